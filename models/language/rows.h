// What is done to one row of activations between products.

#pragma once

#include "vectors.h"

// Root-mean-square norm.
static inline void normed(const float *x, const float *weight, long dim, float epsilon, float *out) {
    vf squares{};
    for (long c = 0; c < dim; c += VL) squares += load(x + c) * load(x + c);
    const float factor = 1 / std::sqrt(sum_of(squares) / dim + epsilon);
    for (long c = 0; c < dim; c += VL) store(out + c, load(x + c) * factor * load(weight + c));
}

static inline vf silu(vf x) {
    const vf e = exp_of(x < 0 ? x : -x);
    return x * (x < 0 ? e : all(1)) / (1 + e);
}

// A head turned by cos, sin (half,): element c and element c + half are the parts of a complex number.
static inline void rotated(const float *x, const float *cos, const float *sin, long half, float *out) {
    for (long c = 0; c < half; c++) {
        const float first = x[c], second = x[c + half];
        out[c] = first * cos[c] - second * sin[c];
        out[c + half] = second * cos[c] + first * sin[c];
    }
}
