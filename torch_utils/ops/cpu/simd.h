// Vectors of the instruction set that the library is compiled for, and helpers of all CPU kernels.
//
// The compiler's options choose the instruction set; LONGTAKE_VECTOR_BYTES is the length of its vectors.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <utility>

#ifndef LONGTAKE_VECTOR_BYTES
#define LONGTAKE_VECTOR_BYTES 16
#endif

#define LONGTAKE_EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline))
// Loops over registers have to be unrolled, or their arrays would be in memory.
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif

// threads.cpp
extern "C" {
typedef void (*LongtakeTask)(void* argument);
// Runs task(argument) on `num_threads` threads at once, the calling one among them.
void longtake_parallel(LongtakeTask task, void* argument, int num_threads);
// Memory of the calling thread, aligned to 64 bytes, valid until the thread's next call.
void* longtake_scratch(size_t num_bytes);
}

#ifdef __SANITIZE_ADDRESS__
extern "C" void __asan_poison_memory_region(const volatile void* address, size_t size);
#define POISON(address, size) __asan_poison_memory_region(address, size)
constexpr size_t SCRATCH_GAP = 64;
#else
#define POISON(address, size)
constexpr size_t SCRATCH_GAP = 0;
#endif

namespace {

// Allocates pieces of the scratch memory of a thread.
class Scratch {
    char* next;

   public:
    static constexpr size_t piece(size_t num_bytes) { return ((num_bytes + 63) & ~(size_t)63) + SCRATCH_GAP; }
    // `num_bytes` is the sum of the pieces.
    explicit Scratch(size_t num_bytes) : next((char*)longtake_scratch(num_bytes)) {}

    template <class E>
    E* take(int64_t count) {
        char* start = next;
        next += piece(count * sizeof(E));
        POISON(start + count * sizeof(E), next - start - count * sizeof(E));
        return (E*)start;
    }
};

template <class T>
struct Simd;

template <>
struct Simd<float> {
    typedef float V __attribute__((vector_size(LONGTAKE_VECTOR_BYTES)));
    typedef int32_t I __attribute__((vector_size(LONGTAKE_VECTOR_BYTES)));
    typedef uint32_t U __attribute__((vector_size(LONGTAKE_VECTOR_BYTES)));
    typedef int32_t Int;
    static constexpr int W = LONGTAKE_VECTOR_BYTES / 4;
    static constexpr int mantissa_bits = 23;
};

template <>
struct Simd<double> {
    typedef double V __attribute__((vector_size(LONGTAKE_VECTOR_BYTES)));
    typedef int64_t I __attribute__((vector_size(LONGTAKE_VECTOR_BYTES)));
    typedef uint64_t U __attribute__((vector_size(LONGTAKE_VECTOR_BYTES)));
    typedef int64_t Int;
    static constexpr int W = LONGTAKE_VECTOR_BYTES / 8;
    static constexpr int mantissa_bits = 52;
};

template <class T>
using Vec = typename Simd<T>::V;

INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -((-a) / b); }  // b > 0

template <class T>
INLINE Vec<T> splat(T value) {
    Vec<T> v;
    UNROLL for (int i = 0; i < Simd<T>::W; i++) v[i] = value;
    return v;
}

template <class T>
INLINE Vec<T> load(const T* p) {
    Vec<T> v;
    memcpy(&v, p, sizeof v);
    return v;
}

template <class T>
INLINE void store(T* p, Vec<T> v) {
    memcpy(p, &v, sizeof v);
}

// ---------------------------------------------------------------------------------------------------------------------
// Transposition of a square of W vectors: unpacking inside 16-byte blocks, then exchanging larger and larger blocks.

template <class T, class Pick, size_t... J>
INLINE Vec<T> permute(Vec<T> a, Vec<T> b, std::index_sequence<J...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, Pick::template at<Simd<T>::W>(J)...);
#else
    return __builtin_shuffle(a, b, typename Simd<T>::I{Pick::template at<Simd<T>::W>(J)...});
#endif
}

template <class T, class Pick>
INLINE Vec<T> permute(Vec<T> a, Vec<T> b) {
    return permute<T, Pick>(a, b, std::make_index_sequence<Simd<T>::W>());
}

// Interleaves the lower (half 0) or upper (half 1) groups of `unit` elements of each block of 16 bytes.
template <int unit, int block, int half>
struct Unpack {
    template <int W>
    static constexpr int at(int j) {
        int base = j / block * block, group = j % block / unit;
        return base + (group / 2 + half * (block / unit / 2)) * unit + j % unit + (group % 2 ? W : 0);
    }
};

