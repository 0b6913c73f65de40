// A stream of image rows through FIR filters: the kernel under upfirdn2d.cu and filtered_lrelu.cu.
//
// A block owns a strip of columns of one or several planes (an image's channel) and walks down its rows, ROWS at a time:
//   rows of the input, converted to float, zero outside of the image      -> shared memory
//   each thread: COLS neighbouring columns of the first filter along x    -> registers
//                the first filter along y over a sliding window of rows   -> registers
//                the nonlinearity                                         -> registers
//                the second filter along y into sliding accumulators      -> output, or shared memory
//   if there is one, the second filter along x                            -> output
// so every input is read once (except for the halo of a strip), only a few rows are kept, inserted zeros are not
// multiplied (each output column and row has its own phase of the filter, a compile-time constant), and all taps are in
// registers. Rows of the next step are fetched during the computation of this one, and one barrier per step suffices
// because both shared buffers are double.
//
// Coordinates. Along x the first filter makes columns c: the sum over t of f[t] * z[c * STEP_X - offset + t], where z is
// the input with UP_X - 1 zeros after each sample, so z[i * UP_X] = x[i]. Along y it makes rows m on the grid between the
// filters: row i of the input completes the rows m = i * UP_Y + row_offset + j, j < UP_Y. Row o of the output needs the
// rows from o * DOWN_Y on, as many as the second filter has taps. Where there is a second filter along x, the same
// holds for columns: STEP_X is 1, c = m, and o * DOWN_X is the first column that output column o needs.
//
// Macros beside those of common.cuh; [1] marks what is 1 where it does not apply:
//   CHANNELS_LAST, BIAS (1 if there is one), FLIP (0: convolve), FILTER_2D (the first filter is TAPS_Y x TAPS_X)
//   UP_X, STEP_X, TAPS_X, PHASE_X   first filter along x; PHASE_X = -offset of the strip's first column, mod UP_X
//   UP_Y, TAPS_Y                    first filter along y          PLAIN_X, PLAIN_Y  1 if that axis has no first filter
//   DOWN_Y, TAPS2_Y, PHASE_Y        second filter along y [1]; PHASE_Y = position of the stream's first row, mod DOWN_Y
//   DOWN_X, TAPS2_X                 second filter along x [1]     SECOND_X, SECOND_Y  1 if that axis has a second filter
//   SHARED_TAPS, SHARED_TAPS2       1 if the filters of both axes are the same
//   TILE_W                          output columns of a strip     PLANES, THREADS, GROUPS (of COLS columns)
//   ROWS                            input rows of a step, such that ROWS * UP_Y is a multiple of DOWN_Y
//   COLS, OUT_COLS                  columns of a thread in the first and in the second filter along x
//   VECTOR_STORE                    1 if those columns can be written as one vector
// and those of the including file for the three functions that it defines: `read_marks`, `transform`, `write_mark`.

#include "common.cuh"

struct Params {
    const Element* x;
    Element* y;
    const Element* b;  // (channels)
    unsigned char* signs;
    const float* filter_x;  // the whole filter if FILTER_2D; null for a single tap of 1
    const float* filter_y;
    const float* second_x;
    const float* second_y;
    int in_h, in_w, out_h, out_w;
    int planes;          // N * C, or N if CHANNELS_LAST
    int channels;
    int strips;          // blocks along x
    int segments;        // blocks along y
    int segment_rows;    // output rows of a segment
    int channel_blocks;  // blocks along the channels of an image if CHANNELS_LAST
    int first_col;       // input column of the first strip's first shared column
    int first_row;       // input row where the first segment's stream begins
    int row_offset;
    int grid_h, grid_w;  // of the signs
    int sign_row, sign_byte;  // of row m = 0 and of the first strip's first column
    float gain_x, gain_y, second_gain;
    float gain, slope, clamp;
    int unused;
};

#define ACCUMULATORS ceil_div(TAPS2_Y, DOWN_Y)
#define WINDOW_X ceil_div(TAPS_X, UP_X)  // taps of one phase
#define WINDOW_Y ceil_div(TAPS_Y, UP_Y)
#define GROUP_STEP (COLS * STEP_X / UP_X)  // input columns from one thread to the next
#define SPAN_X (WINDOW_X + (PHASE_X + (COLS - 1) * STEP_X + UP_X - 1) / UP_X)  // input columns that a thread uses
#define WIDTH_OF_READS(step) ((step) % 4 == 0 ? 4 : (step) % 2 == 0 ? 2 : 1)
#define WINDOW_COLS (FILTER_2D ? SPAN_X : COLS)

