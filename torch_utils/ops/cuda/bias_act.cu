// Bias, activation, gain and clamp of a dense tensor, and its first and second derivative with respect to the input.
//
// Limited by memory bandwidth: every thread moves ITEMS vectors of 16 bytes, and issues all loads before the first use.
// Macros beside those of common.cuh:
//   ACT     activation, one of the names below          ORDER   derivative: 0, 1 or 2
//   CLAMP   1 if there is one                           SAVED   1 if the derivative is computed from the output
//   VECTOR  elements of a vector; 1 if unaligned        ITEMS, THREADS
//   BIAS    0: none. 1: one channel a vector. 2: consecutive channels, aligned as vectors. 3: anything else.

#include "common.cuh"

#define LINEAR 1
#define RELU 2
#define LRELU 3
#define TANH 4
#define SIGMOID 5
#define ELU 6
#define SELU 7
#define SOFTPLUS 8
#define SWISH 9

#define SELU_SCALE 1.0507009873554805f
#define SELU_ALPHA 1.6732632423543772f

// Division by a number that is known before the launch: (n * multiplier) >> (word + shift) with a word of 32 or 64 bits,
// exact for 0 <= n < 2^31 (2^48 with 64-bit indices) and numbers from 2.
struct Divisor {
    unsigned long long multiplier;
    long long value;
    int shift;
    int unused;
};

struct Params {
    const Element* x;      // ORDER 0: the input. Else: the saved output or input.
    const Element* b;
    const Element* dy;     // ORDER 1, 2
    const Element* ddx;    // ORDER 2
    Element* y;            // the result
    long long size;
    Divisor inner;         // elements in a row that share a channel
    Divisor channels;
    float alpha, gain, clamp;
    int unused;
};

typedef Vector<Element, VECTOR> Pack;

__device__ inline Index divide(Index n, const Divisor& divisor)
{
    if (divisor.value == 1) return n;
#if INDEX_64
    return (Index)(__umul64hi((unsigned long long)n, divisor.multiplier) >> divisor.shift);
#else
    return (Index)(__umulhi((unsigned)n, (unsigned)divisor.multiplier) >> divisor.shift);
#endif
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Comparisons are written so that NaN takes the branch that keeps it.
__device__ inline float activate(float x, float alpha)
{
    if (ACT == RELU) return x < 0 ? 0.0f : x;
    if (ACT == LRELU) return x > 0 ? x : x * alpha;
    if (ACT == TANH) return tanhf(x);
    if (ACT == SIGMOID) return sigmoid(x);
    if (ACT == ELU) return x > 0 ? x : expm1f(x);
    if (ACT == SELU) return SELU_SCALE * (x > 0 ? x : SELU_ALPHA * expm1f(x));
    if (ACT == SOFTPLUS) return (x > 0 ? x : 0.0f) + log1pf(expf(-fabsf(x)));
    if (ACT == SWISH) return x * sigmoid(x);
    return x;
}

// First derivative at x, of the smooth activations.
__device__ inline float slope(float x)
{
    if (ACT == TANH) {
        const float y = tanhf(x);
        return 1.0f - y * y;
    }
    const float s = sigmoid(x);
    if (ACT == SIGMOID) return s * (1.0f - s);
    if (ACT == ELU) return x > 0 ? 1.0f : expf(x);
    if (ACT == SELU) return SELU_SCALE * (x > 0 ? 1.0f : SELU_ALPHA * expf(x));
    if (ACT == SOFTPLUS) return s;
    return s * (1.0f + x * (1.0f - s));  // SWISH
}

// Second derivative at x, of the smooth activations.
__device__ inline float curvature(float x)
{
    if (ACT == TANH) {
        const float y = tanhf(x);
        return -2.0f * y * (1.0f - y * y);
    }
    const float s = sigmoid(x);
    if (ACT == SIGMOID) return s * (1.0f - s) * (1.0f - 2.0f * s);
    if (ACT == ELU) return x > 0 ? 0.0f : expf(x);
    if (ACT == SELU) return x > 0 ? 0.0f : SELU_SCALE * SELU_ALPHA * expf(x);
    if (ACT == SOFTPLUS) return s * (1.0f - s);
    return s * (1.0f - s) * (2.0f + x * (1.0f - 2.0f * s));  // SWISH
}

__device__ inline float compute(const Params& p, float x, float b, float dy, float ddx)
{
    if (ORDER == 0) {
        const float y = activate(x + b, p.alpha) * p.gain;
        return CLAMP ? clamp_keeping_nan(y, p.clamp) : y;
    }
    if (SAVED) {
        // x is the output here: its sign times that of the gain is the sign of the activation's input.
        const bool positive = p.gain < 0 ? x < 0 : x > 0;
        float scale = p.gain;
        if (ACT == RELU) scale = positive ? scale : 0.0f;
        if (ACT == LRELU) scale = positive ? scale : scale * p.alpha;
        return CLAMP && !(fabsf(x) < p.clamp) ? 0.0f : dy * scale;
    }
    x += b;
    const bool clamped = CLAMP && !(fabsf(activate(x, p.alpha) * p.gain) <= p.clamp);
    const float scale = ORDER == 1 ? slope(x) : ddx * curvature(x);
    return clamped ? 0.0f : dy * p.gain * scale;
}

// The biases of VECTOR consecutive elements from `start`.
__device__ inline void load_bias(const Params& p, Index start, float* bias)
{
    if (BIAS == 0) {
#pragma unroll
        for (int i = 0; i < VECTOR; i++) bias[i] = 0;
        return;
    }
    Index channel = divide(start, p.inner);
    Index position = start - channel * (Index)p.inner.value;
    if (BIAS == 2) {  // inner is 1: the channel depends on the position only
        channel = start - divide(start, p.channels) * (Index)p.channels.value;
        const Pack pack = *(const Pack*)(p.b + channel);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) bias[i] = to_float(pack.items[i]);
        return;
    }
    channel -= divide(channel, p.channels) * (Index)p.channels.value;
    float value = to_float(p.b[channel]);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
        bias[i] = value;
        if (BIAS == 3 && i + 1 < VECTOR && ++position == p.inner.value) {
            position = 0;
            channel = channel + 1 == p.channels.value ? 0 : channel + 1;
            value = to_float(p.b[channel]);
        }
    }
}

