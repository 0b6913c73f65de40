// FIR filters with zero insertion and decimation.
//
// On a zero-inserted signal only every up-th tap is multiplied with a sample: output o uses the samples from first(o)
// on and the taps of one of `up` phases. Several outputs are computed together, with their sums in registers; taps, and
// where possible samples, are loaded once for all of them. The filters of the published networks, whose taps and factors
// are constants here, have unrolled code; all others use a loop.
//
// Along y, vectors hold neighbouring columns of rows that are given by pointers. Along x, each lane of a vector is
// another image, and a row is a sequence of vectors.
#pragma once

#include "simd.h"

// Arguments from Python; kernels.py defines the same structures.
extern "C" {
struct LongtakeAxis {
    int64_t size, taps, up, down, pad0, out_size;
};
// Either both 1-D filters are given or the 2-D one [y.taps, x.taps]; all in correlation order, gains included.
struct LongtakeFilter {
    LongtakeAxis x, y;
    const double *taps_x, *taps_y, *taps_2d;
};
}

namespace {

INLINE int64_t modulo(int64_t a, int64_t b) { return (a % b + b) % b; }
inline int64_t gcd(int64_t a, int64_t b) { return b ? gcd(b, a % b) : a; }

// The geometry of one axis: the samples and the taps of each output.
struct Grid {
    int64_t size, taps, up, down, pad0, out_size;
    int64_t period, step;  // outputs `period` apart have the same phase, and samples `step` apart
    int64_t max_count;     // taps of a phase, at most

