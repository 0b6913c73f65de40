// The linear maps between images and tiles of which Winograd's convolutions consist (ops/winograd.py).

#include "simd.h"

extern "C" {
// Mirrored in winograd.py. Plane (n, c, t) of height x width begins at n * image_strides[0] + c * image_strides[1] +
// t * height * width. Its tile (y, x) begins at row y * step_y - pad_y and column x * step_x - pad_x, and the values
// of a point at n * point_strides[0] + c * point_strides[1] + t * tiles_y * tiles_x of that point's memory.
struct LongtakeTiles {
    int64_t batch, channels, frames, height, width;
    int64_t tiles_y, tiles_x, step_y, step_x, pad_y, pad_x;
    int64_t overlap;  // whether tiles to read are two pixels larger than their step
    int64_t image_strides[2], point_strides[2];
    float matrix_y[64], matrix_x[64];
};
}

namespace {

constexpr int W = Simd<float>::W;
constexpr int EXTRA = 2;  // points of a tile beyond its outputs, for kernels of 3 taps
constexpr int LARGEST = 4;
typedef Vec<float> V;

INLINE V load_some(const float* p, int64_t n) {
    if (n >= W) return load<float>(p);
    float values[W] = {};
    for (int64_t i = 0; i < n; i++) values[i] = p[i];
    return load<float>(values);
}

INLINE void store_some(float* p, V v, int64_t n) {
    if (n >= W) return store<float>(p, v);
    float values[W];
    store<float>(values, v);
    for (int64_t i = 0; i < n; i++) p[i] = values[i];
}

template <int N>
INLINE V product(const float* factors, const V* values) {
    V sum = factors[0] * values[0];
    UNROLL for (int i = 1; i < N; i++) sum += factors[i] * values[i];
    return sum;
}

class Tiling {
    const LongtakeTiles& job;
    const float* const image;
    float* const pixels;
    float* const* const points;
    const int64_t tiles, lines;
    const int64_t row;  // elements of a row of tiles in scratch memory
    int64_t next = 0;

   public:
    Tiling(const LongtakeTiles& job, const float* image, float* pixels, float* const* points)
        : job(job),
          image(image),
          pixels(pixels),
          points(points),
          tiles(job.tiles_y * job.tiles_x),
          lines(job.tiles_y * job.step_y + EXTRA),
          row((job.tiles_x + EXTRA + 2 * W - 1) / W * W) {}

    static void run(void* self) {
        Tiling& tiling = *(Tiling*)self;
        switch (tiling.job.step_y) {
            case 2: return tiling.planes<2>();
            case 3: return tiling.planes<3>();
            default: return tiling.planes<LARGEST>();
        }
    }

   private:
    template <int MY>
    void planes() {
        switch (job.step_x) {
            case 2: return planes<MY, 2>();
            case 3: return planes<MY, 3>();
            default: return planes<MY, LARGEST>();
        }
    }

    template <int MY, int MX>
    void planes() {
        const int64_t split = lines * MX * row, mixed = (MY + EXTRA) * MX * row;
        Scratch scratch(Scratch::piece(split * sizeof(float)) + Scratch::piece(mixed * sizeof(float)));
        float *phases = scratch.take<float>(split), *rows = scratch.take<float>(mixed);
        // Elements outside of the image are zero, and are not written again.
        memset(phases, 0, split * sizeof(float));
        const int64_t count = job.batch * job.channels * job.frames;
        for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;) {
            int64_t t = i % job.frames, c = i / job.frames % job.channels, n = i / job.frames / job.channels;
            int64_t plane = n * job.image_strides[0] + c * job.image_strides[1] + t * job.height * job.width;
            int64_t at = n * job.point_strides[0] + c * job.point_strides[1] + t * tiles;
            if (pixels)
                write<MY, MX>(at, pixels + plane, rows);
            else if (job.overlap)
                read<MY, MX, MY + EXTRA, MX + EXTRA>(image + plane, at, phases, rows);
            else
                read<MY, MX, MY, MX>(image + plane, at, phases, rows);
        }
    }

