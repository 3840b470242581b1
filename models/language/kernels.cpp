// Products with weights that stay in memory as blocks of 32 along a row: w = d q + m, q of 4 bits or 8, d and m float32.
//
// A few rows of activations, as in decoding, read every weight once and are bound by memory: fewer bits are fewer bytes. For many
// rows weights are made float32 again, a matrix at a time, for the machine's own product.

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif
constexpr long BLOCK = 32;
constexpr int GROUP = 4;  // rows of activations that share a weight while it is in registers

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint8_t vu8 __attribute__((vector_size(VL)));
typedef int8_t vi8 __attribute__((vector_size(VL)));

template <class V> static inline V load(const void *p) { V x; std::memcpy(&x, p, sizeof x); return x; }
static inline float sum_of(vf x) { float s = 0; for (int i = 0; i < VL; i++) s += x[i]; return s; }

// Vector number v of a block's 32 weights. Of 4 bits: byte i holds weights i and i + 16.
template <int BITS> static inline vf weights_at(const uint8_t *q, int v, float d, float m) {
    if (BITS == 8) return __builtin_convertvector(__builtin_convertvector(load<vi8>(q + v * VL), vi), vf) * d + m;
    constexpr int HALF = 16 / VL;
    vi bytes = __builtin_convertvector(load<vu8>(q + (v % HALF) * VL), vi);
    return __builtin_convertvector(v < HALF ? bytes & 15 : bytes >> 4, vf) * d + m;
}

template <int BITS, int ROWS>
static inline void dot(const float *x, const uint8_t *q, const float *d, const float *m, float *y, long in, long out) {
    vf sum[ROWS][2] = {};
    for (long b = 0; b < in / BLOCK; b++, q += BITS * 4) {
        const float least = m ? m[b] : 0;
        for (int v = 0; v < BLOCK / VL; v++) {
            const vf w = weights_at<BITS>(q, v, d[b], least);
            for (int r = 0; r < ROWS; r++) sum[r][v % 2] += w * load<vf>(x + r * in + b * BLOCK + v * VL);
        }
    }
    for (int r = 0; r < ROWS; r++) y[r * out] = sum_of(sum[r][0] + sum[r][1]);
}

template <int BITS>
static void product(const float *x, const uint8_t *q, const float *d, const float *m, float *y, long rows, long in, long out,
                    int threads) {
    const long blocks = in / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long o = 0; o < out; o++) {
        const uint8_t *row = q + o * blocks * BITS * 4;
        const float *scale = d + o * blocks, *least = m ? m + o * blocks : nullptr;
        long r = 0;
        for (; r + GROUP <= rows; r += GROUP) dot<BITS, GROUP>(x + r * in, row, scale, least, y + r * out + o, in, out);
        for (; r < rows; r++) dot<BITS, 1>(x + r * in, row, scale, least, y + r * out + o, in, out);
    }
}

template <int BITS>
static void dense(const uint8_t *q, const float *d, const float *m, float *w, long in, long out, int threads) {
    const long blocks = in / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long o = 0; o < out; o++)
        for (long b = o * blocks; b < (o + 1) * blocks; b++)
            for (int v = 0; v < BLOCK / VL; v++) {
                const vf values = weights_at<BITS>(q + b * BITS * 4, v, d[b], m ? m[b] : 0);
                std::memcpy(w + b * BLOCK + v * VL, &values, sizeof values);
            }
}

extern "C" {

// y (rows, out) = x (rows, in) W^T; q (out, in / 32, 4 or 32 / 8 * bits bytes), d and m (out, in / 32), m may be null.
void quantised_product(const float *x, const uint8_t *q, const float *d, const float *m, float *y, int64_t rows, int64_t in,
                       int64_t out, int32_t bits, int32_t threads) {
    if (bits == 4) product<4>(x, q, d, m, y, rows, in, out, threads);
    else product<8>(x, q, d, m, y, rows, in, out, threads);
}

// w (out, in)
void quantised_dense(const uint8_t *q, const float *d, const float *m, float *w, int64_t in, int64_t out, int32_t bits,
                     int32_t threads) {
    if (bits == 4) dense<4>(q, d, m, w, in, out, threads);
    else dense<8>(q, d, m, w, in, out, threads);
}
}
