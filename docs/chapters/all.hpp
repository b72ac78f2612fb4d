// all.hpp: the chapters, stacked on the devices of nano.cu. Each is a class over the one below it.
// The order is that of the course (README.md), and what comes later has the first say.
#pragma once

#include "cpu-vectors.hpp"
#ifdef __CUDACC__
#include "few-rows.cuh"
#include "decode-attention.cuh"
#include "prefill-attention.cuh"
#include "shared-prefix.cuh"
#include "fast-draw.cuh"
#include "stream.cuh"
#endif

// How pages lie is fixed by the stack, whatever of it is switched off.
inline std::unique_ptr<Device> make_full_cpu(const Model& m, const DeviceOptions& o) {
    using Full = CpuVectors<CpuDevice>;
    const PageLayout values = PageLayout::by_token(m.config.head_dim);
    return std::make_unique<Full>(m, o, Full::keys_transposed(), values);
}

#ifdef __CUDACC__
inline std::unique_ptr<Device> make_full_cuda(const Model& m, const DeviceOptions& o) {
    using namespace cuda;
    using Attention = SharedPrefix<PrefillAttention<DecodeAttention<FewRows<CudaDevice>>>>;
    const PageLayout pages = matrix_pages(m.config.head_dim);
    return std::make_unique<Stream<FastDraw<Attention>>>(m, o, pages, pages);
}
#endif

inline const bool chapters_are_there = [] {
    devices.cpu = make_full_cpu;
#ifdef __CUDACC__
    devices.cuda = make_full_cuda;
#endif
    return true;
}();
