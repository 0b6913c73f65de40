// Bias, activation, gain and clamp in one pass, and the first and second derivative.

#include "simd.h"

extern "C" {
// Mirrored in kernels.py. Element i of the dense memory of x belongs to bias i / inner % num_biases.
struct LongtakeBiasAct {
    int64_t num_elements, num_biases, inner;
    double alpha, gain, clamp;  // infinity for no clamp
    int32_t act, dtype;
};
}

namespace {

enum Act { LINEAR, RELU, LRELU, TANH, SIGMOID, ELU, SELU, SOFTPLUS, SWISH };

constexpr double SELU_SCALE = 1.0507009873554805, SELU_ALPHA = 1.6732632423543772;
constexpr double SOFTPLUS_LINEAR = 20;    // from here on torch's softplus is the identity
constexpr int64_t CHUNK = 1 << 14;        // elements that a thread takes at a time
constexpr int64_t SHORT_RUN = 64;         // shorter runs of one bias are expanded to a period of
constexpr int64_t BIAS_PERIOD = 1 << 10;  // at least so many elements

// ---------------------------------------------------------------------------------------------------------------------
// Exponentials of vectors, accurate to a few units in the last place; NaN stays NaN.

template <class T>
struct Exp {
    typedef Vec<T> V;
    typedef typename Simd<T>::I I;
    static constexpr bool wide = sizeof(T) == 8;

    // x = n ln 2 + r with |r| <= ln 2 / 2; returns exp(r) - 1.
    static INLINE V reduce(V x, V* n) {
        const T magic = wide ? (T)0x1.8p52 : (T)0x1.8p23f;  // pushes the fraction out of the mantissa
        *n = (x * (T)1.4426950408889634 + magic) - magic;
        V r = x - *n * (wide ? (T)0x1.62e42feep-1 : (T)0x1.62e4p-1f);
        r = r - *n * (wide ? (T)0x1.a39ef35793c76p-33 : (T)0x1.7f7d1cp-20f);
        V sum = splat<T>(wide ? (T)(1 / 6227020800.0) : (T)(1 / 40320.0));
        constexpr double inverse[] = {1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0, 1 / 40320.0,
                                      1 / 5040.0,      1 / 720.0,      1 / 120.0,     1 / 24.0,     1 / 6.0};
        for (int i = wide ? 0 : 5; i < 10; i++) sum = sum * r + (T)inverse[i];
        return r + r * r * (sum * r + (T)0.5);
    }

    // 2^n for whole n in the range of normal numbers.
    static INLINE V power(V n) {
        constexpr int bits = Simd<T>::mantissa_bits, bias = wide ? 1023 : 127;
        return (V)((__builtin_convertvector(n, I) + bias) << bits);
    }

    static INLINE V exp(V x) {
        const T low = wide ? (T)-746 : (T)-104, high = wide ? (T)710 : (T)89;
        x = x < low ? splat(low) : x;
        x = x > high ? splat(high) : x;
        V n, r = reduce(x, &n), half = n * (T)0.5;
        half = (half + (wide ? (T)0x1.8p52 : (T)0x1.8p23f)) - (wide ? (T)0x1.8p52 : (T)0x1.8p23f);
        return (r + 1) * power(half) * power(n - half);
    }

    // exp(x) - 1 for x <= 0.
    static INLINE V expm1_negative(V x) {
        x = x < -60 ? splat((T)-60) : x;
        V n, r = reduce(x, &n), scale = power(n);
        return r * scale + (scale - 1);
    }

    // log(1 + x) for 0 <= x <= 1, as 2 artanh(x / (2 + x)).
    static INLINE V log1p_unit(V x) {
        V s = x / (x + 2), square = s * s, sum = splat((T)(1.0 / (wide ? 35 : 17)));
        for (int k = wide ? 33 : 15; k > 0; k -= 2) sum = sum * square + (T)(1.0 / k);
        return 2 * s * sum;
    }

