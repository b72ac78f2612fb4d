// nano.cu: a minimal LLM inference engine. Offline generation on the command line, to be read from
// top to bottom, to be forked. The way of a token:
//
//   text -> ids (model.hpp) -> Sequence -> blocks (cache.hpp) -> Step (flat arrays) -> forward
//        -> logits -> sampler.hpp -> id, back into the Sequence and on the screen
//
// Chapters: 1 the step and its memory   2 the ops on the CPU   3 the forward pass   4 the engine
//           5 the commands   6 main; docs/forks/gpu.hpp (with nvcc) and docs/forks/batch.hpp are
//           read where they are included
// Letters:  T tokens in a step, D hidden size, H query heads, KV key/value heads, HD head size,
//           F intermediate size, V vocabulary, L layers. All arrays are row-major.
// Tests and forks include this file with NANOCU_NO_MAIN defined.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <omp.h>

#include <CLI/CLI.hpp>
#include <charconv>
#include <csignal>
#include <deque>
#include <functional>
#include <iostream>
#include <numeric>
#include <optional>
#include <random>

#include "cache.hpp"
#include "model.hpp"
#include "sampler.hpp"

constexpr int kLogitRows = 64;   // rows whose logits are in memory at a time
constexpr int kPrefetch = 8192;  // weights fetched ahead of their use on a CPU, in numbers

// =============================================================================================
// 1. The step and its memory
// =============================================================================================

// Sees what an engine does, where Engine::observer is set; docs/forks/explain.cu is one.
struct Observer {
    virtual ~Observer() = default;
    virtual void scheduled(const struct Flight&) = 0;  // a step, about to be launched
    virtual void collected(const struct Flight&) = 0;  // its ids are in; what ended has left
    // An id was drawn or scored from logits [V], before penalties. Several threads call this.
    virtual void drawn(const struct Draw&, std::span<const float> logits) = 0;
};

// What a row of logits is for: to draw the id at a position of a sequence, or to score it.
struct Draw {
    int row, part;                       // of Step::logit_rows, of the step's sequences
    int sample, position;                // of the id that is asked for
    const Sampling& sampling;
    std::span<const int> prompt, output;  // before it, for penalties; gone after launch
    int logprobs;                        // -1: none; k: of the id and the k likeliest
    int id = -1;                         // in: the one to score, or -1; out: the new one
    Observer* observer = nullptr;
    vector<TokenLogprob> scores = {};    // out

    // From its row of logits [V].
    void resolve(std::span<const float> logits) {
        if (id < 0) {
            vector<float> penalized;
            if (sampling.has_penalties()) {
                penalized.assign(logits.begin(), logits.end());
                apply_penalties(penalized, sampling, prompt, output);
            }
            id = sample_id(penalized.empty() ? logits : penalized, sampling, sample, position);
        }
        if (logprobs >= 0) scores = log_probabilities(logits, id, logprobs);
        if (observer) observer->drawn(*this, logits);
    }
};

// What a device sees of one iteration: T tokens of several sequences, each token one row. An id
// below 0 is not known yet: -1 - i is what draw i of the step before it gives.
struct Step {
    vector<int> ids, positions;  // [T]
    vector<int> sequence;        // [T], whose token this is: a row of tables
    vector<int> tables;          // [sequences, table_width], block tables
    int table_width = 0;
    vector<int> logit_rows;      // the rows whose logits are asked for
    vector<Draw> draws;          // what for, in the same order
    vector<Cache::Copy> copies;  // blocks to copy before anything is written
    vector<int> taken;           // blocks whose old contents nobody may read
    int slot = 0;                // for the device's own use
    bool replayed = false;       // out: ran as a captured graph

    int tokens() const { return int(ids.size()); }
    const int* table(int row) const { return &tables[size_t(sequence[row]) * table_width]; }
};

// Where steps run. Its memory for keys and values comes with reserve.
struct Device {
    string name, note;      // note: what is worth knowing, or empty
    bool overlaps = false;  // launch returns before the step is done
    virtual ~Device() = default;
    virtual size_t block_bytes() const = 0;
    size_t token_bytes() const { return block_bytes() / kBlockSize; }
    virtual size_t free_memory() const = 0;  // what KV memory may take by default
    virtual void reserve(int blocks) = 0;
    virtual void launch(Step& step) = 0;
    virtual void wait(Step& step) = 0;  // until the draws of this one, the oldest, are resolved
    virtual std::pair<double, double> limits() = 0;  // measured: bytes read, flops, a second
};

double now() { return omp_get_wtime(); }

size_t physical_memory() { return size_t(sysconf(_SC_PHYS_PAGES)) * getpagesize(); }

// Keys and values, in float. Inside a block a head's keys are transposed: one vector holds the same
// component of eight tokens. Memory is real only once it is touched.
struct KvMemory {
    const Config& c;
    float* data;  // [blocks, L, 2 (keys, values), KV, HD * 16]

    KvMemory(const Config& c, int blocks) : c(c), data((float*)calloc(blocks, block_bytes(c))) {
        if (!data) fail("KV memory: ", blocks, " blocks are too much; lower --kv-memory");
    }
    KvMemory(const KvMemory&) = delete;
    ~KvMemory() { free(data); }

    static size_t token_bytes(const Config& c) { return sizeof(float) * c.layers * 2 * c.kv_dim(); }
    static size_t block_bytes(const Config& c) { return token_bytes(c) * kBlockSize; }
    std::span<float> block(int b) {
        size_t size = block_bytes(c) / sizeof(float);
        return {data + size * b, size};
    }
    float* keys(int layer, int block, int head) {  // [HD, 16]
        size_t at = (size_t(block) * c.layers + layer) * 2 * c.kv_heads + head;
        return data + at * c.head_dim * kBlockSize;
    }
    float* values(int layer, int block, int head) {  // [16, HD]
        return keys(layer, block, c.kv_heads + head);
    }
};

// What flows from op to op, in float.
struct Activations {
    vector<float> x;             // [T, D], the residual stream
    vector<float> normed;        // [T, D]
    vector<float> qkv, att;      // [T, (H + 2 KV) HD], [T, H HD]
    vector<float> h;             // [T, F]
    vector<float> cosine, sine;  // [T, HD / 2], of the position's angles
    vector<float> logits;        // [kLogitRows, V]

    Activations(const Config& c, size_t tokens)
        : x(tokens * c.hidden), normed(std::max<size_t>(tokens, kLogitRows) * c.hidden),
          qkv(tokens * c.qkv_dim()), att(tokens * c.q_dim()), h(tokens * c.intermediate),
          cosine(tokens * c.head_dim / 2), sine(cosine), logits(size_t(kLogitRows) * c.vocab) {}
};

// =============================================================================================
// 2. The ops on the CPU: bf16 weights, float everything else, OpenMP.
//    All threads call each op; they share its loops and meet behind them. The bits of a row depend
//    on nothing but its own tokens: every sum has one order, whatever the batch, chunk or threads.
// =============================================================================================

