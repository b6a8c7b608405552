// Products and what follows them in one pass, on the CPU: the same bytes as the operations one by one, in every place that an allocator gives them.

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ops.h"

using tensor = ggml_tensor *;

// what was computed apart from others: all but the nodes that a fused operation covers
static std::vector<const ggml_tensor *> called;

static void on_node(const ggml_tensor * node, void *) {
    called.push_back(node);
}

static void compute_with(ggml_cgraph * graph, int n_threads, bool fused) {
    ggml_cplan           plan = ggml_graph_plan(graph, n_threads, nullptr);
    std::vector<uint8_t> work(plan.work_size);
    plan.work_data = work.data();
    plan.use_ref   = !fused;
    called.clear();
    ggml_cpu_set_node_callback(on_node, nullptr);
    ggml_graph_compute(graph, &plan);
    ggml_cpu_set_node_callback(nullptr, nullptr);
}

static int n_called(const ggml_cgraph *) {
    return (int) called.size() - 1;   // the first call is the beginning
}

struct dims {
    int64_t n, m, k;
};

// odd, of one tile and of several, with one block of terms and with several; vectors and what is left over; thin ones, as of adapters
static const std::vector<dims> SIZES = {
    { 1, 5, 3 },       { 7, 4, 13 },    { 33, 15, 40 },  { 192, 197, 192 }, { 70, 301, 900 }, { 513, 100, 1537 },
    { 2100, 29, 385 }, { 301, 150, 8 }, { 8, 301, 150 }, { 150, 8, 301 },   { 29, 1000, 50 },
};

static tensor matrix(ggml_context * ctx, int64_t n0, int64_t n1) {
    return new_f32(ctx, { n0, n1 }, 0.5f);
}

// a graph in memory that an allocator shares out, so that results lie in the place of operands; leaves keep theirs
struct allocated {
    ggml_context * ctx    = ggml_init({ 64 * ggml_tensor_overhead() + ggml_graph_overhead_custom(256, true), nullptr, true });
    ggml_context * leaves = ggml_init({ 256 * 1024 * 1024, nullptr, false });
    ggml_gallocr_t alloc  = ggml_gallocr_new(ggml_backend_cpu_buffer_type());
    ~allocated() {
        ggml_gallocr_free(alloc);
        ggml_free(leaves);
        ggml_free(ctx);
    }

    // build(ctx, leaves) -> the graph's results; how many nodes were computed apart
    int run(const std::string & name, const std::function<std::vector<tensor>(ggml_context *, ggml_context *)> & build) {
        const std::vector<tensor> outs  = build(ctx, leaves);
        ggml_cgraph *             graph = ggml_new_graph_custom(ctx, 256, true);
        for (tensor t : outs) {
            ggml_set_output(t);
            ggml_build_forward_expand(graph, t);
        }
        check(ggml_gallocr_alloc_graph(alloc, graph), name + ": allocated");
        std::vector<std::vector<float>> want;
        compute_with(graph, 1, /*fused =*/false);
        for (tensor t : outs) {
            want.emplace_back((const float *) t->data, (const float *) t->data + ggml_nelements(t));
        }
        for (int n_threads : thread_counts) {
            for (tensor t : outs) {
                memset(t->data, 0xff, ggml_nbytes(t));
            }
            compute_with(graph, n_threads, /*fused =*/true);
            for (size_t i = 0; i < outs.size(); i++) {
                check(memcmp(outs[i]->data, want[i].data(), ggml_nbytes(outs[i])) == 0,
                      name + ": the same bytes as one by one, " + std::to_string(n_threads) + " threads, result " + std::to_string(i));
            }
        }
        return n_called(graph);
    }
};

static void check_calls(int got, int want, const std::string & name) {
    check(got == want, name + ": " + std::to_string(got) + " operations, not " + std::to_string(want));
}