    explicit Grid(const LongtakeAxis& a)
        : size(a.size), taps(a.taps), up(a.up), down(a.down), pad0(a.pad0), out_size(a.out_size) {
        int64_t common = gcd(up, down);
        period = up / common;
        step = down / common;
        max_count = ceil_div(taps, up);
    }
    int64_t first(int64_t o) const { return ceil_div(o * down - pad0, up); }
    int64_t phase(int64_t o) const { return first(o) * up + pad0 - o * down; }
    int64_t count(int64_t o) const { return ceil_div(taps - phase(o), up); }
    // One past the last sample of outputs .. end - 1.
    int64_t last(int64_t end) const { return first(end - 1) + max_count; }
    bool is_identity() const { return up == 1 && down == 1 && taps == 1 && pad0 == 0 && out_size == size; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Along y: `rows` point to the samples from first(o) on, `out` to rows `stride` elements apart, for `n` (at least W)
// columns.

template <class T>
using KernelY = void (*)(const T* const* rows, T* out, int64_t stride, const Vec<T>* taps, int64_t n);

// All `U` outputs between two samples, B vectors of columns; taps are sorted by phase, K each.
template <class T, int U, int K, int B>
INLINE void up_y_block(const T* const* rows, T* out, int64_t stride, const Vec<T>* taps, int64_t x) {
    Vec<T> sum[U][B] = {};
    UNROLL for (int k = 0; k < K; k++) {
        UNROLL for (int b = 0; b < B; b++) {
            Vec<T> sample = load(rows[k] + x + b * Simd<T>::W);
            UNROLL for (int u = 0; u < U; u++) sum[u][b] += sample * taps[(U - 1 - u) * K + k];
        }
    }
    UNROLL for (int u = 0; u < U; u++) {
        UNROLL for (int b = 0; b < B; b++) store(out + u * stride + x + b * Simd<T>::W, sum[u][b]);
    }
}

template <class T, int U, int K>
void up_y(const T* const* rows, T* out, int64_t stride, const Vec<T>* taps, int64_t n) {
    constexpr int W = Simd<T>::W, B = U == 2 ? 4 : 2;
    int64_t x = 0;
    for (; x + B * W <= n; x += B * W) up_y_block<T, U, K, B>(rows, out, stride, taps, x);
    for (; x + W <= n; x += W) up_y_block<T, U, K, 1>(rows, out, stride, taps, x);
    if (x < n) up_y_block<T, U, K, 1>(rows, out, stride, taps, n - W);
}

constexpr int DOWN_ROWS = 4;  // outputs of a decimating filter that are computed together

template <class T, int S, int K, int B>
INLINE void down_y_block(const T* const* rows, T* out, int64_t stride, const Vec<T>* taps, int64_t x) {
    Vec<T> sum[DOWN_ROWS][B] = {};
    UNROLL for (int i = 0; i < K + (DOWN_ROWS - 1) * S; i++) {
        Vec<T> sample[B];
        UNROLL for (int b = 0; b < B; b++) sample[b] = load(rows[i] + x + b * Simd<T>::W);
        UNROLL for (int o = 0; o < DOWN_ROWS; o++) {
            if (i < o * S || i - o * S >= K) continue;
            UNROLL for (int b = 0; b < B; b++) sum[o][b] += sample[b] * taps[i - o * S];
        }
    }
    UNROLL for (int o = 0; o < DOWN_ROWS; o++) {
        UNROLL for (int b = 0; b < B; b++) store(out + o * stride + x + b * Simd<T>::W, sum[o][b]);
    }
}

template <class T, int S, int K>
void down_y(const T* const* rows, T* out, int64_t stride, const Vec<T>* taps, int64_t n) {
    constexpr int W = Simd<T>::W;
    int64_t x = 0;
    for (; x + 2 * W <= n; x += 2 * W) down_y_block<T, S, K, 2>(rows, out, stride, taps, x);
    for (; x + W <= n; x += W) down_y_block<T, S, K, 1>(rows, out, stride, taps, x);
    if (x < n) down_y_block<T, S, K, 1>(rows, out, stride, taps, n - W);
}

template <class T, int B>
INLINE void any_y_block(const T* const* rows, T* out, const Vec<T>* taps, int64_t count, int64_t x) {
    Vec<T> sum[B] = {};
    for (int64_t k = 0; k < count; k++) {
        Vec<T> tap = taps[k];
        const T* row = rows[k] + x;
        UNROLL for (int b = 0; b < B; b++) sum[b] += load(row + b * Simd<T>::W) * tap;
    }
    UNROLL for (int b = 0; b < B; b++) store(out + x + b * Simd<T>::W, sum[b]);
}

// One output.
template <class T>
void any_y(const T* const* rows, T* out, const Vec<T>* taps, int64_t count, int64_t n) {
    constexpr int W = Simd<T>::W;
    int64_t x = 0;
    for (; x + 8 * W <= n; x += 8 * W) any_y_block<T, 8>(rows, out, taps, count, x);
    for (; x + W <= n; x += W) any_y_block<T, 1>(rows, out, taps, count, x);
    if (x < n) any_y_block<T, 1>(rows, out, taps, count, n - W);
}

// ---------------------------------------------------------------------------------------------------------------------
// Along x.

// `n` times all `U` outputs between two samples.
template <class T>
using KernelX = void (*)(const Vec<T>* in, Vec<T>* out, const Vec<T>* taps, int64_t n);

template <class T, int U, int K, int B>
INLINE void up_x_block(const Vec<T>* in, Vec<T>* out, const Vec<T>* taps) {
    Vec<T> sum[U][B] = {};
    UNROLL for (int k = 0; k < K; k++) {
        UNROLL for (int b = 0; b < B; b++) {
            Vec<T> sample = in[b + k];
            UNROLL for (int u = 0; u < U; u++) sum[u][b] += sample * taps[(U - 1 - u) * K + k];
        }
    }
    UNROLL for (int b = 0; b < B; b++) { UNROLL for (int u = 0; u < U; u++) out[b * U + u] = sum[u][b]; }
}

template <class T, int U, int K>
void up_x(const Vec<T>* in, Vec<T>* out, const Vec<T>* taps, int64_t n) {
    constexpr int B = U == 2 ? 4 : 2;
    int64_t i = 0;
    for (; i + B <= n; i += B) up_x_block<T, U, K, B>(in + i, out + i * U, taps);
    for (; i < n; i++) up_x_block<T, U, K, 1>(in + i, out + i * U, taps);
}

// Decimates R rows of `n` outputs, the rows `in_row` and `out_row` vectors apart.
template <class T>
using DownX = void (*)(const Vec<T>* in, int64_t in_row, Vec<T>* out, int64_t out_row, const Vec<T>* taps, int64_t n);

template <class T, int S, int K, int O, int R>
INLINE void down_x_block(const Vec<T>* in, int64_t in_row, Vec<T>* out, int64_t out_row, const Vec<T>* taps) {
    Vec<T> sum[R][O] = {};
    UNROLL for (int i = 0; i < K + (O - 1) * S; i++) {
        Vec<T> sample[R];
        UNROLL for (int r = 0; r < R; r++) sample[r] = in[r * in_row + i];
        UNROLL for (int o = 0; o < O; o++) {
            if (i < o * S || i - o * S >= K) continue;
            UNROLL for (int r = 0; r < R; r++) sum[r][o] += sample[r] * taps[i - o * S];
        }
    }
    UNROLL for (int r = 0; r < R; r++) { UNROLL for (int o = 0; o < O; o++) out[r * out_row + o] = sum[r][o]; }
}

template <class T, int S, int K, int R>
void down_x(const Vec<T>* in, int64_t in_row, Vec<T>* out, int64_t out_row, const Vec<T>* taps, int64_t n) {
    constexpr int O = 8 / R;
    int64_t i = 0;
    for (; i + O <= n; i += O) down_x_block<T, S, K, O, R>(in + i * S, in_row, out + i, out_row, taps);
    for (; i < n; i++) down_x_block<T, S, K, 1, R>(in + i * S, in_row, out + i, out_row, taps);
}

// Outputs of one phase, `out_step` vectors apart, from samples `step` apart (S, if that is known when compiling).
template <class T, int B, int S>
INLINE void any_x_block(const Vec<T>* in, int64_t step, Vec<T>* out, int64_t out_step, const Vec<T>* taps,
                        int64_t count) {
    if (S) step = S;
    Vec<T> sum[B] = {};
    for (int64_t k = 0; k < count; k++) {
        Vec<T> tap = taps[k];
        UNROLL for (int b = 0; b < B; b++) sum[b] += in[b * step + k] * tap;
    }
    UNROLL for (int b = 0; b < B; b++) out[b * out_step] = sum[b];
}

template <class T, int S>
void any_x(const Vec<T>* in, int64_t step, Vec<T>* out, int64_t out_step, const Vec<T>* taps, int64_t count,
           int64_t n) {
    if (S) step = S;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) any_x_block<T, 8, S>(in + i * step, step, out + i * out_step, out_step, taps, count);
    for (; i + 2 <= n; i += 2) any_x_block<T, 2, S>(in + i * step, step, out + i * out_step, out_step, taps, count);
    if (i < n) any_x_block<T, 1, S>(in + i * step, step, out + i * out_step, out_step, taps, count);
}

// ---------------------------------------------------------------------------------------------------------------------

// A filter of both axes, its taps as vectors sorted by phase, and the unrolled code for it if there is any.
template <class T>
class Fir {
    typedef Vec<T> V;