    static INLINE V magnitude(V x) { return x < 0 ? -x : x; }
    static INLINE V sigmoid(V x) { return 1 / (exp(-x) + 1); }
    static INLINE V tanh(V x) {
        V e = expm1_negative(-2 * magnitude(x)), t = -e / (e + 2);
        return x < 0 ? -t : t;
    }
};

// The activation (order 0) and its derivatives at u.
template <class T, int act, int order>
INLINE Vec<T> activation(Vec<T> u, T alpha) {
    typedef Vec<T> V;
    typedef Exp<T> E;
    if (act == LINEAR) return u;
    if (act == RELU) return u < 0 ? V{} : u;
    if (act == LRELU) return u > 0 ? u : u * alpha;
    if (act == TANH) {
        V t = E::tanh(u), slope = 1 - t * t;
        return order == 0 ? t : order == 1 ? slope : -2 * t * slope;
    }
    if (act == ELU || act == SELU) {
        const T scale = act == SELU ? (T)SELU_SCALE : 1, bend = act == SELU ? (T)(SELU_SCALE * SELU_ALPHA) : 1;
        V e = E::expm1_negative(u > 0 ? V{} : u);
        if (order == 0) return u > 0 ? u * scale : e * bend;
        return u > 0 ? splat(order == 1 ? scale : (T)0) : (e + 1) * bend;
    }
    if (act == SOFTPLUS && order == 0) {
        V soft = (u < 0 ? V{} : u) + E::log1p_unit(E::exp(-E::magnitude(u)));
        return u > (T)SOFTPLUS_LINEAR ? u : soft;
    }
    V s = E::sigmoid(u), slope = s * (1 - s);
    if (act == SOFTPLUS) {
        V derivative = order == 1 ? s : slope;
        return u > (T)SOFTPLUS_LINEAR ? splat(order == 1 ? (T)1 : (T)0) : derivative;
    }
    if (act == SIGMOID) return order == 0 ? s : order == 1 ? slope : slope * (1 - 2 * s);
    return order == 0 ? u * s : order == 1 ? s + u * slope : slope * (2 + u * (1 - 2 * s));  // swish
}

// ---------------------------------------------------------------------------------------------------------------------
// One pass over the elements.

// n elements, a multiple of W; `bias` is W times the same value or, if each element has its own, as many. `x` is the
// input or, for the gradient of piecewise linear activations, the output.
template <class T, int act, int order>
void compute(const LongtakeBiasAct& job, const T* x, const T* dy, const T* ddx, T* y, int64_t n, const T* bias,
             bool each) {
    typedef Vec<T> V;
    const V gain = splat((T)job.gain), limit = splat((T)job.clamp);
    const T alpha = (T)job.alpha;
    const bool clamps = job.clamp < __builtin_inf();
    const V sign = splat(job.gain < 0 ? (T)-1 : (T)1);
    const int64_t step = each;
    for (int64_t i = 0; i < n; i += Simd<T>::W) {
        V u = load(x + i), v;
        if (order == 0) {
            v = activation<T, act, 0>(u + load(bias + i * step), alpha) * gain;
            v = limit < v ? limit : v;  // written so that NaN stays NaN
            v = v < -limit ? -limit : v;
        } else if (act == LINEAR || act == RELU || act == LRELU) {
            v = load(dy + i) * gain;
            if (act != LINEAR) v = u * sign > 0 ? v : act == RELU ? V{} : v * alpha;
            if (clamps) v = Exp<T>::magnitude(u) < limit ? v : V{};
        } else {
            u += load(bias + i * step);
            v = load(dy + i) * gain * activation<T, act, order>(u, alpha);
            if (order == 2) v *= load(ddx + i);
            if (clamps) v = Exp<T>::magnitude(activation<T, act, 0>(u, alpha) * gain) <= limit ? v : V{};
        }
        store(y + i, v);
    }
}

template <class T>
using Compute = void (*)(const LongtakeBiasAct& job, const T* x, const T* dy, const T* ddx, T* y, int64_t n,
                         const T* bias, bool each);

template <class T, int act>
Compute<T> choose(int order) {
    // The second derivative of piecewise linear activations is not used.
    constexpr bool bends = act != LINEAR && act != RELU && act != LRELU;
    return order == 0 ? compute<T, act, 0> : order == 1 ? compute<T, act, 1> : compute < T, act, bends ? 2 : 1 > ;
}

template <class T>
Compute<T> choose(int act, int order) {
    switch (act) {
        case LINEAR: return choose<T, LINEAR>(order);
        case RELU: return choose<T, RELU>(order);
        case LRELU: return choose<T, LRELU>(order);
        case TANH: return choose<T, TANH>(order);
        case SIGMOID: return choose<T, SIGMOID>(order);
        case ELU: return choose<T, ELU>(order);
        case SELU: return choose<T, SELU>(order);
        case SOFTPLUS: return choose<T, SOFTPLUS>(order);
        default: return choose<T, SWISH>(order);
    }
}

template <class T>
class Pass {
    static constexpr int W = Simd<T>::W;

