// Products of small matrices in float32, in tiles that fill the registers: what attention's kernels share.

#pragma once

#include "vectors.h"

#if defined(__AVX512F__) || !defined(__AVX2__)
constexpr int MR = 6, NV = 4;
#else
constexpr int MR = 6, NV = 2;
#endif

// C (rows x vectors * VL) += or = A (rows x depth, any strides) B (depth x ...).
template <int ROWS, int VECTORS>
static inline void tile(int depth, const float *a, long a_row, long a_col, const float *b, long ldb, float *c, long ldc,
                        bool add) {
    vf sum[ROWS][VECTORS];
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < VECTORS; v++) sum[i][v] = add ? load(c + i * ldc + v * VL) : vf{};
    for (int k = 0; k < depth; k++) {
        vf right[VECTORS];
        for (int v = 0; v < VECTORS; v++) right[v] = load(b + k * ldb + v * VL);
        for (int i = 0; i < ROWS; i++) {
            vf left = all(a[i * a_row + k * a_col]);
            for (int v = 0; v < VECTORS; v++) sum[i][v] += left * right[v];
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < VECTORS; v++) store(c + i * ldc + v * VL, sum[i][v]);
}

template <int VECTORS>
static void columns(int rows, int depth, const float *a, long a_row, long a_col, const float *b, long ldb, float *c, long ldc,
                    bool add) {
    int i = 0;
    for (; i + MR <= rows; i += MR) tile<MR, VECTORS>(depth, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, add);
    for (; i + 3 <= rows; i += 3) tile<3, VECTORS>(depth, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, add);
    for (; i + 2 <= rows; i += 2) tile<2, VECTORS>(depth, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, add);
    for (; i < rows; i++) tile<1, VECTORS>(depth, a + i * a_row, a_row, a_col, b, ldb, c + i * ldc, ldc, add);
}

// C (rows x width) += or = A B; the width is a multiple of VL.
static void product(int rows, int width, int depth, const float *a, long a_row, long a_col, const float *b, long ldb, float *c,
                    long ldc, bool add) {
    int j = 0;
    for (; j + NV * VL <= width; j += NV * VL) columns<NV>(rows, depth, a, a_row, a_col, b + j, ldb, c + j, ldc, add);
    for (; j < width; j += VL) columns<1>(rows, depth, a, a_row, a_col, b + j, ldb, c + j, ldc, add);
}
