// Two FIR resamplings with an optional operation between them, in one pass over images that stay in the cache.
//
// Images are processed W at a time, one in each lane of the vectors, so that filters need no neighbouring lanes.
// Rows are a stream: rows of the input are transposed into lanes, filtered along y and x, changed in the middle,
// filtered along x and y, and transposed back. Only the rows that a filter along y spans are kept. Wide images are cut
// into tiles of columns; tall images, if there are few, into bands of rows, which become lanes like images of their
// own.

#include <new>

#include "columns.h"
#include "lanes.h"

extern "C" {
// Mirrored in kernels.py. Tensors are dense, N,C,H,W or channels-last; signs are always N,C,H,W.
struct LongtakeResample {
    int64_t batch_size, num_channels;
    LongtakeFilter first, second;
    double gain, slope, clamp;  // of the leaky ReLU between the filters; infinity for no clamp
    int32_t dtype, channels_last, middle;
};
}

namespace {

// The operation between the filters: none, a leaky ReLU, or its derivative from two recorded bits for each element.
enum Middle { NOTHING = 0, LEAKY = 1, SIGNS = 2 };

constexpr int64_t MIDDLE_BYTES = 12 << 10;  // a row between the filters stays in the first-level cache
constexpr int64_t BATCH = 4;                // rows that are filtered along y together
constexpr int64_t COLUMNS = 16;             // vectors of each row that are filtered along y together
constexpr int64_t MAX_BANDS = 64, MIN_BAND = 8;

template <class T>
class Resampler {
    typedef Vec<T> V;
    typedef typename Simd<T>::U U;
    typedef typename Simd<T>::I I;
    static constexpr int W = Simd<T>::W;

    const LongtakeResample& job;
    const Fir<T>&first, &second;
    const char *x, *b;
    char* y;
    uint8_t* signs;
    const int64_t item, sign_row;  // bytes of an element, and of a row of signs
    const bool identity_x1, identity_y1, identity_x2, identity_y2;
    const bool keeps_middle;  // rows of the middle are kept before they are filtered along x
    const bool writes_signs;
    int64_t num_tiles = 1, tile_width = 1, num_bands = 1, band_height = 1, num_groups = 1, num_units = 1;
    int64_t middle_shift = 0, in_shift = 0;  // rows from one band to the next
    int64_t next_unit = 0;

    // A tile of columns: outputs [out0, out1), the middle that is computed [mid0, mid1) and kept with zeros around it
    // [keep0, keep1), inputs [in0, in1), and the middle whose signs this tile writes [own0, own1).
    struct Tile {
        int64_t out0, out1, mid0, mid1, keep0, keep1, in0, in1, own0, own1;
    };

    // The images, or bands of images, in the lanes: null beyond the last. Bands count from the top.
    struct Lanes {
        int count;
        const char* in[W];
        char* out[W];
        uint8_t* signs[W];
        int64_t band[W];
        T bias[W];
    };

    // One unit of work, and its memory in the thread's scratch: rings of input rows and of rows from the middle, and
    // a batch of rows after the first filter along y, of whole rows of the middle, and of the output.
    struct Work {
        Tile tile;
        Lanes lanes;
        LaneRows<T> rows;
        int64_t in_width, keep_width, out_width, row_width, num_in_rows, num_mid_rows;
        V *in_rows, *filtered, *mid, *mid_rows, *out_rows;
        const T** pointers;
    };

   public:
    Resampler(const LongtakeResample& job, const Fir<T>& first, const Fir<T>& second, const void* x, const void* b,
              void* y, void* signs, int threads)
        : job(job),
          first(first),
          second(second),
          x((const char*)x),
          b((const char*)b),
          y((char*)y),
          signs((uint8_t*)signs),
          item(element_size(job.dtype)),
          sign_row((first.x.out_size + 3) / 4),
          identity_x1(first.is_identity_x()),
          identity_y1(first.is_identity_y()),
          identity_x2(second.is_identity_x()),
          identity_y2(second.is_identity_y()),
          keeps_middle(second.is_2d || identity_x2),
          writes_signs(job.middle == LEAKY && signs) {
        plan(threads);
    }

    int64_t units() const { return num_units; }

