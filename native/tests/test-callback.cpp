// The callback at each node of a graph: `toy train --profile` takes its times there.

#include "ops.h"

static std::vector<const ggml_tensor *> seen;

static void on_node(const ggml_tensor * node, void * data) {
    check(data == &seen, "callback: its own data");
    seen.push_back(node);
    // all threads are done with the node: its last value is there
    if (node) {
        const float last = ((const float *) node->data)[ggml_nelements(node) - 1];
        check(last == 3.0f, "callback: the node is computed");
    }
}

static void test_node_callback() {
    for (int n_threads : { 1, 2, 3 }) {
        context           ctx;
        const std::string name = "callback, " + std::to_string(n_threads) + " threads";
        ggml_tensor *     one  = ggml_set_f32(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1000, 7), 1.0f);
        ggml_tensor *     two  = ggml_set_f32(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1000, 7), 2.0f);
        ggml_tensor *     sum  = ggml_add(ctx, one, two);
        ggml_tensor *     view = ggml_reshape_1d(ctx, sum, 7000);   // computes nothing: no call
        ggml_tensor *     same = ggml_mul(ctx, view, ggml_reshape_1d(ctx, one, 7000));
        ggml_cgraph *     g    = ggml_new_graph(ctx);
        ggml_build_forward_expand(g, same);

        const std::vector<const ggml_tensor *> want = { nullptr, sum, same };
        seen.clear();
        ggml_cpu_set_node_callback(on_node, &seen);
        compute(g, n_threads);
        ggml_cpu_set_node_callback(nullptr, nullptr);
        check(seen == want, name + ": the beginning, then each node once");
        compute(g, n_threads);
        check(seen == want, name + ": none any more");
    }
}

// nodes that are fused are one call, and nodes that need no barrier between them are one each, computed when it comes
static std::vector<float> last_values;   // of what the graph's operations write, at each call

static void test_fused_nodes() {
    for (int n_threads : { 1, 2, 3 }) {
        context           ctx;
        const std::string name  = "callback of fused nodes, " + std::to_string(n_threads) + " threads";
        ggml_tensor *     x     = ggml_set_f32(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 100, 7), 1.0f);
        ggml_tensor *     gain  = ggml_set_f32(ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 100), 5.0f);
        ggml_tensor *     norm  = ggml_rms_norm(ctx, x, 0.0f);
        ggml_tensor *     y     = ggml_mul(ctx, norm, gain);
        ggml_tensor *     hyper = new_f32(ctx, { 8 });
        const float       h[8]  = { 1.0f, 0.0f, 0.0f, 0.0f, 0.0f, 1.0f, 1.0f, 1.0f };
        memcpy(hyper->data, h, sizeof(h));
        ggml_cgraph * g = ggml_new_graph(ctx);
        ggml_set_param(gain);   // a node of its own between the two that are fused
        ggml_build_forward_expand(g, y);

        std::vector<const ggml_tensor *> want    = { nullptr, norm };
        std::vector<ggml_tensor *>       written = { y };
        for (int i = 0; i < 2; ++i) {
            ggml_tensor *w = ggml_set_f32(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1000, 7), 0.0f), *m = ggml_dup_tensor(ctx, w),
                        *v = ggml_dup_tensor(ctx, w);
            ggml_set_param(w);
            ggml_set_zero(m);
            ggml_set_zero(v);
            written.push_back(ggml_opt_step_adamw(ctx, w, ggml_set_f32(ggml_dup_tensor(ctx, w), -1.0f), m, v, hyper));
            want.push_back(written.back());
            ggml_build_forward_expand(g, written.back());
        }
        seen.clear();
        last_values.clear();
        ggml_cpu_set_node_callback(
            [](const ggml_tensor * node, void * data) {
                const auto & tensors = *(const std::vector<ggml_tensor *> *) data;
                if (node) {
                    const ggml_tensor * t = tensors[seen.size() - 1];
                    last_values.push_back(ggml_get_data_f32(t)[ggml_nelements(t) - 1]);
                }
                seen.push_back(node);
            },
            &written);
        compute(g, n_threads);
        ggml_cpu_set_node_callback(nullptr, nullptr);
        check(seen == want, name + ": the first of them");
        check(last_values == std::vector<float>{ 5.0f, 1.0f, 1.0f }, name + ": all of them are computed");
    }
}

int main() {
    ggml_cpu_init();
    test_node_callback();
    test_fused_nodes();
    return summary("test-callback");
}