#define IN_W ((GROUPS - 1) * GROUP_STEP + SPAN_X)
#define IN_PITCH round_up((GROUPS - 1) * GROUP_STEP + round_up(SPAN_X, 4), 4)
#define MID_ROWS (ROWS * UP_Y)
#define OUT_ROWS (MID_ROWS / DOWN_Y)
#define SECOND_STEP (OUT_COLS * DOWN_X)
#define SECOND_SPAN (SECOND_STEP - DOWN_X + TAPS2_X)
#define MID_PITCH \
    round_up(larger(GROUPS * COLS, (TILE_W / OUT_COLS - 1) * SECOND_STEP + round_up(SECOND_SPAN, 4)), 4)
// If neighbouring threads work on neighbouring planes, planes are four banks apart.
#define PLANE_PITCH(size) (CHANNELS_LAST ? round_up((size) - 4, 32) + 4 : (size))
#define IN_PLANE PLANE_PITCH(ROWS * IN_PITCH)
#define MID_PLANE PLANE_PITCH(OUT_ROWS * MID_PITCH)

// Work on `columns` x rows is distributed over the threads so that each keeps its columns: thread i has those congruent
// to i, and if there are more threads than columns, groups of threads alternate in the rows.
#define PER_THREAD(columns) ceil_div(columns, THREADS)
#define ROW_GROUPS(columns) ((columns) * 2 <= THREADS ? THREADS / (columns) : 1)
#define ROW_PERIOD(columns) (ROW_GROUPS(columns) > 1 ? (columns) : THREADS)

#define LOAD_COLUMNS (PLANES * IN_W)
#define LOAD_ROWS ceil_div(ROWS, ROW_GROUPS(LOAD_COLUMNS))
#define OUT_COLUMNS (PLANES * (TILE_W / OUT_COLS))

// The part of the output that this block computes.
struct Place {
    int strip;
    int row_begin, row_end;  // output rows
    int first_row;           // input row where the stream begins
    int out_row;             // output row that the step 0 completes first
    int steps;
    int plane_block;
};

__device__ inline Place locate(const Params& p)
{
    Place place;
    int block = blockIdx.x;
    place.strip = block % p.strips;
    block /= p.strips;
    const int segment = block % p.segments;
    place.plane_block = block / p.segments;
    place.row_begin = segment * p.segment_rows;
    place.row_end = place.row_begin + p.segment_rows < p.out_h ? place.row_begin + p.segment_rows : p.out_h;
    // All segments begin at the same phase: segment_rows * DOWN_Y is a multiple of UP_Y.
    place.first_row = p.first_row + place.row_begin * DOWN_Y / UP_Y;
    const int first_mid = place.first_row * UP_Y + p.row_offset;
    const int last_mid = (place.row_end - 1) * DOWN_Y + TAPS2_Y - 1;
    place.steps = (floor_div(last_mid - p.row_offset, UP_Y) - place.first_row) / ROWS + 1;
    // Row m completes output (m - TAPS2_Y + 1) / DOWN_Y if that is an integer.
    place.out_row = (first_mid - PHASE_Y) / DOWN_Y - (TAPS2_Y - 1) / DOWN_Y + (PHASE_Y > (TAPS2_Y - 1) % DOWN_Y);
    return place;
}

// One of the planes of a block: whether it exists, and its offset in a tensor of `size` elements per plane.
struct Plane {
    bool exists;
    int channel;
    Index index;  // image * C + channel
    Index start;
};

__device__ inline Plane find_plane(const Params& p, const Place& place, int plane, Index size)
{
    Plane result;
    if (CHANNELS_LAST) {
        const int image = place.plane_block / p.channel_blocks;
        result.channel = place.plane_block % p.channel_blocks * PLANES + plane;
        result.exists = result.channel < p.channels;
        result.index = (Index)image * p.channels + result.channel;
        result.start = (Index)image * size * p.channels + result.channel;
    } else {
        const int index = place.plane_block * PLANES + plane;
        result.exists = index < p.planes;
        result.channel = index % p.channels;
        result.index = index;
        result.start = index * size;
    }
    return result;
}

