// gpu.hpp: the five ops, the draw and the step on a GPU: projections by cuBLAS, the rest by kernels
// of our own. Weights, keys and values in bf16, the residual stream and all sums in float.
//
// nano.cu includes this chapter where nvcc builds it, behind the ops on the CPU and before the
// engine; it is kept here because it does not fit into the four sources' budget of lines.
// In reading order: what kernels see of a step, the small kernels, attention of new tokens
// (decode_attend) and of prompts (prefill_attend), the draw, decodes of few rows as one kernel
// (stream.hpp), CudaDevice.
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
constexpr int kSharedParts = 8;   // most, of blocks that decodes attend to together
constexpr int kSharedTiles = 128;  // most, of prefill_attend for these
constexpr int kRotateThreads = 128;
constexpr int kMaxGroup = 8;      // query heads of a kv head

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) fail("CUDA: ", what, ": ", cudaGetErrorString(error));
}

// GPUs in this machine; a driver too old for this build is an error.
int count_gpus() {
    int gpus = 0, driver = 0;
    cudaError_t error = cudaGetDeviceCount(&gpus);
    cudaDriverGetVersion(&driver);  // 0: there is none
    if (error == cudaErrorInsufficientDriver && driver > 0)
        fail("GPU: its driver is for CUDA ", driver / 1000, ".", driver % 1000 / 10,
             ", this build needs ", CUDART_VERSION / 1000, ".", CUDART_VERSION % 1000 / 10,
             "; update the driver, or use --device cpu");
    return error == cudaSuccess ? gpus : 0;
}

// Sizes, as kernels take them.
struct Shape {
    int hidden, heads, kv_heads, head_dim, intermediate, vocab, layers;
    float norm_eps;
    explicit Shape(const Config& c)
        : hidden(c.hidden), heads(c.heads), kv_heads(c.kv_heads), head_dim(c.head_dim),
          intermediate(c.intermediate), vocab(c.vocab), layers(c.layers), norm_eps(c.norm_eps) {}

    // Where a block has the keys of a head; its values are value_offset behind. Such a page is made
    // of the 8x8 matrices that tensor cores take, [2, HD / 8, 8 tokens, 8 components]: they read
    // them just as they lie, and one copy brings a page into shared memory.
    __host__ __device__ size_t page(int block, int layer, int head) const {
        size_t at = (size_t(block) * layers + layer) * 2 * kv_heads + head;
        return at * kBlockSize * head_dim;
    }
    __device__ int in_page(int slot, int d) const {
        return (slot / 8 * (head_dim / 8) + d / 8) * 64 + slot % 8 * 8 + d % 8;
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
        int first, last, part;  // pages that it attends to; which part of shared ones, else -1
    };
    struct Shared {
        int pages, parts, at;  // of its context, that a row attends to with others; at: in grouped
    };
    struct Header {
        int rows, table_width, decodes, tiles;
    };
    Header* header;
    DrawKey* draws;       // [draws]
    Shared* shared;       // [T]
    Tile* tiles;          // [T + kSharedTiles]: for prefill_attend
    int *ids, *positions, *sequence, *logit_rows;  // [T]
    int* decodes;         // [T]: rows for decode_attend
    int* grouped;         // [T]: the same, those that share blocks side by side
    int* tables;          // [sequences, table_width]

    // T, draws: what there is room for
    StepArrays(char* at, int T, int count) {
        auto carve = [&](auto*& array, size_t n) {
            array = (std::remove_reference_t<decltype(array)>)at;
            at += (n * sizeof(*array) + 15) / 16 * 16;
        };
        carve(header, 1), carve(draws, count), carve(shared, T);
        carve(tiles, T + kSharedTiles);
        for (int** array : {&ids, &positions, &sequence, &logit_rows, &decodes, &grouped})
            carve(*array, T);
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

// x [T, D] = the embeddings of the ids; those not known to the host are in drawn. angles [T, 2,
// HD / 2] = cosines and sines of the positions' angles.
__global__ void embed(StepArrays s, Shape c, const int* drawn, const b16* table,
                      const float* inv_freq, float* x, float* angles) {
    wait_for_previous();
    int id = s.ids[blockIdx.x], D = c.hidden, half = c.head_dim / 2;
    if (id < 0) id = drawn[-1 - id];
    for (int i = threadIdx.x; i < D; i += blockDim.x)
        x[size_t(blockIdx.x) * D + i] = float(table[size_t(id) * D + i]);
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        float* to = angles + size_t(blockIdx.x) * 2 * half + i;
        sincosf(float(s.positions[blockIdx.x]) * inv_freq[i], to + half, to);
    }
}

__device__ unsigned pack(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *(unsigned*)&both;
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
        *(uint2*)(out + i) = {pack(v.x * factor * w.x, v.y * factor * w.y),
                              pack(v.z * factor * w.z, v.w * factor * w.w)};
    }
}

__device__ void load8(const float* from, float to[8]) {
    *(float4*)to = *(const float4*)from;
    *(float4*)(to + 4) = *(const float4*)(from + 4);
}