    const LongtakeBiasAct& job;
    const char* const inputs[3];  // x, dy, ddx: as many as the order of the derivative needs
    char* const output;
    const int order;
    const Compute<T> compute;
    T *biases, *written_out = nullptr;  // written_out: a period with one bias per element
    int64_t inner, period = 0, next = 0;

   public:
    Pass(const LongtakeBiasAct& job, const void* x, const void* b, const void* dy, const void* ddx, void* y, int order)
        : job(job),
          inputs{(const char*)x, (const char*)dy, (const char*)ddx},
          output((char*)y),
          order(order),
          compute(choose<T>(job.act, order)),
          inner(b ? job.inner : job.num_elements) {
        int64_t n = b ? job.num_biases : 1, once = n * inner;
        if (inner < SHORT_RUN) period = once * ceil_div(BIAS_PERIOD, once);
        biases = new T[n + period]();
        if (b) convert_from(biases, b, n, job.dtype);
        if (period) written_out = biases + n;
        for (int64_t i = 0; i < period; i++) written_out[i] = biases[i / inner % n];
    }
    ~Pass() { delete[] biases; }

    static void run(void* self) {
        Pass& pass = *(Pass*)self;
        for (int64_t begin; (begin = __atomic_fetch_add(&pass.next, CHUNK, __ATOMIC_RELAXED)) < pass.job.num_elements;)
            pass.work(begin, min64(CHUNK, pass.job.num_elements - begin));
    }

   private:
    void work(int64_t begin, int64_t n) const {
        const int64_t item = element_size(job.dtype);
        const T* from[3] = {};
        T* to = (T*)(output + begin * item);
        bool half = job.dtype >= FLOAT16;
        T* converted = half ? Scratch(Scratch::piece(4 * CHUNK * sizeof(T))).take<T>(4 * CHUNK) : nullptr;
        for (int k = 0; k <= order; k++) {
            from[k] = (const T*)(inputs[k] + begin * item);
            if (!converted) continue;
            convert_from(converted + k * CHUNK, from[k], n, job.dtype);
            from[k] = converted + k * CHUNK;
        }
        for (int k = order + 1; k < 3; k++) from[k] = from[0];  // not read
        if (converted) to = converted + 3 * CHUNK;
        for (int64_t i = 0, length; i < n; i += length) {
            int64_t at = begin + i;
            if (period) {
                length = min64(n - i, period - at % period);
                compute_run(from, to, i, length, written_out + at % period, true);
            } else {
                length = min64(n - i, inner - at % inner);
                compute_run(from, to, i, length, biases + at / inner % job.num_biases, false);
            }
        }
        if (converted) convert_to(output + begin * item, to, n, job.dtype);
    }

    void compute_run(const T* const* from, T* to, int64_t i, int64_t n, const T* bias, bool each) const {
        T constant[W], tail[4][W] = {};
        store(constant, splat(*bias));
        int64_t whole = n / W * W, rest = (n - whole) * sizeof(T), end = i + whole;
        compute(job, from[0] + i, from[1] + i, from[2] + i, to + i, whole, each ? bias : constant, each);
        if (!rest) return;
        for (int k = 0; k <= order; k++) memcpy(tail[k], from[k] + end, rest);
        if (each) memcpy(tail[3], bias + whole, rest);
        compute(job, tail[0], tail[1], tail[2], tail[0], W, each ? tail[3] : constant, each);
        memcpy(to + end, tail[0], rest);
    }
};

template <class T>
void bias_act(const LongtakeBiasAct& job, const void* x, const void* b, const void* dy, const void* ddx, void* y,
              int order, int threads) {
    Pass<T> pass(job, x, b, dy, ddx, y, order);
    longtake_parallel(&Pass<T>::run, &pass, (int)min64(threads, ceil_div(job.num_elements, CHUNK)));
}

}  // namespace

// order 0: y of x. 1: the gradient of x for dy, where x is the output for linear, relu and lrelu. 2: for ddx.
LONGTAKE_EXPORT void longtake_bias_act(const LongtakeBiasAct* job, const void* x, const void* b, const void* dy,
                                       const void* ddx, void* y, int order, int threads) {
    if (job->dtype == FLOAT64)
        bias_act<double>(*job, x, b, dy, ddx, y, order, threads);
    else
        bias_act<float>(*job, x, b, dy, ddx, y, order, threads);
}
