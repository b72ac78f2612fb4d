// few-rows.cuh: products of up to 8 rows, with the norm before and what comes behind in one kernel.
// Replaces norm_linear, norm_swiglu and add_linear of CudaDevice for steps of up to 8 rows.
//
// For one row cuBLAS takes its time: it is made for many, and before it runs a norm, behind it
// the activation, each a kernel of its own that must begin and end. Here
//   - weights are the A of mma.sync as they lie in memory, rows of x the 8 columns of its B;
//   - x is multiplied with the norm's weights on the way in, and the factor 1 / sqrt(mean(x^2)),
//     which is one number a row, is applied to the sums at the end;
//   - the first weights are on their way before the kernel before this one is done.
//
//    16 rows of w         x: 8 columns
//   [ ........ k ......]  [ k ]         8 warps take turns at k, 32 at a time; their sums meet in
//   [ ........ k ......]  [ k ]         shared memory, where silu * up, += x or nothing follows
//
#pragma once

#include "tensor-cores.cuh"

namespace cuda {

// What few_rows does with its sums: q, k, v; x += ; silu(gate) * up; logits.
enum class Into { values, residual, swiglu, logits };

constexpr int kFewRows = 8, kFewThreads = 256;

// y [T, N] = in [T, K] w [N, K]^T for up to 8 rows, each weight read once. in: bf16, or with norm
// the RMS norm of x, whose factor is applied to the sums. A block has 16 rows of weights (8 of gate
// and 8 of up, or 8 where there are few), its warps take turns along K. Weights are the A of the
// mma just as they lie in memory: a lane's 16 bytes are four pairs of k, in an order that x shares.
// The first are on their way before the kernel before this one is done.
template <Into into, int kRows>
__global__ void __launch_bounds__(kFewThreads)
few_rows(Shape c, int T, int N, int K, const bf16* w, const bf16* in, const float* x,
         const int* rows, const float* norm, void* out) {
    constexpr int kWarps = kFewThreads / 32, kAhead = 64 / kRows;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    constexpr bool kPairs = into == Into::swiglu;
    int n0 = blockIdx.x * (kPairs ? 8 : kRows) + g, n1 = kPairs ? n0 + N : min(n0 + 8, N - 1);
    const bf16 *w0 = w + size_t(min(n0, N - 1)) * K + 8 * t, *w1 = w + size_t(n1) * K + 8 * t;
    uint4 a0[kAhead], a1[kAhead], b[kAhead];
    auto fetch = [&](int i, int k) {
        a0[i] = k < K ? __ldcs((const uint4*)(w0 + k)) : uint4{};
        a1[i] = k < K && kRows > 8 ? __ldcs((const uint4*)(w1 + k)) : uint4{};
    };
    #pragma unroll
    for (int i = 0; i < kAhead; i++) fetch(i, (warp + i * kWarps) * 32);
    wait_for_previous();
    float sum[4] = {}, squares = 0;
    size_t row = rows && g < T ? rows[g] : g;
    for (int begin = warp * 32; begin < K; begin += kAhead * kWarps * 32) {
        #pragma unroll
        for (int i = 0; i < kAhead; i++) {
            int k = begin + i * kWarps * 32 + 8 * t;
            b[i] = {};
            if (k < K && g < T && norm) {
                float v[8], f[8];
                *(float4*)v = *(const float4*)(x + row * K + k);
                *(float4*)(v + 4) = *(const float4*)(x + row * K + k + 4);
                *(float4*)f = *(const float4*)(norm + k);
                *(float4*)(f + 4) = *(const float4*)(norm + k + 4);
                for (int j = 0; j < 8; j++) squares += v[j] * v[j], v[j] *= f[j];
                b[i] = {pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7])};
            } else if (k < K && g < T) {
                b[i] = *(const uint4*)(in + row * K + k);
            }
        }
        #pragma unroll
        for (int i = 0; i < kAhead; i++) {
            mma(sum, a0[i].x, a1[i].x, a0[i].y, a1[i].y, b[i].x, b[i].y);
            mma(sum, a0[i].z, a1[i].z, a0[i].w, a1[i].w, b[i].z, b[i].w);
            fetch(i, begin + (i + kAhead) * kWarps * 32);
        }
    }
    __shared__ float sums[kWarps][16][8], all_squares[kWarps][8];
    for (int n = 1; n < 4; n *= 2) squares += __shfl_xor_sync(~0u, squares, n);
    if (t == 0) all_squares[warp][g] = squares;
    for (int i = 0; i < 4; i++) sums[warp][g + i / 2 * 8][2 * t + i % 2] = sum[i];
    __syncthreads();
    int r = threadIdx.x / 8, column = threadIdx.x % 8, n = blockIdx.x * (kPairs ? 8 : kRows) + r;
    if (r >= (kPairs ? 8 : kRows) || n >= N || column >= T) return;
    float value = 0, up = 0, square = 0;
    for (int i = 0; i < kWarps; i++) {
        value += sums[i][r][column];
        if (kPairs) up += sums[i][r + 8][column];
        square += all_squares[i][column];
    }
    float factor = norm ? rsqrtf(square / K + c.norm_eps) : 1;
    value *= factor;
    size_t at = size_t(column) * N + n;
    if (into == Into::values) ((bf16*)out)[at] = bf16(value);
    if (into == Into::residual) ((float*)out)[at] += value;
    if (into == Into::swiglu) ((bf16*)out)[at] = bf16(value / (1 + __expf(-value)) * up * factor);
    if (into == Into::logits) ((float*)out)[at] = value;
}