namespace cpu {

// Four and eight lanes, at any address.
typedef float f32x4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float f32x8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t u32x8 __attribute__((vector_size(32), aligned(2), may_alias));

// One copy of a function for any x86-64-v3, one for AVX-512 with its 32 registers.
#if defined(__x86_64__)
#define NANOCU_CLONES __attribute__((target_clones("arch=x86-64-v4", "default")))
#else
#define NANOCU_CLONES
#endif
#define NANOCU_INLINE inline __attribute__((always_inline))

// exp(x), |x| cut at 87, relative error under 2e-7: 2^n times a polynomial on [-ln2 / 2, ln2 / 2].
NANOCU_INLINE void exp8(f32x8& x) {
    x = x > -87.0f ? x : f32x8{} - 87.0f;
    x = x < 87.0f ? x : f32x8{} + 87.0f;
    f32x8 shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are round(x)
    f32x8 n = shifted - 12582912.0f;
    f32x8 r = x - n * 0.693359375f + n * 2.12194440e-4f, p = f32x8{} + 1 / 5040.0f;
    for (float c : {1 / 720.0f, 1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f}) p = p * r + c;
    x = p * (f32x8)(((u32x8)shifted << 23) + 0x3F800000u);
}

// The sums over the lanes of four vectors, each in the same order.
NANOCU_INLINE void sums_of(const f32x8 v[4], f32x4& out) {
    f32x4 half[4];
    for (int j = 0; j < 4; j++) half[j] = ((f32x4*)&v[j])[0] + ((f32x4*)&v[j])[1];
    f32x4 ab = __builtin_shufflevector(half[0], half[1], 0, 1, 4, 5) +
               __builtin_shufflevector(half[0], half[1], 2, 3, 6, 7);
    f32x4 cd = __builtin_shufflevector(half[2], half[3], 0, 1, 4, 5) +
               __builtin_shufflevector(half[2], half[3], 2, 3, 6, 7);
    out = __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
}

// A row that is multiplied with weights has its 16-groups in the order 0 2 4 .. 14 1 3 .. 15: then
// a shift and a mask split a vector of bf16 into the two of floats that go with it.
inline int paired(int i) { return (i & ~15) + (i & 1) * 8 + (i & 15) / 2; }

// The heart of it: R rows of x [R, K] times 4 rows of weights, each sum a chain of 8 lanes along K.
// R is how many rows share a weight while it is in a register. out: every other one of [R, 2].
template <int R>
NANOCU_CLONES void tile(const float* x, int K, const bf16* const w[4], f32x4* out) {
    f32x8 sum[R][4] = {};
    for (int k = 0; k < K; k += 16) {
        f32x8 even[4], odd[4];
        for (int j = 0; j < 4; j++) {
            u32x8 pairs = *(const u32x8*)(w[j] + k);
            even[j] = (f32x8)(pairs << 16);
            odd[j] = (f32x8)(pairs & 0xFFFF0000u);
            __builtin_prefetch(w[j] + k + kPrefetch, 0, 2);  // into L2: L1 has few misses in flight
        }
        for (int i = 0; i < R; i++) {
            const f32x8* xs = (const f32x8*)(x + size_t(i) * K + k);
            for (int j = 0; j < 4; j++) sum[i][j] += xs[0] * even[j];
            for (int j = 0; j < 4; j++) sum[i][j] += xs[1] * odd[j];
        }
    }
    for (int i = 0; i < R; i++) sums_of(sum[i], out[2 * i]);
}

// All T rows of x [T, K] times the weights row(0) .. row(N - 1), eight at a time: calls
// store(t, n, sums of n .. n + 7). The rows go in groups that stay in L2 while all weights pass by.
template <class Row, class Store>
void project(const float* x, int T, int K, int N, Row row, Store store) {
#if defined(__x86_64__)
    static const bool wide = __builtin_cpu_supports("avx512vl");
#else
    const bool wide = true;  // 32 registers
#endif
    static decltype(tile<1>)* const tiles[] = {
        nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<4>, tile<4>, tile<4>, tile<8>};
    const int group = std::max(8, 65536 / K / 8 * 8);
    for (int begin = 0; begin < T; begin += group) {
        #pragma omp for schedule(static) nowait
        for (int n = 0; n < N; n += 8) {
            const bf16* w[8];
            for (int j = 0; j < 8; j++) w[j] = row(n + j);
            for (int t = begin, end = std::min(T, begin + group), rows; t < end; t += rows) {
                rows = std::min(end - t, wide ? 8 : 3);
                if (rows > 4 && rows < 8) rows = 4;
                f32x8 sums[8];
                for (int half = 0; half < 2; half++)
                    tiles[rows](x + size_t(t) * K, K, w + 4 * half, (f32x4*)sums + half);
                for (int i = 0; i < rows; i++) store(t + i, n, sums[i]);
            }
        }
    }
    #pragma omp barrier
}

// RMS norm (Zhang and Sennrich 2019): out[order(i)] = x[i] / sqrt(mean(x^2) + eps) * weight[i].
template <class Order>
void norm(const float* x, const vector<float>& weight, float eps, float* out, Order order) {
    f32x8 squares = {};
    int n = int(weight.size());
    for (int i = 0; i < n; i += 8) squares += *(const f32x8*)(x + i) * *(const f32x8*)(x + i);
    float sum = std::accumulate((float*)&squares, (float*)&squares + 8, 0.0f);
    float factor = 1 / std::sqrt(sum / float(n) + eps);
    for (int i = 0; i < n; i++) out[order(i)] = x[i] * factor * weight[i];
}

void norm_rows(const Model& m, const Step& step, const vector<float>& weight, Activations& a) {
    size_t D = weight.size();
    #pragma omp for
    for (int t = 0; t < step.tokens(); t++)
        norm(&a.x[t * D], weight, m.config.norm_eps, &a.normed[t * D], paired);
}

// x = the embeddings of the step's ids; the angles of its positions.
void embed(const Model& m, const Step& step, Activations& a) {
    size_t D = m.config.hidden, half = m.config.inv_freq.size();
    #pragma omp for
    for (int t = 0; t < step.tokens(); t++) {
        const bf16* row = m.embed.row(step.ids[t]);
        std::transform(row, row + D, &a.x[t * D], bf16_to_float);
        for (size_t i = 0; i < half; i++) {
            float angle = float(step.positions[t]) * m.config.inv_freq[i];
            a.cosine[t * half + i] = std::cos(angle);
            a.sine[t * half + i] = std::sin(angle);
        }
    }
}

// qkv = norm(x) (Wq, Wk, Wv)^T + bias
void norm_linear(const Model& m, const Layer& l, const Step& step, Activations& a) {
    int Q = l.q.rows, K = l.k.rows, N = Q + 2 * K;
    norm_rows(m, step, l.attn_norm, a);
    auto row = [&](int n) {
        return n < Q ? l.q.row(n) : n < Q + K ? l.k.row(n - Q) : l.v.row(n - Q - K);
    };
    auto store = [&](int t, int n, f32x8 sum) {
        *(f32x8*)&a.qkv[size_t(t) * N + n] = sum + *(const f32x8*)&l.bias[n];
    };
    project(a.normed.data(), step.tokens(), l.q.cols, N, row, store);
}

// x += in W^T, in: [T, W.cols]
void add_linear(const vector<float>& in, const Matrix& w, const Step& step, Activations& a) {
    auto store = [&](int t, int n, f32x8 sum) { *(f32x8*)&a.x[size_t(t) * w.rows + n] += sum; };
    project(in.data(), step.tokens(), w.cols, w.rows, [&](int n) { return w.row(n); }, store);
}

// h = silu(norm(x) Wgate^T) * (norm(x) Wup^T)
void norm_swiglu(const Model& m, const Layer& l, const Step& step, Activations& a) {
    size_t F = l.gate.rows;
    norm_rows(m, step, l.mlp_norm, a);
    auto row = [&](int n) { return (n & 4 ? l.up : l.gate).row(n / 8 * 4 + n % 4); };  // by fours
    auto store = [&](int t, int n, f32x8 sum) {
        f32x8 e = -sum;
        exp8(e);
        for (int j = 0; j < 4; j++)
            a.h[t * F + paired(n / 2 + j)] = sum[j] / (1 + e[j]) * sum[4 + j];
    };
    project(a.normed.data(), step.tokens(), l.gate.cols, 2 * int(F), row, store);
}

// R queries q [R, HD] of one kv head over the first n tokens of a table: out [R, HD] =
// softmax(q K^T / sqrt(HD)) V, paired. scores: room for R times n, rounded up to whole blocks.
template <int R>
NANOCU_CLONES void attend_heads(const float* q, KvMemory& kv, int layer, int head, const int* table,
                                int n, float* scores, float* out) {
    int HD = kv.c.head_dim, size = Cache::blocks_for(n) * kBlockSize;
    float inverse[R], scale = 1 / std::sqrt(float(HD));
    for (int i = 0; i < size; i += kBlockSize) {
        const f32x8* k = (const f32x8*)kv.keys(layer, table[i / kBlockSize], head);
        f32x8 sum[R][2] = {};
        for (int d = 0; d < HD; d++, k += 2)
            for (int r = 0; r < R; r++)
                for (int j = 0; j < 2; j++) sum[r][j] += q[r * HD + d] * k[j];
        for (int r = 0; r < R; r++)
            for (int j = 0; j < 2; j++) *(f32x8*)(scores + r * size + i + 8 * j) = sum[r][j];
    }
    for (int r = 0; r < R; r++) {
        float* p = scores + r * size;
        std::fill(p + n, p + size, -INFINITY);  // not written yet
        f32x8 tops = *(f32x8*)p, total = {};
        for (int i = 8; i < size; i += 8) {
            f32x8 more = *(f32x8*)(p + i);
            tops = more > tops ? more : tops;
        }
        float top = *std::max_element((float*)&tops, (float*)&tops + 8);
        for (int i = 0; i < size; i += 8) {
            f32x8& e = *(f32x8*)(p + i);
            e = (e - top) * scale;
            exp8(e);
            total += e;
        }
        inverse[r] = 1 / std::accumulate((float*)&total, (float*)&total + 8, 0.0f);
    }
    for (int d = 0; d < HD; d += 16) {
        f32x8 sum[R][2] = {};
        for (int i = 0; i < n; i++) {
            const float* v = kv.values(layer, table[i / kBlockSize], head);
            v += i % kBlockSize * HD + d;
            for (int r = 0; r < R; r++)
                for (int j = 0; j < 2; j++)
                    sum[r][j] += scores[r * size + i] * *(const f32x8*)(v + 8 * j);
        }
        for (int r = 0; r < R; r++)
            for (int j = 0; j < 16; j++)
                out[r * HD + d + paired(j)] = ((float*)sum[r])[j] * inverse[r];
    }
}

// Norm (Qwen3) and RoPE of one head's q or k [HD] in row t: turns the pairs (v[i], v[i + HD / 2]).
void rotate(const Config& c, const vector<float>& weight, const Activations& a, int t, float* v) {
    int half = c.head_dim / 2;
    const float *cosine = &a.cosine[size_t(t) * half], *sine = &a.sine[size_t(t) * half];
    if (!weight.empty()) norm(v, weight, c.norm_eps, v, std::identity());
    for (int i = 0; i < half; i++) {
        float first = v[i], second = v[i + half];
        v[i] = first * cosine[i] - second * sine[i];
        v[i + half] = second * cosine[i] + first * sine[i];
    }
}

// Writes the step's keys and values into their slots, then att = attention of its queries over
// their sequences' blocks.
void attend(const Model& m, int layer, const Step& step, Activations& a, KvMemory& kv) {
    const Config& c = m.config;
    const Layer& l = m.layers[layer];
    int H = c.heads, KV = c.kv_heads, HD = c.head_dim;
    static decltype(attend_heads<1>)* const attend_by_rows[] = {
        nullptr, attend_heads<1>, attend_heads<2>, attend_heads<3>, attend_heads<4>};
    #pragma omp for
    for (int t = 0; t < step.tokens(); t++) {
        float *q = &a.qkv[size_t(t) * c.qkv_dim()], *k = q + c.q_dim(), *v = k + c.kv_dim();
        int position = step.positions[t], slot = position % kBlockSize;
        int block = step.table(t)[position / kBlockSize];
        for (int h = 0; h < H; h++) rotate(c, l.q_norm, a, t, q + h * HD);
        for (int h = 0; h < KV; h++, k += HD, v += HD) {
            rotate(c, l.k_norm, a, t, k);
            for (int d = 0; d < HD; d++) kv.keys(layer, block, h)[d * kBlockSize + slot] = k[d];
            std::copy(v, v + HD, kv.values(layer, block, h) + slot * HD);
        }
    }
    vector<float> scores(size_t(step.table_width) * kBlockSize * 4);
    #pragma omp for schedule(dynamic) collapse(2)
    for (int t = 0; t < step.tokens(); t++)
        for (int head = 0; head < KV; head++)
            for (int h = 0, rows; h < H / KV; h += rows) {
                rows = std::min(4, H / KV - h);
                size_t first = size_t(head) * (H / KV) + h;
                attend_by_rows[rows](&a.qkv[size_t(t) * c.qkv_dim() + first * HD], kv, layer, head,
                                     step.table(t), step.positions[t] + 1, scores.data(),
                                     &a.att[(size_t(t) * H + first) * HD]);
            }
}

// logits = norm(x) Wlm_head^T for these rows, at most kLogitRows
void logits(const Model& m, std::span<const int> rows, Activations& a) {
    size_t D = m.config.hidden, V = m.config.vocab;
    #pragma omp for
    for (size_t i = 0; i < rows.size(); i++)
        norm(&a.x[rows[i] * D], m.final_norm, m.config.norm_eps, &a.normed[i * D], paired);
    auto row = [&](int n) { return m.lm_head.row(std::min(n, int(V) - 1)); };
    auto store = [&](int t, int n, f32x8 sum) {
        std::copy_n((float*)&sum, std::min<size_t>(8, V - n), &a.logits[t * V + n]);
    };
    project(a.normed.data(), int(rows.size()), int(D), int(V), row, store);
}

}  // namespace cpu

