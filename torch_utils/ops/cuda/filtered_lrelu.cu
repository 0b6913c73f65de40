// The stream of fir.cuh with a leaky ReLU between its filters, or with its derivative from recorded marks.
//
// Macros beside those of fir.cuh:
//   MODE    LRELU, LRELU_MARKED (write two bits an element: not positive, clamped) or SIGNED (read and apply them)
//   CLAMP   1 if there is one          SCALE  1 if the gain could not be made part of the first filter
//   CONVEX  1 if the slope is within (0, 1], so that the leaky ReLU is a maximum
//   SHIFT   SIGNED: column of the strip's first element within its byte of four
// COLS is 4 where there are marks, so a mark is a byte of the signs, or two halves of neighbours.

#define LRELU 1
#define LRELU_MARKED 2
#define SIGNED 3

#include "fir.cuh"

#define ALL_ZERO 0xaau  // four elements whose derivative is zero, as beyond the grid

// The signs' byte of a lane's first element in a row of the grid that begins at the result's `row`.
struct Marks {
    Index row;
    int byte, width;
};

__device__ inline Marks find_marks(const Params& p, const Place& place, const Lane& lane, int mid_row)
{
    Marks marks;
    marks.width = ceil_div(p.grid_w, 4);
    marks.byte = p.sign_byte + place.strip * (TILE_W * DOWN_X / 4) + lane.group;
    const int row = place.first_row * UP_Y + p.row_offset + mid_row + p.sign_row;
    marks.row = row >= 0 && row < p.grid_h ? (lane.out.index * p.grid_h + row) * marks.width : -1;
    return marks;
}

__device__ inline unsigned read_byte(const Params& p, const Marks& marks, int byte)
{
    if (marks.row < 0 || byte < 0 || byte >= marks.width) return ALL_ZERO;
    const unsigned beyond = byte == marks.width - 1 && p.grid_w % 4 ? (ALL_ZERO << 2 * (p.grid_w % 4)) & 0xffu : 0;
    return p.signs[marks.row + byte] | beyond;
}

__device__ inline void read_marks(const Params& p, const Place& place, const Lane& lane, int step, unsigned* marks)
{
    if (MODE != SIGNED) return;
#pragma unroll
    for (int i = 0; i < MID_ROWS; i++) {
        const Marks found = find_marks(p, place, lane, step * MID_ROWS + i);
        marks[i] = read_byte(p, found, found.byte);
        if (SHIFT) marks[i] = (marks[i] | read_byte(p, found, found.byte + 1) << 8) >> 2 * SHIFT;
    }
}

__device__ inline void write_mark(const Params& p, const Place& place, const Lane& lane, int mid_row, unsigned mark)
{
    if (MODE != LRELU_MARKED) return;
    const Marks found = find_marks(p, place, lane, mid_row);
    // Neighbouring strips write the marks of the halo; above a segment, rows are not complete.
    const int row = place.first_row * UP_Y + p.row_offset + mid_row;
    const bool own = (lane.group * COLS < TILE_W * DOWN_X || place.strip == p.strips - 1) &&
                     row >= place.row_begin * DOWN_Y && (row < place.row_end * DOWN_Y || place.row_end == p.out_h);
    if (own && found.row >= 0 && found.byte < found.width) p.signs[found.row + found.byte] = (unsigned char)mark;
}

__device__ inline void transform(const Params& p, float* values, unsigned& mark)
{
    if (MODE == LRELU_MARKED) mark = 0;
#pragma unroll
    for (int g = 0; g < COLS; g++) {
        float value = values[g];
        if (MODE == SIGNED) {
            if (mark >> 2 * g & 1u) value *= p.slope;
            if (mark >> (2 * g + 1) & 1u) value = 0;  // also where it is not finite
            values[g] = value;
            continue;
        }
        const bool positive = value > 0;
        if (CONVEX) value = fmaxf(value, value * p.slope);
        else value = positive ? value : value * p.slope;
        if (SCALE) value *= p.gain;
        if (MODE == LRELU_MARKED)
            mark |= (positive ? 0u : 1u) << 2 * g | (CLAMP && fabsf(value) > p.clamp ? 2u : 0u) << 2 * g;
        if (CLAMP) value = clamp_keeping_nan(value, p.clamp);
        values[g] = value;
    }
}
