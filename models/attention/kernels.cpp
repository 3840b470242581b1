// Fused attention on the CPU in float32: softmax and Self-Adjust Softmax over the keys that a pattern lets a query see.
//
// A query at position a sees the keys of its window, a - window < j <= a, and of the keys before that window those that are
// kept for everybody (initial tokens, separators). The kept keys are gathered once, so that both parts are runs of memory and
// what a row sees of a block of keys is a range. No scores beyond one block of queries by one block of keys exist at once.
//
// Plain C interface: built without PyTorch's headers in seconds, loaded through ctypes.

#include <vector>

#include "tiles.h"
#include "vectors.h"

constexpr int BQ = 64, BK = 64;

// Rows of keys or values as blocks of (D, BK), columns beyond the last row 0.
static void transpose(const float *rows, long count, int d, float *out) {
    for (long start = 0; start < count; start += BK, out += (long)d * BK) {
        int n = (int)std::min<long>(BK, count - start);
        for (int c = 0; c < d; c++) {
            for (int j = 0; j < n; j++) out[c * BK + j] = rows[(start + j) * d + c];
            for (int j = n; j < BK; j++) out[c * BK + j] = 0;
        }
    }
}

extern "C" {

enum Form { SOFTMAX = 0, SELF_ADJUST = 1, NORMALISED = 2 };

// All tensors are contiguous float32: q, out (B, H, TQ, D); k, v (B, HK, TK, D). `kept`: for each batch `kept_count[b]` ascending
// positions out of a row of `kept_stride`. `visible`: (B, TK) bytes, 0 hides a key; may be null.
struct Shape {
    int64_t batch, heads, key_heads, queries, keys, dim;
    int64_t window;  // keys that a query sees up to itself
    int64_t kept_stride;
    const int32_t *kept, *kept_count;
    const uint8_t *visible;
    float scale, epsilon;
    int32_t form, threads;
};

int attention_abi() { return 1; }
}

namespace {

// One part of the keys of a (batch, key head): all of them, or those that are kept.
struct Part {
    const float *k, *v;        // (count, D)
    const float *kt, *vt;      // blocks of (D, BK); vt may be null
    const int32_t *position;   // null: 0, 1, 2, ...
    long count;
    const uint8_t *visible;    // by position

