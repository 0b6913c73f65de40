// Common code of the kernels: element types, conversions and index arithmetic.
//
// CUDA C++ for NVRTC without any header of a toolkit. Constants of a kernel are macros defined on NVRTC's command line;
// all kernels have: DTYPE (FLOAT32, FLOAT16 or BFLOAT16) and INDEX_64 (1 if an offset needs more than 31
// bits). The tests compile the same text for the host (HOST_SHIM), where most of these macros are variables: arrays are
// then of variable length, and conditions on macros are written with "if".

#define FLOAT32 0
#define FLOAT16 1
#define BFLOAT16 2

#ifdef HOST_SHIM
#include "host_shim.h"
#else
// Shared memory of a size that is set at launch, since more than 48 KB must be requested there.
#define SHARED(type, name, count) extern __shared__ __align__(16) type name[]
#endif

#if INDEX_64
typedef long long Index;
#else
typedef int Index;
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Elements are stored as DTYPE and computed with as float.

#if DTYPE == FLOAT32

typedef float Element;

__device__ inline float to_float(Element value) { return value; }
__device__ inline Element from_float(float value) { return value; }

#else

struct Element {
    unsigned short bits;
};

#if DTYPE == FLOAT16

#ifndef HOST_SHIM
__device__ inline float half_to_float(unsigned short bits)
{
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
    return result;
}

__device__ inline unsigned short float_to_half(float value)
{
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

__device__ inline float to_float(Element value) { return half_to_float(value.bits); }
__device__ inline Element from_float(float value) { return {float_to_half(value)}; }

#elif DTYPE == BFLOAT16

__device__ inline float to_float(Element value) { return __uint_as_float((unsigned)value.bits << 16); }

__device__ inline Element from_float(float value)
{
    Element result;
#if !defined(HOST_SHIM) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
    // To the nearest, ties to even; every NaN stays NaN.
    const unsigned bits = __float_as_uint(value);
    const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    result.bits = (unsigned short)(value != value ? 0x7fffu : rounded);
#endif
    return result;
}

#endif
#endif

// Consecutive elements that move in one instruction.
template <class T, int count> struct alignas(sizeof(T) * count) Vector {
    T items[count];
};

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic.

// Clamps to [-limit, limit] and keeps NaN, which the plain minimum and maximum of the hardware drop.
__device__ inline float clamp_keeping_nan(float value, float limit)
{
#if !defined(HOST_SHIM) && __CUDA_ARCH__ >= 800
    asm("min.NaN.f32 %0, %0, %1;" : "+f"(value) : "f"(limit));
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(value) : "f"(-limit));
    return value;
#else
    value = value > limit ? limit : value;
    return value < -limit ? -limit : value;
#endif
}

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }

// Rounds down for a negative a, too.
__device__ inline int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