// =============================================================================================
// 3. The forward pass
// =============================================================================================

// To be called by all threads, as the ops are.
void forward(const Model& m, const Step& step, Activations& a, KvMemory& kv) {
    cpu::embed(m, step, a);
    for (int i = 0; i < m.config.layers; i++) {
        const Layer& l = m.layers[i];
        cpu::norm_linear(m, l, step, a);
        cpu::attend(m, i, step, a, kv);
        cpu::add_linear(a.att, l.o, step, a);
        cpu::norm_swiglu(m, l, step, a);
        cpu::add_linear(a.h, l.down, step, a);
    }
}

// The best of five: what work() does a second, on all threads together.
double best_rate(auto work) {
    double best = 0;
    for (int repeat = 0; repeat < 5; repeat++) {
        double done = 0, start = now();
        #pragma omp parallel reduction(+ : done)
        done += work();
        best = std::max(best, done / (now() - start));
    }
    return best;
}

volatile float sink;  // takes results that nobody needs but that must be computed

// Bytes a second read from memory, in a buffer of 256 MiB, more than any cache.
double read_bandwidth() {
    vector<unsigned> data(64 << 20, 1);
    return best_rate([&] {
        size_t size = data.size() / omp_get_num_threads();
        const unsigned* begin = &data[size * omp_get_thread_num()];
        sink = float(std::accumulate(begin, begin + size, 0u));
        return double(size) * sizeof(unsigned);
    });
}

// Floating point operations a second of multiply-adds in registers, on vectors as the ops use them.
double fma_peak() {
    return best_rate([] {
        cpu::f32x8 sum[12], factor = cpu::f32x8{} + sink;
        for (int j = 0; j < 12; j++) sum[j] = factor * float(j);
        for (int i = 0; i < 4'000'000; i++)
            for (int j = 0; j < 12; j++) sum[j] = sum[j] * factor + factor;
        for (int j = 1; j < 12; j++) sum[0] += sum[j];
        sink = sum[0][0];
        return 4e6 * 12 * 8 * 2;
    });
}

class CpuDevice : public Device {
public:
    CpuDevice(const Model& m, int tokens) : model(m), act(m.config, tokens) { name = "cpu"; }

    size_t block_bytes() const override { return KvMemory::block_bytes(model.config); }
    size_t free_memory() const override { return physical_memory() / 4; }
    void reserve(int blocks) override {
        if (blocks * block_bytes() > physical_memory())
            fail("--kv-memory: more than this machine has; lower it");
        kv.emplace(model.config, blocks);
    }
    void wait(Step&) override {}
    std::pair<double, double> limits() override { return {read_bandwidth(), fma_peak()}; }
    void launch(Step& step) override {
        for (auto [from, to] : step.copies)
            std::ranges::copy(kv->block(from), kv->block(to).begin());
#ifndef NDEBUG  // whoever reads what is no longer there gets NaN
        for (auto [from, to] : step.copies) std::erase(step.taken, to);
        for (int block : step.taken) std::ranges::fill(kv->block(block), NAN);
#endif
        size_t V = model.config.vocab;
        #pragma omp parallel
        forward(model, step, act, *kv);
        for (size_t begin = 0; begin < step.logit_rows.size(); begin += kLogitRows) {
            auto rows = std::span(step.logit_rows).subspan(begin);
            rows = rows.first(std::min<size_t>(rows.size(), kLogitRows));
            #pragma omp parallel
            {
                cpu::logits(model, rows, act);
                #pragma omp for schedule(dynamic)
                for (size_t i = 0; i < step.draws.size(); i++)
                    if (size_t row = step.draws[i].row - begin; row < rows.size())
                        step.draws[i].resolve({&act.logits[row * V], V});
            }
        }
    }

private:
    const Model& model;
    Activations act;
    std::optional<KvMemory> kv;
};

#ifdef __CUDACC__
#include "docs/forks/gpu.hpp"  // CudaDevice: the same on a GPU
#endif

// =============================================================================================
// 4. The engine: continuous batching (Yu et al. 2022) over the paged cache
// =============================================================================================

struct Request {
    vector<int> prompt;
    Sampling sampling;
    int max_tokens = INT_MAX;   // new ones; the context may end before
    int samples = 1;            // continuations, which share the prompt's blocks
    int logprobs = -1;          // -1: none; 0: of the chosen id; k: of the k likeliest too
    bool ignore_eos = false;
    bool score_prompt = false;  // log-probabilities of the prompt's own ids
    int score_from = 1;         // the first of these; only what is before may come from the cache
};

