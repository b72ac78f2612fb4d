// gpu.hpp: the five ops, the draw and the step on a GPU: projections by cuBLAS, the rest by kernels
// of our own. Weights, keys and values in bf16, the residual stream and all sums in float.
//
// nano.cu includes this chapter where nvcc builds it, behind the ops on the CPU and before the
// engine; it is kept here until it fits into the budget of lines of the four sources.
// In reading order: what kernels see of a step, the small kernels, attention of new tokens
// (decode_attend) and of prompts (prefill_attend), the draw, CudaDevice.
#pragma once

#include <cublas_v2.h>
#include <cuda_bf16.h>

#include <atomic>

namespace cuda {

using b16 = __nv_bfloat16;

constexpr int kGraphRows = 256;   // most rows of a captured step, and of logits at a time
constexpr int kDecodeWarps = 4;   // of a block of decode_attend
constexpr int kMaxSplits = 32;    // blocks that share a context in decode_attend
constexpr int kTileRows = 128;    // (token, query head) pairs in a block of prefill_attend
constexpr int kTileKeys = 64;     // keys it looks at at a time
constexpr int kMaxGroup = 8;      // query heads of a kv head

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) fail("CUDA: ", what, ": ", cudaGetErrorString(error));
}

// Sizes, as kernels take them.
struct Shape {
    int hidden, heads, kv_heads, head_dim, intermediate, vocab, layers;
    float norm_eps;
    explicit Shape(const Config& c)
        : hidden(c.hidden), heads(c.heads), kv_heads(c.kv_heads), head_dim(c.head_dim),
          intermediate(c.intermediate), vocab(c.vocab), layers(c.layers), norm_eps(c.norm_eps) {}

    // Where a block has the keys [16, HD] of a head; its values [HD, 16] are value_offset behind.
    __host__ __device__ size_t page(int block, int layer, int head) const {
        size_t at = (size_t(block) * layers + layer) * 2 * kv_heads + head;
        return at * kBlockSize * head_dim;
    }
    __host__ __device__ size_t value_offset() const {
        return size_t(kv_heads) * kBlockSize * head_dim;
    }
    __host__ __device__ int qkv() const { return (heads + 2 * kv_heads) * head_dim; }
};

// What a draw needs to know.
struct DrawKey {
    Sampling sampling;
    int row, sample, position;  // row: of the logits
};

// A step's arrays, carved out of one piece of memory: the same on the host and on the device.
struct StepArrays {
    struct Tile {
        int row, tokens, position, sequence;  // of the first token
    };
    struct Header {
        int rows, table_width, decodes, tiles;
    };
    Header* header;
    DrawKey* draws;       // [draws]
    Tile* tiles;          // [T]: for prefill_attend
    int *ids, *positions, *sequence, *logit_rows;  // [T]
    int* decodes;         // [T]: rows for decode_attend
    int* tables;          // [sequences, table_width]

    // T, draws: what there is room for
    StepArrays(char* at, int T, int count) {
        auto carve = [&](auto*& array, size_t n) {
            array = (std::remove_reference_t<decltype(array)>)at;
            at += (n * sizeof(*array) + 15) / 16 * 16;
        };
        carve(header, 1), carve(draws, count), carve(tiles, T);
        for (int** array : {&ids, &positions, &sequence, &logit_rows, &decodes}) carve(*array, T);
        carve(tables, 0);
    }
};

__device__ float sum_of_warp(float v) {
    for (int n = 16; n; n /= 2) v += __shfl_xor_sync(~0u, v, n);
    return v;
}

// Until the kernel before this one has written its results; before that, nothing of them is read.
__device__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents; griddepcontrol.wait;" ::: "memory");
#endif
}

// x [T, D] = the embeddings of the ids; those not known to the host are in drawn.
__global__ void embed(StepArrays s, Shape c, const int* drawn, const b16* table, float* x) {
    wait_for_previous();
    int id = s.ids[blockIdx.x], D = c.hidden;
    if (id < 0) id = drawn[-1 - id];
    for (int i = threadIdx.x; i < D; i += blockDim.x)
        x[size_t(blockIdx.x) * D + i] = float(table[size_t(id) * D + i]);
}

