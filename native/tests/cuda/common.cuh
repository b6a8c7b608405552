// defines: what ggml-cuda's own common.cuh gives to the sources of its operations of training, for a CPU. CMake compiles copies of those
// sources beside this file instead of that one: see native/tests/devices/cuda-on-cpu.cpp.
#pragma once

#include "ggml-impl.h"
#include "threads.h"

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <map>
#include <tuple>
#include <type_traits>
#include <utility>

// --- the language ---------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__      static   // blocks run one after the other

#define threadIdx cuda_threads::thread
#define blockIdx  cuda_threads::block
#define blockDim  cuda_threads::block_dim
#define gridDim   cuda_threads::grid_dim

#define WARP_SIZE 32

struct alignas(8) float2 {
    float x, y;
};

inline float2 make_float2(float x, float y) {
    return { x, y };
}

struct dim3 : cuda_threads::index3 {
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : index3{ x, y, z } {}
};

inline void __syncthreads() {
    cuda_threads::meet_block(false);
}

inline void __syncwarp() {
    cuda_threads::meet_warp(cuda_threads::WARP_BARRIER, 0, 0);
}

inline int __syncthreads_or(int value) {
    return cuda_threads::meet_block(value != 0);
}

inline float __shfl_xor_sync(unsigned, float value, int lane_mask, int = WARP_SIZE) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    const unsigned lane = (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % WARP_SIZE;
    bits                = (uint32_t) cuda_threads::meet_warp(cuda_threads::SHUFFLE, bits, lane ^ lane_mask);
    memcpy(&value, &bits, sizeof(value));
    return value;
}

inline uint32_t __ballot_sync(unsigned, int value) {
    return cuda_threads::ballot_warp(value != 0);
}

inline int __popc(uint32_t x) {
    return __builtin_popcount(x);
}

inline int min(int a, int b) {
    return a < b ? a : b;
}

inline float rsqrtf(float x) {
    return 1.0f / sqrtf(x);
}

// as ggml-cuda's
template <int width = WARP_SIZE> inline float warp_reduce_sum(float x) {
    for (int offset = width / 2; offset > 0; offset >>= 1) {
        x += __shfl_xor_sync(0xffffffff, x, offset, width);
    }
    return x;
}

template <int width = WARP_SIZE> inline float2 warp_reduce_sum(float2 a) {
    for (int offset = width / 2; offset > 0; offset >>= 1) {
        a.x += __shfl_xor_sync(0xffffffff, a.x, offset, width);
        a.y += __shfl_xor_sync(0xffffffff, a.y, offset, width);
    }
    return a;
}

// --- the library ----------------------------------------------------------------------------------------------------

typedef int cudaStream_t;

#define CUDA_CHECK(call)   (call)
#define CUBLAS_CHECK(call) (call)

inline int cudaMemsetAsync(void * data, int value, size_t n, cudaStream_t) {
    memset(data, value, n);
    return 0;
}

inline void ggml_cuda_pdl_sync() {}

struct ggml_cuda_kernel_launch_params {
    dim3         block_nums, block_dims;
    size_t       shmem;
    cudaStream_t stream;

    ggml_cuda_kernel_launch_params(dim3 nums, dim3 dims, size_t shmem, cudaStream_t stream) : block_nums(nums), block_dims(dims), shmem(shmem), stream(stream) {}
};

// A kernel has 48 KiB of its launch's shared memory, or what was asked for.
inline size_t & shared_memory_limit(const void * kernel) {
    static std::map<const void *, size_t> limits;
    return limits[kernel];
}

#define CUDA_SET_SHARED_MEMORY_LIMIT(kernel, nbytes) (shared_memory_limit((const void *) (kernel)) = (nbytes))

template <typename... Params, typename... Args>
inline void ggml_cuda_kernel_launch(void (*kernel)(Params...), const ggml_cuda_kernel_launch_params & launch, Args &&... args) {
    static_assert((sizeof(Params) + ... + 0) <= 4096, "a kernel's parameters take 4 KiB at most");
    const std::tuple<std::remove_const_t<Params>...> values(std::forward<Args>(args)...);
    GGML_ASSERT(launch.shmem <= 48 * 1024 || shared_memory_limit((const void *) kernel) >= launch.shmem);
    cuda_threads::launch(launch.block_nums, launch.block_dims, launch.shmem, [&]() { std::apply(kernel, values); });
}

struct ggml_cuda_out_of_memory : std::bad_alloc {
    const char * what() const noexcept override { return "no scratch memory"; }
};

