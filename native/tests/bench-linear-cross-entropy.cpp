// Time and memory of the fused head against the graph whose logits exist, in turn: bench-linear-cross-entropy [threads] [rounds]

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ops.h"

#include <chrono>
#include <cstdlib>
#include <ctime>

struct shape {
    const char * name;
    int64_t      n_embd, n_vocab, n_tokens;
};

// of one thread: the processor's, which says more on a busy machine
static double seconds(int n_threads) {
    return n_threads == 1 ? (double) clock() / CLOCKS_PER_SEC
                          : std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// loss, dx and dw of one head in memory of its own
struct head {
    ggml_context * ctx = ggml_init({ 64 * ggml_tensor_overhead() + ggml_graph_overhead_custom(256, true), nullptr, /*no_alloc =*/true });
    ggml_gallocr_t galloc;
    ggml_cgraph *  graph;
    size_t         n_bytes;   // what the graph and its kernels need
    double         best = INFINITY;

    head(bool fused, const shape & s, const std::vector<ggml_tensor *> & in, int n_threads) {
        ggml_tensor * x = in[0], *w = in[1], *labels = in[2], *scale = in[3], *grad = in[4], *gain = in[5], *dw = in[6], *d_gain = in[7];
        ggml_tensor * h    = ggml_mul(ctx, x, gain);
        ggml_tensor * dx   = fused ? ggml_new_tensor_2d(ctx, GGML_TYPE_F32, s.n_embd, s.n_tokens) : nullptr;
        ggml_tensor * loss = fused ? ggml_linear_cross_entropy(ctx, h, w, labels, scale, grad, dx, dw)
                                   : ggml_cross_entropy_sparse(ctx, ggml_mul_mat(ctx, w, h), labels, scale);
        ggml_set_loss(loss);
        ggml_set_output(loss);
        graph = ggml_new_graph_custom(ctx, 256, true);
        ggml_build_forward_expand(graph, loss);
        std::vector<ggml_tensor *> accs(ggml_graph_n_nodes(graph), nullptr);
        for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
            const ggml_tensor * node = ggml_graph_node(graph, i);
            accs[i]                  = node == w ? dw : node == gain ? d_gain : node == loss ? grad : nullptr;
        }
        ggml_build_backward_expand(ctx, graph, accs.data());
        galloc = ggml_gallocr_new(ggml_backend_cpu_buffer_type());
        ggml_gallocr_alloc_graph(galloc, graph);
        n_bytes = ggml_gallocr_get_buffer_size(galloc, 0) + ggml_graph_plan(graph, n_threads, nullptr).work_size;
    }

    ~head() {
        ggml_gallocr_free(galloc);
        ggml_free(ctx);
    }

    void run(int n_threads) {
        ggml_cplan           plan = ggml_graph_plan(graph, n_threads, nullptr);
        std::vector<uint8_t> work(plan.work_size);
        plan.work_data     = work.data();
        const double start = seconds(n_threads);
        ggml_graph_compute(graph, &plan);
        best = std::min(best, seconds(n_threads) - start);
    }
};

int main(int argc, char ** argv) {
    const int   n_threads = argc > 1 ? atoi(argv[1]) : 2;
    const int   n_rounds  = argc > 2 ? atoi(argv[2]) : 5;
    const shape shapes[]  = {
        { "M", 256, 4096, 2048 },
        { "L", 512, 8192, 2048 },
        { "X", 576, 49152, 256 },
        { "gpt2", 768, 50257, 256 },
    };
    ggml_cpu_init();
    printf("%-6s %28s %28s   ratio of times\n", "", "logits: ms, GFLOP/s, MiB", "fused: ms, GFLOP/s, MiB");
    for (const shape & s : shapes) {
        ggml_context * ctx = ggml_init({ 64u * 1024 * 1024 + 2 * ((size_t) s.n_embd * (s.n_vocab + s.n_tokens)) * sizeof(float), nullptr, false });
        std::vector<int32_t> ids;
        for (int64_t i = 0; i < s.n_tokens; i++) {
            ids.push_back((int32_t) ((i * 7919) % s.n_vocab));
        }
        ggml_tensor * x = new_f32(ctx, { s.n_embd, s.n_tokens });
        ggml_tensor * w = new_f32(ctx, { s.n_embd, s.n_vocab }, 0.1f);
        ggml_tensor * g = new_f32(ctx, { s.n_embd });
        ggml_set_param(w);
        ggml_set_param(g);
        const std::vector<ggml_tensor *> in = { x,
                                                w,
                                                new_i32(ctx, ids),
                                                new_scalar(ctx, 1.0f / (float) s.n_tokens),
                                                new_scalar(ctx, 1.0f),
                                                g,
                                                ggml_dup_tensor(ctx, w),
                                                ggml_dup_tensor(ctx, g) };
        memset(in[6]->data, 0, ggml_nbytes(in[6]));
        memset(in[7]->data, 0, ggml_nbytes(in[7]));
        head plain(false, s, in, n_threads), fused(true, s, in, n_threads);
        for (int i = 0; i < n_rounds; i++) {
            plain.run(n_threads);
            fused.run(n_threads);
        }
        const double flops = 6.0 * s.n_embd * s.n_vocab * s.n_tokens;
        printf("%-6s %12.1f %8.0f %6.0f %14.1f %8.0f %6.0f %16.2f\n", s.name, plain.best * 1e3, flops / plain.best / 1e9, plain.n_bytes / 1048576.0,
               fused.best * 1e3, flops / fused.best / 1e9, fused.n_bytes / 1048576.0, plain.best / fused.best);
        ggml_free(ctx);
    }
}