// out [blocks, D] = RMS norm of x; rows: which ones, or null for all.
__global__ void norm(Shape c, const float* x, const int* rows, const float* weight, b16* out) {
    wait_for_previous();
    int D = c.hidden;
    x += size_t(rows ? rows[blockIdx.x] : blockIdx.x) * D;
    out += size_t(blockIdx.x) * D;
    float sum = 0;
    for (int i = threadIdx.x * 4; i < D; i += blockDim.x * 4) {
        float4 v = *(const float4*)(x + i);
        sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    __shared__ float warps[32];
    sum = sum_of_warp(sum);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = sum_of_warp(threadIdx.x % 32 < blockDim.x / 32 ? warps[threadIdx.x % 32] : 0);
    float factor = rsqrtf(sum / D + c.norm_eps);
    for (int i = threadIdx.x * 4; i < D; i += blockDim.x * 4) {
        float4 v = *(const float4*)(x + i), w = *(const float4*)(weight + i);
        *(__nv_bfloat162*)(out + i) = __floats2bfloat162_rn(v.x * factor * w.x, v.y * factor * w.y);
        *(__nv_bfloat162*)(out + i + 2) =
            __floats2bfloat162_rn(v.z * factor * w.z, v.w * factor * w.w);
    }
}

// Bias, norm (Qwen3) and RoPE of every head of qkv, a warp each; keys and values go to their slots.
template <int HD>
__global__ void rotate(StepArrays s, Shape c, int layer, const float* bias, const float* q_norm,
                       const float* k_norm, const float* inv_freq, b16* qkv, b16* kv) {
    wait_for_previous();
    int t = blockIdx.x, lane = threadIdx.x % 32, head = blockIdx.y * 4 + threadIdx.x / 32;
    int H = c.heads, KV = c.kv_heads;
    if (t >= s.header->rows || head >= H + 2 * KV) return;
    b16* vector = qkv + size_t(t) * c.qkv() + head * HD;
    float v[HD / 32];  // components lane, lane + 32, ...
    for (int i = 0; i < HD / 32; i++) {
        v[i] = float(vector[lane + 32 * i]);
        if (bias) v[i] += bias[head * HD + lane + 32 * i];
    }
    int position = s.positions[t], slot = position % kBlockSize;
    if (head < H + KV) {
        const float* weight = head < H ? q_norm : k_norm;
        if (weight) {
            float sum = 0;
            for (float x : v) sum += x * x;
            float factor = rsqrtf(sum_of_warp(sum) / HD + c.norm_eps);
            for (int i = 0; i < HD / 32; i++) v[i] *= factor * weight[lane + 32 * i];
        }
        for (int i = 0; i < HD / 64; i++) {
            float sine, cosine, first = v[i], second = v[i + HD / 64];
            sincosf(float(position) * inv_freq[lane + 32 * i], &sine, &cosine);
            v[i] = first * cosine - second * sine;
            v[i + HD / 64] = second * cosine + first * sine;
        }
    }
    int block = s.tables[s.sequence[t] * s.header->table_width + position / kBlockSize];
    // Of eight tokens whose values lie side by side, the first one's warp writes all.
    int first = t - slot % 8, last = first + 7;
    bool together = first >= 0 && last < s.header->rows && s.sequence[first] == s.sequence[last];
    b16* to = kv + (head < H ? 0 : c.page(block, layer, head - H));
    for (int i = 0; i < HD / 32; i++) {
        int d = lane + 32 * i;
        if (head < H) vector[d] = b16(v[i]);
        else if (head < H + KV) to[slot * HD + d] = b16(v[i]);
        else if (!together) to[d * kBlockSize + slot] = b16(v[i]);
        else if (t == first) {
            b16 eight[8];
            for (int j = 0; j < 8; j++) {
                eight[j] = vector[size_t(j) * c.qkv() + d];
                if (bias) eight[j] = b16(float(eight[j]) + bias[head * HD + d]);
            }
            *(uint4*)(to + d * kBlockSize + slot) = *(uint4*)eight;
        }
    }
}

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

// sum [16, 8] += a [16, 16] b [16, 8]. Lane 4 g + t has of a the rows g, g + 8, g, g + 8 in columns
// 2t, 2t + 1 (first two) and 8 more (last two); of b rows 2t, 2t + 1 and 8 more in column g; of sum
// columns 2t, 2t + 1 in row g (first two) and g + 8.
__device__ void mma(float sum[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                    unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9},"
        " {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ unsigned pack(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *(unsigned*)&both;
}

__device__ unsigned transpose(unsigned m) {  // of 8x8 numbers, two a lane
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %0;" : "+r"(m));
    return m;
}

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
few_rows(Shape c, int T, int N, int K, const b16* w, const b16* in, const float* x, const int* rows,
         const float* norm, void* out) {
    constexpr int kWarps = kFewThreads / 32, kAhead = 64 / kRows;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    constexpr bool kPairs = into == Into::swiglu;
    int n0 = blockIdx.x * (kPairs ? 8 : kRows) + g, n1 = kPairs ? n0 + N : min(n0 + 8, N - 1);
    const b16 *w0 = w + size_t(min(n0, N - 1)) * K + 8 * t, *w1 = w + size_t(n1) * K + 8 * t;
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
    if (into == Into::values) ((b16*)out)[at] = b16(value);
    if (into == Into::residual) ((float*)out)[at] += value;
    if (into == Into::swiglu) ((b16*)out)[at] = b16(value / (1 + __expf(-value)) * up * factor);
    if (into == Into::logits) ((float*)out)[at] = value;
}

// Attention of one new token a sequence: a block for each row, kv head and part of the context, its
// warps taking turns at the 16-token blocks. Products are S^T = K Q^T and O^T = V^T P^T, so that
// the up to 8 query heads of the kv head are the 8 columns of the mma, and keys and values go from
// memory to registers as they lie there: a lane's 16 bytes of a key are four pairs of components in
// an order that q shares, and tokens are numbered so that a lane's four of P are neighbours in V.
template <int HD>
__global__ void __launch_bounds__(kDecodeWarps * 32)
decode_attend(StepArrays s, Shape c, int layer, const b16* qkv, const b16* kv, float* partial,
              int* tickets, b16* att) {
    wait_for_previous();
    if (int(blockIdx.x) >= s.header->decodes) return;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int row = s.decodes[blockIdx.x], head = blockIdx.y, G = c.heads / c.kv_heads;
    int n = s.positions[row] + 1, blocks = (n + kBlockSize - 1) / kBlockSize;
    int each = max(kDecodeWarps, (blocks + int(gridDim.z) - 1) / int(gridDim.z));
    int first = blockIdx.z * each, last = min(blocks, first + each);
    if (first >= blocks) return;
    const int* table = s.tables + s.sequence[row] * s.header->table_width;
    uint4 q[HD / 32] = {};
    for (int j = 0; j < HD / 32 && g < G; j++)
        q[j] = *(const uint4*)(qkv + size_t(row) * c.qkv() + (head * G + g) * HD + 32 * j + 8 * t);
    const float scale = rsqrtf(HD) * 1.44269504f;  // for exp2
    float o[HD / 16][4] = {}, top[2] = {-1e30f, -1e30f}, sum[2] = {};  // of heads 2t, 2t + 1
    int token = g / 2 * 4 + g % 2;
    for (int b = first + warp; b < last; b += kDecodeWarps) {
        const b16* k = kv + c.page(table[b], layer, head) + token * HD + 8 * t;
        const b16* v = kv + c.page(table[b], layer, head) + c.value_offset() + g * 16 + 4 * t;
        uint4 k0[HD / 32], k1[HD / 32];
        uint2 v0[HD / 16], v1[HD / 16];
        #pragma unroll
        for (int j = 0; j < HD / 32; j++) {
            k0[j] = *(const uint4*)(k + 32 * j);
            k1[j] = *(const uint4*)(k + 32 * j + 2 * HD);
        }
        #pragma unroll
        for (int i = 0; i < HD / 16; i++) {
            v0[i] = *(const uint2*)(v + 256 * i);
            v1[i] = *(const uint2*)(v + 256 * i + 128);
        }
        float p[4] = {};
        #pragma unroll
        for (int j = 0; j < HD / 32; j++) {
            mma(p, k0[j].x, k1[j].x, k0[j].y, k1[j].y, q[j].x, q[j].y);
            mma(p, k0[j].z, k1[j].z, k0[j].w, k1[j].w, q[j].z, q[j].w);
        }
        bool in0 = b * kBlockSize + token < n, in1 = b * kBlockSize + token + 2 < n;
        #pragma unroll
        for (int e = 0; e < 2; e++) {
            float a = in0 ? p[e] * scale : -INFINITY, z = in1 ? p[e + 2] * scale : -INFINITY;
            float m = fmaxf(a, z);
            for (int x = 4; x < 32; x *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, x));
            m = fmaxf(m, top[e]);
            float factor = exp2f(top[e] - m);
            top[e] = m;
            p[e] = exp2f(a - m), p[e + 2] = exp2f(z - m);
            sum[e] = sum[e] * factor + p[e] + p[e + 2];
            #pragma unroll
            for (int i = 0; i < HD / 16; i++) o[i][e] *= factor, o[i][e + 2] *= factor;
        }
        unsigned p0 = transpose(pack(p[0], p[1])), p1 = transpose(pack(p[2], p[3]));
        #pragma unroll
        for (int i = 0; i < HD / 16; i++) mma(o[i], v0[i].x, v1[i].x, v0[i].y, v1[i].y, p0, p1);
    }

    // the warps' parts become one, then those of the blocks, in the block that comes last
    __shared__ float outs[kDecodeWarps][kMaxGroup][HD], tops[kDecodeWarps][kMaxGroup];
    __shared__ float sums[kDecodeWarps][kMaxGroup];
    for (int e = 0; e < 2; e++) {
        for (int x = 4; x < 32; x *= 2) sum[e] += __shfl_xor_sync(~0u, sum[e], x);
        if (g == 0) tops[warp][2 * t + e] = top[e], sums[warp][2 * t + e] = sum[e];
        for (int i = 0; i < HD / 16; i++) {
            outs[warp][2 * t + e][16 * i + g] = o[i][e];
            outs[warp][2 * t + e][16 * i + g + 8] = o[i][e + 2];
        }
    }
    __syncthreads();
    int splits = (blocks + each - 1) / each, unit = blockIdx.x * gridDim.y + head;
    float* mine = partial + size_t(unit) * gridDim.z * G * (HD + 2);
    for (int i = threadIdx.x; i < G * HD; i += blockDim.x) {
        int h = i / HD, d = i % HD;
        float m = -1e30f, l = 0, out = 0;
        for (int w = 0; w < kDecodeWarps; w++) m = fmaxf(m, tops[w][h]);
        for (int w = 0; w < kDecodeWarps; w++) {
            float factor = exp2f(tops[w][h] - m);
            l += factor * sums[w][h];
            out += factor * outs[w][h][d];
        }
        float* part = mine + (blockIdx.z * G + h) * (HD + 2);
        if (splits == 1) att[(size_t(row) * c.heads + head * G + h) * HD + d] = b16(out / l);
        else part[d] = out, part[HD] = m, part[HD + 1] = l;
    }
    if (splits == 1 || !comes_last(&tickets[unit], splits)) return;
    for (int i = threadIdx.x; i < G * HD; i += blockDim.x) {
        int h = i / HD, d = i % HD;
        float m = -1e30f, l = 0, out = 0;
        for (int z = 0; z < splits; z++) m = fmaxf(m, mine[(z * G + h) * (HD + 2) + HD]);
        for (int z = 0; z < splits; z++) {
            const float* part = mine + (z * G + h) * (HD + 2);
            float factor = exp2f(part[HD] - m);
            l += factor * part[HD + 1];
            out += factor * part[d];
        }
        att[(size_t(row) * c.heads + head * G + h) * HD + d] = b16(out / l);
    }
}