    static void run(void* self) {
        Resampler& r = *(Resampler*)self;
        for (int64_t unit; (unit = __atomic_fetch_add(&r.next_unit, 1, __ATOMIC_RELAXED)) < r.num_units;) r.work(unit);
    }

   private:
    // -----------------------------------------------------------------------------------------------------------------
    // Division of the work.

    void plan(int threads) {
        num_tiles = ceil_div(first.x.out_size * (int64_t)sizeof(V), MIDDLE_BYTES);
        tile_width = ceil_div(second.x.out_size, num_tiles);
        num_tiles = ceil_div(second.x.out_size, tile_width);
        // A band begins where both filters have the same phase as at the top.
        int64_t unit = second.y.period;
        while (unit / second.y.period * second.y.step % first.y.period) unit += second.y.period;
        // Additional rows of every band, because its filters extend beyond it.
        int64_t halo = ceil_div(second.y.max_count * second.y.period, second.y.step) +
                       ceil_div(first.y.max_count * first.y.period * second.y.period, first.y.step * second.y.step);
        int64_t height = second.y.out_size, best = INT64_MAX;
        for (int64_t bands = 1; bands <= MAX_BANDS && (bands == 1 || height / bands >= MIN_BAND); bands++) {
            int64_t rows = ceil_div(ceil_div(height, bands), unit) * unit;
            if (ceil_div(height, rows) < bands) continue;
            int64_t groups = job.channels_last ? job.batch_size * ceil_div(job.num_channels, W) * bands
                                               : ceil_div(job.batch_size * job.num_channels * bands, W);
            int64_t cost = ceil_div(groups * num_tiles, threads) * (rows + halo);
            if (cost < best) best = cost, num_bands = bands, band_height = rows, num_groups = groups;
        }
        middle_shift = band_height / second.y.period * second.y.step;
        in_shift = middle_shift / first.y.period * first.y.step;
        num_units = num_groups * num_tiles;
    }

    int64_t own_begin(int64_t tile) const {
        return tile == 0 ? 0 : max64(0, min64(second.x.first(tile * tile_width), first.x.out_size)) & ~(int64_t)3;
    }

    Tile make_tile(int64_t index) const {
        Tile t;
        t.out0 = index * tile_width;
        t.out1 = min64(t.out0 + tile_width, second.x.out_size);
        int64_t needed0 = second.x.first(t.out0), needed1 = second.x.last(t.out1), size = first.x.out_size;
        t.mid0 = max64(0, min64(needed0, size));
        t.mid1 = max64(t.mid0, min64(needed1, size));
        t.own0 = t.own1 = 0;
        if (writes_signs) {
            t.own0 = own_begin(index);
            t.own1 = index + 1 == num_tiles ? size : own_begin(index + 1);
            t.mid0 = min64(t.mid0, t.own0);
            t.mid1 = max64(t.mid1, t.own1);
        }
        t.keep0 = min64(needed0, t.mid0);
        t.keep1 = max64(needed1, t.mid1);
        t.in0 = t.mid0 < t.mid1 ? first.x.first(t.mid0) : 0;
        t.in1 = t.mid0 < t.mid1 ? first.x.last(t.mid1) : 0;
        return t;
    }

    Lanes make_lanes(int64_t group) const {
        Lanes lanes = {};
        int64_t channels = job.num_channels, blocks = ceil_div(channels, W);
        int64_t begin = job.channels_last ? group / num_bands % blocks * W : group * W;
        int64_t end = job.channels_last ? channels : job.batch_size * channels * num_bands;
        lanes.count = (int)min64(W, end - begin);
        for (int l = 0; l < lanes.count; l++) {
            int64_t n = group / num_bands / blocks, c = begin + l;
            lanes.band[l] = group % num_bands;
            if (!job.channels_last) {
                int64_t image = (begin + l) / num_bands;
                n = image / channels, c = image % channels, lanes.band[l] = (begin + l) % num_bands;
            }
            int64_t plane = n * channels + c;
            int64_t in_plane = first.x.size * first.y.size, out_plane = second.x.out_size * second.y.out_size;
            lanes.in[l] = x + (job.channels_last ? n * in_plane * channels + c : plane * in_plane) * item;
            lanes.out[l] = y + (job.channels_last ? n * out_plane * channels + c : plane * out_plane) * item;
            lanes.signs[l] = signs ? signs + plane * first.y.out_size * sign_row : nullptr;
            if (b) convert_from(&lanes.bias[l], b + c * item, 1, job.dtype);
        }
        return lanes;
    }

