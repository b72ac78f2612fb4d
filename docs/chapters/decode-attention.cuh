// decode-attention.cuh: attention of decodes on tensor cores. Replaces attend_decodes of
// CudaDevice.
//
// A decode has one token, so few queries, and reads a whole context of keys and values. The plain
// op spends its time on multiplying numbers one by one. Here the up to 8 query heads that share a
// kv head are the 8 columns of an mma.sync:
//
//    S^T [16 tokens, 8 heads] = K [16, HD] Q^T [HD, 8]
//    O^T [HD, 8] += V^T [HD, 16] P^T [16, 8]
//
// Keys go from memory to registers as they lie there. Parts of a context are merged by the block
// that comes last, so no second kernel is needed.
#pragma once

#include "tensor-cores.cuh"

namespace cuda {

constexpr int kDecodeWarps = 4;  // of a block
constexpr int kMinBlocks = 264;  // that parts of contexts should make at least
constexpr int kMaxSplits = 32;   // parts of a context
constexpr int kPrefixParts = 8;  // of pages that were attended to beforehand

// Pages at the beginning of a row's context that were attended to beforehand, with those of other
// rows (shared-prefix.cuh): how many, in how many parts, and where their results are.
struct PrefixPages {
    int pages, parts, at;
};

// True in the last of count blocks that come here, which then sees what the others wrote.
__device__ bool comes_last(int* ticket, int count) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(ticket, 1) == count - 1;
        if (last) *ticket = 0;
    }
    __syncthreads();
    __threadfence();
    return last;
}

// Where a part of what rows share leaves its results: of each of the G heads the sums of values
// [HD], the largest score and the sum of the weights.
__device__ float* prefix_part(float* results, const Shape& c, int at, int head, int part) {
    int G = c.heads / c.kv_heads;
    return results + size_t((at * c.kv_heads + head) * kPrefixParts + part) * G * (c.head_dim + 2);
}

// Attention of one new token a sequence: a block for each row, kv head and part of the context, its
// warps taking turns at the 16-token blocks. Products are S^T = K Q^T and O^T = V^T P^T, so that
// the up to 8 query heads of the kv head are the 8 columns of the mma, and keys go from memory
// to registers as they lie there: a lane's 16 bytes of a key are four pairs of components in an
// order that q shares. Of values it takes 8 components of 4 tokens and pairs up the tokens. The
// blocks that a row shares with others have been seen to by prefill_attend.
template <int HD>
__global__ void __launch_bounds__(kDecodeWarps * 32)
decode_attend(StepArrays s, Shape c, int layer, const bf16* qkv, const bf16* kv,
              const PrefixPages* prefixes, float* prefix_results, Attended* partial, int* tickets,
              bf16* att) {
    wait_for_previous();
    if (int(blockIdx.x) >= s.header->decodes) return;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int row = s.single[blockIdx.x], head = blockIdx.y, G = c.heads / c.kv_heads;
    int n = s.positions[row] + 1, blocks = (n + kBlockSize - 1) / kBlockSize;
    const PrefixPages with = prefixes ? prefixes[row] : PrefixPages{0, 0, 0};
    const int own = blocks - with.pages;
    int each = max(kDecodeWarps, (own + int(gridDim.z) - 1) / int(gridDim.z));
    int first = with.pages + blockIdx.z * each, last = min(blocks, first + each);
    if (first >= blocks) return;
    const int* table = s.tables + s.sequence[row] * s.header->table_width;
    uint4 q[HD / 32] = {};
    const bf16* queries = qkv + size_t(row) * c.qkv_dim() + (head * G + g) * HD + 8 * t;
    for (int j = 0; j < HD / 32 && g < G; j++) q[j] = *(const uint4*)(queries + 32 * j);
    float o[HD / 16][4] = {}, top[2] = {-1e30f, -1e30f}, sum[2] = {};  // of heads 2t, 2t + 1
    int token = g / 2 + g % 2 * 4;  // of row g of S^T; row g + 8 is 8 further
    for (int b = first + warp; b < last; b += kDecodeWarps) {
        const bf16* page = kv + c.key_page(table[b], layer, head);
        const bf16 *k = page + t * 64 + token * 8, *v = page + c.value_offset() + g * 64 + t * 8;
        uint4 k0[HD / 32], k1[HD / 32], v4[HD / 64][4];  // v4: of tokens t, t + 4, t + 8, t + 12
        #pragma unroll
        for (int j = 0; j < HD / 32; j++) {
            k0[j] = *(const uint4*)(k + 256 * j);
            k1[j] = *(const uint4*)(k + 256 * j + 8 * HD);
        }
        #pragma unroll
        for (int i = 0; i < HD / 64; i++)
            for (int j = 0; j < 4; j++)
                v4[i][j] = *(const uint4*)(v + 512 * i + j % 2 * 32 + j / 2 * 8 * HD);
        auto values = [&](int i, int j) {  // component i of two tokens
            unsigned low = (&v4[i / 8][j].x)[i % 8 / 2], high = (&v4[i / 8][j + 1].x)[i % 8 / 2];
            return __byte_perm(low, high, i % 2 ? 0x7632 : 0x5410);
        };
        float p[4] = {};
        #pragma unroll
        for (int j = 0; j < HD / 32; j++) {
            mma(p, k0[j].x, k1[j].x, k0[j].y, k1[j].y, q[j].x, q[j].y);
            mma(p, k0[j].z, k1[j].z, k0[j].w, k1[j].w, q[j].z, q[j].w);
        }
        bool in0 = b * kBlockSize + token < n, in1 = b * kBlockSize + token + 8 < n;
        auto [p0, p1] = weigh<HD>(p, in0, in1, o, top, sum);
        #pragma unroll
        for (int i = 0; i < HD / 16; i++)
            mma(o[i], values(i, 0), values(i + HD / 16, 0), values(i, 2), values(i + HD / 16, 2),
                p0, p1);
    }

    // the warps' parts become one, then those of the blocks, in the block that comes last
    __shared__ float outs[kDecodeWarps][kMaxGroup][HD], tops[kDecodeWarps][kMaxGroup];
    __shared__ float sums[kDecodeWarps][kMaxGroup];
    for (int e = 0; e < 2; e++) {
        for (int x = 4; x < 32; x *= 2) sum[e] += __shfl_xor_sync(~0u, sum[e], x);
        if (g == 0) tops[warp][2 * t + e] = top[e], sums[warp][2 * t + e] = sum[e];
        for (int i = 0; i < HD / 16; i++) {
            outs[warp][2 * t + e][8 * g + i] = o[i][e];
            outs[warp][2 * t + e][HD == 64 ? 8 * g + i + 4 : 8 * g + i + 64] = o[i][e + 2];
        }
    }
    __syncthreads();
    int splits = (own + each - 1) / each, unit = blockIdx.x * gridDim.y + head;
    Attended* parts = partial + size_t(unit) * gridDim.z * G * HD;  // [splits, G, HD]
    bf16* to = att + (size_t(row) * c.heads + head * G) * HD;
    auto store = [&](int i, Attended all) {
        Attended each[kPrefixParts + 1];
        each[kPrefixParts] = all;
        #pragma unroll
        for (int z = 0; z < kPrefixParts; z++) {  // all are read at the same time
            const float* part = prefix_part(prefix_results, c, with.at, head, z);
            part += i / HD * (HD + 2);
            each[z] = {-1e30f, 0, 0};
            if (z < with.parts) each[z] = {part[HD], part[HD + 1], part[i % HD]};
        }
        if (with.parts)
            all = merge<kPrefixParts + 1>(kPrefixParts + 1, [&](int z) { return each[z]; });
        to[i] = bf16(all.out / all.sum);
    };
    for (int i = threadIdx.x; i < G * HD; i += blockDim.x) {
        Attended all = merge<kDecodeWarps>(kDecodeWarps, [&](int w) {
            return Attended{tops[w][i / HD], sums[w][i / HD], outs[w][i / HD][i % HD]};
        });
        if (splits == 1) store(i, all);
        else parts[blockIdx.z * G * HD + i] = all;
    }
    if (splits == 1 || !comes_last(&tickets[unit], splits)) return;
    for (int i = threadIdx.x; i < G * HD; i += blockDim.x)
        store(i, merge<4>(splits, [&](int z) { return parts[z * G * HD + i]; }));
}