// Memory is full of huge numbers, and what is written behind its end is seen. CUDA_ON_CPU_SCRATCH: the bytes of the largest piece that there is.
struct ggml_cuda_pool {
    static constexpr size_t        GUARD = 64;
    static constexpr unsigned char EMPTY = 0x7f;

    void * alloc(size_t size, size_t * actual) {
        const char * largest = getenv("CUDA_ON_CPU_SCRATCH");
        if (largest && size > strtoull(largest, nullptr, 10)) {
            throw ggml_cuda_out_of_memory();
        }
        char * p = (char *) malloc(size + GUARD);
        memset(p, EMPTY, size + GUARD);
        *actual = size;
        return p;
    }

    void free(void * p, size_t size) {
        for (size_t i = 0; i < GUARD; i++) {
            GGML_ASSERT(((unsigned char *) p)[size + i] == EMPTY && "written behind the end of scratch memory");
        }
        ::free(p);
    }
};

template <typename T> struct ggml_cuda_pool_alloc {
    ggml_cuda_pool & pool;
    T *              ptr         = nullptr;
    size_t           actual_size = 0;

    explicit ggml_cuda_pool_alloc(ggml_cuda_pool & pool) : pool(pool) {}
    ggml_cuda_pool_alloc(ggml_cuda_pool & pool, size_t size) : pool(pool) { alloc(size); }
    ~ggml_cuda_pool_alloc() {
        if (ptr) {
            pool.free(ptr, actual_size);
        }
    }
    ggml_cuda_pool_alloc(const ggml_cuda_pool_alloc &)             = delete;
    ggml_cuda_pool_alloc & operator=(const ggml_cuda_pool_alloc &) = delete;

    T * alloc(size_t n) { return ptr = (T *) pool.alloc(n * sizeof(T), &actual_size); }
    T * get() { return ptr; }
};

// --- cuBLAS: column-major, sums in F64 ------------------------------------------------------------------------------

struct nv_bfloat16 {
    ggml_bf16_t x;
};

enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cudaDataType_t { CUDA_R_32F, CUDA_R_16BF };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F };
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT };
typedef int cublasHandle_t;

inline int cublasSetStream(cublasHandle_t, cudaStream_t) {
    return 0;
}

// 0, or what cuBLAS refuses
int cublasGemmEx(cublasHandle_t, cublasOperation_t opa, cublasOperation_t opb, int64_t m, int64_t n, int64_t k, const void * alpha, const void * a,
                 cudaDataType_t type_a, int64_t lda, const void * b, cudaDataType_t type_b, int64_t ldb, const void * beta, void * c, cudaDataType_t type_c,
                 int64_t ldc, cublasComputeType_t, cublasGemmAlgo_t);
int cublasGemmStridedBatchedEx(cublasHandle_t, cublasOperation_t opa, cublasOperation_t opb, int64_t m, int64_t n, int64_t k, const void * alpha,
                               const void * a, cudaDataType_t type_a, int64_t lda, int64_t stride_a, const void * b, cudaDataType_t type_b, int64_t ldb,
                               int64_t stride_b, const void * beta, void * c, cudaDataType_t type_c, int64_t ldc, int64_t stride_c, int64_t n_batch,
                               cublasComputeType_t, cublasGemmAlgo_t);
int cublasGemmBatchedEx(cublasHandle_t, cublasOperation_t opa, cublasOperation_t opb, int64_t m, int64_t n, int64_t k, const void * alpha,
                        const void ** a, cudaDataType_t type_a, int64_t lda, const void ** b, cudaDataType_t type_b, int64_t ldb, const void * beta,
                        void ** c, cudaDataType_t type_c, int64_t ldc, int64_t n_batch, cublasComputeType_t, cublasGemmAlgo_t);

// --- ggml-cuda ------------------------------------------------------------------------------------------------------

struct ggml_cuda_device_info {
    struct cuda_device_info {
        int    cc;
        size_t smpbo;
    };
    cuda_device_info devices[1];
};

inline const ggml_cuda_device_info & ggml_cuda_info() {
    static const ggml_cuda_device_info info = { { { 900, 227 * 1024 } } };
    return info;
}

inline bool ampere_mma_available(int cc) {
    return cc >= 800;
}

struct ggml_backend_cuda_context {
    ggml_cuda_pool scratch;

    ggml_cuda_pool & pool() { return scratch; }
    cudaStream_t     stream() { return 0; }
    cublasHandle_t   cublas_handle() { return 0; }
};