static void test_steps() {
    for (const dims & s : SIZES) {
        if (too_long(s.n * s.m * s.k)) {
            continue;
        }
        for (ggml_prec prec : { GGML_PREC_F32, GGML_PREC_BF16 }) {
            const std::string at =
                " " + std::to_string(s.n) + " x " + std::to_string(s.m) + " x " + std::to_string(s.k) + (prec == GGML_PREC_BF16 ? " bf16" : "");
            const auto mul = [&](ggml_context * ctx, ggml_context * in) {
                tensor y = ggml_mul_mat(ctx, matrix(in, s.k, s.n), matrix(in, s.k, s.m));
                ggml_mul_mat_set_prec(y, prec);
                return y;
            };
            const auto out_prod = [&](ggml_context * ctx, ggml_context * in) {
                tensor y = ggml_out_prod(ctx, matrix(in, s.n, s.k), ggml_transpose(ctx, matrix(in, s.k, s.m)));
                ggml_mul_mat_set_prec(y, prec);
                return y;
            };
            using F = std::vector<tensor>;
            check_calls(
                allocated().run("bias" + at,
                                [&](ggml_context * ctx, ggml_context * in) -> F { return { ggml_add(ctx, mul(ctx, in), new_f32(in, { s.n })) }; }),
                1, "bias" + at);
            check_calls(allocated().run("bias and residual" + at,
                                        [&](ggml_context * ctx, ggml_context * in) -> F {
                                            return { ggml_add(ctx, matrix(in, s.n, s.m), ggml_add(ctx, mul(ctx, in), new_f32(in, { s.n }))) };
                                        }),
                        1, "bias and residual" + at);
            check_calls(
                allocated().run("scale and gelu" + at,
                                [&](ggml_context * ctx, ggml_context * in) -> F { return { ggml_gelu(ctx, ggml_scale(ctx, mul(ctx, in), 0.3f)) }; }),
                1, "scale and gelu" + at);
            // what GELU reads is kept, so that it writes to another place
            check_calls(allocated().run("bias, kept, and gelu" + at,
                                        [&](ggml_context * ctx, ggml_context * in) -> F {
                                            tensor h = ggml_add(ctx, mul(ctx, in), new_f32(in, { s.n }));
                                            ggml_set_output(h);
                                            return { ggml_gelu(ctx, h), h };
                                        }),
                        2, "bias, kept, and gelu" + at);
            check_calls(allocated().run("gelu_back" + at,
                                        [&](ggml_context * ctx, ggml_context * in) -> F {
                                            return { ggml_gelu_back(ctx, out_prod(ctx, in), matrix(in, s.n, s.m)) };
                                        }),
                        1, "gelu_back" + at);
            // a sum in the place of what was there: sqr(a) has no other reader
            check_calls(allocated().run("two products" + at,
                                        [&](ggml_context * ctx, ggml_context * in) -> F {
                                            tensor a = out_prod(ctx, in);
                                            return { ggml_add(ctx, ggml_sqr(ctx, a), out_prod(ctx, in)) };
                                        }),
                        3, "two products" + at);
            // not fused: another value reads the product, an offset, the product twice
            check_calls(allocated().run("read twice" + at,
                                        [&](ggml_context * ctx, ggml_context * in) -> F {
                                            tensor y = mul(ctx, in);
                                            return { ggml_add(ctx, y, new_f32(in, { s.n })), ggml_sqr(ctx, y) };
                                        }),
                        3, "read twice" + at);
            check_calls(
                allocated().run("with an offset" + at,
                                [&](ggml_context * ctx, ggml_context * in) -> F { return { ggml_scale_bias(ctx, mul(ctx, in), 0.3f, 0.1f) }; }),
                2, "with an offset" + at);
            check_calls(allocated().run("doubled" + at,
                                        [&](ggml_context * ctx, ggml_context * in) -> F {
                                            tensor y = mul(ctx, in);
                                            return { ggml_add(ctx, y, y) };
                                        }),
                        2, "doubled" + at);
        }
        // y = x + w x lies where x did, which all of y is made of
        const std::string at = " " + std::to_string(s.n) + " x " + std::to_string(s.m);
        check_calls(allocated().run("in the place of its operand" + at,
                                    [&](ggml_context * ctx, ggml_context * in) -> std::vector<tensor> {
                                        tensor x = ggml_sqr(ctx, matrix(in, s.n, s.m));
                                        return { ggml_add(ctx, x, ggml_mul_mat(ctx, matrix(in, s.n, s.n), x)) };
                                    }),
                    3, "in the place of its operand" + at);
        // rows that repeat, but not one: every second
        if (s.m % 2 == 0) {
            check_calls(
                allocated().run("two rows" + at,
                                [&](ggml_context * ctx, ggml_context * in) -> std::vector<tensor> {
                                    return { ggml_add(ctx, ggml_mul_mat(ctx, matrix(in, s.k, s.n), matrix(in, s.k, s.m)), matrix(in, s.n, 2)) };
                                }),
                2, "two rows" + at);
        }
    }
    // one value for each row, of which there are as many as columns
    for (int64_t n : { 2, 33, 150 }) {
        const std::string at = " " + std::to_string(n);
        check_calls(allocated().run("a column" + at,
                                    [&](ggml_context * ctx, ggml_context * in) -> std::vector<tensor> {
                                        return { ggml_add(ctx, ggml_mul_mat(ctx, matrix(in, 40, n), matrix(in, 40, n)), new_f32(in, { 1, n })) };
                                    }),
                    2, "a column" + at);
    }
    // a weight in a layout that only the owner of its buffer can read
    check_calls(allocated().run("a layout of its own",
                                [&](ggml_context * ctx, ggml_context * in) -> std::vector<tensor> {
                                    tensor w = matrix(in, 40, 50);
                                    w->extra = w;
                                    return { ggml_add(ctx, ggml_mul_mat(ctx, w, matrix(in, 40, 30)), new_f32(in, { 50 })) };
                                }),
                2, "a layout of its own");
    // a sum without terms, and what follows it
    check_calls(allocated().run("no terms",
                                [&](ggml_context * ctx, ggml_context * in) -> std::vector<tensor> {
                                    return { ggml_add(ctx, ggml_out_prod(ctx, matrix(in, 50, 0), matrix(in, 30, 0)), new_f32(in, { 50 })) };
                                }),
                1, "no terms");
    // several matrices of a product
    check_calls(allocated().run("matrices",
                                [&](ggml_context * ctx, ggml_context * in) -> std::vector<tensor> {
                                    tensor y = ggml_mul_mat(ctx, new_f32(in, { 50, 33, 2 }), new_f32(in, { 50, 40, 4, 3 }));
                                    return { ggml_add(ctx, ggml_add(ctx, y, new_f32(in, { 33 })), new_f32(in, { 33, 40, 4, 3 })) };
                                }),
                1, "matrices");
}