__device__ void copy16(void* shared, const void* global) {  // 16 bytes, not waiting for them
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                     unsigned(__cvta_generic_to_shared(shared))), "l"(global));
}

// Four 8x8 matrices; lane 8 i + j gives the address of row j of matrix i.
__device__ uint4 load_matrices(const void* shared) {
    uint4 m;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w)
                 : "r"(unsigned(__cvta_generic_to_shared(shared))) : "memory");
    return m;
}

// sum [64, N] += a [64, 16] b [16, N] by the four warps of a warpgroup (Hopper): a in registers, 16
// rows a warp, as for mma; b in shared memory, where a row holds 64 numbers of one column in eight
// 16-byte parts, part p of row r at p ^ r % 8. The sums are there when wgmma_wait returns.
template <int N>
__device__ void wgmma(float (*sum)[4], const unsigned a[4], const b16* shared) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    float* s = sum[0];
    uint64_t b = uint64_t(1) << 62 | uint64_t(1024 >> 4) << 32 | 1 << 16 |
                 (unsigned(__cvta_generic_to_shared(shared)) & 0x3FFFF) >> 4;
    if constexpr (N == 64) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
            "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
            : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]),
              "+f"(s[6]), "+f"(s[7]), "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), "+f"(s[11]),
              "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15]), "+f"(s[16]), "+f"(s[17]),
              "+f"(s[18]), "+f"(s[19]), "+f"(s[20]), "+f"(s[21]), "+f"(s[22]), "+f"(s[23]),
              "+f"(s[24]), "+f"(s[25]), "+f"(s[26]), "+f"(s[27]), "+f"(s[28]), "+f"(s[29]),
              "+f"(s[30]), "+f"(s[31])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    } else {
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
            "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
            : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]), "+f"(s[4]), "+f"(s[5]),
              "+f"(s[6]), "+f"(s[7]), "+f"(s[8]), "+f"(s[9]), "+f"(s[10]), "+f"(s[11]),
              "+f"(s[12]), "+f"(s[13]), "+f"(s[14]), "+f"(s[15]), "+f"(s[16]), "+f"(s[17]),
              "+f"(s[18]), "+f"(s[19]), "+f"(s[20]), "+f"(s[21]), "+f"(s[22]), "+f"(s[23]),
              "+f"(s[24]), "+f"(s[25]), "+f"(s[26]), "+f"(s[27]), "+f"(s[28]), "+f"(s[29]),
              "+f"(s[30]), "+f"(s[31]), "+f"(s[32]), "+f"(s[33]), "+f"(s[34]), "+f"(s[35]),
              "+f"(s[36]), "+f"(s[37]), "+f"(s[38]), "+f"(s[39]), "+f"(s[40]), "+f"(s[41]),
              "+f"(s[42]), "+f"(s[43]), "+f"(s[44]), "+f"(s[45]), "+f"(s[46]), "+f"(s[47]),
              "+f"(s[48]), "+f"(s[49]), "+f"(s[50]), "+f"(s[51]), "+f"(s[52]), "+f"(s[53]),
              "+f"(s[54]), "+f"(s[55]), "+f"(s[56]), "+f"(s[57]), "+f"(s[58]), "+f"(s[59]),
              "+f"(s[60]), "+f"(s[61]), "+f"(s[62]), "+f"(s[63])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    }
#endif
}

// Between these two the sums are wgmma's own; nothing may move them from register to register.
template <int N>
__device__ void wgmma_begin(float (&sum)[N][4]) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    for (auto& s : sum) for (float& x : s) asm volatile("" : "+f"(x)::"memory");
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ void wgmma_commit() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until only so many of the groups committed last are not done.
template <int kPending, int N>
__device__ void wgmma_wait(float (&sum)[N][4]) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
    for (auto& s : sum) for (float& x : s) asm volatile("" : "+f"(x)::"memory");
#endif
}

