// Speed of matrix products on the CPU backend, one JSON line a measurement: the roof that training runs under.
//
//   bench-gemm [-t THREADS] [-s SECONDS] [-b BATCH] [-r PRODUCTS] [-l LAYOUT] [-q TYPE] [-p PRECISION] M K N [M K N ...]
//
// PRECISION is f32 (unless given) or bf16: operands are f32 and are rounded as they are packed. TYPE is that of the weights in nt
// and nn, f32 unless given, or q4_K, q8_0, ...: they become f32 as they are packed. PRODUCTS are computed one after another in one
// graph, each with operands of its own, as in training: the caches do not hold them all, and the threads stay awake.
//
// C[m,n] = A[m,k]*B[k,n], row-major, in the three layouts of a linear layer:
//   nt   B stored as [n,k]   MUL_MAT            y  = x W^T
//   nn   both as written     OUT_PROD, grad^T   dx = dy W
//   tn   A stored as [k,m]   OUT_PROD           dW = dy^T x

#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

static ggml_tensor * product(ggml_context * ctx, const char * layout, ggml_type type, int64_t m, int64_t k, int64_t n, int64_t batch) {
    if (strcmp(layout, "nt") == 0) {
        return ggml_mul_mat(ctx, ggml_new_tensor_3d(ctx, type, k, n, batch), ggml_new_tensor_3d(ctx, GGML_TYPE_F32, k, m, batch));
    }
    if (strcmp(layout, "nn") == 0) {
        return ggml_out_prod(ctx, ggml_new_tensor_3d(ctx, type, n, k, batch),
                             ggml_transpose(ctx, ggml_new_tensor_3d(ctx, GGML_TYPE_F32, k, m, batch)));
    }
    // as the first writer of a gradient
    ggml_tensor * c = ggml_out_prod_acc(ctx, ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n, m, batch), ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n, k, batch),
                                        ggml_new_tensor_3d(ctx, GGML_TYPE_F32, m, k, batch));
    c->flags |= GGML_TENSOR_FLAG_SET;
    return c;
}

// seconds of one product
static double measure(const char * layout, ggml_type type, ggml_prec prec, int64_t m, int64_t k, int64_t n, int64_t batch, int n_products,
                      double seconds, ggml_threadpool * pool, int n_threads) {
    const size_t     size   = sizeof(float) * batch * (size_t) (m * k + k * n + m * n) + 4096;
    ggml_init_params params = { size * n_products + ggml_graph_overhead_custom(8 * n_products, false) + 16 * 1024 * 1024, nullptr, false };
    ggml_context *   ctx    = ggml_init(params);
    ggml_cgraph *    graph  = ggml_new_graph_custom(ctx, 8 * n_products, false);

    for (int i = 0; i < n_products; i++) {
        ggml_tensor * c = product(ctx, layout, type, m, k, n, batch);
        ggml_mul_mat_set_prec(c, prec);
        ggml_build_forward_expand(graph, c);
    }
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        if (!t->view_src && t->op == GGML_OP_NONE) {
            std::vector<float> x(ggml_nelements(t));
            for (int64_t i = 0; i < ggml_nelements(t); ++i) {
                x[i] = (float) ((i * 7919) % 1021) / 1021.0f - 0.5f;
            }
            if (t->type == GGML_TYPE_F32) {
                memcpy(t->data, x.data(), ggml_nbytes(t));
            } else {
                ggml_quantize_chunk(t->type, x.data(), t->data, 0, ggml_nrows(t), t->ne[0], nullptr);
            }
        }
    }

    ggml_cplan           plan = ggml_graph_plan(graph, n_threads, pool);
    std::vector<uint8_t> work(plan.work_size);
    plan.work_data = work.data();

    double best  = 1e30;
    double total = 0.0;
    for (int i = 0; i < 3 || total < seconds; ++i) {
        const int64_t t0 = ggml_time_us();
        ggml_graph_compute(graph, &plan);
        const double t = 1e-6 * (double) (ggml_time_us() - t0);
        best           = std::min(best, t);
        total += t;
    }
    ggml_free(ctx);
    return best / n_products;
}

int main(int argc, char ** argv) {
    int                  n_threads = 1;
    int                  batch     = 1;
    int                  products  = 1;
    double               seconds   = 0.5;
    ggml_type            type      = GGML_TYPE_F32;
    std::string          precision = "f32";
    std::string          only;
    std::vector<int64_t> shape;

    for (int i = 1; i < argc; ++i) {
        const std::string arg = argv[i];
        if (arg == "-t" && i + 1 < argc) {
            n_threads = atoi(argv[++i]);
        } else if (arg == "-b" && i + 1 < argc) {
            batch = atoi(argv[++i]);
        } else if (arg == "-r" && i + 1 < argc) {
            products = atoi(argv[++i]);
        } else if (arg == "-s" && i + 1 < argc) {
            seconds = atof(argv[++i]);
        } else if (arg == "-l" && i + 1 < argc) {
            only = argv[++i];
        } else if (arg == "-p" && i + 1 < argc) {
            precision = argv[++i];
        } else if (arg == "-q" && i + 1 < argc) {
            const std::string name = argv[++i];
            int               t    = 0;
            while (t < GGML_TYPE_COUNT && (!ggml_type_name((ggml_type) t) || name != ggml_type_name((ggml_type) t))) {
                t++;
            }
            type = (ggml_type) t;
        } else {
            shape.push_back(atoll(arg.c_str()));
        }
    }
    if (shape.empty() || shape.size() % 3 != 0 || n_threads < 1 || batch < 1 || products < 1 || type == GGML_TYPE_COUNT ||
        (precision != "f32" && precision != "bf16") || *std::min_element(shape.begin(), shape.end()) < 1) {
        fprintf(stderr, "usage: %s [-t THREADS] [-s SECONDS] [-b BATCH] [-r PRODUCTS] [-l LAYOUT] [-q TYPE] [-p PRECISION] M K N [M K N ...]\n",
                argv[0]);
        return 2;
    }

    ggml_time_init();
    ggml_threadpool_params pool_params = ggml_threadpool_params_default(n_threads);
    ggml_threadpool *      pool        = ggml_threadpool_new(&pool_params);

    for (size_t i = 0; i < shape.size(); i += 3) {
        for (const char * layout : { "nt", "nn", "tn" }) {
            if (!only.empty() && only != layout) {
                continue;
            }
            const int64_t   m = shape[i], k = shape[i + 1], n = shape[i + 2];
            const ggml_prec prec = precision == "bf16" ? GGML_PREC_BF16 : GGML_PREC_F32;
            const double    t    = measure(layout, type, prec, m, k, n, batch, products, seconds, pool, n_threads);
            printf(
                "{\"layout\": \"%s\", \"type\": \"%s\", \"precision\": \"%s\", \"m\": %lld, \"k\": %lld, \"n\": %lld, \"batch\": %d, \"threads\": "
                "%d, \"seconds\": %.3e, "
                "\"gflops\": %.1f}\n",
                layout, ggml_type_name(type), precision.c_str(), (long long) m, (long long) k, (long long) n, batch, n_threads, t,
                2e-9 * (double) (m * k * n * batch) / t);
            fflush(stdout);
        }
    }

    ggml_threadpool_free(pool);
    return 0;
}
