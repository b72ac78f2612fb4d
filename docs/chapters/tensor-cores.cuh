// tensor-cores.cuh: what the GPU chapters share: products on tensor cores (mma.sync from Ampere on,
// wgmma on Hopper), barriers and copies in shared memory, and the merge of parts of an attention.
//
// The tensor cores' unit is the 8x8 matrix of bf16, one row of 16 bytes. That is how pages of keys
// and values lie in the cache when these chapters are there (matrix_pages): [2, HD / 8, 8 tokens, 8
// components]. So the cores take them as they lie, and one copy brings a page into shared memory.
//
//       components  0..7   8..15  ...          each of these is 8 tokens by 8 components,
//   tokens  0..7   [ 8x8 ][ 8x8 ] ...          128 bytes in a row
//   tokens  8..15  [ 8x8 ][ 8x8 ] ...
#pragma once

namespace cuda {

constexpr int kMaxGroup = 8;  // query heads of a kv head that the chapters on attention take

inline PageLayout matrix_pages(int head_dim) { return {8, 8 * head_dim, 1, 64}; }

// Whether kernels here run as Hopper's own code; it may be older code, compiled from PTX.
inline bool runs_hopper_code(const void* kernel) {
    cudaFuncAttributes code;
    check(cudaFuncGetAttributes(&code, kernel), "no code for this GPU in here");
    return code.ptxVersion >= 90;
}

__device__ float sum_of_warp(float v) {
    for (int n = 16; n; n /= 2) v += __shfl_xor_sync(~0u, v, n);
    return v;
}

__device__ unsigned pack(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *(unsigned*)&both;
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

__device__ unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

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
    int lane = threadIdx.x % 32, bytes = kPage * sizeof(bf16);
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
        const bf16* from = page(j);
        for (int i = threadIdx.x % 32 * 8; i < kPage; i += 256)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                             to + unsigned(sizeof(bf16)) * (j * kPage + i)), "l"(from + i));
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
__device__ uint4 load_matrices(const bf16* shared) {  // that lie one after the other
    return ldmatrix<kTransposed>(shared_address(shared + threadIdx.x % 32 * 8));
}

// sum [64, N] = (with add: +=) a [64, 16] b [16, N] by the four warps of a warpgroup (Hopper): a in
// registers, 16 rows a warp, as for mma; b in shared memory, made of 8x8 matrices along_k and
// along_n bytes apart, in which neighbours follow k, or n if kTransposed. The sums are there when
// wgmma_wait returns.
template <int N, bool kTransposed>
__device__ void wgmma(float (*sum)[4], const unsigned a[4], const bf16* shared, int along_k,
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

}  // namespace cuda