// One text on its way: a request's, or one of its samples.
struct Sequence {
    int number, sample;                   // of the request, of its samples
    std::shared_ptr<const Request> request;
    vector<int> ids;                      // prompt and output; -1: drawn, but not known yet
    int max_size;                         // ids at the end
    int unforked;                         // samples that start when the prompt is computed
    int computed = 0, cached = 0;         // ids in the cache; of the prompt's, found there
    int published = 0;                    // ids that the cache knows of
    int draw = 0;                         // the last step's that gives the last id
    bool ended = false;
    vector<int> table = {};               // block table
    vector<vector<TokenLogprob>> prompt_logprobs = {};  // of prompt ids score_from, ...

    int reusable() const {  // ids whose beginning the cache may have
        return request->score_prompt ? request->score_from : int(ids.size());
    }
    int known() const {  // ids before the first -1
        int count = int(ids.size());
        while (count > 0 && ids[count - 1] < 0) count--;
        return count;
    }
};

// What a step has to say about one sequence.
struct Output {
    int request, sample, id;                // id: the new token
    int cached;                             // tokens of the prompt that were in the cache
    const char* finish = nullptr;           // "stop", "length", or null: goes on
    vector<TokenLogprob> logprobs = {};     // of id, then of the likeliest, if asked for
    vector<vector<TokenLogprob>> prompt_logprobs = {};  // with the finish, if asked for
};

struct Part {  // of a step: the next count ids of a sequence
    std::shared_ptr<Sequence> sequence;
    int count;
};

struct Flight {  // a step that was launched, or is about to be
    std::unique_ptr<Step> step;  // null: nothing to do
    vector<Part> parts;
};

struct EngineOptions {
    size_t kv_memory = 0;       // bytes; 0: a quarter of the machine's, if max_rows can use it
    int max_context = INT_MAX;  // tokens of a sequence; never more than the model's
    int max_rows = 0;           // sequences running at a time; 0: 64, on a GPU 256
    int chunk = 0;              // tokens computed in a step; 0: 512, on a GPU 8192
    bool prefix_cache = true;
    bool graphs = true;         // decode steps are captured (GPU)
    string device = "auto";     // or cpu, cuda, cuda:1
};

// The device that o.device names; auto: a GPU where there is one. Fills in what o leaves to it.
std::unique_ptr<Device> make_device(const Model& m, EngineOptions& o, int context) {
    int gpus = 0, ordinal = 0;
    bool wanted = o.device == "cuda";
    if (o.device.starts_with("cuda:")) {
        const char *begin = &o.device[5], *end = begin + o.device.size() - 5;
        wanted = std::from_chars(begin, end, ordinal).ptr == end && ordinal >= 0 && begin < end;
    }
    if (!wanted && o.device != "cpu" && o.device != "auto")
        fail("--device ", o.device, ": not known; auto, cpu, cuda and cuda:1 are");
#ifdef __CUDACC__
    if (o.device != "cpu") gpus = cuda::count_gpus();
#endif
    if (wanted && ordinal >= gpus)
        fail("--device ", o.device, ": no such GPU here, or no driver for it; use cpu");
    if (!o.max_rows) o.max_rows = gpus ? 256 : 64;
    if (!o.chunk) o.chunk = gpus ? 8192 : 512;
    int64_t most = std::min<int64_t>(o.chunk, int64_t(context) * o.max_rows);  // tokens in a step
    int tokens = std::max(o.max_rows, int(most));
#ifdef __CUDACC__
    if (gpus) return std::make_unique<cuda::CudaDevice>(m, ordinal, tokens, o.max_rows, o.graphs);
#endif
    return std::make_unique<CpuDevice>(m, tokens);
}

class Engine {
public:
    const Model& model;
    EngineOptions options;
    const int context;  // most tokens of a sequence
    const std::unique_ptr<Device> device;
    Cache cache;
    int preemptions = 0;
    Observer* observer = nullptr;  // null: nobody looks; to be set before the first step

    Engine(const Model& m, EngineOptions o)
        : model(m), options(o), context(std::min(m.config.context, o.max_context)),
          device(make_device(m, options, context)), cache(choose_blocks(), o.prefix_cache) {
        device->reserve(cache.blocks());
        cache.on_take = [this](int block) { taken.push_back(block); };
    }

    // Takes a request; its Outputs carry the number returned here. One that can never run throws
    // std::invalid_argument with the sizes.
    int add(Request r) {
        auto refuse = [](const auto&... what) { throw std::invalid_argument(str(what...)); };
        int size = int(r.prompt.size()), room = cache.blocks() * kBlockSize;
        r.sampling.check();
        if (r.samples < 1 || r.max_tokens < 1) refuse("samples, max-tokens: expected 1 or more");
        if (size == 0) refuse("prompt: no tokens; give some text");
        for (int id : r.prompt) if (id < 0 || id >= model.config.vocab)
            refuse("prompt: id ", id, " is outside the vocabulary of ", model.config.vocab);
        if (r.score_prompt && (r.score_from < 1 || r.score_from > size))
            refuse("score_from: expected 1 to the prompt's ", size, " tokens");
        if (size + !r.score_prompt > context)
            refuse("prompt: ", size, " tokens do not fit into the context of ", context);
        // without -n the memory may end a text; with it, all must fit
        int limit = r.max_tokens == INT_MAX ? std::min(context, std::max(room, size + 1)) : context;
        int max_size = size + std::min(r.max_tokens, std::max(1, limit - size));
        if (max_size - 1 > room) refuse("prompt: ", size, " tokens and ", max_size - size,
            " new ones do not fit into KV memory for ", room, "; raise --kv-memory");
        auto request = std::make_shared<Request>(std::move(r));
        Sequence s = {requests, 0, request, request->prompt, max_size, request->samples - 1};
        if (request->score_prompt) s.prompt_logprobs.resize(size - request->score_from);
        waiting.push_back(std::make_shared<Sequence>(std::move(s)));
        return requests++;
    }

    // What an observer may look at: the sequences that have blocks, the oldest first.
    const auto& rows() const { return running; }

    // Blocks in use, and their slots that hold no token yet.
    std::pair<int, int> memory_use() const {
        int unused = 0;
        for (auto& s : running) unused += int(s->table.size()) * kBlockSize - s->computed;
        return {cache.blocks() - cache.free(), unused};
    }

    bool busy() const { return !running.empty() || !waiting.empty() || flying.step; }

    // One iteration: schedule, run, sample, collect. Returns at most one Output a sequence. On a
    // device that overlaps, they are of the step before the one that is launched, unless somebody
    // observes: then each step is collected before the next one is scheduled.
    vector<Output> step() {
        vector<Output> out;
        Flight done = std::exchange(flying, {});
        if (done.step && needs_ids(done)) collect(std::exchange(done, {}), out);
        flying = schedule();
        if (flying.step) launch(flying);
        if (!device->overlaps || observer) done = std::exchange(flying, {});
        if (done.step) collect(std::move(done), out);
        return out;
    }

    // Between steps, on a device that does not overlap: a running sample goes on with id in place
    // of the last one it drew. Under a new number (as): a copy does, which shares its blocks, and
    // the sample itself goes on as it was.
    void branch(int request, int sample, int as, int id) {
        auto s = std::ranges::find_if(running, [&](const std::shared_ptr<Sequence>& s) {
            return s->number == request && s->sample == sample;
        });
        if (s == running.end()) fail("branch: sample ", sample, " is not running");
        (as == sample ? **s : fork(**s, as)).ids.back() = id;
    }

    // Ends a sequence from outside (a stop string, Ctrl-C); sample -1: all of the request.
    void stop(int request, int sample) {
        for (auto* list : {&running, &waiting})
            std::erase_if(*list, [&](const std::shared_ptr<Sequence>& s) {
                if (s->number != request || (sample >= 0 && s->sample != sample)) return false;
                cache.release(s->table);
                return s->ended = true;
            });
    }

private:
    int choose_blocks() const {
        size_t block = device->block_bytes(), each = context / kBlockSize + 1;
        size_t blocks = std::min(device->free_memory() / block, each * options.max_rows);
        if (options.kv_memory) blocks = options.kv_memory / block;
        if (!blocks) fail("KV memory: no room for a block of ", block, " bytes; give --kv-memory");
        return int(std::min<size_t>(blocks, INT_MAX / kBlockSize));
    }

    // Whether the next step can't be scheduled before the ids of this one are known.
    static bool needs_ids(const Flight& flight) {
        return std::ranges::any_of(flight.step->draws, [&](const Draw& d) {
            return d.sampling.has_penalties() || d.sample != flight.parts[d.part].sequence->sample;
        });
    }