// the gradients of a layer with a bias, and of two over the same input
static void test_linear_gradients() {
    for (const dims & s : SIZES) {
        if (too_long(s.n * s.m * s.k)) {
            continue;
        }
        for (int n_threads : thread_counts) {
            context           ctx;
            const std::string name = "linear " + std::to_string(s.n) + " x " + std::to_string(s.m) + " x " + std::to_string(s.k) + ", " +
                                     std::to_string(n_threads) + " threads";
            rng_state              = 7;
            tensor x = matrix(ctx, s.k, s.m), w = matrix(ctx, s.k, s.n), b = new_f32(ctx, { s.n }), w2 = matrix(ctx, s.k, s.n);
            for (tensor p : { x, w, b, w2 }) {
                ggml_set_param(p);
            }
            tensor y    = ggml_gelu(ctx, ggml_add(ctx, ggml_mul_mat(ctx, w, x), b));
            tensor loss = ggml_sum(ctx, ggml_mul(ctx, ggml_mul(ctx, y, ggml_mul_mat(ctx, w2, x)), matrix(ctx, s.n, s.m)));
            ggml_set_loss(loss);
            ggml_cgraph *       graph = graph_of(ctx, loss);
            // with accumulators, as training has them: x too, so that its gradient is a sum in place
            std::vector<tensor> accs(ggml_graph_n_nodes(graph));
            for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
                tensor t = ggml_graph_node(graph, i);
                accs[i]  = t == x || t == w || t == b || t == w2 ? ggml_dup_tensor(ctx, t) : nullptr;
            }
            ggml_build_backward_expand(ctx, graph, accs.data());

            std::vector<std::vector<float>> want;
            int                             n_apart = 0;
            for (bool fused : { false, true }) {
                ggml_graph_reset(graph);
                compute_with(graph, fused ? n_threads : 1, fused);
                compute_with(graph, fused ? n_threads : 1, fused);   // a second micro-batch
                size_t i = 0;
                for (tensor p : { x, w, b, w2 }) {
                    const tensor       g = ggml_graph_get_grad_acc(graph, p);
                    std::vector<float> values(ggml_get_data_f32(g), ggml_get_data_f32(g) + ggml_nelements(g));
                    if (!fused) {
                        want.push_back(values);
                    } else {
                        check(memcmp(values.data(), want[i].data(), values.size() * sizeof(float)) == 0, name + ": gradient " + std::to_string(i));
                    }
                    i++;
                }
                n_apart = fused ? n_apart - n_called(graph) : n_called(graph);
            }
            // the bias added forward; its gradient's two nodes, before the weight's
            check(n_apart >= 3, name + ": fewer operations", n_apart);
        }
    }
}

