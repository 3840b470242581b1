// What the C++ kernels share: vectors of the compiler's own, so that one source serves AVX2, AVX-512 and NEON.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif
constexpr float NONE = -std::numeric_limits<float>::infinity();

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));

template <class V = vf> static inline V load(const void *p) { V x; std::memcpy(&x, p, sizeof x); return x; }
static inline void store(float *p, vf x) { std::memcpy(p, &x, sizeof x); }
static inline vf all(float x) { return x - vf{}; }

// e^x for x <= 0, within 2 ulp; 0 below -87.
static inline vf exp_of(vf x) {
    vf low = all(-87.0f), y = x < low ? low : x;
    vf t = y * 1.44269504088896341f;
    vi n = __builtin_convertvector(t - 0.5f, vi);
    vf whole = __builtin_convertvector(n, vf);
    vf r = y - whole * 0.693359375f + whole * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vi bits = (n + 127) << 23;
    vf scale; std::memcpy(&scale, &bits, sizeof scale);
    return x < low ? vf{} : p * scale;
}

#if defined(__AVX512F__)
static inline float sum_of(vf x) { return _mm512_reduce_add_ps((__m512)x); }
#elif defined(__AVX2__)
static inline float sum_of(vf x) {  // in three additions rather than eight, which is what a short row's product takes
    __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
#else
static inline float sum_of(vf x) { float s = 0; for (int i = 0; i < VL; i++) s += x[i]; return s; }
#endif
static inline float max_of(vf x) { float s = x[0]; for (int i = 1; i < VL; i++) s = std::max(s, x[i]); return s; }
static inline float min_of(vf x) { float s = x[0]; for (int i = 1; i < VL; i++) s = std::min(s, x[i]); return s; }