    // First come, first served; running sequences before waiting ones. When blocks run out, the
    // youngest gives its own back and is computed again later.
    Flight schedule() {
        Flight flight = {std::make_unique<Step>(), {}};
        int budget = std::max(options.chunk, options.max_rows);
        for (size_t i = 0; i < running.size() && budget > 0; i++)
            while (i < running.size() && !add_part(flight, running[i], budget)) {
                preemptions++;
                suspend();
            }
        while (!waiting.empty() && int(running.size()) < options.max_rows && budget > 0) {
            auto s = waiting.front();
            if (s->ids.back() < 0) break;  // on its way from the device
            // what is scored needs its logits, so nothing of it may be skipped
            s->computed = cache.match(std::span(s->ids).first(s->reusable()), s->table);
            if (will_be_known(*s)) {  // somebody is computing what comes next: wait for that
                s->computed = 0;
                cache.release(s->table);
                break;
            }
            s->published = s->computed;
            if (s->ids.size() == s->request->prompt.size()) s->cached = s->computed;
            running.push_back(s);
            waiting.pop_front();
            if (add_part(flight, s, budget)) continue;
            suspend();  // until there are blocks
            break;
        }
        Step& step = *flight.step;
        for (auto& part : flight.parts)
            step.table_width = std::max(step.table_width, int(part.sequence->table.size()));
        for (auto& part : flight.parts) {
            const vector<int>& table = part.sequence->table;
            step.tables.insert(step.tables.end(), table.begin(), table.end());
            step.tables.resize(step.tables.size() + step.table_width - table.size());
        }
        step.taken = std::exchange(taken, {});
        if (flight.parts.empty()) flight.step.reset();
        return flight;
    }

    // Whether the block behind what s found in the cache is being computed for another sequence.
    bool will_be_known(const Sequence& s) const {
        int end = s.computed + kBlockSize;
        return options.prefix_cache && end < s.reusable() &&
            std::ranges::any_of(running, [&](const std::shared_ptr<Sequence>& other) {
                return other->published < end && other->known() >= end &&
                       std::equal(s.ids.begin(), s.ids.begin() + end, other->ids.begin());
            });
    }

    // The youngest sequence goes back to the head of those that wait.
    void suspend() {
        cache.release(running.back()->table);
        running.back()->computed = running.back()->published = 0;
        waiting.push_front(std::move(running.back()));
        running.pop_back();
    }

    // Puts as many ids of s into the step as the budget allows; false if blocks do not suffice.
    bool add_part(Flight& flight, const std::shared_ptr<Sequence>& sequence, int& budget) {
        Step& step = *flight.step;
        Sequence& s = *sequence;
        const Request& r = *s.request;
        int size = int(s.ids.size()), end = std::min(size, s.computed + budget);
        if (size == s.max_size) return true;  // ends with what is on its way
        if (!cache.reserve(s.table, s.computed, end, step.copies)) return false;
        auto add_draw = [&](int sample, int position, int logprobs, int id) {
            int row = int(step.logit_rows.size()) - 1, part = int(flight.parts.size());
            auto ids = std::span(s.ids), output = ids.subspan(r.prompt.size());
            step.draws.push_back({row, part, sample, position, r.sampling, r.prompt, output,
                                  logprobs, id, observer});
        };
        for (int i = s.computed; i < end; i++) {
            int scored_at = i + 1 - r.score_from;
            bool scored = scored_at >= 0 && scored_at < int(s.prompt_logprobs.size());
            if (i + 1 == size || scored) step.logit_rows.push_back(step.tokens());
            if (scored) add_draw(s.sample, i + 1, std::max(0, r.logprobs), s.ids[i + 1]);
            for (int n = s.unforked; i + 1 == size && n >= 0; n--)  // the sequence's own comes last
                add_draw(s.sample + n, size, r.logprobs, -1);
            step.ids.push_back(s.ids[i] < 0 ? -1 - s.draw : s.ids[i]);
            step.positions.push_back(i);
            step.sequence.push_back(int(flight.parts.size()));
        }
        flight.parts.push_back({sequence, end - s.computed});
        budget -= end - s.computed;
        return true;
    }

    void launch(Flight& flight) {
        if (observer) observer->scheduled(flight);
        device->launch(*flight.step);
        for (Part& part : flight.parts) part.sequence->computed += part.count;
        for (int i = 0; Draw& d : flight.step->draws) {
            Sequence& s = *flight.parts[d.part].sequence;
            if (d.position == int(s.ids.size()) && d.sample == s.sample) {
                s.ids.push_back(-1);
                s.draw = i;
            }
            i++;
        }
    }

    // One more sequence like s, sharing its blocks.
    Sequence& fork(const Sequence& s, int sample) {
        running.push_back(std::make_shared<Sequence>(s));
        Sequence& child = *running.back();
        child.sample = sample;
        child.unforked = 0;
        cache.share(child.table);
        if (int(running.size()) > options.max_rows) suspend();  // it will find its blocks again
        return child;
    }

    // Puts the drawn ids in, starts the samples that waited for the prompt, ends what is finished.
    void collect(Flight flight, vector<Output>& all) {
        device->wait(*flight.step);
        for (Part& part : flight.parts) {
            Sequence& s = *part.sequence;
            int full = std::min(s.computed, s.known());
            if (full > s.published) cache.publish(s.ids, s.table, s.published, full);
            s.published = std::max(s.published, full);
        }
        for (Draw& d : flight.step->draws) {
            Sequence& leader = *flight.parts[d.part].sequence;
            if (leader.ended) continue;  // while this was on its way
            if (d.position < int(leader.request->prompt.size())) {
                int from = leader.request->score_from;
                leader.prompt_logprobs[d.position - from] = std::move(d.scores);
                continue;
            }
            Sequence& s = d.sample == leader.sample ? leader : fork(leader, d.sample);
            s.unforked = 0;
            s.ids[d.position] = d.id;
            Output out = {s.number, s.sample, d.id, s.cached};
            bool eos = !s.request->ignore_eos && model.config.eos.count(d.id);
            out.finish = eos ? "stop" : d.position + 1 == s.max_size ? "length" : nullptr;
            if (out.finish) out.prompt_logprobs = s.prompt_logprobs;
            out.logprobs = std::move(d.scores);
            all.push_back(std::move(out));
        }
        for (const Output& out : all) if (out.finish) stop(out.request, out.sample);
        if (observer) observer->collected(flight);
    }

    std::deque<std::shared_ptr<Sequence>> waiting, running;  // each in order of arrival
    Flight flying;      // launched, not collected
    vector<int> taken;  // blocks whose contents are forgotten in this step
    int requests = 0;
};

// =============================================================================================
// 5. The commands
// =============================================================================================

using ordered = nlohmann::ordered_json;

// What the command line says: a request and the engine's options, but for what the model decides.
struct Flags : Request, EngineOptions {
    string model, file, ids, system, workload, input, output, load = "auto";
    std::optional<string> text;  // of --prompt; a request's prompt is ids
    bool no_think = false, jsonl = false, decode = false, chat = false, json = false;
    bool verbose = false, no_special = false;
    std::optional<float> temperature, top_p, min_p, repetition_penalty;  // else the model's own
    std::optional<int> top_k;
    int threads = 0;  // 0: one a core
    vector<string> stop;
    vector<int> pp = {512}, tg = {128}, rows = {1, 8}, depth = {16};
};

// What settings in MODEL/nanocu.json are for: a processor, its threads, and whether a GPU is used.
string machine([[maybe_unused]] const string& device) {
    unsigned brand[13] = {};  // 48 characters, in three parts
#if defined(__x86_64__)
    for (unsigned i = 0; i < 12; i += 4)
        __get_cpuid(0x80000002 + i / 4, brand + i, brand + i + 1, brand + i + 2, brand + i + 3);
#endif
    const char* more = "";
#ifdef __CUDACC__
    if (device != "cpu" && cuda::count_gpus() > 0) more = ", GPU";
#endif
    return str((const char*)brand, " x ", omp_get_num_procs(), more);
}

volatile std::sig_atomic_t interrupted = 0;  // by Ctrl-C

// Text on stdout, at once; what cannot be written is an error.
void put(const string& text) {
    if (fwrite(text.data(), 1, text.size(), stdout) < text.size() || fflush(stdout))
        fail("stdout: ", strerror(errno), "; the output is incomplete");
}

// One object on stdout: JSON, or a line for each value (lists are for JSON only).
void put_object(const ordered& j, bool as_json) {
    if (as_json) return put(j.dump() + "\n");
    for (auto& [key, value] : j.items())
        if (!value.is_array()) put(str(std::left, std::setw(20), key, value.dump(), "\n"));
}

// What a command starts with: the model, its tokenizer if it has one, the engine.
struct Session {
    const Flags& f;
    Model model{f.model, f.load == "dummy"};
    std::unique_ptr<Tokenizer> tokenizer;
    Engine engine{model, f};