// Bias, norm (Qwen3) and RoPE of every head of qkv, some lanes each; keys and values go to their
// slots. A block takes one token, or with gridDim.y a part of its heads.
template <int HD>
__global__ void __launch_bounds__(kRotateThreads)
rotate(StepArrays s, Shape c, int layer, const float* bias, const float* q_norm,
       const float* k_norm, const float* angles, b16* qkv, b16* kv) {
    wait_for_previous();
    constexpr int kLanes = HD / 16;  // of a head: 8 components of either half of it are a lane's
    int t = blockIdx.x, thread = blockIdx.y * kRotateThreads + threadIdx.x;
    int first = thread % kLanes * 8, H = c.heads, KV = c.kv_heads;
    if (t >= s.header->rows) return;
    float cosine[8], sine[8];
    load8(angles + size_t(t) * HD + first, cosine);
    load8(angles + size_t(t) * HD + HD / 2 + first, sine);
    int position = s.positions[t], slot = position % kBlockSize;
    int block = s.tables[s.sequence[t] * s.header->table_width + position / kBlockSize];
    for (int head = thread / kLanes; head < H + 2 * KV;
         head += gridDim.y * kRotateThreads / kLanes) {
        b16* vector = qkv + size_t(t) * c.qkv() + head * HD + first;
        float v[2][8], f[8];
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            uint4 eight = *(const uint4*)(vector + i * HD / 2);
            for (int j = 0; j < 8; j++) v[i][j] = float(((b16*)&eight)[j]);
            if (!bias) continue;
            load8(bias + head * HD + i * HD / 2 + first, f);
            for (int j = 0; j < 8; j++) v[i][j] += f[j];
        }
        const float* weight = head < H ? q_norm : head < H + KV ? k_norm : nullptr;
        float sum = 0;
        for (int j = 0; j < 8; j++) sum += v[0][j] * v[0][j] + v[1][j] * v[1][j];
        for (int n = 1; n < kLanes; n *= 2) sum += __shfl_xor_sync(~0u, sum, n);
        float factor = rsqrtf(sum / HD + c.norm_eps);
        #pragma unroll
        for (int i = 0; i < 2 && weight; i++) {
            load8(weight + i * HD / 2 + first, f);
            for (int j = 0; j < 8; j++) v[i][j] *= factor * f[j];
        }
        for (int j = 0; j < 8 && head < H + KV; j++) {
            float x = v[0][j], y = v[1][j];
            v[0][j] = x * cosine[j] - y * sine[j];
            v[1][j] = y * cosine[j] + x * sine[j];
        }
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            b16* to = head < H ? vector + i * HD / 2
                    : kv + c.page(block, layer, head - H) + c.in_page(slot, first + i * HD / 2);
            *(uint4*)to = {pack(v[i][0], v[i][1]), pack(v[i][2], v[i][3]),
                           pack(v[i][4], v[i][5]), pack(v[i][6], v[i][7])};
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

// Of one component: the sum of values, weighted by exp2(score - top), and the sum of the weights.
struct Attended {
    float top, sum, out;
};

// All parts as one.
template <int kUnroll = 1>
__device__ Attended merge(int count, auto part) {
    Attended all = {-1e30f, 0, 0};
    #pragma unroll kUnroll
    for (int i = 0; i < count; i++) all.top = fmaxf(all.top, part(i).top);
    #pragma unroll kUnroll
    for (int i = 0; i < count; i++) {
        Attended one = part(i);
        float factor = exp2f(one.top - all.top);
        all.sum += factor * one.sum;
        all.out += factor * one.out;
    }
    return all;
}

// The online softmax (Milakov, Gimelshein 2018) of 16 tokens more. Their products K Q^T, of which
// p has those of two tokens with heads 2t, 2t + 1, become weights exp2(score - top), and what was
// summed up until now, of the same heads, is made to fit. in0, in1: whether the tokens count.
// Returns the weights as B of a product.
template <int HD>
__device__ uint2 weigh(float p[4], bool in0, bool in1, float (*o)[4], float top[2], float sum[2]) {
    const float scale = rsqrtf(HD) * 1.44269504f;  // for exp2
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
    return {transpose(pack(p[0], p[1])), transpose(pack(p[2], p[3]))};
}

// Where a part of what rows share leaves its results: of each of the G heads the sums of values
// [HD], the largest score and the sum of the weights.
__device__ float* shared_part(float* shared, const Shape& c, int at, int head, int part) {
    int G = c.heads / c.kv_heads;
    return shared + size_t((at * c.kv_heads + head) * kSharedParts + part) * G * (c.head_dim + 2);
}

// Attention of one new token a sequence: a block for each row, kv head and part of the context, its
// warps taking turns at the 16-token blocks. Products are S^T = K Q^T and O^T = V^T P^T, so that
// the up to 8 query heads of the kv head are the 8 columns of the mma, and keys go from memory
// to registers as they lie there: a lane's 16 bytes of a key are four pairs of components in an
// order that q shares. Of values it takes 8 components of 4 tokens and pairs up the tokens. The
// blocks that a row shares with others have been seen to by prefill_attend.
template <int HD>
__global__ void __launch_bounds__(kDecodeWarps * 32)
decode_attend(StepArrays s, Shape c, int layer, const b16* qkv, const b16* kv, float* shared,
              Attended* partial, int* tickets, b16* att) {
    wait_for_previous();
    if (int(blockIdx.x) >= s.header->decodes) return;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int row = s.decodes[blockIdx.x], head = blockIdx.y, G = c.heads / c.kv_heads;
    int n = s.positions[row] + 1, blocks = (n + kBlockSize - 1) / kBlockSize;
    const StepArrays::Shared with = s.shared[row];
    const int own = blocks - with.pages;
    int each = max(kDecodeWarps, (own + int(gridDim.z) - 1) / int(gridDim.z));
    int first = with.pages + blockIdx.z * each, last = min(blocks, first + each);
    if (first >= blocks) return;
    const int* table = s.tables + s.sequence[row] * s.header->table_width;
    uint4 q[HD / 32] = {};
    for (int j = 0; j < HD / 32 && g < G; j++)
        q[j] = *(const uint4*)(qkv + size_t(row) * c.qkv() + (head * G + g) * HD + 32 * j + 8 * t);
    float o[HD / 16][4] = {}, top[2] = {-1e30f, -1e30f}, sum[2] = {};  // of heads 2t, 2t + 1
    int token = g / 2 + g % 2 * 4;  // of row g of S^T; row g + 8 is 8 further
    for (int b = first + warp; b < last; b += kDecodeWarps) {
        const b16* page = kv + c.page(table[b], layer, head);
        const b16 *k = page + t * 64 + token * 8, *v = page + c.value_offset() + g * 64 + t * 8;
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
    b16* to = att + (size_t(row) * c.heads + head * G) * HD;
    auto store = [&](int i, Attended all) {
        Attended each[kSharedParts + 1];
        each[kSharedParts] = all;
        #pragma unroll
        for (int z = 0; z < kSharedParts; z++) {  // all are read at the same time
            const float* part = shared_part(shared, c, with.at, head, z) + i / HD * (HD + 2);
            each[z] = {-1e30f, 0, 0};
            if (z < with.parts) each[z] = {part[HD], part[HD + 1], part[i % HD]};
        }
        if (with.parts)
            all = merge<kSharedParts + 1>(kSharedParts + 1, [&](int z) { return each[z]; });
        to[i] = b16(all.out / all.sum);
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

__device__ unsigned shared_address(const void* shared) {
    return unsigned(__cvta_generic_to_shared(shared));
}

// A barrier in shared memory (mbarrier). A use of it ends when so many have arrived as init said,
// and all bytes that were announced have come; the parity of its uses is 0, 1, 0, ...
struct Barrier {
    uint64_t word;

    __device__ void init(int count) {
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&word)), "r"(count));
#if __CUDA_ARCH__ >= 900
        asm volatile("fence.proxy.async;" ::: "memory");  // the copy engine uses it, too
#endif
    }
    __device__ static void arrive(unsigned at) {  // at: its address in shared memory
        asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(at)
                     : "memory");
    }
    __device__ static void expect(unsigned at, int bytes) {  // arrives, and announces bytes
#if __CUDA_ARCH__ >= 900
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(at), "r"(bytes)
                     : "memory");
#endif
    }
    __device__ static bool test(unsigned at, int parity) {
        unsigned done;
        asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2;"
                     " selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(at), "r"(parity) : "memory");
        return done;
    }
    __device__ static void wait(unsigned at, int parity) {
#if __CUDA_ARCH__ >= 900
        for (unsigned done = 0; !done;)  // sleeps for a while
            asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2;"
                         " selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(at), "r"(parity)
                         : "memory");
#else
        while (!test(at, parity)) {}
#endif
    }
    __device__ void arrive() { arrive(shared_address(&word)); }
    __device__ void wait(int parity) { wait(shared_address(&word), parity); }
};

