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

int main() {
    ggml_cpu_init();
    test_node_callback();
    return summary("test-callback");
}