    explicit Session(const Flags& f, bool needs_text = false) : f(f) {
        if (std::filesystem::exists(f.model + "/tokenizer.json"))
            tokenizer = std::make_unique<Tokenizer>(f.model);
        else if (needs_text)
            fail(f.model, "/tokenizer.json: missing; give --ids instead of text");
        if (tokenizer && tokenizer->eos >= 0) model.config.eos.insert(tokenizer->eos);
        const string& rounded = model.weights.rounded;
        if (!rounded.empty()) std::cerr << "weights: " << rounded << ", rounded to bf16\n";
        if (f.verbose && !engine.device->note.empty()) std::cerr << engine.device->note << '\n';
        if (f.verbose) std::cerr << str("device ", engine.device->name, ", threads ", f.threads,
            ", KV memory for ", engine.cache.blocks() * kBlockSize, " tokens, context ",
            engine.context, ", rows ", engine.options.max_rows, ", chunk ", engine.options.chunk,
            ", seed ", f.sampling.seed, "\n");
    }

    // The request of the flags; what they leave open is the model's.
    Request request(vector<int> prompt) const {
        Request r = f;
        const Config& c = model.config;
        r.prompt = std::move(prompt);
        r.sampling.temperature = f.temperature.value_or(c.temperature);
        r.sampling.top_k = f.top_k.value_or(int(c.top_k));
        r.sampling.top_p = f.top_p.value_or(c.top_p);
        r.sampling.min_p = f.min_p.value_or(c.min_p);
        r.sampling.repetition_penalty = f.repetition_penalty.value_or(c.repetition_penalty);
        return r;
    }
};

string input_text(const Flags& f) {
    if (f.text) return *f.text;
    if (!f.file.empty()) return read_file(f.file);
    return {std::istreambuf_iterator<char>(std::cin), {}};
}

vector<int> ids_of(const json& j, const char* where) {
    for (const json& id : j)
        if (!id.is_number_unsigned() || id > INT_MAX) fail(where, ": no id: ", id.dump());
    return j.get<vector<int>>();
}

vector<int> input_ids(const Session& s) {
    if (s.f.ids.empty()) return s.tokenizer->encode(input_text(s.f), !s.f.no_special);
    return ids_of(parse_json("[" + s.f.ids + "]"), "--ids");
}

// What comes for one sample of a request.
struct Reply {
    TextStream stream;
    string text = {};
    vector<int> ids = {};
    vector<vector<TokenLogprob>> logprobs = {};  // of each id, and of the likeliest, if asked for
    Output last = {};  // tells why it ended, and more of the whole sequence

    // Takes what a step says of the sample; returns the text that is certain now.
    string take(Engine& engine, Output& o) {
        ids.push_back(o.id);
        string more = stream.push(o.id);
        if (stream.stopped) engine.stop(o.request, o.sample), o.finish = "stop";
        if (o.finish) more += stream.finish();
        if (!o.logprobs.empty()) logprobs.push_back(std::move(o.logprobs));
        last = std::move(o);
        text += more;
        return more;
    }
};

ordered logprob_json(const Session& s, const TokenLogprob& t) {
    ordered token = s.tokenizer ? ordered(s.tokenizer->decode({&t.id, 1})) : ordered();
    return {{"id", t.id}, {"token", token}, {"logprob", t.logprob}};
}

// What show makes of the first, with the others, the likeliest, as a list under key.
ordered with_likeliest(std::span<const TokenLogprob> all, const char* key, auto show) {
    ordered j = show(all[0]);
    j[key] = ordered::array();
    for (const TokenLogprob& t : all.subspan(1)) j[key].push_back(show(t));
    return j;
}

// Runs one request to its end or to Ctrl-C, and prints the closing line. show: the text of the one
// sample goes to stdout as soon as it is certain.
vector<Reply> run(Session& s, const Request& r, bool show) {
    vector<Reply> replies(r.samples, Reply{TextStream(s.tokenizer.get(), s.f.stop)});
    double start = now(), first = start;
    int number = s.engine.add(r), tokens = 0;
    while (s.engine.busy() && !interrupted)
        for (Output& o : s.engine.step()) {
            if (tokens++ == 0) first = now();
            string more = replies[o.sample].take(s.engine, o);
            if (show) put(more);
        }
    s.engine.stop(number, -1);  // after Ctrl-C
    double rate = std::max(0, tokens - r.samples) / (now() - first);
    for (Reply& reply : replies) {  // those that did not end
        string more = reply.stream.finish();
        reply.text += more;
        if (show) put(more);
    }
    if (show) put("\n");
    fprintf(stderr, "\n%zu prompt tokens (%d from cache), %d new tokens, %.1f tokens/s, "
            "first token after %.3f s\n",
            r.prompt.size(), replies[0].last.cached, tokens, rate, first - start);
    return replies;
}

void generate(const Flags& f) {
    Session s(f, f.ids.empty());
    Request r = s.request(input_ids(s));
    bool show = !f.json && r.samples == 1;
    vector<Reply> replies = run(s, r, show);
    for (int i = 0; i < r.samples && !show; i++) {
        const Reply& a = replies[i];
        const char* finish = a.last.finish;
        ordered j = {{"index", i}, {"text", s.tokenizer ? ordered(a.text) : ordered()},
            {"ids", a.ids}, {"finish_reason", finish ? ordered(finish) : ordered()},
            {"seed", r.sampling.seed}, {"usage", {{"prompt_tokens", r.prompt.size()},
            {"cached_tokens", a.last.cached}, {"completion_tokens", a.ids.size()}}}};
        auto show_logprob = [&](const TokenLogprob& t) { return logprob_json(s, t); };
        if (r.logprobs >= 0) j["logprobs"] = ordered::array();
        for (const auto& of_token : a.logprobs)
            j["logprobs"].push_back(with_likeliest(of_token, "top", show_logprob));
        put(f.json ? j.dump() + "\n" : str("--- sample ", i, "\n", a.text, "\n"));
    }
}

// The user's next message, where a line that ends in \ goes on; false at the end of input.
bool read_message(string& text) {
    text.clear();
    for (string line;;) {
        if (isatty(0)) std::cerr << (text.empty() ? "> " : "| ");
        if (!std::getline(std::cin, line)) return !text.empty();
        text += line;
        if (!line.ends_with("\\")) return true;
        text.back() = '\n';
    }
}

// What the template adds behind an answer, less what the model has said of it itself.
vector<int> end_of_turn(const Chat& format, const Tokenizer& text, const vector<int>& answer) {
    string rest = format.end_of_turn, last = answer.empty() ? "" : text.bytes(answer.back());
    if (rest.starts_with(last)) rest.erase(0, last.size());
    return text.encode(rest);
}

void chat(const Flags& f) {
    Chat format = Chat::load(f.model);
    Session s(f, true);
    const Tokenizer& text = *s.tokenizer;
    format.thinking = !f.no_think;
    text.encode(f.system);  // here and below: an error tells its offset in the user's own text
    vector<int> opening = text.encode(format.opening(f.system.empty() ? nullptr : &f.system));
    std::deque<vector<int>> turns;  // ids of a question, its answer and the end of turn
    auto answer = [&](const string& message) {
        text.encode(message);
        turns.push_back(text.encode(format.user_turn(message)));
        int room = std::min(s.engine.context / 4, f.max_tokens);
        vector<int> prompt;
        for (;; turns.pop_front()) {
            prompt = opening;
            for (const auto& turn : turns) prompt.insert(prompt.end(), turn.begin(), turn.end());
            if (turns.size() == 1 || int(prompt.size()) + room <= s.engine.context) break;
            std::cerr << "(the context is full: the oldest turn is forgotten)\n";
        }
        vector<int> ids = run(s, s.request(prompt), true)[0].ids;
        for (const auto& more : {ids, end_of_turn(format, text, ids)})
            turns.back().insert(turns.back().end(), more.begin(), more.end());
    };
    if (f.text && f.text->empty()) fail("--prompt: no text; give a question");
    if (f.text) return answer(*f.text);
    for (string message; read_message(message) && message != "/quit";) {
        if (message == "/reset") turns.clear();
        else if (!message.empty()) answer(message);
        if (interrupted && !isatty(0)) break;
        interrupted = 0;
    }
}