// Attention of a chunk of a prompt (FlashAttention-2, Dao 2023): a block has kTileRows rows, each a
// token with one of the query heads of a kv head, 16 rows a warp; it goes over the keys and values
// of all tokens before in tiles of kTileKeys. While it works out the exponentials of one tile, the
// tensor cores add up the values of the one before, and the tiles behind are on their way (the
// order of FlashAttention-3, Shah et al. 2024).
template <int HD>
__global__ void __launch_bounds__(kTileRows * 2)
prefill_attend(StepArrays s, Shape c, int layer, const b16* qkv, const b16* kv, b16* att) {
    extern __shared__ __align__(1024) b16 shared[];
    // keys [2, HD / 64, 64, 64], values [2, HD, 64], their 16-byte parts swizzled for wgmma
    constexpr int kTile = kTileKeys * HD, kThreads = kTileRows * 2;
    wait_for_previous();
    if (int(blockIdx.x) >= s.header->tiles) return;
    auto tile = s.tiles[blockIdx.x];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int head = blockIdx.y, G = c.heads / c.kv_heads, keys = tile.position + tile.tokens;
    const int* table = s.tables + tile.sequence * s.header->table_width;

    const int tiles = (keys + kTileKeys - 1) / kTileKeys;
    auto page = [&](int key) {
        return kv + c.page(table[min(key, keys - 1) / kBlockSize], layer, head);
    };
    auto fetch_keys = [&](int j) {
        b16* to = shared + j % 2 * kTile;
        for (int i = threadIdx.x; i < kTile / 8 && j < tiles; i += kThreads) {
            int key = i / (HD / 8), part = i % (HD / 8);
            copy16(to + part / 8 * kTileKeys * 64 + key * 64 + (part % 8 ^ key % 8) * 8,
                   page(j * kTileKeys + key) + key % kBlockSize * HD + part * 8);
        }
    };
    auto fetch_values = [&](int j) {
        b16* to = shared + (2 + j % 2) * kTile;
        for (int i = threadIdx.x; i < kTile / 8 && j < tiles; i += kThreads) {
            int d = i / 8, part = i % 8;
            copy16(to + d * kTileKeys + (part ^ d % 8) * 8, page(j * kTileKeys + part * 8) +
                   c.value_offset() + d * kBlockSize + part % 2 * 8);
        }
    };
    auto arrived = [&] {  // all that was fetched, for all threads
        asm volatile("cp.async.wait_all;" ::: "memory");
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads what was copied
#endif
        __syncthreads();
    };
    int position[2];
    unsigned q[HD / 16][4];
    for (int r = 0; r < 2; r++) {
        int row = warp * 16 + g + 8 * r, token = min(row / G, tile.tokens - 1);
        position[r] = tile.position + token;
        const b16* from = qkv + size_t(tile.row + token) * c.qkv() + (head * G + row % G) * HD;
        #pragma unroll
        for (int i = 0; i < HD / 16; i++) {
            q[i][r] = *(const unsigned*)(from + 16 * i + 2 * t);
            q[i][r + 2] = *(const unsigned*)(from + 16 * i + 2 * t + 8);
        }
    }
    const float scale = rsqrtf(HD) * 1.44269504f;
    float o[HD / 8][4] = {}, top[2] = {-1e30f, -1e30f}, sum[2] = {};
    auto begin_scores = [&](int j, float (&p)[kTileKeys / 8][4]) {
        const b16* ks = shared + j % 2 * kTile;
        for (auto& four : p) for (float& x : four) x = 0;
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
        wgmma_begin(p);
        #pragma unroll
        for (int i = 0; i < HD / 16; i++)
            wgmma<kTileKeys>(p, q[i], ks + i / 4 * kTileKeys * 64 + i % 4 * 16);
        wgmma_commit();
#else
        #pragma unroll
        for (int n = 0; n < kTileKeys / 8; n++)
            #pragma unroll
            for (int i = 0; i < HD / 16; i += 2) {
                uint4 k = load_matrices(ks + i / 4 * kTileKeys * 64 + (n * 8 + lane % 8) * 64 +
                                        ((i % 4 * 2 + lane / 8) ^ lane % 8) * 8);
                mma(p[n], q[i][0], q[i][1], q[i][2], q[i][3], k.x, k.y);
                mma(p[n], q[i + 1][0], q[i + 1][1], q[i + 1][2], q[i + 1][3], k.z, k.w);
            }
#endif
    };
    auto begin_values = [&](int j, const unsigned (&a)[kTileKeys / 16][4]) {  // o += p v
        const b16* vs = shared + (2 + j % 2) * kTile;
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
        wgmma_begin(o);
        #pragma unroll
        for (int i = 0; i < kTileKeys / 16; i++) wgmma<HD>(o, a[i], vs + i * 16);
        wgmma_commit();
#else
        #pragma unroll
        for (int n = 0; n < kTileKeys / 16; n += 2)  // 32 keys
            #pragma unroll
            for (int i = 0; i < HD / 8; i++) {
                uint4 v = load_matrices(vs + (i * 8 + lane % 8) * kTileKeys +
                                        ((n * 2 + lane / 8) ^ lane % 8) * 8);
                mma(o[i], a[n][0], a[n][1], a[n][2], a[n][3], v.x, v.y);
                mma(o[i], a[n + 1][0], a[n + 1][1], a[n + 1][2], a[n + 1][3], v.z, v.w);
            }
#endif
    };
    float p[kTileKeys / 8][4], factor[2];
    unsigned a[kTileKeys / 16][4];
    auto soften = [&](int j) {  // p becomes exp(scores - top)
        bool masked = (j + 1) * kTileKeys > min(position[0], position[1]) + 1;
        #pragma unroll
        for (int r = 0; r < 2; r++) {
            float m = top[r];
            #pragma unroll
            for (int n = 0; n < kTileKeys / 8; n++)
                #pragma unroll
                for (int e = 2 * r; e < 2 * r + 2; e++) {
                    int key = j * kTileKeys + n * 8 + 2 * t + e % 2;
                    p[n][e] = masked && key > position[r] ? -INFINITY : p[n][e] * scale;
                    m = fmaxf(m, p[n][e]);
                }
            m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
            m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
            factor[r] = exp2f(top[r] - m);
            top[r] = m;
            sum[r] *= factor[r];
            #pragma unroll
            for (int n = 0; n < kTileKeys / 8; n++)
                #pragma unroll
                for (int e = 2 * r; e < 2 * r + 2; e++) sum[r] += p[n][e] = exp2f(p[n][e] - m);
        }
    };
    auto pack_scores = [&] {
        #pragma unroll
        for (int n = 0; n < kTileKeys / 8; n++)
            for (int r = 0; r < 2; r++)
                a[n / 2][n % 2 * 2 + r] = pack(p[n][2 * r], p[n][2 * r + 1]);
    };
    fetch_keys(0);
    arrived();
    fetch_keys(1), fetch_values(0);
    begin_scores(0, p);
    wgmma_wait<0>(p);
    soften(0);
    pack_scores();
    for (int j = 0; j < tiles; j++) {
        arrived();
        fetch_keys(j + 2), fetch_values(j + 1);
        begin_scores(j + 1, p);  // behind the last tile: of old keys, and not used
        begin_values(j, a);
        wgmma_wait<1>(p);
        if (j + 1 < tiles) soften(j + 1);
        else factor[0] = factor[1] = 1;
        wgmma_wait<0>(o);
        #pragma unroll
        for (int i = 0; i < HD / 8; i++)
            for (int e = 0; e < 4; e++) o[i][e] *= factor[e / 2];
        pack_scores();
    }
    for (int r = 0; r < 2; r++) {
        int row = warp * 16 + g + 8 * r, token = row / G;
        sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
        sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
        if (token >= tile.tokens || row >= kTileRows / G * G) continue;
        b16* to = att + (size_t(tile.row + token) * c.heads + head * G + row % G) * HD + 2 * t;
        for (int i = 0; i < HD / 8; i++)
            *(unsigned*)(to + 8 * i) = pack(o[i][2 * r] / sum[r], o[i][2 * r + 1] / sum[r]);
    }
}

// Reads data [n]; writes nothing, unless a sum that can't be comes out.
__global__ void read_all(const uint4* data, size_t n, unsigned* out) {
    unsigned sum = 0;
    for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        uint4 v = data[i];
        sum += v.x + v.y + v.z + v.w;
    }
    if (sum == 0x12345678) *out = sum;
}

// h [T, F] = silu(gate) * up, of gate_up [T, 2 F]
__global__ void swiglu(Shape c, const b16* gate_up, b16* h) {
    wait_for_previous();
    int F = c.intermediate, i = (blockIdx.y * blockDim.x + threadIdx.x) * 4;
    if (i >= F) return;
    const b16* from = gate_up + size_t(blockIdx.x) * 2 * F + i;
    for (int j = 0; j < 4; j += 2) {
        float2 gate = __bfloat1622float2(*(const __nv_bfloat162*)(from + j));
        float2 up = __bfloat1622float2(*(const __nv_bfloat162*)(from + F + j));
        *(unsigned*)(h + size_t(blockIdx.x) * F + i + j) =
            pack(gate.x / (1 + __expf(-gate.x)) * up.x, gate.y / (1 + __expf(-gate.y)) * up.y);
    }
}

