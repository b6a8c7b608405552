// defines: conversions of ggml-cuda's convert.cuh, by ggml's own for the CPU
#pragma once

#include "common.cuh"

template <typename T> using to_t_cuda_t    = void (*)(const void * x, T * y, int64_t k, cudaStream_t stream);
template <typename T> using to_t_nc_cuda_t = void (*)(const void * x, T * y, int64_t ne00, int64_t ne01, int64_t ne02, int64_t ne03, int64_t s01,
                                                      int64_t s02, int64_t s03, cudaStream_t stream);

// of F32, in which kernels compute
template <typename T> inline T ggml_cuda_cast(float x) {
    if constexpr (std::is_same_v<T, nv_bfloat16>) {
        return { ggml_fp32_to_bf16(x) };
    } else {
        return x;
    }
}

// nullptr where ggml-cuda has none
to_t_cuda_t<float>          ggml_get_to_fp32_cuda(ggml_type type);
to_t_cuda_t<nv_bfloat16>    ggml_get_to_bf16_cuda(ggml_type type);
to_t_nc_cuda_t<float>       ggml_get_to_fp32_nc_cuda(ggml_type type);
to_t_nc_cuda_t<nv_bfloat16> ggml_get_to_bf16_nc_cuda(ggml_type type);