    // Splits a row of pixels: column x * MX - pad_x + q becomes element x + q / MX of phase q % MX.
    template <int MX>
    void split(const float* line, float* phases) const {
        for (int64_t q = 0; q < MX; q++) {
            int64_t first = max64(0, ceil_div(job.pad_x - q, MX));  // of the elements inside the image
            int64_t last = min64(row, ceil_div(job.width + job.pad_x - q, MX));
            for (int64_t i = first; i < last; i++) phases[q * row + i] = line[i * MX + q - job.pad_x];
        }
    }

    // Points of the tiles of a plane: matrix_y (MY + 2, SY) times pixels times the transpose of matrix_x (MX + 2, SX).
    template <int MY, int MX, int SY, int SX>
    void read(const float* plane, int64_t at, float* phases, float* rows) const {
        constexpr int PY = MY + EXTRA, PX = MX + EXTRA;
        const int64_t line = MX * row;
        int64_t last = min64(job.height, (job.tiles_y - 1) * MY + SY - job.pad_y);
        for (int64_t y = max64(0, -job.pad_y); y < last; y++)
            split<MX>(plane + y * job.width, phases + (y + job.pad_y) * line);
        for (int64_t y = 0; y < job.tiles_y; y++) {
            const float* top = phases + y * MY * line;
            for (int64_t x = 0; x < line; x += W) {
                V values[SY];
                UNROLL for (int p = 0; p < SY; p++) values[p] = load<float>(top + p * line + x);
                UNROLL for (int i = 0; i < PY; i++)
                    store<float>(rows + i * line + x, product<SY>(job.matrix_y + i * SY, values));
            }
            for (int64_t x = 0; x < job.tiles_x; x += W) {
                int64_t tile = y * job.tiles_x + x;
                for (int64_t i = 0; i < PY; i++) {
                    V values[SX];
                    UNROLL for (int q = 0; q < SX; q++)
                        values[q] = load<float>(rows + i * line + q % MX * row + x + q / MX);
                    // Lanes beyond the end of the row belong to the next one, which is written later.
                    UNROLL for (int j = 0; j < PX; j++)
                        store_some(points[i * PX + j] + at + tile, product<SX>(job.matrix_x + j * SX, values),
                                   tiles - tile);
                }
            }
        }
    }

    // Pixels of the tiles of a plane: matrix_y (MY, MY + 2) times points times the transpose of matrix_x (MX, MX + 2).
    template <int MY, int MX>
    void write(int64_t at, float* plane, float* rows) const {
        constexpr int PY = MY + EXTRA, PX = MX + EXTRA;
        for (int64_t y = 0; y < job.tiles_y; y++) {
            for (int64_t x = 0; x < job.tiles_x; x += W) {
                int64_t tile = y * job.tiles_x + x;
                V sums[MY][PX];
                for (int j = 0; j < PX; j++) {
                    V values[PY];
                    UNROLL for (int p = 0; p < PY; p++)
                        values[p] = load_some(points[p * PX + j] + at + tile, tiles - tile);
                    UNROLL for (int i = 0; i < MY; i++) sums[i][j] = product<PY>(job.matrix_y + i * PY, values);
                }
                for (int i = 0; i < MY; i++)
                    UNROLL for (int k = 0; k < MX; k++)
                        store<float>(rows + (i * MX + k) * row + x, product<PX>(job.matrix_x + k * PX, sums[i]));
            }
            const int64_t top = y * MY - job.pad_y, whole = job.width / MX;
            for (int64_t i = 0; i < min64(MY, job.height - top); i++) {
                float* line = plane + (top + i) * job.width;
                const float* values = rows + i * MX * row;
                for (int64_t x = 0; x < whole; x++)
                    UNROLL for (int k = 0; k < MX; k++) line[x * MX + k] = values[k * row + x];
                for (int64_t k = 0; k < job.width - whole * MX; k++) line[whole * MX + k] = values[k * row + whole];
            }
        }
    }
};

}  // namespace

// Computes the points of an image, or if `pixels` is not null, its pixels of the points.
LONGTAKE_EXPORT void longtake_tiles(const LongtakeTiles* job, const float* image, float* pixels, float* const* points,
                                    int threads) {
    Tiling tiling(*job, image, pixels, points);
    int64_t count = job->batch * job->channels * job->frames;
    longtake_parallel(&Tiling::run, &tiling, (int)min64(threads, count));
}