__device__ inline Index pixel_stride(const Params& p) { return CHANNELS_LAST ? p.channels : 1; }

// Splits a number into a plane and a column so that neighbouring threads use neighbouring addresses.
__device__ inline void split(int number, int columns, int& plane, int& column)
{
    plane = CHANNELS_LAST ? number % PLANES : number / columns;
    column = CHANNELS_LAST ? number / PLANES : number % columns;
}

__device__ inline void load_taps(const float* filter, int count, float gain, float* taps)
{
#pragma unroll
    for (int t = 0; t < count; t++) taps[t] = (filter ? filter[FLIP ? t : count - 1 - t] : 1.0f) * gain;
}

template <int width> __device__ inline void read_vectors(const float* from, int count, float* to)
{
#pragma unroll
    for (int i = 0; i < count; i += width) {
        const Vector<float, width> vector = *(const Vector<float, width>*)(from + i);
#pragma unroll
        for (int k = 0; k < width; k++) to[i + k] = vector.items[k];
    }
}

// Reads `count` floats, rounded up to the width of the reads, the largest that `step` allows.
__device__ inline void read_floats(const float* from, int count, int step, float* to)
{
    if (WIDTH_OF_READS(step) == 4) return read_vectors<4>(from, count, to);
    if (WIDTH_OF_READS(step) == 2) return read_vectors<2>(from, count, to);
    read_vectors<1>(from, count, to);
}

template <int width> __device__ inline void write_vector(Element* to, const float* values)
{
    Vector<Element, width> vector;
#pragma unroll
    for (int k = 0; k < width; k++) vector.items[k] = from_float(values[k]);
    *(Vector<Element, width>*)to = vector;
}

// Writes the values of neighbouring columns of the output.
__device__ inline void write_output(const Params& p, Element* to, const float* values, int count, int column)
{
    if (VECTOR_STORE) {
        if (column >= p.out_w) return;
        if (count == 4) write_vector<4>(to, values);
        if (count == 2) write_vector<2>(to, values);
        return;
    }
#pragma unroll
    for (int k = 0; k < count; k++)
        if (column + k < p.out_w) to[k * pixel_stride(p)] = from_float(values[k]);
}

// The first of a thread's rows when `columns` x `rows` are distributed; `rows` if it has none.
__device__ inline int first_row_of(int columns, int rows)
{
    if (ROW_GROUPS(columns) == 1) return 0;
    const int group = threadIdx.x / columns;
    return group < ROW_GROUPS(columns) ? group : rows;
}

// ---------------------------------------------------------------------------------------------------------------------
// Input rows -> shared memory.

// A column of a plane that a thread fetches.
struct Source {
    bool exists;
    Index offset;  // of row 0
    float bias;
    int target;  // in shared memory
};

__device__ inline Source find_source(const Params& p, const Place& place, int number)
{
    Source source = {};
    int plane, column;
    split(number, IN_W, plane, column);
    if (number >= LOAD_COLUMNS) return source;
    const Plane found = find_plane(p, place, plane, (Index)p.in_h * p.in_w);
    const int x = p.first_col + place.strip * (TILE_W * DOWN_X * STEP_X / UP_X) + column;
    source.exists = found.exists && x >= 0 && x < p.in_w;
    source.offset = found.start + x * pixel_stride(p);
    source.bias = BIAS && source.exists ? to_float(p.b[found.channel]) : 0.0f;
    source.target = plane * IN_PLANE + column;
    return source;
}

__device__ inline int first_load_row() { return first_row_of(LOAD_COLUMNS, ROWS); }

// Returns whether row `row` of a step belongs to this thread and is inside of the image.
__device__ inline bool is_loaded(const Params& p, int image_row, int row)
{
    return row < ROWS && image_row + row >= 0 && image_row + row < p.in_h;
}

__device__ inline void fetch_rows(const Params& p, const Source* sources, int image_row, Element* fetched)
{
    const Index stride = (Index)p.in_w * pixel_stride(p);
#pragma unroll
    for (int r = 0; r < LOAD_ROWS; r++) {
        const int row = first_load_row() + r * ROW_GROUPS(LOAD_COLUMNS);
        const bool inside = is_loaded(p, image_row, row);
#pragma unroll
        for (int n = 0; n < PER_THREAD(LOAD_COLUMNS); n++)
            if (inside && sources[n].exists)
                fetched[r * PER_THREAD(LOAD_COLUMNS) + n] = p.x[sources[n].offset + (image_row + row) * stride];
    }
}