template <class Base>
class FewRows : public Base {
public:
    FewRows(const Model& m, const DeviceOptions& o, PageLayout keys, PageLayout values)
        : Base(m, o, keys, values),
          on(this->switched_on("few-rows", m.config.hidden % 32 || m.config.intermediate % 32 ?
                                               "sizes are not multiples of 32" : "",
                               {"norm_linear", "add_linear", "mlp"}, " (up to 8 rows)")) {}

protected:
    void norm_linear(Product p, int layer, const int* rows, int count) override {
        if (!few(count) || p == kGateUp) return Base::norm_linear(p, layer, rows, count);
        const int N = this->weights[p].N;
        const float* weight = this->norm_weight(p, layer);
        void* out = p == kQkv ? (void*)this->qkv : (void*)this->logits;
        auto go = &FewRows::launch<Into::values, 16>;
        if (p == kLmHead) go = &FewRows::launch<Into::logits, 16>;
        (this->*go)(N, count, p, layer, nullptr, rows, weight, out);
    }

    void add_linear(const StepArrays& s, Product p, int layer) override {
        if (!few(s.rows)) return Base::add_linear(s, p, layer);
        const bf16* in = p == kO ? this->att : this->h;
        launch<Into::residual, 8>(this->c.hidden, s.rows, p, layer, in, nullptr, nullptr, this->x);
    }

    void norm_swiglu(const StepArrays& s, int layer) override {
        if (!few(s.rows)) return Base::norm_swiglu(s, layer);
        launch<Into::swiglu, 16>(this->c.intermediate, s.rows, kGateUp, layer, nullptr, nullptr,
                                 this->norm_weight(kGateUp, layer), this->h);
    }

private:
    bool few(int rows) const { return on && rows <= kFewRows; }

    // N: of the result. in: what is multiplied, or null: rows of x, by the norm's weights.
    template <Into into, int kRows>
    void launch(int N, int T, Product p, int layer, const bf16* in, const int* rows,
                const float* norm, void* out) {
        const auto& w = this->weights[p];
        const int each = into == Into::swiglu ? 8 : kRows;
        this->start(few_rows<into, kRows>, (N + each - 1) / each, kFewThreads, 0, 1, this->c, T, N,
                    w.K, w.data + size_t(layer) * w.N * w.K, in, this->x, rows, norm, out);
    }

    const bool on;
};

}  // namespace cuda