   public:
    Grid x, y;
    bool is_2d;
    int64_t group_y;  // rows that are best computed together; a group starts where phase(row) == y.up - 1

    static int64_t table_size(const LongtakeFilter& f) {
        Grid x(f.x), y(f.y);
        int64_t size_x = x.up * x.max_count, size_y = y.up * y.max_count;
        return f.taps_2d ? size_x * size_y : size_x + size_y;
    }

    Fir(const LongtakeFilter& f, V* memory) : x(f.x), y(f.y), is_2d(f.taps_2d), group_y(1), table_x(memory) {
        if (is_2d) {
            sort_2d(f.taps_2d, memory);
        } else {
            sort(x, f.taps_x, memory);
            table_y = memory += x.up * x.max_count;
            sort(y, f.taps_y, memory);
            if constexpr (sizeof(T) == 4) choose();  // double precision, used in tests, has loops only
        }
    }
    bool is_identity_x() const { return !is_2d && x.is_identity() && table_x[0][0] == 1; }
    bool is_identity_y() const { return !is_2d && y.is_identity() && table_y[0][0] == 1; }

    // Outputs begin .. end - 1 into out[0 ..] from samples of which in[0] is the one of number `in_begin`.
    void filter_x(V* out, int64_t begin, int64_t end, const V* in, int64_t in_begin) const {
        int64_t o = begin;
        if (kernel_x) {
            int64_t whole = begin + modulo(x.phase(begin) + 1, x.up), n = (end - whole) / x.up;
            if (n > 0) {
                phases_x(out, begin, whole, in, in_begin);
                kernel_x(in + x.first(whole) - in_begin, out + (whole - begin), table_x, n);
                o = whole + n * x.up;
            }
        }
        if (down_x_1)
            down_x_1(in + x.first(o) - in_begin, 0, out, 0, table_x, end - o);
        else
            phases_x(out + (o - begin), o, end, in, in_begin);
    }

