// What a decoder does to matrices and rows outside a step: products with few rows, weights unpacked for the machine's own product,
// and the passes over a prompt's rows that would otherwise be several operators each.

#include "products.h"
#include "rows.h"

extern "C" {

// y (rows, out) = x (rows, in) W^T; sums (rows, in / 32) are room.
void few_product(const Matrix *w, const float *x, int64_t rows, float *sums, float *y, int32_t threads) {
    constexpr long PIECE = 64;
    if (w->least) block_sums(x, rows, w->in, sums);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long first = 0; first < w->out; first += PIECE)
        product(*w, first, std::min<long>(first + PIECE, w->out), rows, x, sums, y + first, w->out);
}

// y (out, in) of blocks.
void unpack(const Matrix *w, float *y, int32_t threads) {
    const long blocks = w->in / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long b = 0; b < w->out * blocks; b++)
        for (int v = 0; v < BLOCK / VL; v++) {
            const uint8_t *q = (const uint8_t *)w->weights + b * (w->kind == FOUR ? 16 : 32);
            const vf multiples = w->kind == FOUR ? multiples_at<FOUR>(q, v) : multiples_at<EIGHT>(q, v);
            store(y + b * BLOCK + v * VL, multiples * w->scale[b] + (w->least ? w->least[b] : 0));
        }
}

// Root-mean-square norm of x (rows, dim).
void norm_rows(const float *x, const float *weight, int64_t rows, int64_t dim, float epsilon, float *y, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long r = 0; r < rows; r++) normed(x + r * dim, weight, dim, epsilon, y + r * dim);
}

// x (rows, (H + 2 HK) D) of queries, keys and values, the first two rotated by cos, sin (rows, D / 2), into y (H + 2 HK, rows, D).
void rotate_rows(const float *x, const float *cos, const float *sin, int64_t rows, int64_t turning, int64_t heads, int64_t dim, float *y,
                 int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long r = 0; r < rows; r++)
        for (long h = 0; h < heads; h++) {
            const float *from = x + (r * heads + h) * dim;
            float *to = y + (h * rows + r) * dim;
            if (h < turning) rotated(from, cos + r * dim / 2, sin + r * dim / 2, dim / 2, to);
            else std::memcpy(to, from, dim * sizeof *to);
        }
}

// y (rows, hidden) = silu(gate) up of x (rows, 2 hidden).
void gate_rows(const float *x, int64_t rows, int64_t hidden, float *y, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long r = 0; r < rows; r++)
        for (long c = 0; c < hidden; c += VL)
            store(y + r * hidden + c, silu(load(x + r * 2 * hidden + c)) * load(x + (r * 2 + 1) * hidden + c));
}
}