void score(const Flags& f) {
    Session s(f, f.ids.empty());
    Request r = s.request(input_ids(s));
    r.score_prompt = true;
    r.max_tokens = 1;
    Reply reply = run(s, r, false)[0];
    if (interrupted) return;
    vector<double> each;
    for (auto& of_token : reply.last.prompt_logprobs) each.push_back(of_token[0].logprob);
    double sum = std::accumulate(each.begin(), each.end(), 0.0), mean = sum / double(each.size());
    ordered j = {{"tokens", r.prompt.size()}, {"logprob", sum}, {"mean_logprob", mean},
                 {"perplexity", std::exp(-mean)}, {"token_logprobs", {nullptr}}};  // NaN is null
    for (double logprob : each) j["token_logprobs"].push_back(logprob);
    put_object(j, f.json);
}

#include "docs/forks/batch.hpp"  // batch: many requests from a file

void tokenize(const Flags& f) {
    Tokenizer tokenizer(f.model);
    auto convert = [&](const json& j) -> json {
        if (f.decode) return tokenizer.decode(ids_of(j, "--decode"));
        if (!f.chat) return tokenizer.encode(j.get<string>(), !f.no_special);
        Chat format = Chat::load(f.model);
        format.thinking = !f.no_think;
        vector<Message> messages;
        for (const json& m : j) messages.push_back({m.at("role"), m.at("content")});
        return tokenizer.encode(format.render(messages));
    };
    string text = input_text(f), out;
    std::istringstream lines(text);
    for (string line; f.jsonl && std::getline(lines, line);)
        out += convert(parse_json(line)).dump() + "\n";
    if (f.jsonl) return put(out);
    json j = convert(f.decode || f.chat ? parse_json(text) : json(text));
    put(f.decode ? j.get<string>() : j.dump() + "\n");
}

// A request for exactly so many new tokens. Every prompt begins differently: nothing is reused.
Request bench_request(const Session& s, int prompt, int tokens) {
    static int id = 0;
    Request r = s.request(vector<int>(prompt));
    for (int& t : r.prompt) t = id = (id + 7919) % s.model.config.vocab;
    r.max_tokens = tokens;
    r.ignore_eos = true;
    return r;
}

// Runs what was added to its end or to Ctrl-C; the tokens that came.
double run_to_end(Engine& engine) {
    double tokens = 0;
    while (engine.busy() && !interrupted) tokens += double(engine.step().size());
    return tokens;
}

// Tokens a second: of computing one prompt (tokens 0), or of decoding that many in each of some
// rows, from when all prompts are computed.
double bench_once(Session& s, int rows, int prompt, int tokens) {
    for (int i = 0; i < rows; i++) s.engine.add(bench_request(s, prompt, tokens + 1));
    double start = now(), counted = prompt;
    while (s.engine.busy() && !interrupted && int(s.engine.step().size()) < rows) {}
    if (tokens) start = now(), counted = 0;
    counted += run_to_end(s.engine);
    return counted / (now() - start);
}

using Workload = vector<std::pair<int, int>>;  // tokens of a prompt, new ones

// From a file with a line each.
Workload read_workload(const string& path, int context) {
    std::istringstream file(read_file(path));
    Workload lengths;
    for (int prompt, count = 0; file >> prompt; lengths.push_back({prompt, count}))
        if (!(file >> count) || prompt < 1 || count < 1 || prompt + count > context)
            fail(path, ": request ", lengths.size() + 1, " is not two lengths that fit");
    if (lengths.empty() || !file.eof()) fail(path, ": expected lengths, a pair a line");
    return lengths;
}

// All requests at a time, temperature 0.6.
void bench_workload(Session& s, const Workload& lengths) {
    s.engine.add(bench_request(s, lengths[0].first, 2));  // to warm up
    run_to_end(s.engine);
    for (auto [prompt, count] : lengths) {
        Request r = bench_request(s, prompt, count);
        r.sampling.temperature = 0.6f;
        s.engine.add(r);
    }
    double start = now(), tokens = 0;
    std::pair<int, int> peak;  // blocks, unused slots
    while (s.engine.busy() && !interrupted) {
        tokens += double(s.engine.step().size());
        peak = std::max(peak, s.engine.memory_use());
    }
    double seconds = now() - start, slots = double(peak.first) * kBlockSize;
    if (!interrupted) put_object({{"workload", s.f.workload}, {"seconds", seconds},
        {"new_tokens", tokens}, {"tokens_per_s", tokens / seconds},
        {"preemptions", s.engine.preemptions}, {"blocks_at_peak", peak.first},
        {"unused_at_peak", peak.second / slots}}, s.f.json);
}

void bench(const Flags& f) {
    Session s(f);
    const Config& c = s.model.config;
    int longest = std::max(std::ranges::max(f.pp) + 1,
                           std::ranges::max(f.tg) + std::ranges::max(f.depth) + 1);
    if (longest > s.engine.context)
        fail("bench: ", longest, " tokens do not fit into the context of ", s.engine.context);
    Workload workload;
    if (!f.workload.empty()) workload = read_workload(f.workload, s.engine.context);
    auto [bandwidth, peak] = s.engine.device->limits();
    double bytes = double(s.model.weights.bytes);
    put_object({{"device", s.engine.device->name}, {"threads", f.threads},
                {"weight_MB", bytes / 1e6}, {"read_GB_per_s", bandwidth / 1e9},
                {"peak_GFLOP_per_s", peak / 1e9}}, f.json);
    auto row = [&](const string& test, int rows, int prompt, int tokens) {
        double rate[4];
        for (double& r : rate) r = bench_once(s, rows, prompt, tokens);
        std::sort(rate + 1, rate + 4);  // the first was to warm up
        // decoding is limited by reading all weights and the cache once a step, a prompt by
        // multiplying with all but lm_head; of an embedding of its own, either uses a row a token
        double embedding = 2.0 * c.vocab * c.hidden, flops = bytes - embedding * (c.tied ? 1 : 2);
        double read = bytes - (c.tied ? 0 : embedding);
        read += (prompt + tokens / 2.0) * rows * double(s.engine.device->token_bytes());
        double done = tokens ? rate[2] / rows * read : rate[2] * flops;  // a second
        double of_limit = done / (tokens ? bandwidth : peak);
        const char* limit = tokens ? "read bandwidth" : "peak";
        string unit = tokens ? "GB" : "GFLOP";
        if (interrupted) return;
        if (f.json) put_object({{"test", test}, {"rows", rows}, {"tokens_per_s", rate[2]},
            {"least", rate[1]}, {"most", rate[3]}, {unit + "_per_s", done / 1e9},
            {"of_limit", of_limit}, {"limit", limit}}, true);
        else put(str(std::left, std::setw(14), test, std::fixed, std::setprecision(1), rate[2],
            " tokens/s (", rate[1], " to ", rate[3], "), ", done / 1e9, " ", unit, "/s, ",
            of_limit * 100, "% of ", limit, "\n"));
    };
    if (!workload.empty()) return bench_workload(s, workload);
    for (int pp : f.pp) row(str("pp", pp), 1, pp, 0);
    for (int tg : f.tg) for (int depth : f.depth) for (int rows : f.rows)
        row(str("tg", tg, "@", depth, " x ", rows), rows, depth, tg);
}

void info(const Flags& f) {
    Session s(f);
    const Config& c = s.model.config;
    put_object({{"type", c.type}, {"layers", c.layers}, {"hidden", c.hidden}, {"heads", c.heads},
        {"kv_heads", c.kv_heads}, {"head_dim", c.head_dim}, {"intermediate", c.intermediate},
        {"vocabulary", c.vocab}, {"context", c.context}, {"parameters", s.model.weights.bytes / 2},
        {"weight_bytes", s.model.weights.bytes},
        {"kv_bytes_per_token", s.engine.device->token_bytes()},
        {"device", s.engine.device->name}, {"threads", f.threads},
        {"kv_tokens_that_fit", int64_t(s.engine.cache.blocks()) * kBlockSize}}, f.json);
}

// =============================================================================================
// 6. main
// =============================================================================================

// OpenMP's threads meet 250 times a token: those that wait spin for some microseconds, then sleep,
// so that other work on the machine can go on. libgomp reads this before main.
__attribute__((constructor(101))) void wait_briefly() { setenv("GOMP_SPINCOUNT", "1000", 0); }

const auto kSize = CLI::Range(1, 1 << 24);  // of flags that count

// The flags of a program, and how its errors are shown. The programs in docs/forks use it, too.
struct CommandLine {
    Flags f = {};
    CLI::App app;
    const vector<string> own = {""};  // as the commands of a flag: the program has no commands

    explicit CommandLine(const string& what) : app(what) {
        f.sampling.seed = std::random_device()();
        app.set_version_flag("--version", name() + " 0.1");
    }

    // The program's: of what it is, what stands before the colon.
    string name() const {
        return app.get_description().substr(0, app.get_description().find(':'));
    }

