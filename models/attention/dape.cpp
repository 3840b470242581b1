// DAPE and DAPE V2 on the CPU in float32, forward and backward: softmax(A + B + f([A; B])) V, f a network over a layer's heads.
//
// B depends on the distance between query and key alone, and so does what it gives f's hidden units: both come as tables. A block
// of queries meets a chunk of keys with all its heads at once; f works on one row of that at a time, as products of small matrices
// with the keys side by side, so that nothing of f leaves the first cache. A convolution sees two keys to either side of those
// that a chunk scores, so chunks overlap by a halo: what it makes of the halo is computed in both, what it scores in one.
//
// Plain C interface: built without PyTorch's headers in seconds, loaded through ctypes.

#include <omp.h>

#include <vector>

#include "tiles.h"
#include "vectors.h"

constexpr int BQ = 16, W = 128;  // queries of a block, columns of a chunk
constexpr int HALO = 2;          // columns on either side of a chunk under a convolution
constexpr float LEAK = 0.01f;

extern "C" {

// All tensors are contiguous float32: q, out (B, H, TQ, D); k, v (B, HK, TK, D).
struct Shape {
    int64_t batch, heads, key_heads, queries, keys, dim, hidden;
    float scale;
    int32_t taps, threads;  // taps: 1, or 3 of a convolution
};

// `bias` (H, TK): of distances 0, 1, ...; the last constant of f is in it. `units` (C, TK + 1): what bias and constant give a
// hidden unit at distances -1, 0, 1, ...; `units_at_0` (C, TK): the same at key 0, behind which there is none. `w1` (taps, C, H), `w2`
// (taps, H, C).
struct Network {
    const float *bias, *units, *units_at_0, *w1, *w2;
};
}

namespace {

// Tables by the key's place relative to the query, so that a row of keys reads a run of memory; 0 beyond what there is.
struct Tables {
    long width, zero;  // the column of distance 0
    std::vector<float> bias, units;

