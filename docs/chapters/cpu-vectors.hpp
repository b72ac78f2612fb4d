// cpu-vectors.hpp: the CPU's ops on vector registers. Replaces norm_linear, norm_swiglu,
// add_linear, rotate and attend of CpuDevice; the rest stays as it is in nano.cu.
//
// What it gains and how:
//   - A weight is used for up to 8 rows while it is in a register, and 4 rows of weights share a
//     row of x. What that leaves of the time is memory's: weights are prefetched into L2.
//   - bf16 pairs become floats by one shift and one mask, if x has its numbers in an order that
//     fits (paired, below). So norms and activations write what will be multiplied in that order.
//   - Inside a block a head's keys are transposed, [HD, 16]: one vector holds the same component of
//     eight tokens, so a score is a sum down a column, for eight tokens at a time:
//
//         token      0   1   2 ..  7 | 8 ..15
//         dim 0    [ k   k   k     k ][       ]    sum[0] += q[0] * this, sum[1] += ...
//         dim 1    [ k   k   k     k ][       ]    sum[0] += q[1] * this, ...
//
//   - Norm and activation are done where their product's numbers pass by.
// The compiler's vector types are used, so this builds for x86-64 and for arm64. The bits of a row
// depend on nothing but its own tokens: every sum has one order, in any batch, chunk or number of
// threads.
#pragma once

constexpr int kPrefetch = 8192;  // weights fetched ahead of their use, in numbers