// Brings pages [kPage], j -> page(j), to an address in shared memory, by one warp; the barrier at
// another, full, is told when they are there. On Hopper the copy engine does it, elsewhere the
// lanes fetch 16 bytes each.
#if __CUDA_ARCH__ >= 900
constexpr int kFetchers = 1;  // arrivals at full
template <int kPage>
__device__ void fetch_pages(int count, auto page, unsigned to, unsigned full) {
    int lane = threadIdx.x % 32, bytes = kPage * sizeof(b16);
    if (lane == 0) Barrier::expect(full, count * bytes);
    __syncwarp();
    for (int j = lane; j < count; j += 32)
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                     " [%0], [%1], %2, [%3];" ::"r"(to + j * bytes), "l"(page(j)), "r"(bytes),
                     "r"(full) : "memory");
}
#else
constexpr int kFetchers = 32;
template <int kPage>
__device__ void fetch_pages(int count, auto page, unsigned to, unsigned full) {
    for (int j = 0; j < count; j++) {
        const b16* from = page(j);
        for (int i = threadIdx.x % 32 * 8; i < kPage; i += 256)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                             to + unsigned(sizeof(b16)) * (j * kPage + i)), "l"(from + i));
    }
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(full) : "memory");
}
#endif

// Four 8x8 matrices, each transposed if so; at: where, in shared memory, the row lane % 8 of the
// matrix lane / 8 is.
template <bool kTransposed>
__device__ uint4 ldmatrix(unsigned at) {
    uint4 m;
    if (kTransposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w) : "r"(at) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w) : "r"(at) : "memory");
    return m;
}
template <bool kTransposed>
__device__ uint4 load_matrices(const b16* shared) {  // that lie one after the other
    return ldmatrix<kTransposed>(shared_address(shared + threadIdx.x % 32 * 8));
}

// sum [64, N] = (with add: +=) a [64, 16] b [16, N] by the four warps of a warpgroup (Hopper): a in
// registers, 16 rows a warp, as for mma; b in shared memory, made of 8x8 matrices along_k and
// along_n bytes apart, in which neighbours follow k, or n if kTransposed. The sums are there when
// wgmma_wait returns.
template <int N, bool kTransposed>
__device__ void wgmma(float (*sum)[4], const unsigned a[4], const b16* shared, int along_k,
                      int along_n, bool add) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    float* s = sum[0];
    uint64_t b = uint64_t(along_n >> 4) << 32 |
                 uint64_t(along_k >> 4) << 16 |
                 (shared_address(shared) & 0x3FFFF) >> 4;
#define NANOCU_8(i) "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3]), "+f"(s[i + 4]), \
                    "+f"(s[i + 5]), "+f"(s[i + 6]), "+f"(s[i + 7])
#define NANOCU_IN "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), \
                  "n"(int(kTransposed))
    if constexpr (N == 64)
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0;"
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
            "{%32, %33, %34, %35}, %36, p, 1, 1, %38; }"
            : NANOCU_8(0), NANOCU_8(8), NANOCU_8(16), NANOCU_8(24) : NANOCU_IN);
    else
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0;"
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
            "{%64, %65, %66, %67}, %68, p, 1, 1, %70; }"
            : NANOCU_8(0), NANOCU_8(8), NANOCU_8(16), NANOCU_8(24), NANOCU_8(32), NANOCU_8(40),
              NANOCU_8(48), NANOCU_8(56) : NANOCU_IN);
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

// Of a thread, for all warps of a warpgroup: gives registers back, or takes more.
template <int kCount, bool kMore>
__device__ void registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if (kMore) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
    else asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

__device__ float exp2_fast(float x) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

// p [16, keys of a tile] += q k^T, or = ; ks: the keys' pages
template <int HD, int kKeys>
__device__ void score(float (&p)[kKeys / 8][4], const unsigned (&q)[HD / 16][4], const b16* ks) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    wgmma_begin(p);
    #pragma unroll
    for (int i = 0; i < HD / 16; i++)
        wgmma<kKeys, false>(p, q[i], ks + i * 128, 128, 16 * HD, i > 0);
    wgmma_commit();
#else
    for (auto& four : p) for (float& x : four) x = 0;
    #pragma unroll
    for (int n = 0; n < kKeys / 8; n++)
        #pragma unroll
        for (int i = 0; i < HD / 16; i += 2) {
            uint4 k = load_matrices<false>(ks + n * 8 * HD + i * 128);
            mma(p[n], q[i][0], q[i][1], q[i][2], q[i][3], k.x, k.y);
            mma(p[n], q[i + 1][0], q[i + 1][1], q[i + 1][2], q[i + 1][3], k.z, k.w);
        }
#endif
}

// o [16, HD] += p v; vs: the values' pages
template <int HD, int kKeys>
__device__ void add_values(float (&o)[HD / 8][4], const unsigned (&p)[kKeys / 16][4],
                           const b16* vs) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    wgmma_begin(o);
    #pragma unroll
    for (int i = 0; i < kKeys / 16; i++)
        wgmma<HD, true>(o, p[i], vs + i * kBlockSize * HD, 16 * HD, 128, true);
    wgmma_commit();
#else
    #pragma unroll
    for (int i = 0; i < kKeys / 16; i++)
        #pragma unroll
        for (int n = 0; n < HD / 8; n += 4) {
            uint4 low = load_matrices<true>(vs + i * kBlockSize * HD + n * 64);
            uint4 high = load_matrices<true>(vs + i * kBlockSize * HD + n * 64 + 8 * HD);
            for (int j = 0; j < 4; j++)
                mma(o[n + j], p[i][0], p[i][1], p[i][2], p[i][3], (&low.x)[j], (&high.x)[j]);
        }
#endif
}

template <int kKeys>
__device__ void pack_scores(const float (&p)[kKeys / 8][4], unsigned (&a)[kKeys / 16][4]) {
    #pragma unroll
    for (int n = 0; n < kKeys / 8; n++)
        #pragma unroll
        for (int r = 0; r < 2; r++)
            a[n / 2][n % 2 * 2 + r] = pack(p[n][2 * r], p[n][2 * r + 1]);
}

// What a thread knows of its rows g and g + 8: the largest score, sums of exponentials (in halves).
struct Rows {
    float top[2] = {-1e30f, -1e30f}, sum[4] = {}, factor[2];  // factor: for what was summed before
};

// p becomes exp(p - top); seen: how many keys, from 2t on, each of the two rows sees.
template <int kKeys>
__device__ void soften(float (&p)[kKeys / 8][4], Rows& rows, const int seen[2], bool masked,
                       float scale) {
    float m[4] = {rows.top[0], rows.top[0], rows.top[1], rows.top[1]};  // four chains at a time
    if (masked)
        #pragma unroll
        for (int n = 0; n < kKeys / 8; n++)
            #pragma unroll
            for (int e = 0; e < 4; e++) if (n * 8 + e % 2 >= seen[e / 2]) p[n][e] = -INFINITY;
    #pragma unroll
    for (int n = 0; n < kKeys / 8; n++)
        #pragma unroll
        for (int e = 0; e < 4; e++) m[e] = fmaxf(m[e], p[n][e]);
    #pragma unroll
    for (int r = 0; r < 2; r++) {
        float most = fmaxf(m[2 * r], m[2 * r + 1]);
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        rows.factor[r] = exp2_fast((rows.top[r] - most) * scale);
        rows.top[r] = most;
        rows.sum[2 * r] *= rows.factor[r], rows.sum[2 * r + 1] *= rows.factor[r];
    }
    #pragma unroll
    for (int n = 0; n < kKeys / 8; n++)
        #pragma unroll
        for (int e = 0; e < 4; e++)
            rows.sum[e] += p[n][e] = exp2_fast(p[n][e] * scale - rows.top[e / 2] * scale);
}

