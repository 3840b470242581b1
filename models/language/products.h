// Products of a few rows of float32 activations with weights as they lie in memory: float32, bfloat16, or blocks of 32 along a row,
// w = d q + m, q of 4 bits or 8.
//
// A few rows, as in decoding, read every weight once and are bound by memory: fewer bits are fewer bytes. An output is one sum in
// one order whatever rows are beside it, so that a sequence's logits are the same bits in any batch.

#pragma once

#include <type_traits>

#include "vectors.h"

constexpr long BLOCK = 32;
constexpr long AHEAD = 2048;  // bytes: one row's product asks for weights so early, as what it computes hides no wait for them

// GCC makes a byte at a time of __builtin_convertvector from narrow vectors, which takes five times as long as the product itself.
#if defined(__AVX512F__)
static inline vi bytes_at(const uint8_t *p) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline vi signed_bytes_at(const uint8_t *p) { return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
static inline vi shorts_at(const uint16_t *p) { return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
#elif defined(__AVX2__)
static inline vi bytes_at(const uint8_t *p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
static inline vi signed_bytes_at(const uint8_t *p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)); }
static inline vi shorts_at(const uint16_t *p) { return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)); }
#else
template <class T> static inline vi widened(const void *p) {
    typedef T narrow __attribute__((vector_size(VL * sizeof(T))));
    return __builtin_convertvector(load<narrow>(p), vi);
}
static inline vi bytes_at(const uint8_t *p) { return widened<uint8_t>(p); }
static inline vi signed_bytes_at(const uint8_t *p) { return widened<int8_t>(p); }
static inline vi shorts_at(const uint16_t *p) { return widened<uint16_t>(p); }
#endif

enum Kind { FLOAT = 0, HALF = 1, FOUR = 2, EIGHT = 3 };

extern "C" struct Matrix {
    const void *weights;  // (out, in) float32 or bfloat16, or (out, in / 32, 16 or 32 bytes)
    const float *scale, *least;  // (out, in / 32) of blocks; `least` null is 0
    int64_t in, out;
    int32_t kind;
};