namespace vectors {

// Four and eight lanes, at any address.
typedef float f32x4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float f32x8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t u32x8 __attribute__((vector_size(32), aligned(2), may_alias));

// On x86-64 one copy of a function for any x86-64-v3, one for AVX-512 with its 32 registers.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define NANOCU_CLONES __attribute__((target_clones("arch=x86-64-v4", "default")))
inline bool many_registers() { return __builtin_cpu_supports("avx512vl"); }
#elif defined(__x86_64__)
#define NANOCU_CLONES
inline bool many_registers() { return false; }
#else
#define NANOCU_CLONES
inline bool many_registers() { return true; }
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
    static const bool wide = many_registers();
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
void norm(const float* x, int n, const float* weight, float eps, float* out, Order order) {
    f32x8 squares = {};
    for (int i = 0; i < n; i += 8) squares += *(const f32x8*)(x + i) * *(const f32x8*)(x + i);
    float sum = std::accumulate((float*)&squares, (float*)&squares + 8, 0.0f);
    float factor = 1 / std::sqrt(sum / float(n) + eps);
    for (int i = 0; i < n; i++) out[order(i)] = x[i] * factor * weight[i];
}

// R queries q [R, HD] of one kv head over the first n tokens of a table: out [R, HD] =
// softmax(q K^T / sqrt(HD)) V, paired. scores: room for R times n, rounded up to whole blocks.
template <int R>
NANOCU_CLONES void attend_heads(const Shape& c, const float* q, const float* kv, int layer,
                                int head, const int* table, int n, float* scores, float* out) {
    int HD = c.head_dim, size = Cache::blocks_for(n) * kBlockSize;
    float inverse[R], scale = 1 / std::sqrt(float(HD));
    for (int i = 0; i < size; i += kBlockSize) {
        const f32x8* k = (const f32x8*)(kv + c.key_page(table[i / kBlockSize], layer, head));
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
            const float* v = kv + c.value_page(table[i / kBlockSize], layer, head);
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

}  // namespace vectors

// Base: CpuDevice, or a chapter over it; its keys must lie as keys_transposed says.
template <class Base>
class CpuVectors : public Base {
public:
    // One slot is one number further, one component 16.
    static PageLayout keys_transposed() { return {1, 8, kBlockSize, 8 * kBlockSize}; }

    CpuVectors(const Model& m, const DeviceOptions& o, PageLayout keys, PageLayout values)
        : Base(m, o, keys, values),
          on(this->switched_on("cpu-vectors", "",
                               {"norm_linear", "rotate", "attend prompts",
                                "attend decodes", "add_linear", "mlp"}, "")) {}

protected:
    using f32x8 = vectors::f32x8;

    void norm_linear(Product p, int layer, const int* rows, int count) override {
        if (!on) return Base::norm_linear(p, layer, rows, count);
        norm_rows(p, layer, rows, count);
        const Model& m = this->model;
        if (p == kLmHead) {
            const int V = this->c.vocab;
            auto row = [&](int n) { return m.lm_head.row(std::min(n, V - 1)); };
            auto store = [&](int t, int n, f32x8 sum) {
                std::copy_n((float*)&sum, std::min(8, V - n), this->logits + size_t(t) * V + n);
            };
            return vectors::project(this->normed, count, this->c.hidden, V, row, store);
        }
        const Layer& l = m.layers[layer];
        const int Q = l.q.rows, K = l.k.rows, N = Q + 2 * K;
        auto row = [&](int n) {
            return n < Q ? l.q.row(n) : n < Q + K ? l.k.row(n - Q) : l.v.row(n - Q - K);
        };
        auto store = [&](int t, int n, f32x8 sum) {
            *(f32x8*)(this->qkv + size_t(t) * N + n) = sum + *(const f32x8*)&l.bias[n];
        };
        vectors::project(this->normed, count, l.q.cols, N, row, store);
    }

    // Norms rows of x into normed, in the order that products want.
    void norm_rows(Product p, int layer, const int* rows, int count) {
        const size_t D = this->c.hidden;
        #pragma omp for
        for (int t = 0; t < count; t++)
            vectors::norm(this->x + (rows ? rows[t] : t) * D, int(D), this->norm_weight(p, layer),
                          this->c.norm_eps, this->normed + t * D, vectors::paired);
    }

    void norm_swiglu(const StepArrays& s, int layer) override {
        if (!on) return Base::norm_swiglu(s, layer);
        norm_rows(kGateUp, layer, nullptr, s.rows);
        const Layer& l = this->model.layers[layer];
        const int F = l.gate.rows;
        // of each 8 rows of weights, 4 are of gate and 4 of up: rows 4 i to 4 i + 3 of either
        auto row = [&](int n) {
            const Matrix& half = n % 8 < 4 ? l.gate : l.up;
            return half.row(n / 8 * 4 + n % 4);
        };
        auto store = [&](int t, int n, f32x8 sum) {
            f32x8 e = -sum;
            vectors::exp8(e);
            for (int j = 0; j < 4; j++)
                this->h[size_t(t) * F + vectors::paired(n / 2 + j)] =
                    sum[j] / (1 + e[j]) * sum[4 + j];
        };
        vectors::project(this->normed, s.rows, l.gate.cols, 2 * F, row, store);
    }

    void add_linear(const StepArrays& s, Product p, int layer) override {
        if (!on) return Base::add_linear(s, p, layer);
        const Layer& l = this->model.layers[layer];
        const Matrix& w = p == kO ? l.o : l.down;
        const float* in = p == kO ? this->att : this->h;
        auto store = [&](int t, int n, f32x8 sum) {
            *(f32x8*)(this->x + size_t(t) * w.rows + n) += sum;
        };
        vectors::project(in, s.rows, w.cols, w.rows, [&](int n) { return w.row(n); }, store);
    }

    void rotate(const StepArrays& s, int layer) override {
        if (!on) return Base::rotate(s, layer);
        const Shape& c = this->c;
        const Layer& l = this->model.layers[layer];
        const int H = c.heads, KV = c.kv_heads, HD = c.head_dim;
        #pragma omp for
        for (int t = 0; t < s.rows; t++) {
            float *q = this->qkv + size_t(t) * c.qkv_dim(), *k = q + c.q_dim(), *v = k + KV * HD;
            int position = s.positions[t], slot = position % kBlockSize;
            int block = s.table(t)[position / kBlockSize];
            for (int h = 0; h < H; h++) rotate_head(l.q_norm, t, q + h * HD);
            for (int h = 0; h < KV; h++, k += HD, v += HD) {
                rotate_head(l.k_norm, t, k);
                float* keys = this->kv + c.key_page(block, layer, h);
                for (int d = 0; d < HD; d++) keys[d * kBlockSize + slot] = k[d];
                std::copy(v, v + HD, this->kv + c.value_page(block, layer, h) + slot * HD);
            }
        }
    }

    // Norm (Qwen3) and RoPE of one head's q or k [HD] in row t.
    void rotate_head(const vector<float>& weight, int t, float* v) const {
        const int HD = this->c.head_dim, half = HD / 2;
        const float *cosine = this->angles + size_t(t) * HD, *sine = cosine + half;
        if (!weight.empty())
            vectors::norm(v, HD, weight.data(), this->c.norm_eps, v, std::identity());
        for (int i = 0; i < half; i++) {
            float first = v[i], second = v[i + half];
            v[i] = first * cosine[i] - second * sine[i];
            v[i + half] = second * cosine[i] + first * sine[i];
        }
    }

    void attend(const StepArrays& s, int layer) override {
        if (!on) return Base::attend(s, layer);
        const Shape& c = this->c;
        const int H = c.heads, KV = c.kv_heads, HD = c.head_dim, G = c.group();
        static decltype(vectors::attend_heads<1>)* const by_rows[] = {
            nullptr, vectors::attend_heads<1>, vectors::attend_heads<2>, vectors::attend_heads<3>,
            vectors::attend_heads<4>};
        vector<float> scores(size_t(s.header->table_width) * kBlockSize * 4);
        #pragma omp for schedule(dynamic) collapse(2)
        for (int t = 0; t < s.rows; t++)
            for (int head = 0; head < KV; head++)
                for (int h = 0, rows; h < G; h += rows) {
                    rows = std::min(4, G - h);
                    size_t first = size_t(head) * G + h;
                    by_rows[rows](c, this->qkv + size_t(t) * c.qkv_dim() + first * HD, this->kv,
                                  layer, head, s.table(t), s.positions[t] + 1, scores.data(),
                                  this->att + (size_t(t) * H + first) * HD);
                }
    }

private:
    const bool on;
};