// The draw: sampler.hpp's, by a team of blocks.
constexpr int kDrawThreads = 512, kDrawBlocks = 8;

// What the blocks of a team share: in global memory, zero before and after.
struct DrawScratch {
    unsigned long long parts[2][kDrawBlocks], bins[3][kBins];
    float tops[kDrawBlocks * kDrawThreads];
    int count, list[kDrawBlocks * kDrawThreads];
};

// The threads of a cluster of blocks. Its bins are each block's own, then summed in one of three
// arrays: while one is summed, the one before may still be read, and the third is cleared.
struct Cluster {
    int rank, size, block, blocks, uses = 0, digits = 0;
    DrawScratch& scratch;
    unsigned long long* bins;  // of this block

    __device__ void sync() {
        if (blocks == 1) return __syncthreads();
#if __CUDA_ARCH__ >= 900
        asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
#endif
    }
    // What is read after this without volatile is what the others wrote before it, too.
    __device__ void sync_memory() {
        __threadfence();
        sync();
        __threadfence();
    }
    // The sum of value over the threads of the block before this one; total: over all.
    __device__ uint64_t before_in_block(uint64_t value, uint64_t& total) {
        __shared__ uint64_t warps[kDrawThreads / 32];
        uint64_t sum = value, before = 0;
        for (int n = 1; n < 32; n *= 2) {
            uint64_t other = __shfl_up_sync(~0u, sum, n);
            if (threadIdx.x % 32 >= n) sum += other;
        }
        __syncthreads();
        if (threadIdx.x % 32 == 31) warps[threadIdx.x / 32] = sum;
        __syncthreads();
        total = 0;
        for (int i = 0; i < kDrawThreads / 32; i++) {
            if (i < threadIdx.x / 32) before += warps[i];
            total += warps[i];
        }
        return before + sum - value;
    }
    // Puts value of the block's thread 0 where all blocks of the team see it.
    __device__ volatile unsigned long long* share(uint64_t value) {
        volatile unsigned long long* parts = scratch.parts[uses++];
        if (threadIdx.x == 0) parts[block] = value;
        sync();
        return parts;
    }
    __device__ uint64_t largest(uint64_t value) {
        clear();
        atomicMax(bins, value);
        __syncthreads();
        auto parts = share(bins[0]);
        uint64_t most = 0;
        for (int b = 0; b < blocks; b++) most = max(most, uint64_t(parts[b]));
        return most;
    }
    __device__ uint64_t before(uint64_t value, uint64_t& total) {
        uint64_t before = before_in_block(value, total);
        auto parts = share(total);
        total = 0;
        for (int b = 0; b < blocks; b++) {
            if (b < block) before += parts[b];
            total += parts[b];
        }
        return before;
    }
    // The k largest of what is each thread's largest are k ids, so the k likeliest are among those
    // that are as large as the last of these: seldom many more than k.
    __device__ void narrow(Candidates& c, uint64_t largest, int k) {
        if (k > size / 4) return;
        scratch.tops[rank] = largest ? c.logits[~uint32_t(largest)] : -INFINITY;
        sync_memory();
        Candidates tops = {scratch.tops, size};
        cut(*this, tops, [](int) { return 1; }, [&](uint64_t) { return uint64_t(k); });
        c.least = tops.least >> 32 << 32;  // all the ids of that logit
        NANOCU_UNROLL
        for (int id = rank; id < c.V; id += size) {
            if (order_key(c.logits[id], id) < c.least) continue;
            int at = atomicAdd(&scratch.count, 1);
            if (at < size) scratch.list[at] = id;
        }
        sync_memory();
        int count = *(volatile int*)&scratch.count;
        if (count <= size) c.list = scratch.list, c.count = count;
    }
    __device__ void clear() {
        __syncthreads();
        for (int i = threadIdx.x; i < kBins; i += kDrawThreads) bins[i] = 0;
        __syncthreads();
    }
    __device__ void add(int bin, uint64_t amount) { atomicAdd(&bins[bin], amount); }
    template <class Need>
    __device__ Found find(Need need_of) {
        unsigned long long* sums = scratch.bins[digits % 3];
        volatile unsigned long long* next = scratch.bins[++digits % 3];
        __syncthreads();
        for (int i = threadIdx.x; i < kBins; i += kDrawThreads)
            if (bins[i]) atomicAdd(&sums[i], bins[i]);
        for (int i = rank; i < kBins; i += size) next[i] = 0;
        sync();
        constexpr int each = kBins / kDrawThreads;
        int top = kBins - 1 - each * int(threadIdx.x);  // this thread's highest bin
        uint64_t mine[each], sum = 0, total;
        for (int i = 0; i < each; i++) sum += mine[i] = ((volatile uint64_t*)sums)[top - i];
        uint64_t before = before_in_block(sum, total), need = need_of(total);
        __shared__ Found found;
        if (threadIdx.x == 0) found = {kBins - 1, 0, 0};  // stays if the logits are not numbers
        __syncthreads();
        if (before < need && need <= before + sum) {
            int i = 0;
            for (; before + mine[i] < need; i++) before += mine[i];
            found = {top - i, need - before, mine[i]};
        }
        __syncthreads();
        return found;
    }
};

// Draws an id for each key from logits [rows, V], a team of blocks each, and writes it to drawn and
// to host, which the host can read.
__global__ void __launch_bounds__(kDrawThreads)
draw_ids(const DrawKey* keys, DrawScratch* scratch, const float* logits, int V, int blocks,
         int* drawn, int* host) {
    __shared__ unsigned long long bins[kBins];
    wait_for_previous();
    int draw = blockIdx.x / blocks, block = blockIdx.x % blocks;
    Cluster team = {block * kDrawThreads + int(threadIdx.x), blocks * kDrawThreads, block, blocks,
                    0, 0, scratch[draw], bins};
    const DrawKey& key = keys[draw];
    int id = draw_id(team, logits + size_t(key.row) * V, V, key.sampling, key.sample, key.position);
    if (id >= 0) drawn[draw] = host[draw] = id;
    if (!team.digits) return;
    team.sync();
    if (team.rank == 0) team.scratch.count = 0;
    for (auto& sums : team.scratch.bins)
        for (int i = team.rank; i < kBins; i += team.size) sums[i] = 0;
}

// Penalties, as apply_penalties: one thread for each (row, id, how often in output) of a list.
struct Penalty {
    int row, id, count;
    Sampling sampling;
};
__global__ void penalize_all(const Penalty* list, int count, float* logits, int V) {
    wait_for_previous();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count)
        ::penalize(logits[size_t(list[i].row) * V + list[i].id], list[i].sampling, list[i].count);
}

struct DeviceLayer {
    float *attn_norm, *mlp_norm, *q_norm = nullptr, *k_norm = nullptr, *bias = nullptr;
    b16 *qkv, *o, *gate_up, *down;
};

