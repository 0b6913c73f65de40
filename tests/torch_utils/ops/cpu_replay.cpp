// Runs recorded calls of the CPU kernels on memory of exactly the size that they may touch; for sanitisers.
//
// replay CALLS RESULTS: both files hold blocks, an int64 length (-1: a null pointer) followed by as many bytes. A call
// is its kind, the structure of constants, the taps that the structure points to, and the arrays.

#include <stdio.h>
#include <stdlib.h>

#include "bias_act.cpp"
#include "resample.cpp"
#include "threads.cpp"
#include "tiles.cpp"

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

void replay_tiles(FILE* calls, FILE* results) {
    Block structure(calls), image(calls), pixels(calls);
    LongtakeTiles& job = *(LongtakeTiles*)structure.data;
    int count = (job.step_y + 2) * (job.step_x + 2);
    Block* blocks[36];
    float* points[36];
    for (int i = 0; i < count; i++) {
        blocks[i] = new Block(calls);
        points[i] = (float*)blocks[i]->data;
    }
    longtake_tiles(&job, (float*)image.data, (float*)pixels.data, points, 3);
    if (pixels.data) pixels.write(results);
    for (int i = 0; i < count; i++) {
        if (!pixels.data) blocks[i]->write(results);
        delete blocks[i];
    }
}

int main(int, char** arguments) {
    FILE *calls = fopen(arguments[1], "rb"), *results = fopen(arguments[2], "wb");
    if (!calls || !results) return 2;
    for (;;) {
        Block kind(calls);
        if (kind.size < 0) break;
        void (*replays[])(FILE*, FILE*) = {replay_resample, replay_bias_act, replay_tiles};
        replays[(int)kind.data[0]](calls, results);
    }
    fclose(calls);
    return fclose(results);
}
