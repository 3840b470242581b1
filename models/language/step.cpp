// One step of a Llama-family decoder: a token for each of a few sequences, from the embedding to the logits, in one team of
// threads.
//
// A token's products are bound by reading the weights; what else is done per layer is a few thousand operations, and calling an
// operator for each of them takes longer than they do. Threads meet at a barrier of their own after each part: one of OpenMP's puts
// them to sleep where the process asks for passive waiting, and waking takes longer than a part. Work is taken in small pieces as
// threads come, for the machine may be shared.

#include <atomic>
#include <omp.h>
#include <thread>
#include <vector>

#include "products.h"
#include "rows.h"

namespace {

constexpr long OUTPUTS = 16;  // of a matrix, a piece of work
constexpr long HEADS = 4;     // of a group, that share an entry in registers
constexpr long KEYS = 256;    // of a sequence, a piece of work: whatever else is decoded, its sums are in this order

struct Layer {
    const float *norm, *ffn_norm;
    Matrix qkv, out, gate_up, down;
};

// Keys and values (HK, room, D) of a sequence; seen are entries [0, kept) and [start, end), and the last is the token's own,
// yet to be written.
struct Cache {
    void *k, *v;
    int64_t room, kept, start, end;
    long seen() const { return kept + end - start; }
    long pieces() const { return (seen() + KEYS - 1) / KEYS; }
    long at(long i) const { return i < kept ? i : start + i - kept; }
};

struct Model {
    const Layer *layers;
    const float *norm;
    Matrix head;
    int64_t count, dim, hidden, heads, key_heads, head_size;
    float epsilon;
    int32_t half, threads;  // `half`: caches are bfloat16
};

class Barrier {
  public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait() {
        const long round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (long spins = 0; round_.load(std::memory_order_acquire) == round; spins++)
            if (spins > SPINS) std::this_thread::yield();
    }

  private:
    static constexpr long SPINS = 2000;
    const int threads_;
    std::atomic<long> arrived_{0}, round_{0};
};

inline void write(float *p, const float *x, long n) { std::memcpy(p, x, n * sizeof *x); }
inline void write(uint16_t *p, const float *x, long n) { for (long i = 0; i < n; i++) p[i] = half_of(x[i]); }

// The heads of a group over keys [begin, end) of those seen: greatest scores and sums (group,), values weighted (group, D), not yet
// divided by the sums.
template <class E>
void attended_part(const Cache &cache, const E *k, const E *v, const float *q, long group, long dim, long begin, long end, float *tops,
                   float *sums, float *out) {
    const float scale = 1 / std::sqrt((float)dim);
    const long count = end - begin, stride = (count + VL - 1) / VL * VL;
    std::vector<float> scores(group * stride, NONE);
    for (long i = 0; i < count; i++) {
        const E *row = k + cache.at(begin + i) * dim;
        for (long g = 0; g < group; g++) {
            vf sum{};
            for (long c = 0; c < dim; c += VL) sum += load(q + g * dim + c) * value_at(row + c);
            scores[g * stride + i] = sum_of(sum) * scale;
        }
    }
    for (long g = 0; g < group; g++) {
        float *x = scores.data() + g * stride;
        vf most = load(x), sum{};
        for (long i = VL; i < count; i += VL) { const vf y = load(x + i); most = y > most ? y : most; }
        tops[g] = max_of(most);
        for (long i = 0; i < count; i += VL) {
            const vf p = exp_of(load(x + i) - tops[g]);
            store(x + i, p);
            sum += p;
        }
        sums[g] = sum_of(sum);
    }
    for (long c = 0; c < dim; c += VL)
        for (long g = 0; g < group; g += HEADS) {
            const long some = std::min<long>(HEADS, group - g);
            vf sum[HEADS] = {};
            for (long i = 0; i < count; i++) {
                const vf value = value_at(v + cache.at(begin + i) * dim + c);
                for (long h = 0; h < HEADS; h++) sum[h] += value * scores[std::min(g + h, group - 1) * stride + i];
            }
            for (long h = 0; h < some; h++) store(out + (g + h) * dim + c, sum[h]);
        }
}

class Step {
  public:
    Step(const Model &model, long rows, float *x, const Cache *caches, const float *cos, const float *sin, float *logits)
        : m_(model), rows_(rows), x_(x), caches_(caches), cos_(cos), sin_(sin), logits_(logits), group_(model.heads / model.key_heads),
          width_((model.heads + 2 * model.key_heads) * model.head_size), qkv_(rows * width_), 
          hidden_(rows * model.hidden), taken_(5 * model.count + 1) {
        long most = 0;
        for (long l = 0; l < m_.count; l++) most = std::max(most, pieces(caches + l * rows));
        parts_.resize(most * m_.key_heads * group_ * (m_.head_size + 2));
    }