    Work make_work(int64_t unit) const {
        Tile t = make_tile(unit % num_tiles);
        int64_t in_width = t.in1 - t.in0, keep_width = t.keep1 - t.keep0, out_width = t.out1 - t.out0;
        int64_t row_width = keeps_middle ? keep_width : out_width, longest = max64(in_width, out_width) + W;
        // Groups of rows may begin before and end after the rows that are needed.
        int64_t mid_batch = max64(BATCH, first.group_y);
        int64_t num_in_rows = first.y.max_count + ceil_div(mid_batch * first.y.down, first.y.up) + 1;
        int64_t num_mid_rows =
            second.y.max_count + ceil_div(BATCH * second.y.down, second.y.up) + 1 + 2 * first.group_y;
        int64_t sizes[] = {identity_y1 ? 0 : num_in_rows * in_width, mid_batch * in_width, 2 * keep_width,
                           num_mid_rows * row_width, BATCH * out_width};
        int64_t num_pointers = max64(num_in_rows, num_mid_rows);
        size_t total = LaneRows<T>::scratch_bytes(job.dtype, longest) + Scratch::piece(num_pointers * sizeof(T*));
        for (int64_t size : sizes) total += Scratch::piece(size * sizeof(V));
        Scratch scratch(total);
        LaneRows<T> rows(job.dtype, longest, &scratch);
        V* parts[5];
        for (int i = 0; i < 5; i++) parts[i] = scratch.take<V>(sizes[i]);
        Work w = {t,
                  make_lanes(unit / num_tiles),
                  rows,
                  in_width,
                  keep_width,
                  out_width,
                  row_width,
                  num_in_rows,
                  num_mid_rows,
                  parts[0],
                  parts[1],
                  parts[2],
                  parts[3],
                  parts[4],
                  scratch.take<const T*>(num_pointers)};
        for (int64_t row = 0; row < (keeps_middle ? w.num_mid_rows : 2); row++) {
            V* margins = (keeps_middle ? w.mid_rows : w.mid) + row * w.keep_width;
            for (int64_t i = w.tile.keep0; i < w.tile.mid0; i++) margins[i - w.tile.keep0] = V{};
            for (int64_t i = w.tile.mid1; i < w.tile.keep1; i++) margins[i - w.tile.keep0] = V{};
        }
        return w;
    }

    // -----------------------------------------------------------------------------------------------------------------
    // Rows of the tensors. `row` counts from the top of the band.

    void load_row(const Work& w, V* to, int64_t row) const {
        const Lanes& lanes = w.lanes;
        const char* from[W];
        V bias = {};
        int64_t begin = max64(w.tile.in0, 0), end = max64(begin, min64(w.tile.in1, first.x.size)), n = end - begin;
        int64_t pixel = job.channels_last ? job.num_channels : 1;
        bool any = false;
        for (int l = 0; l < W; l++) {
            int64_t r = row + lanes.band[l] * in_shift;
            bool inside = l < lanes.count && r >= 0 && r < first.y.size;
            from[l] = inside ? lanes.in[l] + (r * first.x.size + begin) * pixel * item : nullptr;
            bias[l] = inside ? lanes.bias[l] : 0;
            any |= inside;
        }
        for (int64_t i = w.tile.in0; i < begin; i++) to[i - w.tile.in0] = V{};
        for (int64_t i = end; i < w.tile.in1; i++) to[i - w.tile.in0] = V{};
        to += begin - w.tile.in0;
        if (!any)
            for (int64_t i = 0; i < n; i++) to[i] = V{};
        else if (job.channels_last)
            w.rows.load_pixels(to, from[0], pixel * item, n, lanes.count);
        else
            w.rows.load_planes(to, from, n);
        if (any && b)
            for (int64_t i = 0; i < n; i++) to[i] += bias;
    }

