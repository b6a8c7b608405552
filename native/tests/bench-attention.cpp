// Attention, forward and backward: the operation of patch 0014 against the graph of products and a softmax that it replaces, in turn.
// GFLOP/s count what is below the diagonal: 2 products forward and 5 backward, as the operation does.
//
//   bench-attention [-t THREADS] [-s SECONDS] [-p f32|bf16] [-a] [D H K T B CAUSAL ...]
//
// -p bf16 rounds the operands of both to bf16; -a runs the operation alone.

#include "ops.h"

#include <ctime>
#include <memory>

struct shape {
    int64_t D, H, K, T, B, causal;
};

static const std::vector<shape> SHAPES = {
    { 32, 8, 4, 256, 8, 1 },   { 64, 8, 4, 512, 4, 1 }, { 64, 8, 4, 2048, 1, 1 }, { 64, 9, 3, 256, 1, 1 },
    { 64, 12, 12, 256, 1, 1 }, { 64, 3, 3, 197, 8, 0 }, { 32, 4, 4, 64, 12, 1 },  { 16, 4, 4, 64, 4, 1 },
};

struct graph {
    ggml_context *       ctx;
    ggml_cgraph *        forward;
    ggml_cgraph *        both;
    ggml_cplan           plan_forward, plan_both;
    std::vector<uint8_t> work;
    double               best_forward = 1e30, best_both = 1e30;

    graph(const shape & s, bool fused, bool bf16, ggml_threadpool * pool, int n_threads) {
        const size_t scores = (size_t) s.T * s.T * s.H * s.B * sizeof(float);
        const size_t rows   = (size_t) s.D * s.H * s.T * s.B * sizeof(float);
        ctx                 = ggml_init({ 40 * rows + (fused ? 0 : 10 * scores) + (16 << 20), nullptr, false });

        ggml_tensor *q = new_f32(ctx, { s.D, s.H, s.T, s.B }), *k = new_f32(ctx, { s.D, s.K, s.T, s.B }), *v = new_f32(ctx, { s.D, s.K, s.T, s.B });
        for (ggml_tensor * p : { q, k, v }) {
            ggml_set_param(p);
        }
        const float   scale = 1.0f / std::sqrt((float) s.D);
        ggml_tensor * out;
        if (fused) {
            out = ggml_attn(ctx, q, k, v, scale, s.causal);
            ggml_attn_set_bf16(out, bf16);
        } else {
            ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, s.T, s.T);
            for (int64_t i = 0; i < s.T * s.T; ++i) {
                ggml_get_data_f32(mask)[i] = s.causal && i % s.T > i / s.T ? -INFINITY : 0.0f;
            }
            ggml_tensor * kq = ggml_mul_mat(ctx, ggml_permute(ctx, k, 0, 2, 1, 3), ggml_permute(ctx, q, 0, 2, 1, 3));
            ggml_mul_mat_set_prec(kq, bf16 ? GGML_PREC_BF16 : GGML_PREC_DEFAULT);
            kq  = ggml_soft_max_ext(ctx, kq, s.causal ? mask : nullptr, scale, 0.0f);
            out = ggml_mul_mat(ctx, ggml_cont(ctx, ggml_permute(ctx, v, 1, 2, 0, 3)), kq);
            ggml_mul_mat_set_prec(out, bf16 ? GGML_PREC_BF16 : GGML_PREC_DEFAULT);
            out = ggml_cont(ctx, ggml_permute(ctx, out, 0, 2, 1, 3));
        }
        ggml_tensor * loss = ggml_sum(ctx, out);
        ggml_set_loss(loss);
        forward            = graph_of(ctx, out);
        ggml_cgraph * full = graph_of(ctx, loss);
        ggml_build_backward_expand(ctx, full, nullptr);
        ggml_graph_reset(full);
        compute(full, n_threads);
        both = ggml_new_graph_custom(ctx, 4096, false);   // without the loss and its gradient: they are not of the attention
        for (int i = 0; i < ggml_graph_n_nodes(full); ++i) {
            ggml_tensor * node = ggml_graph_node(full, i);
            if (node->op != GGML_OP_SUM && node->op != GGML_OP_REPEAT) {
                ggml_graph_add_node(both, node);
            }
        }
        plan_forward = ggml_graph_plan(forward, n_threads, pool);
        plan_both    = ggml_graph_plan(both, n_threads, pool);
        work.resize(std::max(plan_forward.work_size, plan_both.work_size));
        plan_forward.work_data = plan_both.work_data = work.data();
    }

    ~graph() { ggml_free(ctx); }

    // of one thread the processor's time, so that what else runs on the machine matters less
    static double now(int n_threads) { return n_threads == 1 ? (double) std::clock() / CLOCKS_PER_SEC : 1e-6 * (double) ggml_time_us(); }

    static double time(ggml_cgraph * g, ggml_cplan * plan, double & best) {
        const double t0 = now(plan->n_threads);
        ggml_graph_compute(g, plan);
        const double t = now(plan->n_threads) - t0;
        best           = std::min(best, t);
        return t;
    }

    double run() { return time(forward, &plan_forward, best_forward) + time(both, &plan_both, best_both); }
};

