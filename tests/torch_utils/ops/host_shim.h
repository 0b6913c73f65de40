// Lets the CUDA sources of the operators compile and run on a CPU: a block's threads are fibers that take turns between
// barriers, in an order that the caller may shuffle, so a missing barrier shows as a wrong number. Shared memory has
// exactly the size asked for and begins as NaN; compile-time constants are entries of a table (`constants`).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <ucontext.h>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __device__
#define __host__
#define __global__
#define __launch_bounds__(threads)
#define SHARED(type, name, count) type* name = (type*)shim::shared_memory(sizeof(type) * (count))

struct Dim {
    unsigned x;
};
static Dim threadIdx, blockIdx, gridDim;

static int constants[64];

static inline unsigned __float_as_uint(float value)
{
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float __uint_as_float(unsigned bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline float half_to_float(unsigned short bits)
{
    _Float16 value;
    memcpy(&value, &bits, 2);
    return (float)value;
}

static inline unsigned short float_to_half(float value)
{
    const _Float16 half = (_Float16)value;
    unsigned short bits;
    memcpy(&bits, &half, 2);
    return bits;
}

static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }

static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b)
{
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

namespace shim {

const size_t STACK_SIZE = 1 << 18;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool finished;
    void* fake_stack;
};

static ucontext_t scheduler;
static void* scheduler_fake_stack;
static const void* scheduler_stack;
static size_t scheduler_stack_size;
static std::vector<Fiber> fibers;
static Fiber* current;
static std::function<void()> body;
static char* shared;

// Switches between a fiber and the scheduler, telling AddressSanitizer which stack comes next.
static void leave(bool finished)
{
    Fiber* fiber = current;
    fiber->finished = finished;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(finished ? nullptr : &fiber->fake_stack, scheduler_stack, scheduler_stack_size);
#endif
    swapcontext(&fiber->context, &scheduler);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fiber->fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}

static void enter(Fiber& fiber, unsigned thread)
{
    current = &fiber;
    threadIdx.x = thread;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack.data(), fiber.stack.size());
#endif
    swapcontext(&scheduler, &fiber.context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

static void run_fiber()
{
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
    body();
    leave(true);
}

static void* shared_memory(size_t size)
{
    if (!shared) {
        shared = (char*)aligned_alloc(16, (size + 15) / 16 * 16);
        memset(shared, 0xff, size);
    }
    return shared;
}

// Runs one block; returns false if not all of its threads meet at the same barriers.
static bool run_block(unsigned threads, std::mt19937& order)
{
    fibers.resize(threads);
    std::vector<unsigned> turns(threads);
    for (unsigned i = 0; i < threads; i++) {
        turns[i] = i;
        fibers[i].finished = false;
        fibers[i].fake_stack = nullptr;
        fibers[i].stack.resize(STACK_SIZE);
        getcontext(&fibers[i].context);
        fibers[i].context.uc_stack.ss_sp = fibers[i].stack.data();
        fibers[i].context.uc_stack.ss_size = STACK_SIZE;
        fibers[i].context.uc_link = nullptr;
        makecontext(&fibers[i].context, run_fiber, 0);
    }
    for (unsigned finished = 0; finished < threads;) {
        for (unsigned i = threads - 1; i > 0; i--) std::swap(turns[i], turns[order() % (i + 1)]);
        finished = 0;
        for (unsigned i : turns) {
            enter(fibers[i], i);
            finished += fibers[i].finished;
        }
        if (finished != 0 && finished != threads) return false;
    }
    free(shared);
    shared = nullptr;
    return true;
}

}  // namespace shim

static inline void __syncthreads() { shim::leave(false); }

// To be called after the kernel: run_grid<Params, kernel> as a function with C linkage.
#define SHIM_ENTRY(kernel)                                                                                             \
    extern "C" int run(const int* values, int count, unsigned first, unsigned last, unsigned blocks, unsigned threads, \
                       const void* params, unsigned seed)                                                              \
    {                                                                                                                  \
        memcpy(constants, values, sizeof(int) * count);                                                                \
        std::mt19937 order(seed);                                                                                      \
        gridDim.x = blocks;                                                                                            \
        shim::body = [params] { kernel(*(const Params*)params); };                                                     \
        for (blockIdx.x = first; blockIdx.x < last; blockIdx.x++)                                                      \
            if (!shim::run_block(threads, order)) return 1;                                                            \
        return 0;                                                                                                      \
    }