class CudaDevice : public Device {
public:
    // tokens: most in a step. rows: most sequences. graphs: whether decode steps are captured.
    CudaDevice(const Model& m, int ordinal, int tokens, int rows, bool graphs)
        : model(m), c(m.config), graphs_on(graphs) {
        overlaps = true;
        if (c.head_dim != 64 && c.head_dim != 128)
            fail("config.json: head_dim ", c.head_dim, " is not built for GPUs; use --device cpu");
        if (c.heads / c.kv_heads > kMaxGroup)
            fail("config.json: over 8 query heads a kv head; use --device cpu");
        cudaDeviceProp device;
        check(cudaSetDevice(ordinal), "device");
        check(cudaGetDeviceProperties(&device, ordinal), "device");
        name = device.name;
        check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
        check(cudaStreamCreateWithFlags(&uploads, cudaStreamNonBlocking), "stream");
        if (cublasCreate(&blas)) fail("CUDA: cuBLAS does not start");
        cublasSetStream(blas, stream);
        team = device.major >= 9 ? kDrawBlocks : 1;
        cublasSetWorkspace(blas, make<char>(kWorkspace), kWorkspace);
        load_weights();
        size_t T = std::max(tokens, kGraphRows);
        x = make<float>(T * c.hidden), normed = make<b16>(T * c.hidden);
        qkv = make<b16>(T * c.qkv()), att = make<b16>(T * c.heads * c.head_dim);
        gate_up = make<b16>(T * 2 * c.intermediate), h = make<b16>(T * c.intermediate);
        logits = make<float>(size_t(kGraphRows) * c.vocab);
        inv_freq = to_device(m.config.inv_freq);
        partial = make<float>(size_t(4 * kMaxBlocks) * kMaxGroup * (c.head_dim + 2));
        max_draws = std::max<size_t>(T, rows);
        drawn = make<int>(max_draws);
        tickets = make<int>(size_t(T) * c.kv_heads);
        scratch = make<DrawScratch>(kGraphRows);
        check(cudaMemset(tickets, 0, T * c.kv_heads * sizeof(int)), "memory");
        check(cudaMemset(scratch, 0, kGraphRows * sizeof(DrawScratch)), "memory");
        size_t width = m.config.context / kBlockSize + 1;
        array_bytes = 64 + T * (sizeof(StepArrays::Tile) + 6 * sizeof(int)) +
                      max_draws * sizeof(DrawKey) + 256 + rows * width * sizeof(int);
        for (Slot& slot : slots) {
            check(cudaMallocHost(&slot.host, array_bytes), "pinned memory");
            check(cudaMallocHost(&slot.drawn, max_draws * sizeof(int)), "pinned memory");
            slot.device = make<char>(array_bytes);
            check(cudaEventCreateWithFlags(&slot.uploaded, cudaEventDisableTiming), "event");
            check(cudaEventCreateWithFlags(&slot.done, cudaEventDisableTiming), "event");
        }
        check(cudaFuncSetAttribute(c.head_dim == 64 ? prefill_attend<64> : prefill_attend<128>,
                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   int(prefill_shared())), "prefill_attend");
    }
    CudaDevice(const CudaDevice&) = delete;
    ~CudaDevice() override {
        cudaStreamSynchronize(stream);
        for (auto& [key, graph] : graphs) cudaGraphExecDestroy(graph);
        for (Slot& slot : slots) cudaFreeHost(slot.host), cudaFreeHost(slot.drawn);
        for (void* memory : owned) cudaFree(memory);
        cublasDestroy(blas);
    }

    size_t block_bytes() const override { return c.page(1, 0, 0) * sizeof(b16); }
    size_t free_memory() const override {
        size_t free, total;
        check(cudaMemGetInfo(&free, &total), "memory");
        return free - std::min(free, kMargin);
    }
    void reserve(int blocks) override {
        kv = make<b16>(blocks * c.page(1, 0, 0));
        kv_bytes = blocks * block_bytes();
        check(cudaMemset(kv, 0, kv_bytes), "KV memory");  // 0 times a NaN is a NaN
    }

    void launch(Step& step) override {
        turn = !turn;
        step.slot = turn;
        Slot& slot = slots[turn];
        int T = step.tokens(), rows = int(step.tables.size()) / std::max(1, step.table_width);
        bool plain = std::ranges::none_of(step.draws, [](const Draw& d) {
            return d.logprobs >= 0 || d.sampling.has_penalties();
        });
        bool decode = T == rows && int(step.draws.size()) == T && T <= kGraphRows && plain;
        int padded = !decode ? T : T <= 16 ? std::bit_ceil(unsigned(T)) : (T + 15) / 16 * 16;
        int draws = std::max(padded, int(step.draws.size()));
        if (size_t(draws) > max_draws)
            fail("GPU: ", draws, " samples at a time, room for ", max_draws, "; lower --samples");
        StepArrays host(slot.host, padded, draws);
        size_t bytes = fill(host, step, padded) - slot.host;
        check(cudaMemcpyAsync(slot.device, slot.host, bytes, cudaMemcpyHostToDevice, uploads),
              "upload");
        check(cudaEventRecord(slot.uploaded, uploads), "upload");
        check(cudaStreamWaitEvent(stream, slot.uploaded), "upload");
        for (auto [from, to] : step.copies)
            check(cudaMemcpyAsync(kv + c.page(to, 0, 0), kv + c.page(from, 0, 0), block_bytes(),
                                  cudaMemcpyDeviceToDevice, stream), "copy of a block");
        StepArrays s(slot.device, padded, draws);
        if (decode && graphs_on) {
            auto& graph = graphs[{padded, turn}];
            if (!graph) graph = capture(s, padded);
            check(cudaGraphLaunch(graph, stream), "graph");
        } else {
            forward(s, T, host.header->decodes, host.header->tiles);
            sample_groups(s, step);
        }
        check(cudaEventRecord(slot.done, stream), "step");
    }

    std::pair<double, double> limits() override {
        const size_t bytes = size_t(1) << 30, N = 8192;
        char* data = kv_bytes < bytes ? make<char>(bytes) : (char*)kv;  // nothing is cached yet
        b16 *a = (b16*)data, *b = a + N * N, *c = b + N * N;
        auto best = [&](auto work) {
            double seconds = 1;
            for (int i = 0; i < 10; i++) {
                double start = now();
                work();
                check(cudaStreamSynchronize(stream), "bench");
                seconds = std::min(seconds, now() - start);
            }
            return seconds;
        };
        double read = best([&] {
            run(read_all, 2048, 512, 0, 1, (uint4*)data, bytes / 16, (unsigned*)data);
        });
        double product = best([&] { gemm(a, b, c, N, N, N); });
        return {bytes / read, 2.0 * N * N * N / product};
    }

    void wait(Step& step) override {
        Slot& slot = slots[step.slot];
        check(cudaEventSynchronize(slot.done), "step");
        for (size_t i = 0; i < step.draws.size(); i++)
            if (step.draws[i].id < 0) step.draws[i].id = slot.drawn[i];
    }

private:
    struct Slot {  // of a step; two take turns, since one may be filled while the other runs
        char *host = nullptr, *device = nullptr;
        int* drawn = nullptr;  // on the host, written by the device
        cudaEvent_t uploaded, done;
    };
    static constexpr size_t kWorkspace = 64 << 20, kMargin = 1 << 30;
    static constexpr int kMaxBlocks = 264;  // of decode_attend that its splits should make at least