    void run() {
#pragma omp parallel num_threads(m_.threads)
        {
#pragma omp single
            barrier_ = new Barrier(omp_get_num_threads());
            Thread thread(std::max(std::max(m_.dim, m_.hidden), m_.heads * m_.head_size), rows_);
            for (long l = 0; l < m_.count; l++) layer(m_.layers[l], caches_ + l * rows_, 5 * l, thread);
            norm(m_.norm, thread.x.data());
            multiply(m_.head, 5 * m_.count, thread, thread.x.data(), logits_, false);
        }
        delete barrier_;
    }

  private:
    struct Thread {
        std::vector<float> x, sums, gate;
        Thread(long width, long rows) : x(width * rows), sums(width / BLOCK * rows), gate(2 * rows * OUTPUTS) {}
    };

    long pieces(const Cache *caches) const {
        long found = 0;
        for (long r = 0; r < rows_; r++) found += caches[r].pieces();
        return found;
    }

    void norm(const float *weight, float *out) const {
        for (long r = 0; r < rows_; r++) normed(x_ + r * m_.dim, weight, m_.dim, m_.epsilon, out + r * m_.dim);
    }

    // Work of a phase, piece by piece, as threads come for it.
    template <class F> void shared(long phase, long count, F work) {
        for (long i; (i = taken_[phase].fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
    }

    void multiply(const Matrix &w, long phase, Thread &thread, const float *x, float *y, bool add) {
        if (w.least) block_sums(x, rows_, w.in, thread.sums.data());
        shared(phase, (w.out + OUTPUTS - 1) / OUTPUTS, [&](long i) {
            const long first = i * OUTPUTS, last = std::min(first + OUTPUTS, (long)w.out);
            product(w, first, last, rows_, x, thread.sums.data(), y + first, w.out, add);
        });
    }

    void layer(const Layer &layer, const Cache *caches, long phase, Thread &thread) {
        float *x = thread.x.data();
        norm(layer.norm, x);
        multiply(layer.qkv, phase, thread, x, qkv_.data(), false);
        barrier_->wait();
        shared(phase + 1, pieces(caches) * m_.key_heads, [&](long i) {
            if (m_.half) attend<uint16_t>(caches, i / m_.key_heads, i % m_.key_heads);
            else attend<float>(caches, i / m_.key_heads, i % m_.key_heads);
        });
        barrier_->wait();
        merge(caches, x);
        multiply(layer.out, phase + 2, thread, x, x_, true);
        barrier_->wait();
        norm(layer.ffn_norm, x);
        feed(layer.gate_up, phase + 3, thread);
        barrier_->wait();
        multiply(layer.down, phase + 4, thread, hidden_.data(), x_, true);
        barrier_->wait();
    }

    void feed(const Matrix &w, long phase, Thread &thread) {
        if (w.least) block_sums(thread.x.data(), rows_, w.in, thread.sums.data());
        shared(phase, (m_.hidden + OUTPUTS - 1) / OUTPUTS, [&](long i) {
            const long first = i * OUTPUTS, last = std::min(first + OUTPUTS, (long)m_.hidden);
            float *gate = thread.gate.data(), *up = gate + rows_ * OUTPUTS;
            product(w, first, last, rows_, thread.x.data(), thread.sums.data(), gate, OUTPUTS);
            product(w, m_.hidden + first, m_.hidden + last, rows_, thread.x.data(), thread.sums.data(), up, OUTPUTS);
            for (long r = 0; r < rows_; r++)
                for (long c = 0; c < last - first; c += VL)
                    store(hidden_.data() + r * m_.hidden + first + c, silu(load(gate + r * OUTPUTS + c)) * load(up + r * OUTPUTS + c));
        });
    }

    float *part(long piece, long key_head) { return parts_.data() + (piece * m_.key_heads + key_head) * group_ * (m_.head_size + 2); }

    // Piece number `piece` of all sequences', for one head of keys; where it holds the newest entry that is written first.
    template <class E> void attend(const Cache *caches, long piece, long key_head) {
        const long dim = m_.head_size;
        long row = 0, number = piece;
        while (number >= caches[row].pieces()) number -= caches[row++].pieces();
        const Cache &cache = caches[row];
        E *k = (E *)cache.k + key_head * cache.room * dim, *v = (E *)cache.v + key_head * cache.room * dim;
        const float *here = qkv_.data() + row * width_, *cos = cos_ + row * dim / 2, *sin = sin_ + row * dim / 2;
        std::vector<float> q((group_ + 1) * dim);
        for (long g = 0; g < group_; g++) rotated(here + (key_head * group_ + g) * dim, cos, sin, dim / 2, q.data() + g * dim);
        const long end = std::min((number + 1) * KEYS, cache.seen());
        if (end == cache.seen()) {
            float *key = q.data() + group_ * dim;
            rotated(here + (m_.heads + key_head) * dim, cos, sin, dim / 2, key);
            write(k + (cache.end - 1) * dim, key, dim);
            write(v + (cache.end - 1) * dim, here + (m_.heads + m_.key_heads + key_head) * dim, dim);
        }
        float *found = part(piece, key_head);
        attended_part(cache, k, v, q.data(), group_, dim, number * KEYS, end, found, found + group_, found + 2 * group_);
    }

    // (rows, heads * D) of the parts, by each thread for itself: less than waiting for another to do it.
    void merge(const Cache *caches, float *out) {
        const long dim = m_.head_size;
        for (long r = 0, first = 0; r < rows_; first += caches[r++].pieces())
            for (long head = 0; head < m_.heads; head++, out += dim) {
                const long key_head = head / group_, g = head % group_, pieces = caches[r].pieces();
                float top = NONE, sum = 0;
                for (long p = 0; p < pieces; p++) top = std::max(top, part(first + p, key_head)[g]);
                std::fill(out, out + dim, 0.f);
                for (long p = 0; p < pieces; p++) {
                    const float *found = part(first + p, key_head), factor = std::exp(found[g] - top);
                    sum += found[group_ + g] * factor;
                    for (long c = 0; c < dim; c++) out[c] += found[2 * group_ + g * dim + c] * factor;
                }
                for (long c = 0; c < dim; c++) out[c] /= sum;
            }
    }

    const Model &m_;
    const long rows_;
    float *x_;
    const Cache *caches_;
    const float *cos_, *sin_;
    float *logits_;
    const long group_, width_;
    std::vector<float> qkv_, hidden_, parts_;
    std::vector<std::atomic<long>> taken_;
    Barrier *barrier_ = nullptr;
};

}  // namespace

extern "C" {

// x (rows, dim) are embeddings, and what becomes of them; caches (layers, rows); cos, sin (rows, D / 2); logits (rows, out).
void decode_step(const Model *model, int64_t rows, float *x, const Cache *caches, const float *cos, const float *sin, float *logits) {
    Step(*model, rows, x, caches, cos, sin, logits).run();
}
}