    long at(long index) const { return position ? position[index] : index; }
    long before(long bound) const {  // how many lie before a position
        if (bound <= 0) return 0;
        if (!position) return std::min(bound, count);
        return std::lower_bound(position, position + count, (int32_t)std::min<long>(bound, INT32_MAX)) - position;
    }
};

struct Prepared {
    std::vector<float> kt, vt, kept_k, kept_v, kept_kt, kept_vt;
    std::vector<Part> parts;  // two for each (batch, key head)
};

inline long blocks(long n) { return (n + BK - 1) / BK; }

Prepared prepare(const Shape &s, const float *k, const float *v, bool backward) {
    Prepared p;
    const long heads = s.batch * s.key_heads, size = blocks(s.keys) * BK * s.dim;
    long most = 0;
    for (long b = 0; b < s.batch; b++) most = std::max<long>(most, s.kept_count[b]);
    const long kept_rows = most * s.dim, kept_size = blocks(most) * BK * s.dim;
    p.kt.resize(heads * size);
    p.kept_k.resize(heads * kept_rows), p.kept_v.resize(heads * kept_rows), p.kept_kt.resize(heads * kept_size);
    if (backward) p.vt.resize(heads * size), p.kept_vt.resize(heads * kept_size);
    p.parts.resize(2 * heads);
#pragma omp parallel for num_threads(s.threads) schedule(static)
    for (long h = 0; h < heads; h++) {
        const long b = h / s.key_heads, count = s.kept_count[b];
        const float *kh = k + h * s.keys * s.dim, *vh = v + h * s.keys * s.dim;
        const int32_t *where = s.kept + b * s.kept_stride;
        const uint8_t *visible = s.visible ? s.visible + b * s.keys : nullptr;
        float *gk = p.kept_k.data() + h * kept_rows, *gv = p.kept_v.data() + h * kept_rows;
        for (long i = 0; i < count; i++) {
            std::memcpy(gk + i * s.dim, kh + where[i] * s.dim, s.dim * 4);
            std::memcpy(gv + i * s.dim, vh + where[i] * s.dim, s.dim * 4);
        }
        float *kt = p.kt.data() + h * size, *gt = p.kept_kt.data() + h * kept_size;
        transpose(kh, s.keys, s.dim, kt);
        transpose(gk, count, s.dim, gt);
        float *vt = nullptr, *gvt = nullptr;
        if (backward) {
            vt = p.vt.data() + h * size, gvt = p.kept_vt.data() + h * kept_size;
            transpose(vh, s.keys, s.dim, vt);
            transpose(gv, count, s.dim, gvt);
        }
        p.parts[2 * h] = {gk, gv, gt, gvt, where, count, visible};
        p.parts[2 * h + 1] = {kh, vh, kt, vt, nullptr, s.keys, visible};
    }
    return p;
}

// What the rows of a block of queries see of a part: keys [begin, end), and of those each row its own range.
struct Seen {
    long begin, end;
    long row_begin[BQ], row_end[BQ];
};

Seen seen_by(const Shape &s, const Part &part, bool kept, long first, int rows) {
    Seen seen{std::numeric_limits<long>::max(), 0, {}, {}};
    for (int i = 0; i < rows; i++) {
        const long here = first + i, start = here - s.window + 1;
        seen.row_begin[i] = kept ? 0 : part.before(start);
        seen.row_end[i] = kept ? part.before(start) : part.before(here + 1);
        if (seen.row_begin[i] < seen.row_end[i]) {
            seen.begin = std::min(seen.begin, seen.row_begin[i]);
            seen.end = std::max(seen.end, seen.row_end[i]);
        }
    }
    return seen;
}

// Scaled scores of a block, -inf where a row does not see.
void scores(const Shape &s, const Part &part, const Seen &seen, long block, int rows, const float *q, float *x) {
    const long start = block * BK;
    product(rows, BK, s.dim, q, s.dim, 1, part.kt + block * s.dim * BK, BK, x, BK, false);
    for (int i = 0; i < rows; i++) {
        float *row = x + i * BK;
        for (int j = 0; j < BK; j += VL) store(row + j, load(row + j) * s.scale);
        const long from = std::clamp<long>(seen.row_begin[i] - start, 0, BK), to = std::clamp<long>(seen.row_end[i] - start, from, BK);
        std::fill(row, row + from, NONE);
        std::fill(row + to, row + BK, NONE);
        if (part.visible)
            for (long j = from; j < to; j++)
                if (!part.visible[part.at(start + j)]) row[j] = NONE;
    }
}

struct Running {  // of a row, over the keys so far
    float top = NONE, sum = 0, least = -NONE, at_least = 0, at_top = 0;
};

// Scores become weights relative to the new maximum; what was summed is scaled to it.
template <int FORM>
void weigh(int rows, int dim, float *x, float *px, Running *running, float *summed, float *weighted) {
    for (int i = 0; i < rows; i++) {
        float *row = x + i * BK, *out = px + i * BK;
        Running &r = running[i];
        vf top = load(row);
        for (int j = VL; j < BK; j += VL) { vf y = load(row + j); top = y > top ? y : top; }
        const float most = std::max(r.top, max_of(top)), base = most == NONE ? 0 : most;
        if (FORM == NORMALISED && most != NONE) {
            vf least = all(-NONE);
            for (int j = 0; j < BK; j += VL) { vf y = load(row + j); y = y == NONE ? all(-NONE) : y; least = y < least ? y : least; }
            const float low = std::min(r.least, min_of(least));
            vf lows{}, tops{};
            for (int j = 0; j < BK; j += VL) {
                vf y = load(row + j);
                lows += y == low ? all(1) : vf{}, tops += y == most ? all(1) : vf{};
            }
            r.at_least = sum_of(lows) + (low == r.least ? r.at_least : 0), r.at_top = sum_of(tops) + (most == r.top ? r.at_top : 0);
            r.least = low;
        }
        if (most != r.top) {
            const float factor = r.top == NONE ? 0 : std::exp(r.top - most);
            r.sum *= factor;
            for (int c = 0; c < dim; c += VL) {
                if (FORM != SELF_ADJUST) store(summed + i * dim + c, load(summed + i * dim + c) * factor);
                if (FORM != SOFTMAX) store(weighted + i * dim + c, load(weighted + i * dim + c) * factor);
            }
            r.top = most;
        }
        vf sum{};
        for (int j = 0; j < BK; j += VL) {
            vf y = load(row + j), p = exp_of(y - base);
            sum += p;
            if (FORM != SOFTMAX) store(out + j, y == NONE ? vf{} : p * y);
            if (FORM != SELF_ADJUST) store(row + j, p);
        }
        r.sum += sum_of(sum);
    }
}

template <int FORM>
void forward(const Shape &s, const float *q, const Prepared &prepared, float *out, float *stats, float *plain) {
    const long heads = s.batch * s.heads, query_blocks = (s.queries + BQ - 1) / BQ, group = s.heads / s.key_heads;
    const int dim = s.dim;
#pragma omp parallel num_threads(s.threads)
    {
        std::vector<float> x(BQ * BK), px(BQ * BK), summed(BQ * dim), weighted(BQ * dim);
#pragma omp for schedule(dynamic, 1)
        for (long work = 0; work < heads * query_blocks; work++) {
            const long block = query_blocks - 1 - work / heads, head = work % heads, first = block * BQ;  // the longest first
            const int rows = (int)std::min<long>(BQ, s.queries - first);
            const float *here = q + (head * s.queries + first) * dim;
            const long key_head = (head / s.heads) * s.key_heads + (head % s.heads) / group;
            Running running[BQ];
            std::fill(summed.begin(), summed.end(), 0.f), std::fill(weighted.begin(), weighted.end(), 0.f);
            for (int which = 0; which < 2; which++) {
                const Part &part = prepared.parts[2 * key_head + which];
                const Seen seen = seen_by(s, part, which == 0, s.keys - s.queries + first, rows);
                if (seen.begin >= seen.end) continue;
                for (long b = seen.begin / BK; b < blocks(seen.end); b++) {
                    const int keys = (int)std::min<long>(BK, part.count - b * BK);
                    scores(s, part, seen, b, rows, here, x.data());
                    weigh<FORM>(rows, dim, x.data(), px.data(), running, summed.data(), weighted.data());
                    const float *v = part.v + b * BK * dim;
                    if (FORM != SELF_ADJUST) product(rows, dim, keys, x.data(), BK, 1, v, dim, summed.data(), dim, true);
                    if (FORM != SOFTMAX) product(rows, dim, keys, px.data(), BK, 1, v, dim, weighted.data(), dim, true);
                }
            }
            for (int i = 0; i < rows; i++) {
                const Running &r = running[i];
                const long row = head * s.queries + first + i;
                const float per_sum = r.sum > 0 ? 1 / r.sum : 0;
                const float low = std::min(r.least, 0.f), high = std::max(r.top, 0.f), spread = high - low + s.epsilon;
                for (int c = 0; c < dim; c++) {
                    const float p = summed[i * dim + c] * per_sum, xp = weighted[i * dim + c] * per_sum;
                    out[row * dim + c] = r.sum <= 0 ? 0 : FORM == SOFTMAX ? p : FORM == SELF_ADJUST ? xp : (xp - low * p) / spread;
                    if (FORM == NORMALISED && plain) plain[row * dim + c] = p;
                }
                if (stats) {
                    const float kept[5] = {r.top, r.sum, r.least, r.at_top, r.at_least};
                    std::copy(kept, kept + 5, stats + row * 5);
                }
            }
        }
    }
}

// What the gradient of a row needs: the weight of a key is p (slope x + offset), the gradient of its score
// p (dy (slope x + gain) - delta), and what the row's least and greatest score add.
struct Row {
    float top, per_sum, slope, offset, gain, delta, least, most, at_least, at_most;
};

template <int FORM>
Row row_of(const Shape &s, const float *stats, const float *out, const float *grad, const float *plain) {
    float delta = 0, plain_delta = 0;
    for (int c = 0; c < s.dim; c++) {
        delta += grad[c] * out[c];
        if (FORM == NORMALISED) plain_delta += grad[c] * plain[c];
    }
    Row r{stats[0] == NONE ? 0 : stats[0], stats[1] > 0 ? 1 / stats[1] : 0, 0, 1, 1, delta, stats[2], stats[0], 0, 0};
    if (FORM == SELF_ADJUST) r.slope = 1, r.offset = 0;
    if (FORM == NORMALISED) {
        const float low = std::min(stats[2], 0.f), high = std::max(stats[0], 0.f), spread = high - low + s.epsilon;
        r.slope = 1 / spread, r.offset = -low / spread, r.gain = (1 - low) / spread;
        if (stats[2] < 0) r.at_least = (delta - plain_delta) / spread / stats[4];
        if (stats[0] > 0) r.at_most = -delta / spread / stats[3];
    }
    return r;
}

template <int FORM>
void backward(const Shape &s, const float *q, const Prepared &prepared, const float *out, const float *stats, const float *plain,
              const float *grad, float *dq, float *dk, float *dv) {
    const long heads = s.batch * s.heads, group = s.heads / s.key_heads;
    const int dim = s.dim;
#pragma omp parallel num_threads(s.threads)
    {
        std::vector<float> x(BQ * BK), dy(BQ * BK), y(BQ * BK), kept_dk, kept_dv;
#pragma omp for schedule(dynamic, 1)
        for (long head = 0; head < heads; head++) {
            const long key_head = (head / s.heads) * s.key_heads + (head % s.heads) / group;
            for (int which = 0; which < 2; which++) {
                const Part &part = prepared.parts[2 * key_head + which];
                float *into_k = dk + head * s.keys * dim, *into_v = dv + head * s.keys * dim;
                if (which == 0) {
                    kept_dk.assign(part.count * dim, 0.f), kept_dv.assign(part.count * dim, 0.f);
                    into_k = kept_dk.data(), into_v = kept_dv.data();
                }
                for (long first = 0; first < s.queries; first += BQ) {
                    const int rows = (int)std::min<long>(BQ, s.queries - first);
                    const Seen seen = seen_by(s, part, which == 0, s.keys - s.queries + first, rows);
                    if (seen.begin >= seen.end) continue;
                    const long at = head * s.queries + first;
                    const float *here = q + at * dim, *g = grad + at * dim;
                    Row row[BQ];
                    for (int i = 0; i < rows; i++)
                        row[i] = row_of<FORM>(s, stats + (at + i) * 5, out + (at + i) * dim, g + i * dim,
                                              plain ? plain + (at + i) * dim : nullptr);
                    for (long b = seen.begin / BK; b < blocks(seen.end); b++) {
                        const int keys = (int)std::min<long>(BK, part.count - b * BK);
                        scores(s, part, seen, b, rows, here, x.data());
                        product(rows, BK, dim, g, dim, 1, part.vt + b * dim * BK, BK, dy.data(), BK, false);
                        for (int i = 0; i < rows; i++) {
                            const Row &r = row[i];
                            for (int j = i * BK; j < (i + 1) * BK; j += VL) {
                                vf z = load(x.data() + j), p = exp_of(z - r.top) * r.per_sum, d = load(dy.data() + j);
                                vf score = z == NONE ? vf{} : z;
                                store(y.data() + j, p * (score * r.slope + r.offset));
                                vf dx = p * (d * (score * r.slope + r.gain) - r.delta);
                                if (FORM == NORMALISED) {
                                    dx += z == r.least ? all(r.at_least) : vf{};
                                    dx += z == r.most ? all(r.at_most) : vf{};
                                    dx = z == NONE ? vf{} : dx;
                                }
                                store(x.data() + j, dx * s.scale);
                            }
                        }
                        product(rows, dim, keys, x.data(), BK, 1, part.k + b * BK * dim, dim, dq + at * dim, dim, true);
                        product(keys, dim, rows, x.data(), 1, BK, here, dim, into_k + b * BK * dim, dim, true);
                        product(keys, dim, rows, y.data(), 1, BK, g, dim, into_v + b * BK * dim, dim, true);
                    }
                }
                if (which == 0)
                    for (long i = 0; i < part.count; i++)
                        for (int c = 0; c < dim; c++) {
                            dk[(head * s.keys + part.position[i]) * dim + c] += kept_dk[i * dim + c];
                            dv[(head * s.keys + part.position[i]) * dim + c] += kept_dv[i * dim + c];
                        }
            }
        }
    }
}

}  // namespace

