// Zero insertion, FIR filtering and decimation of images with any filter, one output per thread, for filters that do
// not fit into the registers of upfirdn2d.cu.
//
// Macros beside those of common.cuh: CHANNELS_LAST, FLIP (0: convolve), THREADS.

#include "common.cuh"

struct Params {
    const Element* x;
    Element* y;
    const float* filter;  // taps_y x taps_x, or null for a single tap of 1
    long long size;       // of the output
    int in_h, in_w, out_h, out_w, channels;
    int up_x, up_y, down_x, down_y, pad_x, pad_y, taps_x, taps_y;
    float gain;
};

extern "C" __global__ void __launch_bounds__(THREADS) direct(const Params p)
{
    const long long stride = (long long)gridDim.x * THREADS;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < p.size; i += stride) {
        long long rest = CHANNELS_LAST ? i / p.channels : i;
        const int out_x = (int)(rest % p.out_w);
        rest /= p.out_w;
        const int out_y = (int)(rest % p.out_h);
        const long long plane = rest / p.out_h;
        const long long start = plane * p.in_h * p.in_w * (CHANNELS_LAST ? p.channels : 1);
        const Element* x = p.x + start + (CHANNELS_LAST ? i % p.channels : 0);

        // Tap t multiplies the padded sample out * down + t, which is input i if that minus the padding is up * i.
        const int base_y = out_y * p.down_y - p.pad_y;
        const int base_x = out_x * p.down_x - p.pad_x;
        const int first_y = base_y < 0 ? -base_y : (p.up_y - base_y % p.up_y) % p.up_y;
        const int first_x = base_x < 0 ? -base_x : (p.up_x - base_x % p.up_x) % p.up_x;
        float sum = 0;
        for (int ty = first_y; ty < p.taps_y; ty += p.up_y) {
            const int in_y = (base_y + ty) / p.up_y;
            if (in_y >= p.in_h) break;
            for (int tx = first_x; tx < p.taps_x; tx += p.up_x) {
                const int in_x = (base_x + tx) / p.up_x;
                if (in_x >= p.in_w) break;
                const int t = ty * p.taps_x + tx;
                const float tap = p.filter ? p.filter[FLIP ? t : p.taps_y * p.taps_x - 1 - t] : 1.0f;
                const long long pixel = (long long)in_y * p.in_w + in_x;
                sum = fmaf(tap, to_float(x[pixel * (CHANNELS_LAST ? p.channels : 1)]), sum);
            }
        }
        p.y[i] = from_float(sum * p.gain);
    }
}