    Tables(const Shape &s, const Network *f) : width((s.keys + HALO + BQ + 2 * W) / VL * VL), zero(s.keys - 1 + HALO) {
        bias.assign(s.heads * width, 0.f), units.assign(s.hidden * width, 0.f);
        if (!f) return;
        for (long h = 0; h < s.heads; h++)
            for (long d = 0; d < s.keys; d++) bias[h * width + zero - d] = f->bias[h * s.keys + d];
        for (long c = 0; c < s.hidden; c++)
            for (long d = -1; d < s.keys; d++) units[c * width + zero - d] = f->units[c * (s.keys + 1) + d + 1];
    }
};

// A chunk of keys: it scores columns [HALO, HALO + useful) under a convolution, [0, useful) else.
template <int TAPS>
struct Chunk {
    static constexpr int halo = TAPS == 1 ? 0 : HALO, useful = W - 2 * halo;
    long start;          // the key of column 0; may be before the first
    int from, to;        // columns that are keys
    Chunk(const Shape &s, long n)
        : start(n * useful - halo), from((int)std::max<long>(0, -start)), to((int)std::min<long>(W, s.keys - start)) {}
    static long count(long keys) { return (keys + useful - 1) / useful; }
    // Of a query: columns up to itself; of them those it scores here end at `last`; how many columns f has to know.
    int seen(long here) const { return (int)std::clamp<long>(here - start + 1, 0, W); }
    static int last(int seen) { return std::min(seen, halo + useful); }
    static int wide(int seen) { return std::min(W, (seen + 2 * (TAPS / 2) + VL - 1) / VL * VL); }
};

// Rows of keys or values as chunks of (D, W), 0 where there is no key.
template <int TAPS>
std::vector<float> packed(const Shape &s, const float *rows) {
    const long chunks = Chunk<TAPS>::count(s.keys), heads = s.batch * s.key_heads;
    std::vector<float> out(heads * chunks * s.dim * W);
#pragma omp parallel for num_threads(s.threads) schedule(static)
    for (long work = 0; work < heads * chunks; work++) {
        const Chunk<TAPS> chunk(s, work % chunks);
        const float *from = rows + work / chunks * s.keys * s.dim;
        float *into = out.data() + work * s.dim * W;
        for (int w = chunk.from; w < chunk.to; w++)
            for (int c = 0; c < s.dim; c++) into[c * W + w] = from[(chunk.start + w) * s.dim + c];
    }
    return out;
}

// Memory that products may read a vector before and behind.
struct Guarded {
    std::vector<float> all;
    explicit Guarded(size_t size) : all(size + 2 * VL) {}
    operator float *() { return all.data() + VL; }
};

// f's hidden units over a row: (C, W) from the row's scores, of stride BQ * W by heads; `wide` columns.
template <int TAPS>
void hidden_units(const Shape &s, const Network &f, const Tables &tables, const Chunk<TAPS> &chunk, long here, int wide,
                  const float *x, float *hidden) {
    for (int c = 0; c < s.hidden; c++) {
        std::memcpy(hidden + c * W, tables.units.data() + c * tables.width + tables.zero + chunk.start - here, wide * 4);
        if (TAPS > 1 && chunk.start <= 0) hidden[c * W - chunk.start] = f.units_at_0[c * s.keys + here];
    }
    for (int t = 0; t < TAPS; t++)
        product(s.hidden, wide, s.heads, f.w1 + t * s.hidden * s.heads, s.heads, 1, x + t - TAPS / 2, BQ * W, hidden, W, true);
    for (int c = 0; c < s.hidden; c++) {
        float *row = hidden + c * W;
        for (int j = 0; j < wide; j += VL) { vf y = load(row + j); store(row + j, y > 0 ? y : y * LEAK); }
        std::fill(row, row + chunk.from, 0.f);
    }
}

// The scores of a row with positions in them, (H, W); -inf where the row does not see or another chunk scores.
template <int TAPS>
void positioned(const Shape &s, const Network &f, const Tables &tables, const Chunk<TAPS> &chunk, long here, int wide, int last,
                const float *x, const float *hidden, float *y) {
    for (int h = 0; h < s.heads; h++) {
        const float *bias = tables.bias.data() + h * tables.width + tables.zero + chunk.start - here;
        for (int j = 0; j < wide; j += VL) store(y + h * W + j, load(x + h * BQ * W + j) + load(bias + j));
    }
    for (int t = 0; t < TAPS; t++)
        product(s.heads, wide, s.hidden, f.w2 + t * s.heads * s.hidden, s.hidden, 1, hidden + t - TAPS / 2, W, y, W, true);
    for (int h = 0; h < s.heads; h++) {
        std::fill(y + h * W, y + h * W + chunk.halo, NONE);
        std::fill(y + h * W + last, y + h * W + wide, NONE);
    }
}

// Scaled scores of all heads, (H, BQ, W); 0 behind a query, where the network must see nothing.
template <int TAPS>
void scores(const Shape &s, const Chunk<TAPS> &chunk, long first, int rows, const float *q, const float *kt, long kt_stride, float *x) {
    const long group = s.heads / s.key_heads;
    for (int h = 0; h < s.heads; h++) {
        float *into = x + h * BQ * W;
        product(rows, W, s.dim, q + h * s.queries * s.dim, s.dim, 1, kt + h / group * kt_stride, W, into, W, false);
        for (int i = 0; i < rows; i++) {
            const int seen = chunk.seen(first + i);
            for (int j = 0; j < W; j += VL) store(into + i * W + j, load(into + i * W + j) * s.scale);
            std::fill(into + i * W + seen, into + (i + 1) * W, 0.f);
        }
    }
}

template <int TAPS>
void forward(const Shape &s, const float *q, const float *k, const float *v, const Network &f, float *out, float *log_sums) {
    const Tables tables(s, &f);
    const std::vector<float> kt = packed<TAPS>(s, k);
    const long blocks = (s.queries + BQ - 1) / BQ, chunks = Chunk<TAPS>::count(s.keys), group = s.heads / s.key_heads;
    const long chunk_size = s.dim * W, block_size = BQ * s.dim;
#pragma omp parallel num_threads(std::clamp<long>(s.batch * blocks, 1, s.threads))
    {
        Guarded x(s.heads * BQ * W), hidden(s.hidden * W), y(s.heads * W);
        std::vector<float> summed(s.heads * block_size), top(s.heads * BQ), sum(s.heads * BQ);
#pragma omp for schedule(dynamic, 1)
        for (long work = 0; work < s.batch * blocks; work++) {
            const long block = blocks - 1 - work / s.batch, b = work % s.batch, from = block * BQ;  // the longest first
            const int rows = (int)std::min<long>(BQ, s.queries - from);
            const long first = s.keys - s.queries + from, at = (b * s.heads) * s.queries + from;
            std::fill(summed.begin(), summed.end(), 0.f), std::fill(sum.begin(), sum.end(), 0.f);
            std::fill(top.begin(), top.end(), NONE);
            for (long n = 0; n < chunks; n++) {
                const Chunk<TAPS> chunk(s, n);
                const int most = chunk.last(chunk.seen(first + rows - 1));
                if (most <= chunk.halo) break;
                scores<TAPS>(s, chunk, first, rows, q + at * s.dim, kt.data() + (b * s.key_heads * chunks + n) * chunk_size,
                             chunks * chunk_size, x);
                for (int i = 0; i < rows; i++) {
                    const int seen = chunk.seen(first + i), last = chunk.last(seen), wide = chunk.wide(seen);
                    float *row = x + i * W;
                    if (last > chunk.halo) {
                        hidden_units<TAPS>(s, f, tables, chunk, first + i, wide, row, hidden);
                        positioned<TAPS>(s, f, tables, chunk, first + i, wide, last, row, hidden, y);
                    }
                    for (int h = 0; h < s.heads; h++) {
                        float *weights = row + h * BQ * W;
                        if (last <= chunk.halo) {
                            std::fill(weights, weights + W, 0.f);
                            continue;
                        }
                        const float *score = y + h * W;
                        float &highest = top[h * BQ + i], &total = sum[h * BQ + i], *into = summed.data() + h * block_size + i * s.dim;
                        vf high = load(score), added{};
                        for (int j = VL; j < wide; j += VL) { vf z = load(score + j); high = z > high ? z : high; }
                        const float now = std::max(highest, max_of(high));
                        if (now != highest) {
                            const float factor = highest == NONE ? 0 : std::exp(highest - now);
                            for (int c = 0; c < s.dim; c += VL) store(into + c, load(into + c) * factor);
                            total *= factor, highest = now;
                        }
                        for (int j = 0; j < wide; j += VL) {
                            vf p = exp_of(load(score + j) - now);
                            store(weights + j, p), added += p;
                        }
                        std::fill(weights + wide, weights + W, 0.f);
                        total += sum_of(added);
                    }
                }
                for (int h = 0; h < s.heads; h++)
                    product(rows, s.dim, most - chunk.halo, x + h * BQ * W + chunk.halo, W, 1,
                            v + ((b * s.key_heads + h / group) * s.keys + chunk.start + chunk.halo) * s.dim, s.dim,
                            summed.data() + h * block_size, s.dim, true);
            }
            for (int h = 0; h < s.heads; h++)
                for (int i = 0; i < rows; i++) {
                    const long row = at + h * s.queries + i;
                    const float per_sum = 1 / sum[h * BQ + i];
                    for (int c = 0; c < s.dim; c++) out[row * s.dim + c] = summed[h * block_size + i * s.dim + c] * per_sum;
                    if (log_sums) log_sums[row] = top[h * BQ + i] + std::log(sum[h * BQ + i]);
                }
        }
    }
}

// Sums of products along keys: out (rows, columns) vectors += A (rows, width) B (columns, width)^T, lanes apart; B's rows lie W apart.
template <int ROWS, int COLUMNS>
static inline void dots(int width, const float *a, long lda, const float *b, float *out, long columns) {
    vf sum[ROWS][COLUMNS];
    for (int i = 0; i < ROWS; i++)
        for (int c = 0; c < COLUMNS; c++) sum[i][c] = load(out + (i * columns + c) * VL);
    for (int j = 0; j < width; j += VL) {
        vf right[COLUMNS];
        for (int c = 0; c < COLUMNS; c++) right[c] = load(b + c * W + j);
        for (int i = 0; i < ROWS; i++) {
            vf left = load(a + i * lda + j);
            for (int c = 0; c < COLUMNS; c++) sum[i][c] += left * right[c];
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int c = 0; c < COLUMNS; c++) store(out + (i * columns + c) * VL, sum[i][c]);
}

static void all_dots(int rows, int columns, int width, const float *a, long lda, const float *b, float *out) {
    constexpr int R = NV == 4 ? 6 : 3, C = 4;  // of 32 registers, of 16
    int c = 0;
    for (; c + C <= columns; c += C) {
        int i = 0;
        for (; i + R <= rows; i += R) dots<R, C>(width, a + i * lda, lda, b + c * W, out + (i * columns + c) * VL, columns);
        for (; i < rows; i++) dots<1, C>(width, a + i * lda, lda, b + c * W, out + (i * columns + c) * VL, columns);
    }
    for (; c < columns; c++)
        for (int i = 0; i < rows; i++) dots<1, 1>(width, a + i * lda, lda, b + c * W, out + (i * columns + c) * VL, columns);
}

// What one thread has found of the gradients that all queries add to.
struct Found {
    std::vector<float> dk, dv, dunits_at_0, dw1, dw2;  // of w1 and w2 as (taps, H, C), lanes apart
    Tables tables;

    explicit Found(const Shape &s)
        : dk(s.key_heads * s.keys * s.dim), dv(dk.size()), dunits_at_0(s.hidden * s.keys), dw1(s.taps * s.hidden * s.heads * VL),
          dw2(dw1.size()), tables(s, nullptr) {}
};

struct Gradients {
    float *q, *k, *v, *bias, *units, *units_at_0, *w1, *w2;
};

template <int TAPS>
void backward(const Shape &s, const float *q, const float *k, const float *v, const Network &f, const float *out,
              const float *log_sums, const float *grad, const Gradients &into) {
    const Tables tables(s, &f);
    const std::vector<float> kt = packed<TAPS>(s, k), vt = packed<TAPS>(s, v);
    const long blocks = (s.queries + BQ - 1) / BQ, chunks = Chunk<TAPS>::count(s.keys), group = s.heads / s.key_heads;
    const long chunk_size = s.dim * W, of_weights = s.hidden * s.heads, head = BQ * W;
    const int threads = (int)std::clamp<long>(blocks, 1, s.threads);
    std::vector<Found> found(threads, Found(s));
#pragma omp parallel num_threads(threads)
    {
        Guarded x(s.heads * head), dx(s.heads * head), hidden(s.hidden * W), dhidden(s.hidden * W), y(s.heads * W), dy(s.heads * W);
        std::vector<float> p(s.heads * head), delta(s.heads * BQ);
        Found &mine = found[omp_get_thread_num()];
        for (long b = 0; b < s.batch; b++) {
            std::fill(mine.dk.begin(), mine.dk.end(), 0.f), std::fill(mine.dv.begin(), mine.dv.end(), 0.f);
#pragma omp for schedule(static, 1)  // not by who is free: sums would depend on it
            for (long block = 0; block < blocks; block++) {
                const long from = block * BQ, first = s.keys - s.queries + from, at = (b * s.heads) * s.queries + from;
                const int rows = (int)std::min<long>(BQ, s.queries - from);
                for (int h = 0; h < s.heads; h++)
                    for (int i = 0; i < rows; i++) {
                        const long row = (at + h * s.queries + i) * s.dim;
                        vf sum{};
                        for (int c = 0; c < s.dim; c += VL) sum += load(out + row + c) * load(grad + row + c);
                        delta[h * BQ + i] = sum_of(sum);
                    }
                for (long n = 0; n < chunks; n++) {
                    const Chunk<TAPS> chunk(s, n);
                    if (chunk.last(chunk.seen(first + rows - 1)) <= chunk.halo) break;
                    const long packed_at = (b * s.key_heads * chunks + n) * chunk_size, stride = chunks * chunk_size;
                    scores<TAPS>(s, chunk, first, rows, q + at * s.dim, kt.data() + packed_at, stride, x);
                    for (int h = 0; h < s.heads; h++)
                        product(rows, W, s.dim, grad + (at + h * s.queries) * s.dim, s.dim, 1,
                                vt.data() + packed_at + h / group * stride, W, dx + h * head, W, false);
                    for (int i = 0; i < rows; i++) {
                        const long here = first + i, place = tables.zero + chunk.start - here;
                        const int seen = chunk.seen(here), last = chunk.last(seen), wide = chunk.wide(seen);
                        float *row = x + i * W;
                        if (last <= chunk.halo) {
                            for (int h = 0; h < s.heads; h++) {
                                std::fill(dx + h * head + i * W, dx + h * head + (i + 1) * W, 0.f);
                                std::fill(p.data() + h * head + i * W, p.data() + h * head + (i + 1) * W, 0.f);
                            }
                            continue;
                        }
                        hidden_units<TAPS>(s, f, tables, chunk, here, wide, row, hidden);
                        positioned<TAPS>(s, f, tables, chunk, here, wide, last, row, hidden, y);
                        for (int h = 0; h < s.heads; h++) {
                            float *weights = p.data() + h * head + i * W, *slope = dx + h * head + i * W;
                            const float log_sum = log_sums[at + h * s.queries + i], less = delta[h * BQ + i];
                            float *bias = mine.tables.bias.data() + h * tables.width + place;
                            for (int j = 0; j < wide; j += VL) {
                                vf weight = exp_of(load(y + h * W + j) - log_sum), d = weight * (load(slope + j) - less);
                                store(weights + j, weight), store(slope + j, d), store(dy + h * W + j, d);
                                store(bias + j, load(bias + j) + d);
                            }
                            std::fill(weights + wide, weights + W, 0.f), std::fill(slope + wide, slope + W, 0.f);
                            std::fill(dy + h * W + wide, dy + (h + 1) * W, 0.f);
                        }
                        for (int t = 0; t < TAPS; t++) {
                            all_dots(s.heads, s.hidden, wide, dy, W, hidden + t - TAPS / 2, mine.dw2.data() + t * of_weights * VL);
                            product(s.hidden, wide, s.heads, f.w2 + t * of_weights, 1, s.hidden, dy - t + TAPS / 2, W, dhidden, W, t > 0);
                        }
                        for (int c = 0; c < s.hidden; c++) {
                            float *d = dhidden + c * W, *units = mine.tables.units.data() + c * tables.width + place;
                            const float *unit = hidden + c * W;
                            for (int j = 0; j < wide; j += VL) { vf z = load(d + j); store(d + j, load(unit + j) > 0 ? z : z * LEAK); }
                            std::fill(d, d + chunk.from, 0.f), std::fill(d + wide, d + W, 0.f);
                            float at_key_0 = 0;  // which has a table of its own
                            if (TAPS > 1 && chunk.start <= 0) std::swap(at_key_0, d[-chunk.start]);
                            for (int j = 0; j < wide; j += VL) store(units + j, load(units + j) + load(d + j));
                            if (TAPS > 1 && chunk.start <= 0) d[-chunk.start] = at_key_0, mine.dunits_at_0[c * s.keys + here] += at_key_0;
                        }
                        float *slope = dx + i * W;
                        for (int t = 0; t < TAPS; t++) {
                            all_dots(s.heads, s.hidden, wide, row + t - TAPS / 2, head, dhidden, mine.dw1.data() + t * of_weights * VL);
                            product(s.heads, wide, s.hidden, f.w1 + t * of_weights, 1, s.heads, dhidden - t + TAPS / 2, W, slope, head, true);
                        }
                        for (int h = 0; h < s.heads; h++) {
                            for (int j = 0; j < wide; j += VL) store(slope + h * head + j, load(slope + h * head + j) * s.scale);
                            std::fill(slope + h * head + seen, slope + h * head + W, 0.f);
                        }
                    }
                    const int to = chunk.seen(first + rows - 1), last = chunk.last(to);
                    for (int h = 0; h < s.heads; h++) {
                        const float *own = q + (at + h * s.queries) * s.dim, *g = grad + (at + h * s.queries) * s.dim;
                        const long key = (h / group) * s.keys + chunk.start, keys_of = b * s.key_heads * s.keys;
                        const float *slope = dx + h * head + chunk.from, *weights = p.data() + h * head + chunk.halo;
                        product(rows, s.dim, to - chunk.from, slope, W, 1, k + (keys_of + key + chunk.from) * s.dim, s.dim,
                                into.q + (at + h * s.queries) * s.dim, s.dim, true);
                        product(to - chunk.from, s.dim, rows, slope, 1, W, own, s.dim, mine.dk.data() + (key + chunk.from) * s.dim, s.dim,
                                true);
                        product(last - chunk.halo, s.dim, rows, weights, 1, W, g, s.dim, mine.dv.data() + (key + chunk.halo) * s.dim,
                                s.dim, true);
                    }
                }
            }
            const long size = s.key_heads * s.keys * s.dim;
#pragma omp for schedule(static)
            for (long e = 0; e < size; e++) {
                float of_k = 0, of_v = 0;
                for (const Found &some : found) of_k += some.dk[e], of_v += some.dv[e];
                into.k[b * size + e] = of_k, into.v[b * size + e] = of_v;
            }
        }
    }
    for (const Found &some : found) {
        const Tables &of = some.tables;
        for (long h = 0; h < s.heads; h++)
            for (long d = 0; d < s.keys; d++) into.bias[h * s.keys + d] += of.bias[h * of.width + of.zero - d];
        for (long c = 0; c < s.hidden; c++) {
            for (long d = -1; d < s.keys; d++) into.units[c * (s.keys + 1) + d + 1] += of.units[c * of.width + of.zero - d];
            for (long d = 0; d < s.keys; d++) into.units_at_0[c * s.keys + d] += some.dunits_at_0[c * s.keys + d];
        }
        for (long t = 0; t < TAPS; t++)
            for (long h = 0; h < s.heads; h++)
                for (long c = 0; c < s.hidden; c++) {
                    const long at = (t * s.heads + h) * s.hidden + c;
                    into.w1[(t * s.hidden + c) * s.heads + h] += sum_of(load(some.dw1.data() + at * VL));
                    into.w2[at] += sum_of(load(some.dw2.data() + at * VL));
                }
    }
}

}  // namespace

extern "C" {

// `log_sums` (B, H, TQ): of a row's exponentials, for the backward pass; null where nobody will ask for gradients.
void dape_forward(const Shape *s, const float *q, const float *k, const float *v, const Network *f, float *out, float *log_sums) {
    s->taps == 1 ? forward<1>(*s, q, k, v, *f, out, log_sums) : forward<3>(*s, q, k, v, *f, out, log_sums);
}

// Gradients come zeroed, of the shapes of what they are of.
void dape_backward(const Shape *s, const float *q, const float *k, const float *v, const Network *f, const float *out,
                   const float *log_sums, const float *grad, const Gradients *into) {
    s->taps == 1 ? backward<1>(*s, q, k, v, *f, out, log_sums, grad, *into)
                 : backward<3>(*s, q, k, v, *f, out, log_sums, grad, *into);
}
}