    // The same for two rows, `in_row` and `out_row` vectors apart: taps are loaded once for both.
    void filter_x_twice(V* out, int64_t out_row, int64_t begin, int64_t end, const V* in, int64_t in_row,
                        int64_t in_begin) const {
        if (down_x_2) return down_x_2(in + x.first(begin) - in_begin, in_row, out, out_row, table_x, end - begin);
        filter_x(out, begin, end, in, in_begin);
        filter_x(out + out_row, begin, end, in + in_row, in_begin);
    }

    // Rows begin .. end - 1 into out, `stride` elements apart; rows[0] is the sample of number first(begin).
    void filter_y(T* out, int64_t stride, int64_t begin, int64_t end, const T* const* rows, int64_t n) const {
        for (int64_t o = begin, first = y.first(begin); o < end; out += stride) {
            const T* const* from = rows + (y.first(o) - first);
            if (kernel_y && o + group_y <= end && y.phase(o) == y.up - 1) {
                kernel_y(from, out, stride, table_y, n);
                o += group_y, out += (group_y - 1) * stride;
            } else {
                any_y<T>(from, out, table_y + y.phase(o) * y.max_count, y.count(o), n);
                o++;
            }
        }
    }

    // Outputs begin .. end - 1 of row `o` into out; rows[0] is the sample of number first(o) along y.
    void filter_2d(V* out, int64_t o, int64_t begin, int64_t end, const T* const* rows, int64_t in_begin) const {
        const V* taps = table_x + y.phase(o) * x.up * y.max_count * x.max_count;
        for (int64_t i = begin; i < end; i++) {
            const V* row_taps = taps + x.phase(i) * y.max_count * x.max_count;
            V sum = {};
            for (int64_t ky = 0; ky < y.count(o); ky++, row_taps += x.max_count) {
                const V* in = (const V*)rows[ky] + (x.first(i) - in_begin);
                for (int64_t kx = 0; kx < x.count(i); kx++) sum += in[kx] * row_taps[kx];
            }
            out[i - begin] = sum;
        }
    }

   private:
    const V *table_x, *table_y = nullptr;
    KernelX<T> kernel_x = nullptr;
    DownX<T> down_x_1 = nullptr, down_x_2 = nullptr;
    KernelY<T> kernel_y = nullptr;

    static void sort(const Grid& grid, const double* taps, V* memory) {
        for (int64_t phase = 0; phase < grid.up; phase++)
            for (int64_t t = phase; t < phase + grid.max_count * grid.up; t += grid.up)
                *memory++ = splat<T>(t < grid.taps ? (T)taps[t] : 0);
    }