template <class Base>
class DecodeAttention : public Base {
public:
    DecodeAttention(const Model& m, const DeviceOptions& o, PageLayout keys, PageLayout values)
        : Base(m, o, keys, values),
          decode_attention(this->switched_on("decode-attention", not_for(this->c),
                                             {"attend decodes"}, "")) {
        if (!decode_attention) return;
        const size_t rows = std::max(o.tokens, Base::kLogitRows), KV = this->c.kv_heads;
        const size_t most = size_t(4 * kMinBlocks) * kMaxGroup * this->c.head_dim;
        partial = this->template make<Attended>(most);
        tickets = this->template make<int>(rows * KV);
        check(cudaMemset(tickets, 0, rows * KV * sizeof(int)), "memory");
    }

    // Why attention of this shape is not what the chapters can do; "": it is.
    static const char* not_for(const Shape& c) {
        if (c.head_dim != 64 && c.head_dim != 128) return "head_dim is not 64 or 128";
        return c.group() > kMaxGroup ? "over 8 query heads a kv head" : "";
    }

protected:
    void attend_decodes(const StepArrays& s, int layer) override {
        if (!decode_attention) return Base::attend_decodes(s, layer);
        const int units = s.decodes * this->c.kv_heads;
        const int splits = std::clamp((kMinBlocks + units - 1) / units, 1, kMaxSplits);
        auto kernel = this->c.head_dim == 64 ? decode_attend<64> : decode_attend<128>;
        this->start(kernel, dim3(s.decodes, this->c.kv_heads, splits), kDecodeWarps * 32, 0, 1, s,
                    this->c, layer, this->qkv, this->kv, prefixes, prefix_results, partial, tickets,
                    this->att);
    }

    const bool decode_attention;                // switched on
    const PrefixPages* prefixes = nullptr;      // [T], of the step, if a chapter provides them
    float* prefix_results = nullptr;

private:
    typename Base::template Array<Attended> partial;
    typename Base::template Array<int> tickets;
};

}  // namespace cuda