    void store_row(const Work& w, const V* from, int64_t row) const {
        char* to[W];
        int64_t pixel = job.channels_last ? job.num_channels : 1;
        bool any = false;
        for (int l = 0; l < W; l++) {
            int64_t r = row + w.lanes.band[l] * band_height;
            bool inside = l < w.lanes.count && r < second.y.out_size;
            to[l] = inside ? w.lanes.out[l] + (r * second.x.out_size + w.tile.out0) * pixel * item : nullptr;
            any |= inside;
        }
        if (!any) return;
        if (job.channels_last)
            w.rows.store_pixels(to[0], pixel * item, from, w.out_width, w.lanes.count);
        else
            w.rows.store_planes(to, from, w.out_width);
    }

    // -----------------------------------------------------------------------------------------------------------------
    // The middle. An element has two bits, in a word of sixteen elements the lowest ones for the first.

    // Leaky ReLU, gain and clamp; `plain`: there is no gain, and the larger of u and u * slope is right.
    template <bool plain>
    static INLINE V activate(V u, V slope, V gain, V limit, U* bits) {
        V v = u * slope;
        if (plain)
            v = u > v ? u : v;
        else
            v = (u > 0 ? u : v) * gain;
        if (bits) {  // as the topmost ones of 32
            V size = v < 0 ? -v : v;
            *bits = (~(U)(u > 0) & 0x40000000u) | ((U)(size > limit) & 0x80000000u);
        }
        v = limit < v ? limit : v;  // written so that NaN stays NaN
        return v < -limit ? -limit : v;
    }

    template <bool plain>
    void lrelu_row(const Work& w, V* mid, int64_t row) const {
        V slope = splat<T>((T)job.slope), gain = splat<T>((T)job.gain), limit = splat<T>((T)job.clamp);
        const Tile& t = w.tile;
        mid -= t.mid0;
        int64_t i = t.mid0;
        if (writes_signs) {
            for (; i < t.own0; i++) mid[i] = activate<plain>(mid[i], slope, gain, limit, nullptr);
            for (; i < t.own1; i += 16) {
                int64_t n = min64(16, t.own1 - i);
                U word = {}, bits;
                for (int64_t j = i; j < i + n; j++) {
                    mid[j] = activate<plain>(mid[j], slope, gain, limit, &bits);
                    word = (word >> 2) | bits;
                }
                store_signs(w, word >> (2 * (16 - (int)n)), row, i, n);
            }
            i = t.own1;
        }
        for (; i < t.mid1; i++) mid[i] = activate<plain>(mid[i], slope, gain, limit, nullptr);
    }

    void store_signs(const Work& w, U word, int64_t row, int64_t column, int64_t n) const {
        for (int l = 0; l < w.lanes.count; l++) {
            int64_t band = w.lanes.band[l], r = row + band * middle_shift;
            bool own = row >= 0 && (row < middle_shift || band + 1 == num_bands) && r < first.y.out_size;
            if (!own) continue;
            uint8_t* to = w.lanes.signs[l] + r * sign_row + column / 4;
            uint32_t bytes = (uint32_t)word[l];
            if (n == 16)
                memcpy(to, &bytes, 4);
            else
                for (int64_t i = 0; i * 4 < n; i++) to[i] = (uint8_t)(bytes >> 8 * i);
        }
    }

    void signs_row(const Work& w, V* mid, int64_t row) const {
        V gain = splat<T>((T)job.gain), slope = splat<T>((T)(job.gain * job.slope));
        const Tile& t = w.tile;
        mid -= t.mid0;
        for (int64_t i = t.mid0; i < t.mid1;) {
            int64_t column = i & ~(int64_t)3, end = min64(column + 16, t.mid1);
            U word = load_signs(w, row, column) >> (2 * (int)(i - column));
            for (; i < end; i++, word >>= 2) {
                V v = mid[i] * ((I)(word & 1u) == 0 ? gain : slope);
                mid[i] = (I)(word & 2u) == 0 ? v : V{};
            }
        }
    }

    U load_signs(const Work& w, int64_t row, int64_t column) const {
        U word = U{} + 0xaaaaaaaau;  // beyond the grid there are zeros
        int64_t n = min64(4, sign_row - column / 4);
        for (int l = 0; l < w.lanes.count; l++) {
            int64_t r = row + w.lanes.band[l] * middle_shift;
            if (r < 0 || r >= first.y.out_size) continue;
            const uint8_t* from = w.lanes.signs[l] + r * sign_row + column / 4;
            uint32_t bytes = 0;
            if (n == 4)
                memcpy(&bytes, from, 4);
            else
                for (int64_t i = 0; i < n; i++) bytes |= (uint32_t)from[i] << 8 * i;
            word[l] = bytes;
        }
        return word;
    }

