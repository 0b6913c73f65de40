// Conversion between rows of several images and rows of vectors whose lanes are pixels of different images.
#pragma once

#include "simd.h"

namespace {

// Access to the memory of tensors, with conversion of elements of `dtype`.
template <class T>
class LaneRows {
    typedef Vec<T> V;
    static constexpr int W = Simd<T>::W;

    const int dtype;
    const bool half;
    const int64_t longest;  // pixels of a row, at most
    T *zeros, *converted;

   public:
    static size_t scratch_bytes(int dtype, int64_t longest) {
        return Scratch::piece(longest * sizeof(T)) + Scratch::piece(dtype >= FLOAT16 ? W * longest * sizeof(T) : 0);
    }

    LaneRows(int dtype, int64_t longest, Scratch* scratch)
        : dtype(dtype), half(dtype >= FLOAT16), longest(longest), zeros(scratch->take<T>(longest)) {
        converted = scratch->take<T>(half ? W * longest : 0);
        memset(zeros, 0, longest * sizeof(T));
    }

    // n pixels of W planes; a null pointer is a plane of zeros.
    void load_planes(V* to, const char* const* from, int64_t n) const {
        const T* rows[W];
        for (int l = 0; l < W; l++) {
            rows[l] = from[l] ? (const T*)from[l] : zeros;
            if (!from[l] || !half) continue;
            rows[l] = converted + l * longest;
            convert_from(converted + l * longest, from[l], n, dtype);
        }
        if (n < W) {
            for (int64_t i = 0; i < n; i++)
                for (int l = 0; l < W; l++) to[i][l] = rows[l][i];
            return;
        }
        for (int64_t i = 0; i < n; i += W) {
            int64_t at = min64(i, n - W);  // the last block overlaps the one before
            V square[W];
            UNROLL for (int l = 0; l < W; l++) square[l] = load<T>(rows[l] + at);
            transpose<T>(square);
            UNROLL for (int l = 0; l < W; l++) to[at + l] = square[l];
        }
    }

    // Into n pixels of those of W planes that are not null.
    void store_planes(char* const* to, const V* from, int64_t n) const {
        T* rows[W];
        for (int l = 0; l < W; l++) rows[l] = half ? converted + l * longest : (T*)to[l];
        if (n < W) {
            for (int l = 0; l < W; l++)
                for (int64_t i = 0; to[l] && i < n; i++) rows[l][i] = from[i][l];
        } else {
            for (int64_t i = 0; i < n; i += W) {
                int64_t at = min64(i, n - W);
                V square[W];
                UNROLL for (int l = 0; l < W; l++) square[l] = from[at + l];
                transpose<T>(square);
                UNROLL for (int l = 0; l < W; l++) {
                    if (to[l]) store<T>(rows[l] + at, square[l]);
                }
            }
        }
        for (int l = 0; l < W; l++)
            if (to[l] && half) convert_to(to[l], rows[l], n, dtype);
    }

    // n pixels of `count` neighbouring channels, `stride` bytes apart.
    void load_pixels(V* to, const char* from, int64_t stride, int64_t n, int count) const {
        T values[W] = {};
        for (int64_t i = 0; i < n; i++, from += stride) {
            if (count < W || half) convert_from(values, from, count, dtype);
            to[i] = load<T>(count < W || half ? values : (const T*)from);
        }
    }

    void store_pixels(char* to, int64_t stride, const V* from, int64_t n, int count) const {
        T values[W];
        for (int64_t i = 0; i < n; i++, to += stride) {
            store<T>(count < W || half ? values : (T*)to, from[i]);
            if (count < W || half) convert_to(to, values, count, dtype);
        }
    }
};

}  // namespace