extern "C" {

// `stats` (B, H, TQ, 5) and `plain` (B, H, TQ, D) are what `attention_backward` wants; null where nobody will ask for gradients.
// `plain`, the softmax's own output, is needed by the normalised form alone.
void attention_forward(const Shape *s, const float *q, const float *k, const float *v, float *out, float *stats, float *plain) {
    const Prepared prepared = prepare(*s, k, v, false);
    switch (s->form) {
        case SOFTMAX: return forward<SOFTMAX>(*s, q, prepared, out, stats, plain);
        case SELF_ADJUST: return forward<SELF_ADJUST>(*s, q, prepared, out, stats, plain);
        default: return forward<NORMALISED>(*s, q, prepared, out, stats, plain);
    }
}

// dq (B, H, TQ, D), dk and dv (B, H, TK, D) come zeroed; those of keys are summed over the heads of a group by the caller.
void attention_backward(const Shape *s, const float *q, const float *k, const float *v, const float *out, const float *stats,
                        const float *plain, const float *grad, float *dq, float *dk, float *dv) {
    const Prepared prepared = prepare(*s, k, v, true);
    switch (s->form) {
        case SOFTMAX: return backward<SOFTMAX>(*s, q, prepared, out, stats, plain, grad, dq, dk, dv);
        case SELF_ADJUST: return backward<SELF_ADJUST>(*s, q, prepared, out, stats, plain, grad, dq, dk, dv);
        default: return backward<NORMALISED>(*s, q, prepared, out, stats, plain, grad, dq, dk, dv);
    }
}
}