// REPEAT_BACK to the shape of a parameter, its addition in place, and the product of the same gradient
static void test_sums_of_gradients() {
    const int64_t n = 70, k = 40;
    for (const char * kind : { "rows", "columns", "a layout of its own" }) {
        context           ctx;
        const bool        row  = std::string(kind) != "columns";
        const std::string name = std::string("sums of gradients: ") + kind;
        tensor grad = matrix(ctx, n, n), x = matrix(ctx, k, n), acc = new_f32(ctx, row ? std::vector<int64_t>{ n } : std::vector<int64_t>{ 1, n });
        const auto start = values_of(acc);
        if (std::string(kind) == "a layout of its own") {
            x->extra = x;
        }
        tensor        sum   = ggml_add_inplace(ctx, acc, ggml_repeat_back(ctx, grad, acc));
        tensor        dw    = ggml_out_prod(ctx, x, grad);
        ggml_cgraph * graph = graph_of(ctx, sum);
        ggml_build_forward_expand(graph, dw);
        std::vector<float> want;
        for (bool fused : { false, true }) {
            memcpy(acc->data, start.data(), ggml_nbytes(acc));
            compute_with(graph, 3, fused);
            if (fused) {
                check(values_of(acc) == want, name);
                check_calls(n_called(graph), std::string(kind) == "rows" ? 1 : 3, name);
            }
            want = values_of(acc);
        }
    }
}

// --- memory ---------------------------------------------------------------------------------------------------------

// products of these widths, each of which only the next one needs
static void test_memory(const std::vector<int64_t> & widths, bool affordable) {
    const std::string  name = "memory by size, " + std::to_string(widths.size()) + " products";
    std::vector<float> want;
    size_t             plain = 0;
    for (bool by_size : { false, true }) {
        allocated g;
        rng_state = 11;
        ggml_gallocr_set_by_size(g.alloc, by_size);
        std::vector<tensor> made;
        tensor              x = matrix(g.leaves, 5, 40);
        for (int64_t n : widths) {
            made.push_back(x = ggml_mul_mat(g.ctx, matrix(g.leaves, x->ne[0], n), x));
        }
        ggml_cgraph * graph = ggml_new_graph_custom(g.ctx, 256, false);
        ggml_set_output(made[0]);
        ggml_build_forward_expand(graph, x);
        check(ggml_gallocr_alloc_graph(g.alloc, graph), name + ": allocated");
        compute_with(graph, 2, true);

        int n_mixed = 0;   // memory that tensors of several sizes have had
        for (tensor s : made) {
            for (tensor t : made) {
                const char *s0 = (const char *) s->data, *t0 = (const char *) t->data;
                n_mixed += s0 < t0 + ggml_nbytes(t) && t0 < s0 + ggml_nbytes(s) && (s0 != t0 || ggml_nbytes(s) != ggml_nbytes(t));
            }
        }
        check((n_mixed == 0) == (by_size && affordable), name + ": " + std::to_string(n_mixed) + " tensors in the place of others");

        const size_t             size = ggml_gallocr_get_buffer_size(g.alloc, 0);
        const std::vector<float> got((const float *) x->data, (const float *) x->data + ggml_nelements(x));
        if (!by_size) {
            want  = got;
            plain = size;
        }
        check(memcmp(got.data(), want.data(), ggml_nbytes(x)) == 0, name + ": the same result");
        check(size <= plain + plain / 4 && (affordable || size == plain),
              name + ": " + std::to_string(size) + " bytes, not " + std::to_string(plain));
    }
}

static void test_memory_by_size() {
    test_memory({ 1000, 70, 33, 33, 70, 33 }, true);
    test_memory({ 10, 70, 33, 33, 70, 33 }, false);
}

int main() {
    ggml_cpu_init();
    test_steps();
    test_linear_gradients();
    test_sums_of_gradients();
    test_memory_by_size();
    return summary("test-fusion");
}