    void sort_2d(const double* taps, V* memory) {
        for (int64_t py = 0; py < y.up; py++)
            for (int64_t px = 0; px < x.up; px++)
                for (int64_t ty = py; ty < py + y.max_count * y.up; ty += y.up)
                    for (int64_t tx = px; tx < px + x.max_count * x.up; tx += x.up)
                        *memory++ = splat<T>(ty < y.taps && tx < x.taps ? (T)taps[ty * x.taps + tx] : 0);
    }

    static bool is(const Grid& grid, int64_t up, int64_t down, int64_t taps) {
        return grid.up == up && grid.down == down && grid.taps == taps;
    }

    void choose() {
        // Kaiser windows of six samples, [1, 3, 3, 1] and the triangular filters of the discriminators' up-sampling.
        if (is(x, 2, 1, 12)) kernel_x = up_x<T, 2, 6>;
        if (is(x, 4, 1, 24)) kernel_x = up_x<T, 4, 6>;
        if (is(x, 2, 1, 4)) kernel_x = up_x<T, 2, 2>;
        if (is(x, 4, 1, 8)) kernel_x = up_x<T, 4, 2>;
        if (is(x, 1, 1, 4)) down_x_1 = down_x<T, 1, 4, 1>, down_x_2 = down_x<T, 1, 4, 2>;
        if (is(x, 1, 2, 4)) down_x_1 = down_x<T, 2, 4, 1>, down_x_2 = down_x<T, 2, 4, 2>;
        if (is(x, 1, 2, 12)) down_x_1 = down_x<T, 2, 12, 1>, down_x_2 = down_x<T, 2, 12, 2>;
        if (is(x, 1, 4, 8)) down_x_1 = down_x<T, 4, 8, 1>, down_x_2 = down_x<T, 4, 8, 2>;
        if (is(x, 1, 4, 24)) down_x_1 = down_x<T, 4, 24, 1>, down_x_2 = down_x<T, 4, 24, 2>;
        if (is(y, 2, 1, 12)) kernel_y = up_y<T, 2, 6>;
        if (is(y, 4, 1, 24)) kernel_y = up_y<T, 4, 6>;
        if (is(y, 2, 1, 4)) kernel_y = up_y<T, 2, 2>;
        if (is(y, 4, 1, 8)) kernel_y = up_y<T, 4, 2>;
        if (is(y, 1, 1, 4)) kernel_y = down_y<T, 1, 4>;
        if (is(y, 1, 2, 4)) kernel_y = down_y<T, 2, 4>;
        if (is(y, 1, 2, 12)) kernel_y = down_y<T, 2, 12>;
        if (is(y, 1, 4, 8)) kernel_y = down_y<T, 4, 8>;
        if (is(y, 1, 4, 24)) kernel_y = down_y<T, 4, 24>;
        if (kernel_y) group_y = y.up > 1 ? y.up : DOWN_ROWS;
    }

    void phases_x(V* out, int64_t begin, int64_t end, const V* in, int64_t in_begin) const {
        for (int64_t o = begin; o < min64(begin + x.period, end); o++) {
            const V *from = in + (x.first(o) - in_begin), *taps = table_x + x.phase(o) * x.max_count;
            int64_t n = ceil_div(end - o, x.period), count = x.count(o);
            V* to = out + (o - begin);
            if (x.step == 1)
                any_x<T, 1>(from, 1, to, x.period, taps, count, n);
            else if (x.step == 2)
                any_x<T, 2>(from, 2, to, x.period, taps, count, n);
            else if (x.step == 4)
                any_x<T, 4>(from, 4, to, x.period, taps, count, n);
            else
                any_x<T, 0>(from, x.step, to, x.period, taps, count, n);
        }
    }
};

}  // namespace