// Keeps two tiles of keys and two of values on their way; page(i, kind): of keys (0) or values (1).
template <int HD, int kKeys>
__device__ void fetch_tiles(int tiles, auto page, b16* shared, Barrier (*full)[2],
                            Barrier (*empty)[2]) {
    constexpr int kPages = kKeys / kBlockSize;
    for (int j = 0; j < tiles; j++)
        for (int kind = 0; kind < 2; kind++) {
            empty[kind][j % 2].wait(j / 2 % 2 ^ 1);
            auto of_tile = [&](int i) { return page(j * kPages + i, kind); };
            b16* to = shared + (2 * kind + j % 2) * kKeys * HD;
            fetch_pages<kBlockSize * HD>(kPages, of_tile, shared_address(to),
                                         shared_address(&full[kind][j % 2]));
        }
}

// Attention of a chunk of a prompt (FlashAttention-2, Dao 2023): a block has kTileRows rows, each a
// token with one of the query heads of a kv head, 16 rows a warp; it goes over the keys and values
// of all tokens before in tiles of kKeys, which a warp of its own fetches two tiles ahead. While
// the others work out the exponentials of one tile, the tensor cores add up the values of the one
// before (the order of FlashAttention-3, Shah et al. 2024).
// A tile may also be of decodes and blocks that they share, or a part of these, which are so read
// once for all of them (Hydragen, Juravsky et al. 2024): decode_attend does the rest of each.
template <int HD, int kKeys>
__global__ void __launch_bounds__(kTileRows * 3, 1)
prefill_attend(StepArrays s, Shape c, int layer, const b16* qkv, const b16* kv, float* shared_out,
               b16* att) {
    extern __shared__ __align__(128) b16 shared[];  // keys [2, kKeys, HD], values [2, kKeys, HD]
    constexpr int kTile = kKeys * HD, kWarps = kTileRows / 16;
    __shared__ Barrier full[2][2], empty[2][2];  // of keys, of values; two of each
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    if (threadIdx.x < 4) {
        full[0][threadIdx.x].init(kFetchers);
        empty[0][threadIdx.x].init(kWarps);
    }
    __syncthreads();
    wait_for_previous();
    if (int(blockIdx.y) >= s.header->tiles) return;
    auto tile = s.tiles[blockIdx.y];
    const int head = blockIdx.x, G = c.heads / c.kv_heads, first_key = tile.first * kBlockSize;
    const int tiles = ((tile.last - tile.first) * kBlockSize + kKeys - 1) / kKeys;
    const bool shares = tile.part >= 0;
    if (warp >= kWarps) {
        registers<24, false>();
        const int* table = s.tables + tile.sequence * s.header->table_width;
        auto page = [&](int i, int kind) {
            int block = table[min(tile.first + i, tile.last - 1)];
            return kv + c.page(block, layer, head) + kind * c.value_offset();
        };
        if (warp == kWarps) fetch_tiles<HD, kKeys>(tiles, page, shared, full, empty);
        return;
    }
    registers<240, true>();

    int position[2];
    unsigned q[HD / 16][4];
    for (int r = 0; r < 2; r++) {
        int row = warp * 16 + g + 8 * r, token = min(row / G, tile.tokens - 1);
        position[r] = tile.position + (shares ? 0 : token);
        token = shares ? s.grouped[tile.row + token] : tile.row + token;
        const b16* from = qkv + size_t(token) * c.qkv() + (head * G + row % G) * HD;
        #pragma unroll
        for (int i = 0; i < HD / 16; i++) {
            q[i][r] = *(const unsigned*)(from + 16 * i + 2 * t);
            q[i][r + 2] = *(const unsigned*)(from + 16 * i + 2 * t + 8);
        }
    }
    const float scale = rsqrtf(HD) * 1.44269504f;  // for exp2
    // keys that all the warp's rows see
    const int unmasked = tile.position - first_key + (shares ? 0 : warp * 16 / G) + 1;
    Rows rows;
    float o[HD / 8][4] = {}, p[kKeys / 8][4];
    unsigned a[kKeys / 16][4];
    auto begin_scores = [&](int j) {
        full[0][j % 2].wait(j / 2 % 2);
        score<HD, kKeys>(p, q, shared + j % 2 * kTile);
    };
    auto begin_values = [&](int j) {
        full[1][j % 2].wait(j / 2 % 2);
        add_values<HD, kKeys>(o, a, shared + (2 + j % 2) * kTile);
    };
    auto release = [&](int kind, int j) {
        __syncwarp();
        if (lane == 0) empty[kind][j % 2].arrive();
    };
    auto weigh = [&](int j) {
        release(0, j);
        const int first = first_key + j * kKeys + 2 * t;
        const int seen[2] = {position[0] + 1 - first, position[1] + 1 - first};
        soften<kKeys>(p, rows, seen, (j + 1) * kKeys > unmasked, scale);
    };
    begin_scores(0);
    wgmma_wait<0>(p);
    weigh(0);
    pack_scores<kKeys>(p, a);
    // The two warpgroups take turns at the tensor cores, and at exponentials.
    const int mine = 1 + warp / 4, other = 3 - mine;  // numbers of barriers
    auto pass_on = [&] { asm volatile("bar.arrive %0, 256;" ::"r"(other) : "memory"); };
    if (mine == 2 && tiles > 1) pass_on();
    for (int j = 1; j < tiles; j++) {
        asm volatile("bar.sync %0, 256;" ::"r"(mine) : "memory");
        begin_scores(j);
        begin_values(j - 1);
        if (mine == 1 || j + 1 < tiles) pass_on();
        wgmma_wait<1>(p);
        weigh(j);
        wgmma_wait<0>(o);
        release(1, j - 1);
        #pragma unroll
        for (int i = 0; i < HD / 8; i++)
            #pragma unroll
            for (int e = 0; e < 4; e++) o[i][e] *= rows.factor[e / 2];
        pack_scores<kKeys>(p, a);
    }
    begin_values(tiles - 1);
    wgmma_wait<0>(o);
    for (int r = 0; r < 2; r++) {
        int row = warp * 16 + g + 8 * r, token = row / G;
        float total = rows.sum[2 * r] + rows.sum[2 * r + 1];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        if (token >= tile.tokens || row >= kTileRows / G * G) continue;
        if (shares) {
            float* to = shared_part(shared_out, c, tile.row + token, head, tile.part);
            to += row % G * (HD + 2);
            for (int i = 0; i < HD / 8; i++)
                *(float2*)(to + 8 * i + 2 * t) = {o[i][2 * r], o[i][2 * r + 1]};
            if (t == 0) to[HD] = rows.top[r] * scale, to[HD + 1] = total;
            continue;
        }
        b16* to = att + (size_t(tile.row + token) * c.heads + head * G + row % G) * HD + 2 * t;
        for (int i = 0; i < HD / 8; i++)
            *(unsigned*)(to + 8 * i) = pack(o[i][2 * r] / total, o[i][2 * r + 1] / total);
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

}  // namespace cuda

#include "../chapters/fast-draw.cuh"
#include "stream.hpp"

namespace cuda {

// One layer of each array below.
struct DeviceLayer {
    float *attn_norm, *mlp_norm, *q_norm = nullptr, *k_norm = nullptr, *bias = nullptr;
    b16 *qkv, *o, *gate_up, *down;
};

class CudaDevice : public Device {
public:
    // tokens: most in a step. rows: most sequences. graphs: whether decode steps are captured.
    CudaDevice(const Model& m, int ordinal, int tokens, int rows, bool graphs)
        : CudaDevice(m, ordinal, graphs) {  // from here on, what throws destroys what was made
        if (c.head_dim != 64 && c.head_dim != 128)
            fail("config.json: head_dim ", c.head_dim, " is not built for GPUs; use --device cpu");
        if (c.heads / c.kv_heads > kMaxGroup)
            fail("config.json: over 8 query heads a kv head; use --device cpu");
        cudaDeviceProp device;
        check(cudaSetDevice(ordinal), "device");
        check(cudaGetDeviceProperties(&device, ordinal), "device");
        name = device.name;
        if (device.major < 8)
            fail("GPU: ", name, " is older than compute capability 8.0; use --device cpu");
        check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
        check(cudaStreamCreateWithFlags(&uploads, cudaStreamNonBlocking), "stream");
        if (cublasCreate(&blas)) fail("CUDA: cuBLAS does not start");
        cublasSetStream(blas, stream);
        cudaFuncAttributes code;  // what runs may be older than the GPU, compiled from PTX
        check(cudaFuncGetAttributes(&code, draw_ids), "no code for this GPU in here");
        bool hopper = code.ptxVersion >= 90;
        team = hopper ? kDrawBlocks : 1;
        cublasSetWorkspace(blas, make<char>(kWorkspace), kWorkspace);
        load_weights();
        size_t T = std::max(tokens, kGraphRows);
        x = make<float>(T * c.hidden), normed = make<b16>(T * c.hidden);
        qkv = make<b16>(T * c.qkv()), att = make<b16>(T * c.heads * c.head_dim);
        gate_up = make<b16>(T * 2 * c.intermediate), h = make<b16>(T * c.intermediate);
        logits = make<float>(size_t(kGraphRows) * c.vocab);
        inv_freq = to_device(m.config.inv_freq), angles = make<float>(T * c.head_dim);
        shared = make<float>(size_t(rows) * c.heads * kSharedParts * (c.head_dim + 2));
        partial = make<Attended>(size_t(4 * kMinBlocks) * kMaxGroup * c.head_dim);
        max_draws = std::max<size_t>(T, rows);
        drawn = make<int>(max_draws);
        tickets = make<int>(size_t(T) * c.kv_heads);
        scratch = make<DrawScratch>(kGraphRows);
        check(cudaMemsetAsync(tickets, 0, T * c.kv_heads * sizeof(int), stream), "memory");
        check(cudaMemsetAsync(scratch, 0, kGraphRows * sizeof(DrawScratch), stream), "memory");
        size_t width = m.config.context / kBlockSize + 1;
        size_t array_bytes = 64 + T * (sizeof(StepArrays::Tile) + sizeof(StepArrays::Shared) +
                      7 * sizeof(int)) + kSharedTiles * sizeof(StepArrays::Tile) +
                      max_draws * sizeof(DrawKey) + 320 + rows * width * sizeof(int);
        for (Slot& slot : slots) {
            slot.device = make<char>(array_bytes);
            check(cudaMallocHost(&slot.host, array_bytes), "pinned memory, lower --max-rows");
            check(cudaMallocHost(&slot.drawn, max_draws * sizeof(int)), "pinned memory");
            check(cudaEventCreateWithFlags(&slot.uploaded, cudaEventDisableTiming), "event");
            check(cudaEventCreateWithFlags(&slot.done, cudaEventDisableTiming), "event");
        }
        prefill = hopper
            ? c.head_dim == 64 ? prefill_attend<64, 128> : prefill_attend<128, 128>
            : c.head_dim == 64 ? prefill_attend<64, 64> : prefill_attend<128, 64>;
        prefill_shared = 4 * (hopper ? 128 : 64) * c.head_dim * sizeof(b16);
        check(cudaFuncSetAttribute(prefill, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   int(prefill_shared)), "prefill_attend");
        if (!hopper) note = "this build has no code for Hopper that this GPU runs";
        else if (c.hidden % 64 || c.intermediate % 64) note = "sizes are not multiples of 64";
        else if (!set_up_streaming(device)) note = "its shared memory does not fit";
        if (!note.empty()) note = "decodes of few rows are not streamed: " + note;
    }
    CudaDevice(const CudaDevice&) = delete;
    ~CudaDevice() override {
        for (cudaStream_t s : {stream, uploads}) if (s) cudaStreamSynchronize(s);
        for (auto& [key, graph] : graphs) cudaGraphExecDestroy(graph);
        for (Slot& slot : slots) {
            cudaFreeHost(slot.host), cudaFreeHost(slot.drawn);
            for (cudaEvent_t e : {slot.uploaded, slot.done}) if (e) cudaEventDestroy(e);
        }
        for (void* memory : owned) cudaFree(memory);
        if (blas) cublasDestroy(blas);
        for (cudaStream_t s : {stream, uploads}) if (s) cudaStreamDestroy(s);
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
        check(cudaMemsetAsync(kv, 0, kv_bytes, stream), "KV memory");  // 0 times a NaN is a NaN
        const cuuint64_t heads = c.kv_heads, rows = c.head_dim / 16;  // of 256 numbers, in a page
        if (streams)
            maps.pages = map_tensor(kv, {256, heads * rows, 2, cuuint64_t(blocks) * c.layers},
                                    {256, c.value_offset(), 2 * c.value_offset()},
                                    {256, cuuint32_t(rows), 2, 1}, CU_TENSOR_MAP_SWIZZLE_NONE);
    }

    void launch(Step& step) override {
        int T = step.tokens(), rows = int(step.tables.size()) / std::max(1, step.table_width);
        bool plain = std::ranges::none_of(step.draws, [](const Draw& d) {
            return d.logprobs >= 0 || d.sampling.has_penalties();
        });
        bool decode = T == rows && int(step.draws.size()) == T && T <= kGraphRows &&
                      int(step.logit_rows.size()) == T;  // so each row has one draw
        bool streamed = streams && decode && T <= kStreamRows, captured = decode && plain;
        int padded = !captured ? T : T <= 16 ? std::bit_ceil(unsigned(T)) : (T + 15) / 16 * 16;
        auto [s, decodes, tiles] = upload(step, padded);
        if (streamed) ready_words(T);
        for (auto [from, to] : step.copies)
            check(cudaMemcpyAsync(kv + c.page(to, 0, 0), kv + c.page(from, 0, 0), block_bytes(),
                                  cudaMemcpyDeviceToDevice, stream), "copy of a block");
        step.replayed = captured && graphs_on;
        if (step.replayed) {
            auto& graph = graphs[{padded, turn, tiles > 0}];
            if (!graph) graph = capture(s, padded, tiles > 0);
            check(cudaGraphLaunch(graph, stream), "graph");
        } else {
            if (streamed) stream_rows(s, T);
            else forward(s, T, decodes, tiles);
            sample_groups(s, step, streamed);
        }
        check(cudaEventRecord(slots[turn].done, stream), "step");
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
        for (const Draw& d : step.draws) {  // a graph's logits are there until the next step
            if (!step.replayed || !d.observer) continue;
            vector<float> row(c.vocab);
            check(cudaMemcpy(row.data(), logits + size_t(d.row) * c.vocab,
                             row.size() * sizeof(float), cudaMemcpyDeviceToHost), "logits");
            d.observer->drawn(d, row);
        }
    }

protected:  // tests look at each op
    struct Slot {  // of a step; two take turns, since one may be filled while the other runs
        char *host = nullptr, *device = nullptr;
        int* drawn = nullptr;  // on the host, written by the device
        cudaEvent_t uploaded = nullptr, done = nullptr;
    };
    static constexpr size_t kWorkspace = 64 << 20, kMargin = 1 << 30;
    static constexpr int kMinBlocks = 264;  // of decode_attend that its splits should make at least
    static constexpr int kSharedRows = 4, kSharedPages = 8;  // fewer are not worth to be shared

    CudaDevice(const Model& m, int ordinal, bool graphs)
        : model(m), c(m.config), ordinal(ordinal), graphs_on(graphs) { overlaps = true; }

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
            cudaGetLastError();  // it is told here, and not again
            size_t free = 0, total = 0;
            cudaMemGetInfo(&free, &total);
            fail("GPU: ", count * sizeof(T) >> 20, " MiB do not fit into the ", free >> 20,
                 " MiB that are free; lower --kv-memory, --chunk or --max-rows, or take a smaller "
                 "model");
        }
        owned.push_back(memory);
        return (T*)memory;
    }

    float* to_device(const vector<float>& values) {
        float* to = make<float>(values.size());
        check(cudaMemcpyAsync(to, values.data(), values.size() * sizeof(float),
                              cudaMemcpyHostToDevice, stream), "upload");
        return to;
    }

    // Puts matrices of equal width one under the other; they are copied later, all at a time.
    // Returns where they end.
    b16* stack(b16* to, std::initializer_list<Matrix> parts) {
        for (const Matrix& part : parts) {
            size_t size = size_t(part.rows) * part.cols;
            for (size_t i = 0; i < size; i += kPiece / 2)
                pieces.push_back({part.data + i, to + i, std::min(size - i, kPiece / 2) * 2});
            to += size;
        }
        return to;
    }

    // A vector of each layer, one behind the other; the last of attn_norm is final_norm.
    float* stack(vector<float> Layer::* member) {
        vector<float> all;
        for (const Layer& l : model.layers)
            all.insert(all.end(), (l.*member).begin(), (l.*member).end());
        if (member == &Layer::attn_norm)
            all.insert(all.end(), model.final_norm.begin(), model.final_norm.end());
        return all.empty() ? nullptr : to_device(all);
    }

    void load_weights() {
        const size_t D = c.hidden, F = c.intermediate, Q = size_t(c.heads) * c.head_dim;
        const size_t L = c.layers, HD = c.head_dim, N = c.qkv();
        all = {stack(&Layer::attn_norm), stack(&Layer::mlp_norm), stack(&Layer::q_norm),
               stack(&Layer::k_norm),
               model.config.type == "qwen2" ? stack(&Layer::bias) : nullptr,
               make<b16>(L * N * D), make<b16>(L * Q * D), make<b16>(L * 2 * F * D),
               make<b16>(L * F * D)};
        for (size_t i = 0; i < L; i++) {
            const Layer& l = model.layers[i];
            auto of = [&](float* array, size_t n) { return array ? array + i * n : nullptr; };
            DeviceLayer d = {of(all.attn_norm, D), of(all.mlp_norm, D), of(all.q_norm, HD),
                             of(all.k_norm, HD), of(all.bias, N), all.qkv + i * N * D,
                             all.o + i * Q * D, all.gate_up + i * 2 * F * D, all.down + i * F * D};
            stack(d.qkv, {l.q, l.k, l.v}), stack(d.o, {l.o});
            stack(d.gate_up, {l.gate, l.up}), stack(d.down, {l.down});
            layers.push_back(d);
        }
        final_norm = all.attn_norm + L * D;
        embedding = lm_head = make<b16>(c.vocab * D);
        stack(embedding, {model.embed});
        if (!model.config.tied) stack(lm_head = make<b16>(c.vocab * D), {model.lm_head});
        copy_pieces();
    }

    // From the page cache through pinned memory, several threads at a time: no one thread copies as
    // fast as the bus.
    void copy_pieces() {
        std::atomic<size_t> next = 0;
        std::atomic<cudaError_t> first_error = cudaSuccess;
        #pragma omp parallel num_threads(std::min(8, omp_get_max_threads()))
        {
            char* pinned[2] = {};
            cudaEvent_t free[2] = {};
            cudaError_t error = cudaSuccess;
            auto ok = [&](cudaError_t e) { return (error = e) == cudaSuccess; };
            bool ready = ok(cudaSetDevice(ordinal)) && ok(cudaMallocHost(&pinned[0], 2 * kPiece)) &&
                         ok(cudaEventCreate(&free[0])) && ok(cudaEventCreate(&free[1]));
            pinned[1] = pinned[0] + kPiece;
            for (size_t i, turn = 0; ready && (i = next++) < pieces.size(); turn = !turn) {
                const Piece& piece = pieces[i];
                ready = ok(cudaEventSynchronize(free[turn]));
                memcpy(pinned[turn], piece.from, piece.bytes);
                ready = ready && ok(cudaMemcpyAsync(piece.to, pinned[turn], piece.bytes,
                                                    cudaMemcpyHostToDevice, cudaStreamPerThread)) &&
                        ok(cudaEventRecord(free[turn], cudaStreamPerThread));
            }
            if (ready) ok(cudaStreamSynchronize(cudaStreamPerThread));
            cudaFreeHost(pinned[0]);
            for (auto& event : free) if (event) cudaEventDestroy(event);
            if (error) first_error = error;
        }
        pieces.clear();
        check(first_error, "the copy of the weights");
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
                    step.sequence[row], 0, Cache::blocks_for(step.positions[i - 1] + 1), -1};
            }
        }
        share_prefixes(to, step);
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

    // Decodes whose tables begin with the same blocks attend to them together, if it saves enough.
    void share_prefixes(StepArrays& to, const Step& step) {
        const int decodes = to.header->decodes, tile = kTileRows / (c.heads / c.kv_heads);
        const int others = to.header->tiles, limit = others + shared_tiles();
        std::span rows(to.grouped, size_t(decodes));
        std::copy_n(to.decodes, decodes, to.grouped);
        for (int row : rows) to.shared[row] = {};
        if (decodes <= kStreamRows) return;
        auto pages = [&](int row) {  // that are full, and nobody writes to any more
            const int* table = &step.tables[size_t(step.sequence[row]) * step.table_width];
            return std::span(table, size_t(step.positions[row] / kBlockSize));
        };
        auto common = [&](int a, int b) {
            return int(std::ranges::mismatch(pages(a), pages(b)).in1 - pages(a).begin());
        };
        std::ranges::sort(rows, [&](int a, int b) {
            return std::ranges::lexicographical_compare(pages(a), pages(b));
        });
        const int blocks = c.kv_heads * ((decodes + tile - 1) / tile);  // with parts of one
        int64_t gain = 0;  // pages that are not read
        for (int begin = 0, end; begin < decodes; begin = end) {
            int shared = int(pages(rows[begin]).size()), saved = 0;  // of rows begin .. end - 1
            for (end = begin + 1; end < decodes; end++) {
                int with = std::min(shared, common(rows[begin], rows[end]));
                if (with < kSharedPages || (end - begin) * with < saved) break;
                shared = with, saved = (end - begin) * with;
            }
            int tiles = (end - begin + tile - 1) / tile;
            int parts = std::clamp(kMinBlocks / 2 / blocks, 1,
                                   std::min(kSharedParts, std::max(1, shared / kSharedPages)));
            if (end - begin < kSharedRows || to.header->tiles + tiles * parts > limit) continue;
            for (int part = 0; part < parts; part++)
                for (int i = begin; i < end; i += tile) {
                    int first = shared * part / parts, last = shared * (part + 1) / parts;
                    to.tiles[to.header->tiles++] = {i, std::min(tile, end - i),
                        last * kBlockSize - 1, step.sequence[rows[begin]], first, last, part};
                }
            for (int i = begin; i < end; i++) to.shared[rows[i]] = {shared, parts, i};
            gain += saved - 10 * (end - begin);  // what the merge of a row costs
        }
        if (gain * c.kv_heads * c.head_dim >= share_from) return;
        to.header->tiles = others;
        for (int row : rows) to.shared[row] = {};
    }
    int shared_tiles() const { return std::min(kSharedTiles, 2 * kMinBlocks / c.kv_heads); }

    // Puts a step where kernels see it; what there is for decode_attend and for prefill_attend.
    struct Uploaded {
        StepArrays arrays;
        int decodes, tiles;
    };
    Uploaded upload(Step& step, int padded) {
        step.slot = turn = !turn;
        Slot& slot = slots[turn];
        int draws = std::max(padded, int(step.draws.size()));
        if (size_t(draws) > max_draws)
            fail("GPU: ", draws, " samples at a time, room for ", max_draws, "; lower --samples");
        StepArrays host(slot.host, padded, draws);
        size_t bytes = fill(host, step, padded) - slot.host;
        check(cudaMemcpyAsync(slot.device, slot.host, bytes, cudaMemcpyHostToDevice, uploads),
              "upload");
        check(cudaEventRecord(slot.uploaded, uploads), "upload");
        check(cudaStreamWaitEvent(stream, slot.uploaded), "upload");
        return {StepArrays(slot.device, padded, draws), host.header->decodes, host.header->tiles};
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

    void look_up(const StepArrays& s, int T) {
        run(embed, T, 128, 0, 1, s, c, drawn, embedding, inv_freq, x, angles);
    }

    void attend(const StepArrays& s, int layer, int T, int decodes, int tiles) {
        if (c.head_dim == 64) attend_by<64>(s, layers[layer], layer, T, decodes, tiles);
        else attend_by<128>(s, layers[layer], layer, T, decodes, tiles);
    }

    template <int HD>
    void attend_by(const StepArrays& s, const DeviceLayer& l, int layer, int T, int decodes,
                   int tiles) {
        int units = decodes * c.kv_heads;
        int parts = T > kGraphRows ? 1 : (c.qkv() / 16 + kRotateThreads - 1) / kRotateThreads;
        run(rotate<HD>, dim3(T, parts), kRotateThreads, 0, 1, s, c, layer, l.bias, l.q_norm,
            l.k_norm, angles, qkv, kv);
        if (tiles) run(prefill, dim3(c.kv_heads, tiles), kTileRows * 3, prefill_shared, 1, s, c,
                        layer, qkv, kv, shared, att);
        if (!decodes) return;
        int splits = std::clamp((kMinBlocks + units - 1) / units, 1, kMaxSplits);
        run(decode_attend<HD>, dim3(decodes, c.kv_heads, splits), kDecodeWarps * 32, 0, 1, s, c,
            layer, qkv, kv, shared, partial, tickets, att);
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
        look_up(s, T);
        for (int i = 0; i < c.layers; i++) {
            const DeviceLayer& l = layers[i];
            norm_linear<Into::values>(T, nullptr, l.attn_norm, l.qkv, c.qkv(), qkv);
            attend(s, i, T, decodes, tiles);
            add_linear(T, att, l.o, c.heads * c.head_dim);
            norm_swiglu(T, l);
            add_linear(T, h, l.down, c.intermediate);
        }
    }

    // False if shared memory does not suffice.
    bool set_up_streaming(const cudaDeviceProp& device) {
        int D = c.hidden, N = c.qkv(), F = c.intermediate, Q = c.heads * c.head_dim, L = c.layers;
        stream_blocks = std::min({device.multiProcessorCount, kStreamBlocks, (N + 7) / 8});
        stream_kernel = c.head_dim == 64 ? stream_step<64> : stream_step<128>;
        cudaFuncAttributes code;
        check(cudaFuncGetAttributes(&code, stream_kernel), "stream_step");
        stream_shared = int(device.sharedMemPerBlockOptin - code.sharedSizeBytes);
        check(cudaFuncSetAttribute(stream_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   stream_shared), "stream_step");
        if (slots_beside(kStreamRows) < 5 || kStreamRows * c.kv_heads > kMaxUnits * stream_blocks)
            return false;
        maps = {{map_weights(all.qkv, N, D, L), map_weights(all.o, D, Q, L),
                 map_weights(all.gate_up, 2 * F, D, L), map_weights(all.down, D, F, L),
                 map_weights(lm_head, c.vocab, D, 1)}, {}};  // reserve maps the pages
        size_t parts = size_t(std::max(stream_blocks, kStreamRows * c.kv_heads)) * Q / c.kv_heads;
        size_t words = kStreamRows * (D + N + Q + size_t(F));
        words_bytes = parts * sizeof(uint4) + words * 4 + kStreamRows * kStreamBlocks * 8 + 4;
        streams = {.c = c, .embedding = embedding, .inv_freq = inv_freq,
                   .attn_norms = all.attn_norm, .mlp_norms = all.mlp_norm, .q_norms = all.q_norm,
                   .k_norms = all.k_norm, .bias = all.bias, .drawn = drawn, .logits = logits};
        streams->parts = (uint4*)make<char>(words_bytes);
        streams->squares = (uint64_t*)(streams->parts + parts);
        streams->x = (unsigned*)(streams->squares + kStreamRows * kStreamBlocks);
        streams->qkv = streams->x + kStreamRows * D;
        streams->att = streams->qkv + kStreamRows * N;
        streams->h = streams->att + kStreamRows * Q;
        streams->step = streams->h + kStreamRows * F;
        return true;
    }

    // w [layers, N, K], for boxes of 8 rows.
    static CUtensorMap map_weights(const b16* w, size_t N, size_t K, size_t layers) {
        unsigned chunks = unsigned(std::min<size_t>(kPieceChunks / 2, K / 64));
        return map_tensor(w, {64, N, K / 64, layers}, {K, 64, N * K}, {64, 8, chunks, 1},
                          CU_TENSOR_MAP_SWIZZLE_128B);
    }

    // Of four dimensions, the innermost first; strides: of the others, in numbers.
    static CUtensorMap map_tensor(const b16* from, std::array<cuuint64_t, 4> sizes,
                                  std::array<cuuint64_t, 3> strides, std::array<cuuint32_t, 4> box,
                                  CUtensorMapSwizzle swizzle) {
        CUtensorMap map;
        void* encode;
        cudaDriverEntryPointQueryResult found;
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000,
                                               cudaEnableDefault, &found), "tensor map");
        for (cuuint64_t& stride : strides) stride *= sizeof(b16);
        const cuuint32_t ones[] = {1, 1, 1, 1};
        if (decltype(&cuTensorMapEncodeTiled)(encode)(
                &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, (void*)from, sizes.data(),
                strides.data(), box.data(), ones, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))
            fail("CUDA: no tensor map of ", sizes[3], " x ", sizes[2], " x ", sizes[1]);
        return map;
    }

    // Clears the words before a step for which old ones may be there: see stream.hpp.
    void ready_words(int rows) {
        if (rows <= streamed_rows && ++streamed_steps < 1 << 20) {
            streamed_rows = rows;
            return;
        }
        streamed_rows = rows, streamed_steps = 0;
        check(cudaMemsetAsync(streams->parts, 0, words_bytes, stream), "words");
    }

    // Slots of the ring of a step with so many columns.
    int slots_beside(int columns) const {
        auto floats = c.head_dim == 64 ? stream_floats<64> : stream_floats<128>;
        int taken = floats(c, columns, stream_blocks, 3) * int(sizeof(float)) + 1024;
        return std::min((stream_shared - taken) / kSlotBytes, kMaxSlots);
    }

    // A step of up to T rows, up to its logits.
    void stream_rows(const StepArrays& s, int T) {
        streams->s = s, streams->kv = kv, streams->columns = int(std::bit_ceil(unsigned(T)));
        streams->slots = slots_beside(streams->columns);
        // large layers need the memory's bandwidth, small ones words that do not queue behind it
        size_t layer = sizeof(b16) * (size_t(c.qkv() + c.heads * c.head_dim) * c.hidden +
                                      size_t(3) * c.intermediate * c.hidden);
        bool large = layer / stream_blocks > size_t(4 * streams->slots) * kSlotBytes;
        streams->in_flight = large ? 4 : 2;
        cudaLaunchAttribute all_at_once;
        all_at_once.id = cudaLaunchAttributeCooperative;
        all_at_once.val.cooperative = 1;
        cudaLaunchConfig_t config = {dim3(stream_blocks), dim3(kStreamThreads),
                                     size_t(stream_shared), stream, &all_at_once, 1};
        check(cudaLaunchKernelEx(&config, stream_kernel, maps, *streams), "stream_step");
    }

    void compute_logits(const int* rows, int count) {
        norm_linear<Into::logits>(count, rows, final_norm, lm_head, c.vocab, logits);
    }

    void draw(const DrawKey* keys, int draws, int* drawn, int* host) {
        run(draw_ids, dim3(draws * team), kDrawThreads, 0, team, keys, scratch, logits, c.vocab,
            team, drawn, host);
    }

    // A decode step of up to T rows as a graph; shares: they may attend to blocks together.
    cudaGraphExec_t capture(const StepArrays& s, int T, bool shares) {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
        if (streams && T <= kStreamRows) stream_rows(s, T);
        else forward(s, T, T, shares ? shared_tiles() : 0), compute_logits(s.logit_rows, T);
        draw(s.draws, T, drawn, slots[turn].drawn);
        check(cudaStreamEndCapture(stream, &graph), "capture");
        check(cudaGraphInstantiate(&exec, graph), "graph");
        check(cudaGraphDestroy(graph), "graph");
        return exec;
    }

    // The draws of a step that is not captured, for kGraphRows rows of logits at a time.
    // done: the logits are there.
    void sample_groups(const StepArrays& s, Step& step, bool done) {
        auto d = step.draws.begin();
        for (int begin = 0; begin < int(step.logit_rows.size()); begin += kGraphRows) {
            int count = std::min(kGraphRows, int(step.logit_rows.size()) - begin);
            auto first = d;
            vector<Penalty> penalties;
            bool scored = false;
            for (int last = -1; d != step.draws.end() && d->row < begin + count; d++) {
                scored |= d->logprobs >= 0 || d->observer;
                if (d->row != std::exchange(last, d->row)) add_penalties(*d, penalties);
            }
            if (!done) compute_logits(s.logit_rows + begin, count);
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
                if (one.logprobs < 0 && !one.observer) continue;
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
    const int ordinal;
    const bool graphs_on;
    bool turn = false;
    int team;  // blocks that work on a draw
    size_t max_draws = 0, kv_bytes = 0;
    cudaStream_t stream = nullptr, uploads = nullptr;
    cublasHandle_t blas = nullptr;
    vector<void*> owned;
    vector<Piece> pieces;  // of weights, to be copied
    DeviceLayer all;  // layers, one behind the other
    vector<DeviceLayer> layers;
    b16 *embedding, *lm_head, *normed, *qkv, *att, *gate_up, *h, *kv = nullptr;
    float *final_norm, *inv_freq, *x, *logits, *angles;
    Attended* partial;
    float* shared;  // [rows, KV, kSharedParts, G, HD + 2]
    int64_t share_from = 500 << 10;  // numbers of pages to save in a layer: one more kernel's worth
    decltype(&prefill_attend<64, 64>) prefill;
    size_t prefill_shared;
    int *drawn, *tickets;
    DrawScratch* scratch;
    Slot slots[2];
    std::map<std::tuple<int, bool, bool>, cudaGraphExec_t> graphs;  // by rows, slot, shared blocks

    std::optional<StreamArguments> streams;  // of stream_step, if it is used
    StreamMaps maps;
    decltype(&stream_step<64>) stream_kernel;
    int stream_shared, stream_blocks, streamed_rows = 0, streamed_steps = 0;
    size_t words_bytes;
};

}  // namespace cuda