int main(int argc, char ** argv) {
    int                  n_threads = 1;
    double               seconds   = 1.0;
    bool                 bf16 = false, alone = false;
    std::vector<int64_t> numbers;
    for (int i = 1; i < argc; ++i) {
        const std::string arg = argv[i];
        if (arg == "-t" && i + 1 < argc) {
            n_threads = atoi(argv[++i]);
        } else if (arg == "-s" && i + 1 < argc) {
            seconds = atof(argv[++i]);
        } else if (arg == "-p" && i + 1 < argc) {
            bf16 = std::string(argv[++i]) == "bf16";
        } else if (arg == "-a") {
            alone = true;
        } else {
            numbers.push_back(atoll(arg.c_str()));
        }
    }
    std::vector<shape> shapes;
    for (size_t i = 0; i + 6 <= numbers.size(); i += 6) {
        shapes.push_back({ numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3], numbers[i + 4], numbers[i + 5] });
    }
    if (numbers.size() % 6 != 0 || n_threads < 1) {
        fprintf(stderr, "usage: %s [-t THREADS] [-s SECONDS] [-p f32|bf16] [-a] [D H K T B CAUSAL ...]\n", argv[0]);
        return 2;
    }

    ggml_time_init();
    ggml_cpu_init();
    ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
    ggml_threadpool *      pool   = ggml_threadpool_new(&params);
    for (const shape & s : shapes.empty() ? SHAPES : shapes) {
        graph                  fused(s, true, bf16, pool, n_threads);
        std::unique_ptr<graph> unfused;
        if (!alone) {
            unfused = std::make_unique<graph>(s, false, bf16, pool, n_threads);
        }
        double total = 0.0;
        for (int i = 0; i < 3 || total < seconds; ++i) {
            total += fused.run() + (unfused ? unfused->run() : 0.0);
        }
        const double flops = 2.0 * (double) (s.D * s.H * s.B) * (s.causal ? 0.5 * (double) s.T * (double) (s.T + 1) : (double) (s.T * s.T));
        printf(
            "{\"D\": %lld, \"H\": %lld, \"K\": %lld, \"T\": %lld, \"B\": %lld, \"causal\": %lld, \"dtype\": \"%s\", \"threads\": %d, "
            "\"forward_ms\": %.3f, \"both_ms\": %.3f, \"gflops\": %.1f",
            (long long) s.D, (long long) s.H, (long long) s.K, (long long) s.T, (long long) s.B, (long long) s.causal, bf16 ? "bf16" : "f32",
            n_threads, 1e3 * fused.best_forward, 1e3 * fused.best_both, 1e-9 * 7 * flops / fused.best_both);
        if (unfused) {
            printf(", \"unfused_forward_ms\": %.3f, \"unfused_both_ms\": %.3f, \"ratio\": %.2f", 1e3 * unfused->best_forward,
                   1e3 * unfused->best_both, unfused->best_both / fused.best_both);
        }
        printf("}\n");
        fflush(stdout);
    }
    ggml_threadpool_free(pool);
    return 0;
}
