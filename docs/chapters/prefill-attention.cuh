// prefill-attention.cuh: attention of prompts on tensor cores. Replaces attend_prompts of
// CudaDevice.
//
// In a prompt many queries see the same keys, so arithmetic is the limit, and tensor cores do it 16
// times as fast as the plain op. The order of work is FlashAttention-3's (Shah et al. 2024):
//
//   copy warp    K0 V0 K1 V1 K2 ...          two tiles ahead, whole pages, by the copy engine
//   warpgroup 0  S0 | softmax | S1, += P0 V0 | softmax | S2, += P1 V1 | ...
//   warpgroup 1     S0 | softmax | S1, += P0 V0 | softmax | ...      one's exponentials beside the
//                                                                    other's products
#pragma once

#include "decode-attention.cuh"

namespace cuda {

constexpr int kTileRows = 128;  // (token, query head) pairs of a tile

__device__ float exp2_fast(float x) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

// p [16, keys of a tile] += q k^T, or = ; ks: the keys' pages
template <int HD, int kKeys>
__device__ void score(float (&p)[kKeys / 8][4], const unsigned (&q)[HD / 16][4], const bf16* ks) {
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
                           const bf16* vs) {
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
__device__ void fetch_tiles(int tiles, auto page, bf16* shared, Barrier (*full)[2],
                            Barrier (*empty)[2]) {
    constexpr int kPages = kKeys / kBlockSize;
    for (int j = 0; j < tiles; j++)
        for (int kind = 0; kind < 2; kind++) {
            empty[kind][j % 2].wait(j / 2 % 2 ^ 1);
            auto of_tile = [&](int i) { return page(j * kPages + i, kind); };
            bf16* to = shared + (2 * kind + j % 2) * kKeys * HD;
            fetch_pages<kBlockSize * HD>(kPages, of_tile, shared_address(to),
                                         shared_address(&full[kind][j % 2]));
        }
}

// Loads a query as half r of the A of products.
template <int HD>
__device__ void load_row(const bf16* from, unsigned (&q)[HD / 16][4], int r) {
    from += 2 * (threadIdx.x % 4);
    #pragma unroll
    for (int i = 0; i < HD / 16; i++) {
        q[i][r] = *(const unsigned*)(from + 16 * i);
        q[i][r + 2] = *(const unsigned*)(from + 16 * i + 8);
    }
}

// Makes what was summed up fit to a new largest score.
template <int HD>
__device__ void rescale(float (&o)[HD / 8][4], const Rows& rows) {
    #pragma unroll
    for (int i = 0; i < HD / 8; i++)
        #pragma unroll
        for (int e = 0; e < 4; e++) o[i][e] *= rows.factor[e / 2];
}

// Store half r of o, a row: as a part of an attention, or done.
template <int HD>
__device__ void store_part(const float (&o)[HD / 8][4], int r, float top, float sum, float* to) {
    const int t = threadIdx.x % 4;
    #pragma unroll
    for (int i = 0; i < HD / 8; i++)
        *(float2*)(to + 8 * i + 2 * t) = {o[i][2 * r], o[i][2 * r + 1]};
    if (t == 0) to[HD] = top, to[HD + 1] = sum;
}
template <int HD>
__device__ void store_row(const float (&o)[HD / 8][4], int r, float sum, bf16* to) {
    const int t = threadIdx.x % 4;
    #pragma unroll
    for (int i = 0; i < HD / 8; i++)
        *(unsigned*)(to + 8 * i + 2 * t) = pack(o[i][2 * r] / sum, o[i][2 * r + 1] / sum);
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
prefill_attend(StepArrays s, Shape c, int layer, const bf16* qkv, const bf16* kv,
               const int* grouped, float* prefix_results, bf16* att) {
    extern __shared__ __align__(128) bf16 shared[];  // keys [2, kKeys, HD], values [2, kKeys, HD]
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
    auto tile = s.prompts[blockIdx.y];
    const int head = blockIdx.x, G = c.heads / c.kv_heads, first_key = tile.first * kBlockSize;
    const int tiles = ((tile.last - tile.first) * kBlockSize + kKeys - 1) / kKeys;
    const bool shares = tile.part >= 0;
    if (warp >= kWarps) {
        registers<24, false>();
        const int* table = s.tables + tile.sequence * s.header->table_width;
        auto page = [&](int i, int kind) {
            int block = table[min(tile.first + i, tile.last - 1)];
            return kv + c.key_page(block, layer, head) + kind * c.value_offset();
        };
        if (warp == kWarps) fetch_tiles<HD, kKeys>(tiles, page, shared, full, empty);
        return;
    }
    registers<240, true>();

    int position[2];
    unsigned q[HD / 16][4];
    #pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = warp * 16 + g + 8 * r, token = min(row / G, tile.rows - 1);
        position[r] = tile.position + (shares ? 0 : token);
        token = shares ? grouped[tile.row + token] : tile.row + token;
        load_row<HD>(qkv + size_t(token) * c.qkv_dim() + (head * G + row % G) * HD, q, r);
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
        rescale<HD>(o, rows);
        pack_scores<kKeys>(p, a);
    }
    begin_values(tiles - 1);
    wgmma_wait<0>(o);
    #pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = warp * 16 + g + 8 * r, token = row / G;
        float total = rows.sum[2 * r] + rows.sum[2 * r + 1];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        if (token >= tile.rows || row >= kTileRows / G * G) continue;
        if (shares) store_part<HD>(o, r, rows.top[r] * scale, total,
                                   prefix_part(prefix_results, c, tile.row + token, head,
                                               tile.part) + row % G * (HD + 2));
        else store_row<HD>(o, r, total, att + (size_t(tile.row + token) * c.heads + head * G +
                                               row % G) * HD);
    }
}

template <class Base>
class PrefillAttention : public Base {
public:
    PrefillAttention(const Model& m, const DeviceOptions& o, PageLayout keys, PageLayout values)
        : Base(m, o, keys, values),
          prefill_attention(this->switched_on("prefill-attention", Base::not_for(this->c),
                                              {"attend prompts"}, "")) {
        if (!prefill_attention) return;
        const bool hopper = runs_hopper_code((const void*)prefill_attend<64, 128>);
        kernel = this->c.head_dim == 64
            ? hopper ? prefill_attend<64, 128> : prefill_attend<64, 64>
            : hopper ? prefill_attend<128, 128> : prefill_attend<128, 64>;
        shared_bytes = 4 * (hopper ? 128 : 64) * this->c.head_dim * sizeof(bf16);
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   int(shared_bytes)), "prefill_attend");
    }

protected:
    void attend_prompts(const StepArrays& s, int layer) override {
        if (!prefill_attention) return Base::attend_prompts(s, layer);
        this->start(kernel, dim3(this->c.kv_heads, s.tiles), kTileRows * 3, shared_bytes, 1, s,
                    this->c, layer, this->qkv, this->kv, grouped, this->prefix_results, this->att);
    }
    int tile_rows() const override {
        return prefill_attention ? kTileRows / this->c.group() : Base::tile_rows();
    }

    const bool prefill_attention;  // switched on
    const int* grouped = nullptr;  // [T]: the rows of tiles that have a part (shared-prefix.cuh)

private:
    decltype(&prefill_attend<64, 64>) kernel;
    size_t shared_bytes;
};

}  // namespace cuda