static inline vf value_at(const float *p) { return load(p); }
static inline vf value_at(const uint16_t *p) {  // bfloat16
    vi bits = shorts_at(p) << 16;
    vf x; std::memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint16_t half_of(float x) {  // to the nearest, ties to even
    uint32_t bits; std::memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Vector number v of a block's 32 multiples. Of 4 bits: byte i holds weights i and i + 16.
template <int KIND> static inline vf multiples_at(const uint8_t *q, int v) {
    if constexpr (KIND == EIGHT) return __builtin_convertvector(signed_bytes_at(q + v * VL), vf);
    constexpr int PER_HALF = 16 / VL;
    const vi bytes = bytes_at(q + (v % PER_HALF) * VL);
    return __builtin_convertvector(v < PER_HALF ? bytes & 15 : bytes >> 4, vf);
}

// y[r * ldy + o] (+)= x[r] . W[first + o], of OUTS outputs and ROWS rows. `sums` (rows, in / 32) are those of x's blocks.
template <int KIND, int ROWS, int OUTS>
static inline void tile(const Matrix &w, long first, const float *x, const float *sums, float *y, long ldy, bool add) {
    const long in = w.in, blocks = in / BLOCK;
    vf sum[ROWS][OUTS] = {};
    float least[ROWS][OUTS] = {};
    if constexpr (KIND == FLOAT || KIND == HALF) {
        typedef std::conditional_t<KIND == FLOAT, float, uint16_t> Weight;
        const Weight *from[OUTS];
        for (int o = 0; o < OUTS; o++) from[o] = (const Weight *)w.weights + (first + o) * in;
        for (long c = 0; c < in; c += VL) {
            vf right[OUTS];
            if (ROWS == 1) __builtin_prefetch((const char *)(from[0] + c) + AHEAD);
            for (int o = 0; o < OUTS; o++) right[o] = value_at(from[o] + c);
            for (int r = 0; r < ROWS; r++) {
                const vf left = load(x + r * in + c);
                for (int o = 0; o < OUTS; o++) sum[r][o] += left * right[o];
            }
        }
    } else {
        constexpr int BYTES = KIND == FOUR ? 16 : 32;
        const uint8_t *from[OUTS];
        const float *scale[OUTS], *lowest[OUTS];
        for (int o = 0; o < OUTS; o++) {
            from[o] = (const uint8_t *)w.weights + (first + o) * blocks * BYTES;
            scale[o] = w.scale + (first + o) * blocks, lowest[o] = w.least + (first + o) * blocks;
        }
        for (long b = 0; b < blocks; b++) {
            vf part[ROWS][OUTS] = {};
#pragma GCC unroll 8
            for (int v = 0; v < BLOCK / VL; v++) {
                vf right[OUTS];
                for (int o = 0; o < OUTS; o++) right[o] = multiples_at<KIND>(from[o] + b * BYTES, v);
                for (int r = 0; r < ROWS; r++) {
                    const vf left = load(x + r * in + b * BLOCK + v * VL);
                    for (int o = 0; o < OUTS; o++) part[r][o] += left * right[o];
                }
            }
            for (int r = 0; r < ROWS; r++)
                for (int o = 0; o < OUTS; o++) sum[r][o] += part[r][o] * scale[o][b];
        }
        if (w.least)
            for (int r = 0; r < ROWS; r++)
                for (int o = 0; o < OUTS; o++)
                    for (long b = 0; b < blocks; b++) least[r][o] += sums[r * blocks + b] * lowest[o][b];
    }
    for (int r = 0; r < ROWS; r++)
        for (int o = 0; o < OUTS; o++) {
            const float found = sum_of(sum[r][o]) + least[r][o];
            y[r * ldy + o] = add ? y[r * ldy + o] + found : found;
        }
}

template <int KIND, int OUTS>
static inline void some_rows(const Matrix &w, long first, long rows, const float *x, const float *sums, float *y, long ldy, bool add) {
    const long blocks = w.in / BLOCK;
    long r = 0;
    for (; r + 4 <= rows; r += 4) tile<KIND, 4, OUTS>(w, first, x + r * w.in, sums + r * blocks, y + r * ldy, ldy, add);
    for (; r + 2 <= rows; r += 2) tile<KIND, 2, OUTS>(w, first, x + r * w.in, sums + r * blocks, y + r * ldy, ldy, add);
    for (; r < rows; r++) tile<KIND, 1, OUTS>(w, first, x + r * w.in, sums + r * blocks, y + r * ldy, ldy, add);
}

template <int KIND>
static void outputs(const Matrix &w, long first, long last, long rows, const float *x, const float *sums, float *y, long ldy, bool add) {
    constexpr int OUTS = 2;
    long o = first;
    if (KIND == HALF && rows == 1)  // one run of memory is read faster than two
        for (; o < last; o++) some_rows<KIND, 1>(w, o, rows, x, sums, y + o - first, ldy, add);
    for (; o + OUTS <= last; o += OUTS) some_rows<KIND, OUTS>(w, o, rows, x, sums, y + o - first, ldy, add);
    for (; o < last; o++) some_rows<KIND, 1>(w, o, rows, x, sums, y + o - first, ldy, add);
}

// y (rows, ldy) (+)= x (rows, in) times rows [first, last) of the matrix; y begins at the first.
static inline void product(const Matrix &w, long first, long last, long rows, const float *x, const float *sums, float *y, long ldy,
                    bool add = false) {
    switch (w.kind) {
        case FLOAT: return outputs<FLOAT>(w, first, last, rows, x, sums, y, ldy, add);
        case HALF: return outputs<HALF>(w, first, last, rows, x, sums, y, ldy, add);
        case FOUR: return outputs<FOUR>(w, first, last, rows, x, sums, y, ldy, add);
        default: return outputs<EIGHT>(w, first, last, rows, x, sums, y, ldy, add);
    }
}

// Of each block of 32 of x (rows, in).
static inline void block_sums(const float *x, long rows, long in, float *sums) {
    for (long b = 0; b < rows * (in / BLOCK); b++) {
        vf sum{};
        for (int v = 0; v < BLOCK; v += VL) sum += load(x + b * BLOCK + v);
        sums[b] = sum_of(sum);
    }
}