__device__ inline void put_rows(const Params& p, const Source* sources, int image_row, const Element* fetched, float* in)
{
#pragma unroll
    for (int r = 0; r < LOAD_ROWS; r++) {
        const int row = first_load_row() + r * ROW_GROUPS(LOAD_COLUMNS);
        const bool inside = is_loaded(p, image_row, row);
#pragma unroll
        for (int n = 0; n < PER_THREAD(LOAD_COLUMNS); n++) {
            const bool mine = row < ROWS && (int)threadIdx.x % ROW_PERIOD(LOAD_COLUMNS) + n * THREADS < LOAD_COLUMNS;
            float value = to_float(fetched[r * PER_THREAD(LOAD_COLUMNS) + n]);
            if (BIAS) value += sources[n].bias;
            if (mine) in[sources[n].target + row * IN_PITCH] = inside && sources[n].exists ? value : 0.0f;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The first filter along x, of one row: shared memory -> a row of the window along y.

__device__ inline void filter_row(const float* in, const float* taps, float* out)
{
    float span[round_up(SPAN_X, 4)];
    read_floats(in, SPAN_X, GROUP_STEP, span);
    if (FILTER_2D) {
#pragma unroll
        for (int i = 0; i < SPAN_X; i++) out[i] = span[i];
        return;
    }
#pragma unroll
    for (int g = 0; g < COLS; g++) {
        const int offset = PHASE_X + g * STEP_X;
        const int first = ceil_div(offset, UP_X);
        if (PLAIN_X) {
            out[g] = span[first];
            continue;
        }
        float sum = 0;
#pragma unroll
        for (int q = 0; q < WINDOW_X; q++) {
            const int t = (first + q) * UP_X - offset;
            if (t < TAPS_X) sum = q ? fmaf(taps[t], span[first + q], sum) : taps[t] * span[first];
        }
        out[g] = sum;
    }
}

// The first filter along y: rows of the window, the newest last -> row j of those that the newest completes.
__device__ inline void filter_window(const float* window, const float* taps, int j, float* out)
{
#pragma unroll
    for (int g = 0; g < COLS; g++) {
        const float* newest = window + (WINDOW_Y - 1) * WINDOW_COLS;
        if (PLAIN_Y && !FILTER_2D) {
            out[g] = newest[g];
            continue;
        }
        float sum = 0;
#pragma unroll
        for (int q = WINDOW_Y - 1; q >= 0; q--) {
            const int t = TAPS_Y - 1 - j - q * UP_Y;
            const float* row = newest - q * WINDOW_COLS;
            if (t < 0) continue;
            if (!FILTER_2D) {
                sum = fmaf(taps[t], row[g], sum);
                continue;
            }
            const int offset = PHASE_X + g * STEP_X;
            const int first = ceil_div(offset, UP_X);
#pragma unroll
            for (int k = 0; k < WINDOW_X; k++) {
                const int s = (first + k) * UP_X - offset;
                if (s < TAPS_X) sum = fmaf(taps[t * TAPS_X + s], row[first + k], sum);
            }
        }
        out[g] = sum;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The second filter along x: shared memory -> output.

__device__ inline void filter_columns(const Params& p, const Place& place, int step, const float* mid, const float* taps)
{
    const int first_number = threadIdx.x % ROW_PERIOD(OUT_COLUMNS);
    const int first = first_row_of(OUT_COLUMNS, OUT_ROWS);
#pragma unroll
    for (int n = 0; n < PER_THREAD(OUT_COLUMNS); n++) {
        if (first_number + n * THREADS >= OUT_COLUMNS) continue;
        int plane, group;
        split(first_number + n * THREADS, TILE_W / OUT_COLS, plane, group);
        const Plane found = find_plane(p, place, plane, (Index)p.out_h * p.out_w);
        if (!found.exists) continue;
        const int column = place.strip * TILE_W + group * OUT_COLS;
        Element* to = p.y + found.start + column * pixel_stride(p);
#pragma unroll
        for (int r = 0; r < ceil_div(OUT_ROWS, ROW_GROUPS(OUT_COLUMNS)); r++) {
            const int row = first + r * ROW_GROUPS(OUT_COLUMNS);
            const int out_row = place.out_row + step * OUT_ROWS + row;
            if (row >= OUT_ROWS || out_row < place.row_begin || out_row >= place.row_end) continue;
            float span[round_up(SECOND_SPAN, 4)], sums[OUT_COLS];
            read_floats(mid + plane * MID_PLANE + row * MID_PITCH + group * SECOND_STEP, SECOND_SPAN, SECOND_STEP, span);
#pragma unroll
            for (int k = 0; k < OUT_COLS; k++) {
                sums[k] = taps[0] * span[k * DOWN_X];
#pragma unroll
                for (int t = 1; t < TAPS2_X; t++) sums[k] = fmaf(taps[t], span[k * DOWN_X + t], sums[k]);
            }
            write_output(p, to + (Index)out_row * p.out_w * pixel_stride(p), sums, OUT_COLS, column);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The kernel.

// The columns that a thread has in the first filter along x.
struct Lane {
    bool exists;
    int plane, group;
    Plane out;   // plane of the output
};

// The operation between the filters. A mark has two bits for each of COLS elements of a row.
__device__ inline void read_marks(const Params& p, const Place& place, const Lane& lane, int step, unsigned* marks);
__device__ inline void transform(const Params& p, float* values, unsigned& mark);
__device__ inline void write_mark(const Params& p, const Place& place, const Lane& lane, int mid_row, unsigned mark);

__device__ inline Lane find_lane(const Params& p, const Place& place)
{
    Lane lane;
    split(threadIdx.x, GROUPS, lane.plane, lane.group);
    lane.exists = threadIdx.x < GROUPS * PLANES;
    lane.out = find_plane(p, place, lane.plane, (Index)p.out_h * p.out_w);
    lane.exists = lane.exists && lane.out.exists;
    return lane;
}

template <int width> __device__ inline void put_vectors(float* to, const float* values)
{
#pragma unroll
    for (int g = 0; g < COLS; g += width) {
        Vector<float, width> vector;
#pragma unroll
        for (int k = 0; k < width; k++) vector.items[k] = values[g + k];
        *(Vector<float, width>*)(to + g) = vector;
    }
}

// Takes a row that the filters along y have completed: the row-th of the step.
__device__ inline void emit(const Params& p, const Place& place, const Lane& lane, int step, int row, const float* values,
                            float* mid)
{
    if (SECOND_X) {
        float* to = mid + lane.plane * MID_PLANE + row * MID_PITCH + lane.group * COLS;
        if (WIDTH_OF_READS(COLS) == 4) return put_vectors<4>(to, values);
        if (WIDTH_OF_READS(COLS) == 2) return put_vectors<2>(to, values);
        return put_vectors<1>(to, values);
    }
    const int out_row = place.out_row + step * OUT_ROWS + row;
    if (out_row < place.row_begin || out_row >= place.row_end) return;
    const int column = place.strip * TILE_W + lane.group * COLS;
    const Index offset = ((Index)out_row * p.out_w + column) * pixel_stride(p);
    write_output(p, p.y + lane.out.start + offset, values, COLS, column);
}

// Adds a row of the grid, `position` rows after one where an output row begins, to the outputs that it is part of.
__device__ inline void accumulate(const float* values, const float* taps, int position, float* sums)
{
#pragma unroll
    for (int q = 0; q < ACCUMULATORS; q++) {
        const int t = position + q * DOWN_Y;
        if (t >= TAPS2_Y) continue;
#pragma unroll
        for (int g = 0; g < COLS; g++)
            sums[q * COLS + g] = t ? fmaf(taps[t], values[g], sums[q * COLS + g]) : taps[0] * values[g];
    }
}

// The filters along y, for the rows of one step.
__device__ inline void filter_rows(const Params& p, const Place& place, const Lane& lane, int step, const float* in,
                                   const float* taps_x, const float* taps_y, const float* taps2_y, float* window,
                                   float* sums, float* mid)
{
    unsigned marks[MID_ROWS];
    read_marks(p, place, lane, step, marks);
    const int last = (TAPS2_Y - 1) % DOWN_Y;  // position of the row that completes an output
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
#pragma unroll
        for (int i = 0; i < (WINDOW_Y - 1) * WINDOW_COLS; i++) window[i] = window[i + WINDOW_COLS];
        float* newest = window + (WINDOW_Y - 1) * WINDOW_COLS;
        filter_row(in + lane.plane * IN_PLANE + row * IN_PITCH + lane.group * GROUP_STEP, taps_x, newest);
#pragma unroll
        for (int j = 0; j < UP_Y; j++) {
            const int mid_row = row * UP_Y + j;
            const int position = (PHASE_Y + mid_row) % DOWN_Y;
            const int out_row = (PHASE_Y + mid_row) / DOWN_Y - (PHASE_Y > last);
            if (position < TAPS2_Y) {
                float values[COLS];
                filter_window(window, FILTER_2D ? taps_x : taps_y, j, values);
                transform(p, values, marks[mid_row]);
                write_mark(p, place, lane, step * MID_ROWS + mid_row, marks[mid_row]);
                if (SECOND_Y) accumulate(values, taps2_y, position, sums);
                if (position == last)
                    emit(p, place, lane, step, out_row, SECOND_Y ? sums + (ACCUMULATORS - 1) * COLS : values, mid);
            }
            if (SECOND_Y && position == DOWN_Y - 1) {
#pragma unroll
                for (int i = ACCUMULATORS * COLS - 1; i >= 0; i--) sums[i] = i < COLS ? 0.0f : sums[i - COLS];
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) stream(const Params p)
{
    SHARED(float, in, 2 * PLANES * (IN_PLANE + SECOND_X * MID_PLANE));
    float* mid = in + 2 * PLANES * IN_PLANE;
    const Place place = locate(p);
    const Lane lane = find_lane(p, place);

    float taps_x[FILTER_2D ? TAPS_Y * TAPS_X : TAPS_X], taps_y[TAPS_Y], taps2_x[TAPS2_X], taps2_y[TAPS2_Y];
    load_taps(p.filter_x, FILTER_2D ? TAPS_Y * TAPS_X : TAPS_X, p.gain_x, taps_x);
    if (!SHARED_TAPS && !FILTER_2D) load_taps(p.filter_y, TAPS_Y, p.gain_y, taps_y);
    if (SECOND_Y) load_taps(p.second_y, TAPS2_Y, p.second_gain, taps2_y);
    if (SECOND_X && !SHARED_TAPS2) load_taps(p.second_x, TAPS2_X, 1.0f, taps2_x);

    float window[WINDOW_Y * WINDOW_COLS], sums[ACCUMULATORS * COLS];
#pragma unroll
    for (int i = 0; i < WINDOW_Y * WINDOW_COLS; i++) window[i] = 0;
#pragma unroll
    for (int i = 0; i < ACCUMULATORS * COLS; i++) sums[i] = 0;

    Source sources[PER_THREAD(LOAD_COLUMNS)];
#pragma unroll
    for (int n = 0; n < PER_THREAD(LOAD_COLUMNS); n++)
        sources[n] = find_source(p, place, threadIdx.x % ROW_PERIOD(LOAD_COLUMNS) + n * THREADS);
    Element fetched[LOAD_ROWS * PER_THREAD(LOAD_COLUMNS)];
    fetch_rows(p, sources, place.first_row, fetched);
    put_rows(p, sources, place.first_row, fetched, in);
    __syncthreads();

    for (int step = 0; step < place.steps + SECOND_X; step++) {
        const int next_row = place.first_row + (step + 1) * ROWS;
        float* mid_now = mid + (step & 1) * (PLANES * MID_PLANE);
        if (step + 1 < place.steps) fetch_rows(p, sources, next_row, fetched);
        if (step < place.steps && lane.exists)
            filter_rows(p, place, lane, step, in + (step & 1) * (PLANES * IN_PLANE), taps_x,
                        SHARED_TAPS ? taps_x : taps_y, taps2_y, window, sums, mid_now);
        if (SECOND_X && step > 0)
            filter_columns(p, place, step - 1, mid + (1 - (step & 1)) * (PLANES * MID_PLANE),
                           SHARED_TAPS2 ? taps2_y : taps2_x);
        if (step + 1 < place.steps)
            put_rows(p, sources, next_row, fetched, in + (1 - (step & 1)) * (PLANES * IN_PLANE));
        __syncthreads();
    }
}