    // -----------------------------------------------------------------------------------------------------------------
    // Rows through the filters.

    static V* ring(V* rows, int64_t row, int64_t num_rows, int64_t width) {
        return rows + modulo(row, num_rows) * width;
    }

    // Filters rows begin .. end - 1 along y, from the rows of a ring, a few columns at a time, so that the common input
    // of neighbouring rows is read from the first-level cache.
    static void filter_y(const Work& w, const Fir<T>& fir, V* out, int64_t width, int64_t begin, int64_t end, V* rows,
                         int64_t row_width, int64_t num_rows) {
        int64_t base = fir.y.first(begin), n = fir.y.last(end) - base;
        for (int64_t i = 0; i < n; i++) w.pointers[i] = (const T*)ring(rows, base + i, num_rows, row_width);
        for (int64_t x = 0; x < width; x += COLUMNS) {
            int64_t columns = min64(COLUMNS, width - x);
            fir.filter_y((T*)(out + x), width * W, begin, end, w.pointers, columns * W);
            for (int64_t i = 0; i < n; i++) w.pointers[i] += COLUMNS * W;
        }
    }

    // Computes rows begin .. end - 1 of the middle and filters them along x. *loaded counts the input rows so far.
    void make_middle(const Work& w, int64_t begin, int64_t end, int64_t* loaded) const {
        const Tile& t = w.tile;
        if (!identity_y1) {
            int64_t last = first.y.last(end);
            for (int64_t i = max64(*loaded, first.y.first(begin)); i < last; i++)
                load_row(w, ring(w.in_rows, i, w.num_in_rows, w.in_width), i);
            *loaded = last;
            if (!first.is_2d)
                filter_y(w, first, w.filtered, w.in_width, begin, end, w.in_rows, w.in_width, w.num_in_rows);
        }
        for (int64_t row = begin; row < end; row++) {
            V* kept = ring(w.mid_rows, row, w.num_mid_rows, w.row_width);
            if (keeps_middle) {
                make_row(w, kept, row, w.filtered + (row - begin) * w.in_width);
                continue;
            }
            V* next = ring(w.mid_rows, row + 1, w.num_mid_rows, w.row_width);
            make_row(w, w.mid, row, w.filtered + (row - begin) * w.in_width);
            if (row + 1 == end) {
                second.filter_x(kept, t.out0, t.out1, w.mid, t.keep0);
            } else {
                make_row(w, w.mid + w.keep_width, row + 1, w.filtered + (row + 1 - begin) * w.in_width);
                second.filter_x_twice(kept, next - kept, t.out0, t.out1, w.mid, w.keep_width, t.keep0);
                row++;
            }
        }
    }

    // One row of the middle into `to`; `filtered` is or becomes the row after the first filter along y.
    void make_row(const Work& w, V* to, int64_t row, V* filtered) const {
        const Tile& t = w.tile;
        V* mid = to + (t.mid0 - t.keep0);
        if (identity_y1) load_row(w, identity_x1 ? mid : filtered, row);
        if (first.is_2d) {
            int64_t base = first.y.first(row);
            for (int64_t i = 0; i < first.y.max_count; i++)
                w.pointers[i] = (const T*)ring(w.in_rows, base + i, w.num_in_rows, w.in_width);
            first.filter_2d(mid, row, t.mid0, t.mid1, w.pointers, t.in0);
        } else if (!identity_x1) {
            first.filter_x(mid, t.mid0, t.mid1, filtered, t.in0);
        } else if (!identity_y1) {
            memcpy(mid, filtered, (t.mid1 - t.mid0) * sizeof(V));
        }
        if (job.middle == LEAKY && job.gain == 1 && job.slope > 0 && job.slope <= 1)
            lrelu_row<true>(w, mid, row);
        else if (job.middle == LEAKY)
            lrelu_row<false>(w, mid, row);
        else if (job.middle == SIGNS)
            signs_row(w, mid, row);
    }