// Joins the blocks of `size` elements with even (odd = 0) or odd numbers of two vectors, alternating between them.
template <int size, int odd>
struct Exchange {
    template <int W>
    static constexpr int at(int j) {
        bool from_b = j & size;
        return from_b ? (odd ? W + j : W + j - size) : (odd ? j + size : j);
    }
};

template <class T, int size>
INLINE void exchange(Vec<T>* r) {
    if constexpr (size < Simd<T>::W) {
        UNROLL for (int i = 0; i < Simd<T>::W; i++) {
            if (i & size) continue;
            Vec<T> a = r[i], b = r[i + size];
            r[i] = permute<T, Exchange<size, 0>>(a, b);
            r[i + size] = permute<T, Exchange<size, 1>>(a, b);
        }
        exchange<T, size * 2>(r);
    }
}

// Element j of vector i becomes element i of vector j.
template <class T>
INLINE void transpose(Vec<T>* r) {
    constexpr int block = 16 / sizeof(T);
    UNROLL for (int i = 0; i < Simd<T>::W; i += 2) {
        Vec<T> a = r[i], b = r[i + 1];
        r[i] = permute<T, Unpack<1, block, 0>>(a, b);
        r[i + 1] = permute<T, Unpack<1, block, 1>>(a, b);
    }
    if constexpr (block == 4) {
        UNROLL for (int i = 0; i < Simd<T>::W; i += 4) {
            Vec<T> a = r[i], b = r[i + 1], c = r[i + 2], d = r[i + 3];
            r[i] = permute<T, Unpack<2, block, 0>>(a, c);
            r[i + 1] = permute<T, Unpack<2, block, 1>>(a, c);
            r[i + 2] = permute<T, Unpack<2, block, 0>>(b, d);
            r[i + 3] = permute<T, Unpack<2, block, 1>>(b, d);
        }
    }
    exchange<T, block>(r);
}

// ---------------------------------------------------------------------------------------------------------------------
// Half precision is converted to float in chunks, in integer arithmetic that compilers vectorise.

enum Dtype { FLOAT32 = 0, FLOAT64 = 1, FLOAT16 = 2, BFLOAT16 = 3 };

INLINE int64_t element_size(int dtype) { return dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : 2; }

INLINE float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    // The exponent is rebiased by a product, which also makes subnormal numbers normal.
    float value = bits_to_float(magnitude << 13) * 0x1p112f;
    uint32_t bits = magnitude >= 0x7c00 ? (magnitude << 13 | 0x7f800000) : float_to_bits(value);
    return bits_to_float(bits | sign);
}

INLINE uint16_t float_to_half(float value) {
    uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    // Below the smallest normal half, the sum with 0.5 leaves the rounded fraction in the lowest bits.
    uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
    uint32_t half = magnitude < 113u << 23 ? subnormal : normal;
    half = magnitude >= 0x477ff000 ? 0x7c00 : half;
    half = magnitude > 0x7f800000 ? 0x7e00 : half;
    return (uint16_t)(half | sign);
}

INLINE float bfloat_to_float(uint16_t value) { return bits_to_float((uint32_t)value << 16); }

INLINE uint16_t float_to_bfloat(float value) {
    uint32_t bits = float_to_bits(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// Converts n elements of a tensor of `dtype` from or to the type of the arithmetic.
template <class T>
void convert_from(T* to, const void* from, int64_t n, int dtype) {
    const uint16_t* half = (const uint16_t*)from;
    if (dtype == FLOAT16) {
        for (int64_t i = 0; i < n; i++) to[i] = half_to_float(half[i]);
    } else if (dtype == BFLOAT16) {
        for (int64_t i = 0; i < n; i++) to[i] = bfloat_to_float(half[i]);
    } else {
        memcpy(to, from, n * sizeof(T));
    }
}

template <class T>
void convert_to(void* to, const T* from, int64_t n, int dtype) {
    uint16_t* half = (uint16_t*)to;
    if (dtype == FLOAT16) {
        for (int64_t i = 0; i < n; i++) half[i] = float_to_half((float)from[i]);
    } else if (dtype == BFLOAT16) {
        for (int64_t i = 0; i < n; i++) half[i] = float_to_bfloat((float)from[i]);
    } else {
        memcpy(to, from, n * sizeof(T));
    }
}

}  // namespace