    // Launches a kernel. It may be set up while the one before it ends (PDL). cluster: of blocks.
    template <class... Parameters, class... Arguments>
    void run(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, int cluster,
             Arguments... arguments) {
        cudaLaunchAttribute attributes[2];
        attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[0].val.programmaticStreamSerializationAllowed = 1;
        attributes[1].id = cudaLaunchAttributeClusterDimension;
        attributes[1].val.clusterDim = {unsigned(cluster), 1, 1};
        cudaLaunchConfig_t config = {grid, dim3(threads), shared, stream, attributes,
                                     cluster > 1 ? 2u : 1u};
        check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "kernel");
    }

    template <class T>
    T* make(size_t count) {
        void* memory = nullptr;
        if (cudaMalloc(&memory, std::max<size_t>(count, 1) * sizeof(T)) != cudaSuccess) {
            size_t free = 0, total = 0;
            cudaMemGetInfo(&free, &total);
            fail("GPU: ", count * sizeof(T) >> 20, " MiB do not fit into the ", free >> 20,
                 " MiB that are free; lower --kv-memory, --chunk, or take a smaller model");
        }
        owned.push_back(memory);
        return (T*)memory;
    }

    float* to_device(const vector<float>& values) {
        float* to = make<float>(values.size());
        check(cudaMemcpy(to, values.data(), values.size() * sizeof(float), cudaMemcpyHostToDevice),
              "upload");
        return to;
    }

    // Matrices of equal width, one under the other; they are copied later, all at a time.
    b16* stack(std::initializer_list<Matrix> parts) {
        size_t count = 0, at = 0;
        for (const Matrix& part : parts) count += size_t(part.rows) * part.cols;
        b16* to = make<b16>(count);
        for (const Matrix& part : parts) {
            size_t size = size_t(part.rows) * part.cols;
            for (size_t i = 0; i < size; i += kPiece / 2)
                pieces.push_back({part.data + i, to + at + i, std::min(size - i, kPiece / 2) * 2});
            at += size;
        }
        return to;
    }

    void load_weights() {
        const Config& config = model.config;
        for (const Layer& l : model.layers) {
            DeviceLayer d;
            d.attn_norm = to_device(l.attn_norm), d.mlp_norm = to_device(l.mlp_norm);
            if (!l.q_norm.empty()) d.q_norm = to_device(l.q_norm), d.k_norm = to_device(l.k_norm);
            if (config.type == "qwen2") d.bias = to_device(l.bias);
            d.qkv = stack({l.q, l.k, l.v}), d.o = stack({l.o});
            d.gate_up = stack({l.gate, l.up}), d.down = stack({l.down});
            layers.push_back(d);
        }
        final_norm = to_device(model.final_norm);
        embedding = stack({model.embed});
        lm_head = config.tied ? embedding : stack({model.lm_head});
        copy_pieces();
    }

    // From the page cache through pinned memory, several threads at a time: no one thread copies as
    // fast as the bus.
    void copy_pieces() {
        std::atomic<size_t> next = 0;
        std::atomic<bool> failed = false;
        #pragma omp parallel num_threads(std::min(8, omp_get_max_threads()))
        {
            char* pinned[2] = {};
            cudaEvent_t free[2];
            bool ok = !cudaMallocHost(&pinned[0], 2 * kPiece);
            pinned[1] = pinned[0] + kPiece;
            for (auto& event : free) ok &= !cudaEventCreate(&event);
            for (size_t i, turn = 0; ok && (i = next++) < pieces.size(); turn = !turn) {
                const Piece& piece = pieces[i];
                ok &= !cudaEventSynchronize(free[turn]);
                memcpy(pinned[turn], piece.from, piece.bytes);
                ok &= !cudaMemcpyAsync(piece.to, pinned[turn], piece.bytes, cudaMemcpyHostToDevice,
                                       cudaStreamPerThread);
                ok &= !cudaEventRecord(free[turn], cudaStreamPerThread);
            }
            ok &= !cudaStreamSynchronize(cudaStreamPerThread);
            cudaFreeHost(pinned[0]);
            for (auto& event : free) cudaEventDestroy(event);
            if (!ok) failed = true;
        }
        pieces.clear();
        if (failed) fail("GPU: the weights could not be copied: ",
                         cudaGetErrorString(cudaGetLastError()));
    }

    // Puts a step into the arrays; returns their end. padded: rows up to here do nothing.
    char* fill(StepArrays& to, const Step& step, int padded) {
        int T = step.tokens(), G = c.heads / c.kv_heads, tile = kTileRows / G;
        *to.header = {T, step.table_width, 0, 0};
        std::ranges::copy(step.ids, to.ids);
        std::ranges::copy(step.positions, to.positions);
        std::ranges::copy(step.sequence, to.sequence);
        std::ranges::copy(step.logit_rows, to.logit_rows);
        std::ranges::copy(step.tables, to.tables);
        for (int i = T; i < padded; i++) to.ids[i] = to.positions[i] = to.logit_rows[i] = 0;
        for (int begin = 0, end; begin < T; begin = end) {
            for (end = begin; end < T && step.sequence[end] == step.sequence[begin];) end++;
            if (end - begin == 1) to.decodes[to.header->decodes++] = begin;
            else for (int i = end; i > begin; i -= tile) {  // the longest first
                int row = std::max(begin, i - tile);
                to.tiles[to.header->tiles++] = {row, i - row, step.positions[row],
                                                step.sequence[row]};
            }
        }
        auto context = [&](int row) { return step.positions[row]; };  // the longest first
        std::ranges::sort(to.decodes, to.decodes + to.header->decodes, std::greater(), context);
        for (size_t i = 0; i < step.draws.size(); i++) {
            const Draw& d = step.draws[i];
            to.draws[i] = {d.sampling, d.row % kGraphRows, d.sample, d.position};
            if (d.id >= 0) to.draws[i].sampling.temperature = 0;  // only scored
        }
        for (int i = int(step.draws.size()); i < padded; i++) to.draws[i] = {};
        return (char*)(to.tables + step.tables.size());
    }

    // y [T, N] = x [T, K] w [N, K]^T, + y if add
    template <class Out>
    void gemm(const b16* x, const b16* w, Out* y, int T, int N, int K, bool add = false) {
        float one = 1, old = add;
        auto type = std::is_same_v<Out, float> ? CUDA_R_32F : CUDA_R_16BF;
        if (cublasGemmEx(blas, CUBLAS_OP_T, CUBLAS_OP_N, N, T, K, &one, w, CUDA_R_16BF, K, x,
                         CUDA_R_16BF, K, &old, y, type, N, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT))
            fail("CUDA: cuBLAS refused a product");
    }

    size_t prefill_shared() const { return size_t(4) * kTileKeys * c.head_dim * sizeof(b16); }

    template <int HD>
    void attend(const StepArrays& s, const DeviceLayer& l, int layer, int T, int decodes,
                int tiles) {
        int heads = c.heads + 2 * c.kv_heads, units = decodes * c.kv_heads;
        run(rotate<HD>, dim3(T, (heads + 3) / 4), 128, 0, 1, s, c, layer, l.bias, l.q_norm,
            l.k_norm, inv_freq, qkv, kv);
        if (tiles) run(prefill_attend<HD>, dim3(tiles, c.kv_heads), kTileRows * 2,
                       prefill_shared(), 1, s, c, layer, qkv, kv, att);
        if (!decodes) return;
        int splits = std::clamp((kMaxBlocks + units - 1) / units, 1, kMaxSplits);
        run(decode_attend<HD>, dim3(decodes, c.kv_heads, splits), kDecodeWarps * 32, 0, 1, s, c,
            layer, qkv, kv, partial, tickets, att);
    }

    bool few(int T) const {
        return T <= kFewRows && c.hidden % 32 == 0 && c.intermediate % 32 == 0;
    }

    // out = RMS norm of x (the rows given, or all) times w [N, D]^T
    template <Into into>
    void norm_linear(int T, const int* rows, const float* weight, const b16* w, int N, void* out) {
        if (few(T)) return run(few_rows<into, 16>, (N + 15) / 16, kFewThreads, 0, 1, c, T, N,
                               c.hidden, w, nullptr, x, rows, weight, out);
        run(norm, T, 256, 0, 1, c, x, rows, weight, normed);
        if (into == Into::logits) gemm(normed, w, (float*)out, T, N, c.hidden);
        else gemm(normed, w, (b16*)out, T, N, c.hidden);
    }

    // x += in [T, K] w^T
    void add_linear(int T, const b16* in, const b16* w, int K) {
        int D = c.hidden;
        if (few(T)) run(few_rows<Into::residual, 8>, (D + 7) / 8, kFewThreads, 0, 1, c, T, D, K, w,
                        in, nullptr, nullptr, nullptr, x);
        else gemm(in, w, x, T, D, K, true);
    }

    void norm_swiglu(int T, const DeviceLayer& l) {
        int F = c.intermediate;
        if (few(T)) return run(few_rows<Into::swiglu, 16>, (F + 7) / 8, kFewThreads, 0, 1, c, T, F,
                               c.hidden, l.gate_up, nullptr, x, nullptr, l.mlp_norm, h);
        norm_linear<Into::values>(T, nullptr, l.mlp_norm, l.gate_up, 2 * F, gate_up);
        run(swiglu, dim3(T, (F + 1023) / 1024), 256, 0, 1, c, gate_up, h);
    }

    void forward(const StepArrays& s, int T, int decodes, int tiles) {
        run(embed, T, 128, 0, 1, s, c, drawn, embedding, x);
        for (int i = 0; i < c.layers; i++) {
            const DeviceLayer& l = layers[i];
            norm_linear<Into::values>(T, nullptr, l.attn_norm, l.qkv, c.qkv(), qkv);
            if (c.head_dim == 64) attend<64>(s, l, i, T, decodes, tiles);
            else attend<128>(s, l, i, T, decodes, tiles);
            add_linear(T, att, l.o, c.heads * c.head_dim);
            norm_swiglu(T, l);
            add_linear(T, h, l.down, c.intermediate);
        }
    }

    void compute_logits(const int* rows, int count) {
        norm_linear<Into::logits>(count, rows, final_norm, lm_head, c.vocab, logits);
    }

    void draw(const DrawKey* keys, int draws, int* drawn, int* host) {
        run(draw_ids, dim3(draws * team), kDrawThreads, 0, team, keys, scratch, logits, c.vocab,
            team, drawn, host);
    }

    // A decode step of up to T rows as a graph.
    cudaGraphExec_t capture(const StepArrays& s, int T) {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
        forward(s, T, T, 0);
        compute_logits(s.logit_rows, T);
        draw(s.draws, T, drawn, slots[turn].drawn);
        check(cudaStreamEndCapture(stream, &graph), "capture");
        check(cudaGraphInstantiate(&exec, graph), "graph");
        check(cudaGraphDestroy(graph), "graph");
        return exec;
    }

    // The draws of a step that is not captured, for kGraphRows rows of logits at a time.
    void sample_groups(const StepArrays& s, Step& step) {
        auto d = step.draws.begin();
        for (int begin = 0; begin < int(step.logit_rows.size()); begin += kGraphRows) {
            int count = std::min(kGraphRows, int(step.logit_rows.size()) - begin);
            auto first = d;
            vector<Penalty> penalties;
            bool scored = false;
            for (int last = -1; d != step.draws.end() && d->row < begin + count; d++) {
                scored |= d->logprobs >= 0;
                if (d->row != std::exchange(last, d->row)) add_penalties(*d, penalties);
            }
            compute_logits(s.logit_rows + begin, count);
            vector<float> host(scored ? size_t(count) * c.vocab : 0);
            if (scored) check(cudaMemcpyAsync(host.data(), logits, host.size() * sizeof(float),
                                              cudaMemcpyDeviceToHost, stream), "logits");
            if (!penalties.empty()) {
                int n = int(penalties.size());
                Penalty* list;
                check(cudaMallocAsync(&list, n * sizeof(Penalty), stream), "memory");
                check(cudaMemcpyAsync(list, penalties.data(), n * sizeof(Penalty),
                                      cudaMemcpyHostToDevice, stream), "penalties");
                run(penalize_all, (n + 255) / 256, 256, 0, 1, list, n, logits, c.vocab);
                check(cudaFreeAsync(list, stream), "memory");
            }
            for (auto at = first; at < d; at += kGraphRows) {  // a row may have several draws
                int i = int(at - step.draws.begin()), n = std::min(kGraphRows, int(d - at));
                draw(s.draws + i, n, drawn + i, slots[step.slot].drawn + i);
            }
            if (!scored) continue;
            check(cudaStreamSynchronize(stream), "logits");
            int from = int(first - step.draws.begin()), end = int(d - step.draws.begin());
            #pragma omp parallel for schedule(dynamic)
            for (int i = from; i < end; i++) {
                Draw& one = step.draws[i];
                if (one.id < 0) one.id = slots[step.slot].drawn[i];
                if (one.logprobs < 0) continue;
                one.resolve(std::span(host).subspan(size_t(one.row - begin) * c.vocab, c.vocab));
            }
        }
    }

    static void add_penalties(const Draw& d, vector<Penalty>& list) {
        const Sampling& p = d.sampling;
        if (d.id >= 0 || !p.has_penalties()) return;
        for (auto [id, count] : count_ids(d.prompt, d.output))
            list.push_back({d.row % kGraphRows, id, count, p});
    }

    struct Piece {
        const void* from;
        void* to;
        size_t bytes;
    };
    static constexpr size_t kPiece = 4 << 20;

    const Model& model;
    const Shape c;
    bool graphs_on, turn = false;
    int team;  // blocks that work on a draw
    size_t max_draws = 0, array_bytes = 0, kv_bytes = 0;
    cudaStream_t stream, uploads;
    cublasHandle_t blas;
    vector<void*> owned;
    vector<Piece> pieces;  // of weights, to be copied
    vector<DeviceLayer> layers;
    b16 *embedding, *lm_head, *normed, *qkv, *att, *gate_up, *h, *kv = nullptr;
    float *final_norm, *inv_freq, *x, *logits, *partial;
    int *drawn, *tickets;
    DrawScratch* scratch;
    Slot slots[2];
    std::map<std::pair<int, bool>, cudaGraphExec_t> graphs;  // by rows, slot
};

}  // namespace cuda
