// Threads and their memory.

#include "simd.h"

#include <pthread.h>
#include <stdlib.h>

typedef void (*StartTeam)(LongtakeTask task, void* argument, unsigned num_threads, unsigned flags);

#ifdef __SANITIZE_ADDRESS__
extern "C" void __asan_unpoison_memory_region(const volatile void* address, size_t size);
#endif

namespace {

StartTeam start_team = nullptr;

// Newly mapped pages cost more time than the arithmetic on them, so every thread keeps its memory.
struct Memory {
    void* memory = nullptr;
    size_t num_bytes = 0;
    ~Memory() { free(memory); }
};
thread_local Memory scratch;

struct Call {
    LongtakeTask task;
    void* argument;
};

void* run(void* call) {
    ((Call*)call)->task(((Call*)call)->argument);
    return nullptr;
}

}  // namespace

// The OpenMP runtime that torch uses has the entry point GOMP_parallel. Using its threads instead of
// additional ones avoids that two sets of waiting threads compete for the same cores.
LONGTAKE_EXPORT void longtake_use_team(void* gomp_parallel) { start_team = (StartTeam)gomp_parallel; }

extern "C" void longtake_parallel(LongtakeTask task, void* argument, int num_threads) {
    if (num_threads <= 1) return task(argument);
    if (start_team) return start_team(task, argument, (unsigned)num_threads, 0);
    Call call = {task, argument};
    pthread_t* threads = new pthread_t[num_threads];
    int started = 0;
    // The task distributes its work itself, so a thread that cannot be started is not needed.
    while (started < num_threads - 1 && pthread_create(&threads[started], nullptr, run, &call) == 0) started++;
    task(argument);
    while (started > 0) pthread_join(threads[--started], nullptr);
    delete[] threads;
}

extern "C" void* longtake_scratch(size_t num_bytes) {
    if (num_bytes > scratch.num_bytes) {
        free(scratch.memory);
        scratch.num_bytes = 0;
        if (posix_memalign(&scratch.memory, 64, num_bytes)) abort();
        scratch.num_bytes = num_bytes;
    }
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(scratch.memory, scratch.num_bytes);
#endif
    return scratch.memory;
}