    CLI::App* command(const string& name) { return name.empty() ? &app : app.get_subcommand(name); }

    // A flag of some commands; check may refuse or change its value.
    void flag(const vector<string>& commands, const char* name, auto& value, const char* what,
              const CLI::Validator& check = {}) {
        using T = std::decay_t<decltype(value)>;
        for (const string& to : commands) {
            CLI::App* c = command(to);
            if constexpr (std::is_same_v<T, bool>) c->add_flag(name, value, what);
            else c->add_option(name, value, what)->transform(check)->allow_extra_args(false)
                ->delimiter(std::is_same_v<T, vector<int>> ? ',' : '\0');
        }
    }

    void model(const string& name) {
        command(name)->add_option("MODEL", f.model, "a model's folder, as Hugging Face has it")
            ->required();
    }

    void text_flags(const vector<string>& commands) {
        flag(commands, "-p,--prompt", f.text, "the text");
        flag(commands, "-f,--file", f.file, "a file with the text; without -p and -f: stdin");
    }

    void truncation_flags(const vector<string>& commands) {
        flag(commands, "-t,--temperature", f.temperature, "0: always the likeliest");
        flag(commands, "-k,--top-k", f.top_k, "only the k likeliest; 0: all");
        flag(commands, "--top-p", f.top_p, "only the likeliest that together have p; 1: all");
        flag(commands, "--min-p", f.min_p, "only those with p times the largest probability");
    }

    void drawing_flags(const vector<string>& to) {
        truncation_flags(to);
        flag(to, "-n,--max-tokens", f.max_tokens, "else to the end of text or context", kSize);
        flag(to, "--repetition-penalty", f.repetition_penalty, "1: none");
        flag(to, "--presence-penalty", f.sampling.presence_penalty, "0: none");
        flag(to, "--frequency-penalty", f.sampling.frequency_penalty, "0: none");
        flag(to, "--seed", f.sampling.seed, "the same seed draws the same; else a random one");
        flag(to, "--stop", f.stop, "end before this text; may be repeated");
        flag(to, "--ignore-eos", f.ignore_eos, "go on behind the end of text");
    }

    void engine_flags(const vector<string>& to) {
        flag(to, "--device", f.device, "auto, cpu, cuda or cuda:1");
        flag(to, "--threads", f.threads, "of the CPU; else one a core", CLI::Range(1, 1024));
        flag(to, "--kv-memory", f.kv_memory, "size of the cache, as 512M", CLI::AsSizeValue(false));
        flag(to, "--max-context", f.max_context, "fewer tokens than the model allows", kSize);
        flag(to, "--max-rows", f.max_rows, "sequences running at a time; else 64", kSize);
        flag(to, "--chunk", f.chunk, "tokens computed in a step; else 512", kSize);
        flag(to, "!--no-prefix-cache", f.prefix_cache, "compute all prompts from the start");
        flag(to, "!--no-graph", f.graphs, "no captured graphs (GPU only)");
        flag(to, "--load-format", f.load, "dummy: random weights",
             CLI::IsMember({"auto", "dummy"}));
        flag(to, "--verbose", f.verbose, "say what was chosen");
    }

    // What the flags leave open is what docs/forks/tune.cu found best on this machine, if it did.
    void take_settings() {
        with_json(f.model + "/nanocu.json", [&](const json& j) {
            std::map<string, std::pair<int*, int>> known = {{"threads", {&f.threads, 1024}},
                {"max-rows", {&f.max_rows, 1 << 24}}, {"chunk", {&f.chunk, 1 << 24}}};
            const json mine = j.is_object() ? value_or(j, machine(f.device), json::object()) : j;
            for (const auto& [name, value] : mine.items()) {
                auto [to, most] = known[name];
                if (!to || !value.is_number_unsigned() || value < 1 || value > most)
                    fail("\"", name, "\": ", value, " is no setting; delete the file, tune again");
                if (*to) continue;  // a flag says otherwise
                *to = value;
                if (f.verbose) std::cerr << str(f.model, "/nanocu.json: ", name, " ", *to, "\n");
            }
        }, true);
        if (!f.threads) f.threads = omp_get_num_procs();
    }

    // Reads the flags and does the work. Returns the exit status: after an error, which is one line
    // (what, where, what to do), 1; after Ctrl-C 130.
    int run(int argc, char** argv, const std::function<void()>& work) {
        struct sigaction action = {};
        action.sa_handler = [](int) {
            if (interrupted) _exit(130);  // the second time, at once
            interrupted = 1;
        };
        sigaction(SIGINT, &action, nullptr);
        string error;
        try {
            app.parse(argc, argv);
            for (const string& stop : f.stop)
                if (stop.empty()) fail("--stop: is empty; leave it out");
            take_settings();
            omp_set_num_threads(f.threads);
            work();
            return interrupted ? 130 : 0;
        } catch (const CLI::ParseError& e) {
            if (e.get_exit_code() == 0) return app.exit(e);  // --help, --version
            error = str(e.what(), "; see ", name(), " --help");
            if (!app.get_subcommands({}).empty()) error += str(", or ", name(), " COMMAND --help");
        } catch (const json::exception& e) {  // of what the user wrote; a file's own has its name
            error = str("input, --ids: ", strchr(e.what(), ']') + 2);
        } catch (const std::exception& e) {
            error = e.what();
        }
        std::ranges::replace_if(error, [](unsigned char c) { return c < 32; }, ' ');
        std::cerr << name() << ": " << error.substr(0, 300) << "\n";
        return 1;
    }
};

#ifndef NANOCU_NO_MAIN
int main(int argc, char** argv) {
    CommandLine line("nanocu: LLM inference, small enough to be read");
    Flags& f = line.f;
    void (*called)(const Flags&) = nullptr;
    line.app.require_subcommand(1);
    auto command = [&](const char* name, auto run, const char* what) {
        line.app.add_subcommand(name, what)->callback([&called, run] { called = run; });
        line.model(name);
        line.flag({name}, "--json", f.json, "JSON on stdout, one object a line");
    };
    command("chat", chat, "talk; /reset, /quit; a line that ends in \\ goes on");
    command("generate", generate, "continue a text as it is");
    command("batch", batch, "OpenAI batch lines in, results out; run again, it goes on");
    command("score", score, "log-probabilities of a text, and its perplexity");
    command("tokenize", tokenize, "text to ids");
    command("bench", bench, "speed of prompts (pp) and of decoding (tg)");
    command("info", info, "the model's shape, and what fits here");

    line.flag({"chat"}, "--system", f.system, "the system message");
    line.flag({"chat", "tokenize"}, "--no-think", f.no_think, "Qwen3: answer without a thought");
    line.flag({"chat"}, "-p,--prompt", f.text, "one question; answer it and end");
    line.text_flags({"generate", "score", "tokenize"});
    line.flag({"generate", "score", "tokenize"}, "--no-special", f.no_special,
              "add no bos, or what else the tokenizer adds");
    line.flag({"generate", "score"}, "--ids", f.ids, "the text as ids: 1,2,3");
    line.flag({"generate"}, "--samples", f.samples, "continuations of the one prompt", kSize);
    line.flag({"generate"}, "--logprobs", f.logprobs, "log-probabilities, and of the K likeliest",
              CLI::Range(1000));
    CLI::App* batch = line.command("batch");
    batch->add_option("INPUT", f.input, "a JSONL file of requests; -: stdin")->required();
    line.flag({"batch"}, "-o,--output", f.output, "where results go, a line each; -: stdout");
    batch->get_option("--output")->required();
    line.flag({"tokenize"}, "--jsonl", f.jsonl, "a JSON string a line in, an array of ids out");
    line.flag({"tokenize"}, "--decode", f.decode, "ids to text");
    line.flag({"tokenize"}, "--chat", f.chat, "in: a JSON array of messages");
    line.flag({"bench"}, "--pp", f.pp, "prompt lengths", kSize);
    line.flag({"bench"}, "--tg", f.tg, "tokens to decode", kSize);
    line.flag({"bench"}, "--depth", f.depth, "tokens before those; else 16", kSize);
    line.flag({"bench"}, "--rows", f.rows, "sequences at a time", kSize);
    line.flag({"bench"}, "--workload", f.workload,
              "a file of prompt and output lengths, a pair a line");
    line.truncation_flags({"bench"});
    line.drawing_flags({"chat", "generate"});
    line.engine_flags({"chat", "generate", "batch", "score", "bench", "info"});
    return line.run(argc, argv, [&] {
        if (f.logprobs >= 0 && !f.json) fail("--logprobs: shown in JSON only; add --json");
        called(f);
    });
}
#endif