// Elements beyond the end of the tensor are not written.
__device__ inline Pack load(const Element* from, Index start, long long size)
{
    Pack pack = {};
    if (start + VECTOR <= size) return *(const Pack*)(from + start);
    for (int i = 0; i < VECTOR; i++)
        if (start + i < size) pack.items[i] = from[start + i];
    return pack;
}

extern "C" __global__ void __launch_bounds__(THREADS) bias_act(const Params p)
{
    const Index first = ((Index)blockIdx.x * (THREADS * ITEMS) + threadIdx.x) * VECTOR;
    Pack x[ITEMS], dy[ITEMS], ddx[ITEMS];
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const Index start = first + (Index)item * (THREADS * VECTOR);
        if (start >= p.size) continue;
        x[item] = load(p.x, start, p.size);
        if (ORDER >= 1) dy[item] = load(p.dy, start, p.size);
        if (ORDER >= 2) ddx[item] = load(p.ddx, start, p.size);
    }
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
        const Index start = first + (Index)item * (THREADS * VECTOR);
        if (start >= p.size) continue;
        float bias[VECTOR];
        load_bias(p, start, bias);
        Pack y;
#pragma unroll
        for (int i = 0; i < VECTOR; i++) {
            const float dy_value = ORDER >= 1 ? to_float(dy[item].items[i]) : 0.0f;
            const float ddx_value = ORDER >= 2 ? to_float(ddx[item].items[i]) : 0.0f;
            y.items[i] = from_float(compute(p, to_float(x[item].items[i]), bias[i], dy_value, ddx_value));
        }
        if (start + VECTOR <= p.size) {
            *(Pack*)(p.y + start) = y;
        } else {
            for (int i = 0; i < VECTOR; i++)
                if (start + i < p.size) p.y[start + i] = y.items[i];
        }
    }
}
