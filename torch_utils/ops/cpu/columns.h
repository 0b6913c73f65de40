// A filter along y only reads the rows of the tensor in place, without transposition or buffers.
#pragma once

#include "fir.h"

namespace {

template <class T>
class Columns {
    static constexpr int64_t ROWS = 16;  // outputs of a unit of work

    const Fir<T>& fir;
    const T* x;
    T* y;
    const int64_t width, num_blocks, num_units;
    int64_t next_unit = 0;

   public:
    // `num_planes` images of rows of `width` elements, at least W.
    Columns(const Fir<T>& fir, const void* x, void* y, int64_t num_planes, int64_t width)
        : fir(fir),
          x((const T*)x),
          y((T*)y),
          width(width),
          num_blocks(ceil_div(fir.y.out_size, ROWS)),
          num_units(num_planes * num_blocks) {}

    int64_t units() const { return num_units; }

    static void run(void* self) {
        Columns& c = *(Columns*)self;
        int64_t most = c.fir.y.max_count + ceil_div(ROWS * c.fir.y.down, c.fir.y.up) + 1;
        Scratch scratch(Scratch::piece(c.width * sizeof(T)) + Scratch::piece(most * sizeof(T*)));
        T* zeros = scratch.take<T>(c.width);
        const T** rows = scratch.take<const T*>(most);
        memset(zeros, 0, c.width * sizeof(T));
        for (int64_t unit; (unit = __atomic_fetch_add(&c.next_unit, 1, __ATOMIC_RELAXED)) < c.num_units;)
            c.work(unit, zeros, rows);
    }

   private:
    void work(int64_t unit, const T* zeros, const T** rows) const {
        const T* plane = x + unit / num_blocks * fir.y.size * width;
        int64_t begin = unit % num_blocks * ROWS, end = min64(begin + ROWS, fir.y.out_size), first = fir.y.first(begin);
        for (int64_t i = first; i < fir.y.last(end); i++)
            rows[i - first] = i >= 0 && i < fir.y.size ? plane + i * width : zeros;
        T* out = y + (unit / num_blocks * fir.y.out_size + begin) * width;
        fir.filter_y(out, width, begin, end, rows, width);
    }
};

}  // namespace
