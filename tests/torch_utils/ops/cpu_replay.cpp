// Runs recorded calls of the CPU kernels on memory of exactly the size that they may touch; for sanitisers.
//
// replay CALLS RESULTS: both files hold blocks, an int64 length (-1: a null pointer) followed by as many bytes. A call
// is its kind, the structure of constants, the taps that the structure points to, and the arrays.

#include <stdio.h>
#include <stdlib.h>

#include "bias_act.cpp"
#include "resample.cpp"
#include "threads.cpp"

struct Block {
    char* data = nullptr;
    int64_t size = -1;

    explicit Block(FILE* file) {
        if (fread(&size, sizeof size, 1, file) != 1 || size < 0) return;
        data = (char*)malloc(size);
        if (fread(data, 1, size, file) != (size_t)size) abort();
    }
    ~Block() { free(data); }
    void write(FILE* file) const {
        fwrite(&size, sizeof size, 1, file);
        if (size > 0) fwrite(data, 1, size, file);
    }
};

void replay_resample(FILE* calls, FILE* results) {
    Block structure(calls);
    LongtakeResample& job = *(LongtakeResample*)structure.data;
    Block a(calls), b(calls), c(calls), d(calls), e(calls), f(calls);
    LongtakeFilter *first = &job.first, *second = &job.second;
    first->taps_x = (double*)a.data, first->taps_y = (double*)b.data, first->taps_2d = (double*)c.data;
    second->taps_x = (double*)d.data, second->taps_y = (double*)e.data, second->taps_2d = (double*)f.data;
    Block x(calls), bias(calls), signs(calls), y(calls);
    longtake_resample(&job, x.data, y.data, bias.data, signs.data, 3);
    y.write(results);
    signs.write(results);
}

void replay_bias_act(FILE* calls, FILE* results) {
    Block structure(calls), order(calls), x(calls), b(calls), dy(calls), ddx(calls), y(calls);
    longtake_bias_act((LongtakeBiasAct*)structure.data, x.data, b.data, dy.data, ddx.data, y.data, order.data[0], 3);
    y.write(results);
}

int main(int, char** arguments) {
    FILE *calls = fopen(arguments[1], "rb"), *results = fopen(arguments[2], "wb");
    if (!calls || !results) return 2;
    for (;;) {
        Block kind(calls);
        if (kind.size < 0) break;
        (kind.data[0] ? replay_bias_act : replay_resample)(calls, results);
    }
    fclose(calls);
    return fclose(results);
}
