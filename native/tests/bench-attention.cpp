// Attention, forward and backward: the operation of patch 0014 against the graph of products and a softmax that it replaces, in turn.
// GFLOP/s count what is below the diagonal: 2 products forward and 5 backward, as the operation does.
//
//   bench-attention [-t THREADS] [-s SECONDS] [-p f32|bf16] [-l LAYERS] [-a] [-q] [D H K T B CAUSAL ...]
//
// -p bf16 rounds the operands of both to bf16; -l computes so many in turn, forward and then backward, as the layers of a model do: the
// operands are not in the caches then; -a runs the operation alone; -q takes q, k and v of it from one product.

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

struct options {
    int     n_threads = 1;
    int64_t n_layer   = 1;
    bool    bf16 = false, alone = false, qkv = false;
};

struct graph {
    ggml_context *       ctx;
    ggml_cgraph *        forward;
    ggml_cgraph *        both;
    ggml_cplan           plan_forward, plan_both;
    std::vector<uint8_t> memory, work;
    double               best_forward = 1e30, best_both = 1e30;

    graph(const shape & s, bool fused, const options & o, ggml_threadpool * pool) {
        ctx = ggml_init({ 16 << 20, nullptr, /*no_alloc =*/true });

        ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, s.T, s.T);
        ggml_tensor * loss = nullptr;
        forward            = ggml_new_graph_custom(ctx, 4096, false);
        for (int64_t il = 0; il < o.n_layer; ++il) {
            ggml_tensor * out = layer(s, fused, o, mask);
            ggml_build_forward_expand(forward, out);
            loss = loss ? ggml_add(ctx, loss, ggml_sum(ctx, out)) : ggml_sum(ctx, out);
        }
        ggml_set_loss(loss);
        ggml_cgraph * full = graph_of(ctx, loss);
        ggml_build_backward_expand(ctx, full, nullptr);
        place();
        for (int64_t i = 0; i < s.T * s.T; ++i) {
            ggml_get_data_f32(mask)[i] = s.causal && i % s.T > i / s.T ? -INFINITY : 0.0f;
        }
        ggml_graph_reset(full);
        compute(full, o.n_threads);
        both = ggml_new_graph_custom(ctx, 4096, false);   // without the loss and its gradient: they are not of the attention
        for (int i = 0; i < ggml_graph_n_nodes(full); ++i) {
            ggml_tensor * node = ggml_graph_node(full, i);
            if (node->op != GGML_OP_SUM && node->op != GGML_OP_REPEAT && ggml_nelements(node) > 1) {
                ggml_graph_add_node(both, node);
            }
        }
        plan_forward = ggml_graph_plan(forward, o.n_threads, pool);
        plan_both    = ggml_graph_plan(both, o.n_threads, pool);
        work.resize(std::max(plan_forward.work_size, plan_both.work_size));
        plan_forward.work_data = plan_both.work_data = work.data();
    }

    ~graph() { ggml_free(ctx); }

    // tensors start with a cache line, as those of a backend do
    void place() {
        const size_t line = 64;
        for (const bool assign : { false, true }) {
            size_t at = assign ? (line - (uintptr_t) memory.data() % line) % line : 0;
            for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
                if (t->view_src) {
                    t->data = assign ? (uint8_t *) t->view_src->data + t->view_offs : nullptr;
                    continue;
                }
                t->data = assign ? memory.data() + at : nullptr;
                at += GGML_PAD(ggml_nbytes(t), line);
                if (assign && t->flags & GGML_TENSOR_FLAG_PARAM) {
                    fill(t);
                }
            }
            memory.resize(assign ? memory.size() : at + line);
        }
    }

    static ggml_tensor * param(ggml_context * ctx, int64_t D, int64_t N, int64_t T, int64_t B) {
        ggml_tensor * t = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, D, N, T, B);
        ggml_set_param(t);
        return t;
    }

    ggml_tensor * layer(const shape & s, bool fused, const options & o, ggml_tensor * mask) const {
        const float   scale = 1.0f / std::sqrt((float) s.D);
        ggml_tensor * out;
        if (fused && o.qkv) {
            out = ggml_attn_qkv(ctx, param(ctx, s.D, s.H + 2 * s.K, s.T, s.B), s.K, scale, s.causal);
            ggml_attn_set_bf16(out, o.bf16);
            return out;
        }
        ggml_tensor * q = param(ctx, s.D, s.H, s.T, s.B);
        ggml_tensor * k = param(ctx, s.D, s.K, s.T, s.B);
        ggml_tensor * v = param(ctx, s.D, s.K, s.T, s.B);
        if (fused) {
            out = ggml_attn(ctx, q, k, v, scale, s.causal);
            ggml_attn_set_bf16(out, o.bf16);
            return out;
        }
        ggml_tensor * kq = ggml_mul_mat(ctx, ggml_permute(ctx, k, 0, 2, 1, 3), ggml_permute(ctx, q, 0, 2, 1, 3));
        ggml_mul_mat_set_prec(kq, o.bf16 ? GGML_PREC_BF16 : GGML_PREC_DEFAULT);
        kq  = ggml_soft_max_ext(ctx, kq, s.causal ? mask : nullptr, scale, 0.0f);
        out = ggml_mul_mat(ctx, ggml_cont(ctx, ggml_permute(ctx, v, 1, 2, 0, 3)), kq);
        ggml_mul_mat_set_prec(out, o.bf16 ? GGML_PREC_BF16 : GGML_PREC_DEFAULT);
        return ggml_cont(ctx, ggml_permute(ctx, out, 0, 2, 1, 3));
    }

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
    options              o;
    double               seconds = 1.0;
    std::vector<int64_t> numbers;
    for (int i = 1; i < argc; ++i) {
        const std::string arg = argv[i];
        if (arg == "-t" && i + 1 < argc) {
            o.n_threads = atoi(argv[++i]);
        } else if (arg == "-s" && i + 1 < argc) {
            seconds = atof(argv[++i]);
        } else if (arg == "-p" && i + 1 < argc) {
            o.bf16 = std::string(argv[++i]) == "bf16";
        } else if (arg == "-l" && i + 1 < argc) {
            o.n_layer = atoll(argv[++i]);
        } else if (arg == "-a") {
            o.alone = true;
        } else if (arg == "-q") {
            o.qkv = true;
        } else {
            numbers.push_back(atoll(arg.c_str()));
        }
    }
    std::vector<shape> shapes;
    for (size_t i = 0; i + 6 <= numbers.size(); i += 6) {
        shapes.push_back({ numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3], numbers[i + 4], numbers[i + 5] });
    }
    if (numbers.size() % 6 != 0 || o.n_threads < 1 || o.n_layer < 1) {
        fprintf(stderr, "usage: %s [-t THREADS] [-s SECONDS] [-p f32|bf16] [-l LAYERS] [-a] [-q] [D H K T B CAUSAL ...]\n", argv[0]);
        return 2;
    }

    ggml_time_init();
    ggml_cpu_init();
    ggml_threadpool_params params = ggml_threadpool_params_default(o.n_threads);
    ggml_threadpool *      pool   = ggml_threadpool_new(&params);
    for (const shape & s : shapes.empty() ? SHAPES : shapes) {
        graph                  fused(s, true, o, pool);
        std::unique_ptr<graph> unfused;
        if (!o.alone) {
            unfused = std::make_unique<graph>(s, false, o, pool);
        }
        double total = 0.0;
        for (int i = 0; i < 3 || total < seconds; ++i) {
            total += fused.run() + (unfused ? unfused->run() : 0.0);
        }
        const double flops =
            2.0 * (double) (o.n_layer * s.D * s.H * s.B) * (s.causal ? 0.5 * (double) s.T * (double) (s.T + 1) : (double) (s.T * s.T));
        printf(
            "{\"D\": %lld, \"H\": %lld, \"K\": %lld, \"T\": %lld, \"B\": %lld, \"causal\": %lld, \"dtype\": \"%s\", \"threads\": %d, "
            "\"forward_ms\": %.3f, \"both_ms\": %.3f, \"gflops\": %.1f",
            (long long) s.D, (long long) s.H, (long long) s.K, (long long) s.T, (long long) s.B, (long long) s.causal, o.bf16 ? "bf16" : "f32",
            o.n_threads, 1e3 * fused.best_forward, 1e3 * fused.best_both, 1e-9 * 7 * flops / fused.best_both);
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
