// limits.hpp: what the machine itself can do, measured: the bytes that it reads from memory and the
// operations that it does in a second. bench compares the engine with it.
#pragma once

#ifdef __CUDACC__
#include <cublas_v2.h>
#include <cuda_bf16.h>
#endif

namespace bench {

struct Limits {
    double bytes, flops;  // a second
};

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

// In a buffer of 256 MiB, more than any cache.
double read_bandwidth() {
    vector<unsigned> data(64 << 20, 1);
    return best_rate([&] {
        size_t size = data.size() / omp_get_num_threads();
        const unsigned* begin = &data[size * omp_get_thread_num()];
        sink = float(std::accumulate(begin, begin + size, 0u));
        return double(size) * sizeof(unsigned);
    });
}

// Multiply-adds in registers: twelve chains of vectors, to hide that each takes some cycles.
double fma_peak() {
    typedef float f32x8 __attribute__((vector_size(32)));
    return best_rate([] {
        f32x8 sum[12], factor = f32x8{} + sink;
        for (int j = 0; j < 12; j++) sum[j] = factor * float(j);
        for (int i = 0; i < 4'000'000; i++)
            for (int j = 0; j < 12; j++) sum[j] = sum[j] * factor + factor;
        for (int j = 1; j < 12; j++) sum[0] += sum[j];
        sink = sum[0][0];
        return 4e6 * 12 * 8 * 2;
    });
}

#ifdef __CUDACC__
// Reads data [n]; writes nothing, unless a sum that can't be comes out.
__global__ void read_all(const uint4* data, size_t n, unsigned* out) {
    unsigned sum = 0;
    for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        uint4 v = data[i];
        sum += v.x + v.y + v.z + v.w;
    }
    if (sum == 0x12345678) *out = sum;
}

// The seconds of work on the GPU, the best of ten.
double best_seconds(auto work) {
    double best = INFINITY;
    for (int i = 0; i < 10; i++) {
        double start = now();
        work();
        if (cudaError_t e = cudaDeviceSynchronize()) fail("bench: ", cudaGetErrorString(e));
        best = std::min(best, now() - start);
    }
    return best;
}

// Reading 384 MiB, and the product of two matrices of 8192 x 8192 in bf16. The engine leaves that
// much memory.
Limits measure_gpu() {
    const int N = 8192;
    const size_t matrix = sizeof(__nv_bfloat16) * N * N;
    char* data;
    if (cudaMalloc(&data, 3 * matrix)) fail("bench: no GPU memory left; lower --kv-memory");
    cudaMemset(data, 0, 3 * matrix);
    double read = best_seconds([&] {
        read_all<<<2048, 512>>>((const uint4*)data, 3 * matrix / 16, (unsigned*)data);
    });
    cublasHandle_t blas;
    if (cublasCreate(&blas)) fail("bench: cuBLAS does not start");
    const float one = 1, zero = 0;
    double product = best_seconds([&] {
        cublasGemmEx(blas, CUBLAS_OP_T, CUBLAS_OP_N, N, N, N, &one, data, CUDA_R_16BF, N,
                     data + matrix, CUDA_R_16BF, N, &zero, data + 2 * matrix, CUDA_R_16BF, N,
                     CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    });
    cublasDestroy(blas);
    cudaFree(data);
    return {3 * matrix / read, 2.0 * N * N * N / product};
}
#endif

Limits measure([[maybe_unused]] const Session& s) {
#ifdef __CUDACC__
    if (s.engine.device->overlaps) return measure_gpu();
#endif
    return {read_bandwidth(), fma_peak()};
}

}  // namespace bench
