// defines: the instructions of ggml-cuda's attn-ptx.cuh, lane by lane as the PTX ISA lays their fragments out
#pragma once

#include "common.cuh"

inline char * ggml_cuda_launch_shared_memory() {
    return cuda_threads::shared_memory();
}

inline uint32_t ggml_cuda_pack_bf16(float low, float high) {
    return ggml_fp32_to_bf16(low).bits | (uint32_t) ggml_fp32_to_bf16(high).bits << 16;
}

inline float ggml_cuda_exp2_approx(float x) {
    return exp2f(x);
}

inline unsigned lane_of_thread() {
    return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % WARP_SIZE;
}

inline float bf16_half(uint32_t pair, unsigned high) {
    return ggml_bf16_to_fp32({ (uint16_t) (pair >> 16 * high) });
}

// mma.sync.m16n8k16: each lane has come with a[0..3], b0, b1
inline void ggml_cuda_mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t      mine[6] = { a[0], a[1], a[2], a[3], b0, b1 };
    cuda_threads::lanes all;
    cuda_threads::meet_warp(cuda_threads::PRODUCT, mine, 6, all);
    const auto element_a = [&](unsigned row, unsigned k) {   // of 16 x 16
        const unsigned lane = row % 8 * 4 + k % 8 / 2, reg = row / 8 + k / 8 * 2;
        return bf16_half(all.x[lane][reg], k % 2);
    };
    const auto element_b = [&](unsigned k, unsigned col) {   // of 16 x 8
        const unsigned lane = col * 4 + k % 8 / 2, reg = 4 + k / 8;
        return bf16_half(all.x[lane][reg], k % 2);
    };
    const unsigned lane = lane_of_thread();
    for (unsigned i = 0; i < 4; i++) {
        const unsigned row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
        double         sum = 0;
        for (unsigned k = 0; k < 16; k++) {
            sum += element_a(row, k) * element_b(k, col);   // exact in f32
        }
        d[i] += (float) sum;
    }
}

inline void load_matrices(uint32_t (&r)[4], const void * row, bool transposed) {
    GGML_ASSERT((uintptr_t) row % 16 == 0 && cuda_threads::is_shared(row, 16));
    const uint32_t      mine[2] = { (uint32_t) (uintptr_t) row, (uint32_t) ((uint64_t) (uintptr_t) row >> 32) };
    cuda_threads::lanes all;
    cuda_threads::meet_warp(cuda_threads::MATRIX, mine, 2, all);
    const auto element = [&](unsigned matrix, unsigned i, unsigned j) {
        const uint32_t * address = all.x[8 * matrix + i];
        return ((const uint16_t *) (uintptr_t) (address[0] | (uint64_t) address[1] << 32))[j];
    };
    const unsigned g = lane_of_thread() / 4, t = lane_of_thread() % 4;
    for (unsigned m = 0; m < 4; m++) {
        r[m] = transposed ? element(m, 2 * t, g) | (uint32_t) element(m, 2 * t + 1, g) << 16
                          : element(m, g, 2 * t) | (uint32_t) element(m, g, 2 * t + 1) << 16;
    }
}

inline void ggml_cuda_ldmatrix_x4(uint32_t (&r)[4], const void * row) {
    load_matrices(r, row, false);
}

inline void ggml_cuda_ldmatrix_x4_trans(uint32_t (&r)[4], const void * row) {
    load_matrices(r, row, true);
}

inline void ggml_cuda_copy_async_16(void * dst, const void * src) {
    cuda_threads::copy_later(dst, src);
}

inline void ggml_cuda_copy_async_wait() {
    cuda_threads::wait_for_copies();
}