    // The same for all rows up to `end`, in groups that the first filter along y prefers.
    void make_middles(const Work& w, int64_t* done, int64_t end, int64_t* loaded) const {
        int64_t group = first.group_y, batch = max64(BATCH, group);
        while (*done < end) {
            int64_t next = *done + batch;
            if (group > 1)
                next = max64(*done + group, next - modulo(-1 - first.y.phase(next), first.y.up));
            else
                next = min64(next, end);
            make_middle(w, *done, next, loaded);
            *done = next;
        }
    }

    void work(int64_t unit) const {
        Work w = make_work(unit);
        int64_t done = second.y.first(0), height = min64(band_height, second.y.out_size);
        if (writes_signs) done = min64(done, 0);
        if (first.y.up == first.group_y) done -= modulo(-1 - first.y.phase(done), first.y.up);
        int64_t loaded = first.y.first(done);
        for (int64_t begin = 0; begin < height; begin += BATCH) {
            int64_t end = min64(begin + BATCH, height);
            make_middles(w, &done, second.y.last(end), &loaded);
            store_rows(w, begin, end);
        }
        // Signs of rows that no output needs are written, too: of the last band, which may be shorter than the others.
        int64_t own = first.y.out_size - (num_bands - 1) * middle_shift;
        if (writes_signs) make_middles(w, &done, num_bands > 1 ? max64(own, middle_shift) : own, &loaded);
    }

    void store_rows(const Work& w, int64_t begin, int64_t end) const {
        const Tile& t = w.tile;
        if (identity_y2) {
            for (int64_t row = begin; row < end; row++) {
                V* kept = ring(w.mid_rows, row, w.num_mid_rows, w.row_width);
                store_row(w, keeps_middle ? kept + (t.out0 - t.keep0) : kept, row);
            }
            return;
        }
        if (!second.is_2d) {
            V* rows = keeps_middle ? w.mid_rows + (t.out0 - t.keep0) : w.mid_rows;
            filter_y(w, second, w.out_rows, w.out_width, begin, end, rows, w.row_width, w.num_mid_rows);
        }
        for (int64_t row = begin; row < end; row++) {
            V* out = w.out_rows + (row - begin) * w.out_width;
            if (second.is_2d) {
                int64_t base = second.y.first(row);
                for (int64_t i = 0; i < second.y.max_count; i++)
                    w.pointers[i] = (const T*)ring(w.mid_rows, base + i, w.num_mid_rows, w.row_width);
                second.filter_2d(out, row, t.out0, t.out1, w.pointers, t.keep0);
            }
            store_row(w, out, row);
        }
    }
};

template <class Task>
void run(Task task, int threads) {
    longtake_parallel(&Task::run, &task, (int)min64(threads, task.units()));
}

template <class T>
void resample(const LongtakeResample& job, const void* x, void* y, const void* b, void* signs, int threads) {
    int64_t first_size = Fir<T>::table_size(job.first), size = first_size + Fir<T>::table_size(job.second);
    Vec<T>* tables = (Vec<T>*)operator new(size * sizeof(Vec<T>), std::align_val_t(64));
    const Fir<T> first(job.first, tables), second(job.second, tables + first_size);
    bool one_is_identity = first.is_identity_y() || second.is_identity_y();
    int64_t planes = job.batch_size * (job.channels_last ? 1 : job.num_channels);
    int64_t width = first.x.size * (job.channels_last ? job.num_channels : 1);
    if (job.middle == NOTHING && job.dtype < FLOAT16 && width >= Simd<T>::W && one_is_identity &&
        first.is_identity_x() && second.is_identity_x())
        run(Columns<T>(first.is_identity_y() ? second : first, x, y, planes, width), threads);
    else
        run(Resampler<T>(job, first, second, x, b, y, signs, threads), threads);
    operator delete(tables, std::align_val_t(64));
}

}  // namespace

// y of x; b (num_channels) is added to x, signs are written or read; both may be null.
LONGTAKE_EXPORT void longtake_resample(const LongtakeResample* job, const void* x, void* y, const void* b, void* signs,
                                       int threads) {
    if (job->dtype == FLOAT64)
        resample<double>(*job, x, y, b, signs, threads);
    else
        resample<float>(*job, x, y, b, signs, threads);
}
