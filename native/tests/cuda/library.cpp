// What the emulated common.cuh and convert.cuh declare: products and conversions.
#include "convert.cuh"

#include <vector>

// --- products -------------------------------------------------------------------------------------------------------

static double element(const void * x, cudaDataType_t type, int64_t i) {
    return type == CUDA_R_32F ? ((const float *) x)[i] : ggml_bf16_to_fp32(((const ggml_bf16_t *) x)[i]);
}

int cublasGemmEx(cublasHandle_t, cublasOperation_t opa, cublasOperation_t opb, int64_t m, int64_t n, int64_t k, const void * alpha, const void * a,
                 cudaDataType_t type_a, int64_t lda, const void * b, cudaDataType_t type_b, int64_t ldb, const void * beta, void * c,
                 cudaDataType_t type_c, int64_t ldc, cublasComputeType_t, cublasGemmAlgo_t) {
    GGML_ASSERT(type_a == type_b && type_c == CUDA_R_32F);
    GGML_ASSERT(lda >= (opa == CUBLAS_OP_N ? m : k) && ldb >= (opb == CUBLAS_OP_N ? k : n) && ldc >= m);
    for (int64_t j = 0; j < n; j++) {
        for (int64_t i = 0; i < m; i++) {
            double sum = 0;
            for (int64_t l = 0; l < k; l++) {
                sum += element(a, type_a, opa == CUBLAS_OP_N ? l * lda + i : i * lda + l) *
                       element(b, type_b, opb == CUBLAS_OP_N ? j * ldb + l : l * ldb + j);
            }
            float & at = ((float *) c)[j * ldc + i];
            // beta 0: what is there is not read
            at         = *(const float *) alpha * (float) sum + (*(const float *) beta == 0 ? 0.0f : *(const float *) beta * at);
        }
    }
    return 0;
}

static const char * offset(const void * x, cudaDataType_t type, int64_t n) {
    return (const char *) x + n * (type == CUDA_R_32F ? 4 : 2);
}

int cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t opa, cublasOperation_t opb, int64_t m, int64_t n, int64_t k,
                               const void * alpha, const void * a, cudaDataType_t type_a, int64_t lda, int64_t stride_a, const void * b,
                               cudaDataType_t type_b, int64_t ldb, int64_t stride_b, const void * beta, void * c, cudaDataType_t type_c, int64_t ldc,
                               int64_t stride_c, int64_t n_batch, cublasComputeType_t compute, cublasGemmAlgo_t algo) {
    for (int64_t i = 0; i < n_batch; i++) {
        cublasGemmEx(handle, opa, opb, m, n, k, alpha, offset(a, type_a, i * stride_a), type_a, lda, offset(b, type_b, i * stride_b), type_b, ldb,
                     beta, (float *) c + i * stride_c, type_c, ldc, compute, algo);
    }
    return 0;
}

int cublasGemmBatchedEx(cublasHandle_t handle, cublasOperation_t opa, cublasOperation_t opb, int64_t m, int64_t n, int64_t k, const void * alpha,
                        const void ** a, cudaDataType_t type_a, int64_t lda, const void ** b, cudaDataType_t type_b, int64_t ldb, const void * beta,
                        void ** c, cudaDataType_t type_c, int64_t ldc, int64_t n_batch, cublasComputeType_t compute, cublasGemmAlgo_t algo) {
    for (int64_t i = 0; i < n_batch; i++) {
        cublasGemmEx(handle, opa, opb, m, n, k, alpha, a[i], type_a, lda, b[i], type_b, ldb, beta, c[i], type_c, ldc, compute, algo);
    }
    return 0;
}

// --- conversions ----------------------------------------------------------------------------------------------------

static void store(float x, float * y) {
    *y = x;
}

static void store(float x, nv_bfloat16 * y) {
    y->x = ggml_fp32_to_bf16(x);
}

template <ggml_type type, typename T>
static void convert(const void * x, T * y, int64_t k, cudaStream_t) {
    std::vector<float> f(k);
    if (type == GGML_TYPE_F32) {
        memcpy(f.data(), x, k * sizeof(float));
    } else {
        ggml_get_type_traits(type)->to_float(x, f.data(), k);
    }
    for (int64_t i = 0; i < k; i++) {
        store(f[i], y + i);
    }
}

template <ggml_type type, typename T>
static void convert_rows(const void * x, T * y, int64_t ne00, int64_t ne01, int64_t ne02, int64_t ne03, int64_t s01, int64_t s02, int64_t s03,
                         cudaStream_t stream) {
    for (int64_t i3 = 0; i3 < ne03; i3++) {
        for (int64_t i2 = 0; i2 < ne02; i2++) {
            for (int64_t i1 = 0; i1 < ne01; i1++, y += ne00) {
                convert<type>((const char *) x + (i3 * s03 + i2 * s02 + i1 * s01) * ggml_type_size(type), y, ne00, stream);
            }
        }
    }
}

// Types of a base that stays frozen.
template <typename T>
static to_t_cuda_t<T> conversion(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F16:
            return convert<GGML_TYPE_F16, T>;
        case GGML_TYPE_BF16:
            return convert<GGML_TYPE_BF16, T>;
        case GGML_TYPE_Q4_0:
            return convert<GGML_TYPE_Q4_0, T>;
        case GGML_TYPE_Q4_1:
            return convert<GGML_TYPE_Q4_1, T>;
        case GGML_TYPE_Q5_0:
            return convert<GGML_TYPE_Q5_0, T>;
        case GGML_TYPE_Q5_1:
            return convert<GGML_TYPE_Q5_1, T>;
        case GGML_TYPE_Q8_0:
            return convert<GGML_TYPE_Q8_0, T>;
        case GGML_TYPE_Q2_K:
            return convert<GGML_TYPE_Q2_K, T>;
        case GGML_TYPE_Q3_K:
            return convert<GGML_TYPE_Q3_K, T>;
        case GGML_TYPE_Q4_K:
            return convert<GGML_TYPE_Q4_K, T>;
        case GGML_TYPE_Q5_K:
            return convert<GGML_TYPE_Q5_K, T>;
        case GGML_TYPE_Q6_K:
            return convert<GGML_TYPE_Q6_K, T>;
        default:
            return nullptr;
    }
}

to_t_cuda_t<float> ggml_get_to_fp32_cuda(ggml_type type) {
    return conversion<float>(type);
}

to_t_cuda_t<nv_bfloat16> ggml_get_to_bf16_cuda(ggml_type type) {
    return type == GGML_TYPE_F32 ? convert<GGML_TYPE_F32, nv_bfloat16> : conversion<nv_bfloat16>(type);
}

to_t_nc_cuda_t<float> ggml_get_to_fp32_nc_cuda(ggml_type) {
    return nullptr;
}

to_t_nc_cuda_t<nv_bfloat16> ggml_get_to_bf16_nc_cuda(ggml_type type) {
    return type == GGML_TYPE_F32 ? convert_rows<GGML_TYPE_F32, nv_bfloat16> : nullptr;
}
