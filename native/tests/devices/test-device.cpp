// Operations that toy adds to ggml or changes, on a device against the cpu: values, and the same bytes twice. With the device of use_toy_device.
#include "../ops.h"
#include "engine/device.h"
#include "engine/error.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"

using tensor = ggml_tensor *;
using toy::format;

// What a case computes, of tensors without data: `build` names its sources in the order in which they are filled.
struct op_case {
    std::string                                                          name;
    std::function<tensor(ggml_context *, std::vector<tensor> & sources)> build;
    double                                                               limit = 2e-6;    // of the largest value of a tensor
    std::vector<int32_t>                                                 ids   = {};      // what an I32 source is filled with
    bool                                                                 cuda  = false;   // other devices may leave it to the cpu
};

static tensor typed(ggml_context * ctx, std::vector<tensor> & sources, ggml_type type, std::vector<int64_t> ne) {
    sources.push_back(ggml_new_tensor(ctx, type, (int) ne.size(), ne.data()));
    return sources.back();
}

static tensor f32(ggml_context * ctx, std::vector<tensor> & sources, std::vector<int64_t> ne) {
    return typed(ctx, sources, GGML_TYPE_F32, ne);
}

static tensor i32(ggml_context * ctx, std::vector<tensor> & sources, int64_t n) {
    sources.push_back(ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n));
    return sources.back();
}

// The sources, as an operation may work in place, and the result: {} where the device does not compute it.
static std::vector<std::vector<float>> run_on(ggml_backend_t backend, const op_case & c) {
    ggml_context *      ctx = ggml_init({ /*mem_size =*/1024 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, /*no_alloc =*/true });
    std::vector<tensor> sources;
    tensor              out    = c.build(ctx, sources);
    const bool          usable = ggml_backend_supports_op(backend, out);
    std::vector<std::vector<float>> values;
    if (usable) {
        ggml_cgraph * graph = ggml_new_graph(ctx);
        for (tensor t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
            if (t->op == GGML_OP_OPT_STEP_ADAMW) {   // there may be several
                ggml_build_forward_expand(graph, t);
            }
        }
        ggml_build_forward_expand(graph, out);
        ggml_backend_buffer_t buf = ggml_backend_alloc_ctx_tensors(ctx, backend);
        rng_state                 = 1;
        for (tensor t : sources) {
            std::vector<float> x(ggml_nelements(t));
            for (float & v : x) {
                v = rng_uniform();
            }
            std::vector<uint8_t> stored(ggml_nbytes(t));
            if (t->type == GGML_TYPE_I32) {
                memcpy(stored.data(), c.ids.data(), stored.size());
            } else if (t->type == GGML_TYPE_F32) {
                memcpy(stored.data(), x.data(), stored.size());
            } else {
                ggml_quantize_chunk(t->type, x.data(), stored.data(), 0, ggml_nrows(t), t->ne[0], nullptr);
            }
            ggml_backend_tensor_set(t, stored.data(), 0, stored.size());
        }
        for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
            tensor t = ggml_graph_node(graph, i);
            if (t->op == GGML_OP_OPT_STEP_ADAMW) {   // moments of squares are none below zero
                const std::vector<float> v(ggml_nelements(t), 0.25f), h = { 1e-2f, 0.9f, 0.99f, 1e-8f, 0.1f, 1.5f, 2.5f, 0.5f };
                ggml_backend_tensor_set(t->src[3], v.data(), 0, ggml_nbytes(t->src[3]));
                ggml_backend_tensor_set(t->src[4], h.data(), 0, ggml_nbytes(t->src[4]));
            }
        }
        check(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS, c.name + ": computed");
        sources.push_back(out);
        for (tensor t : sources) {
            if (t->type == GGML_TYPE_F32) {
                values.emplace_back(ggml_nelements(t));
                ggml_backend_tensor_get(t, values.back().data(), 0, ggml_nbytes(t));
            }
        }
        ggml_backend_buffer_free(buf);
    }
    ggml_free(ctx);
    return values;
}

// The head and its loss, in chunks of some rows: the gradients of both are sources, which are compared too
static void add_linear_cross_entropy_cases(std::vector<op_case> & all) {
    const int64_t        n_tokens = 13;
    std::vector<int32_t> labels(n_tokens);
    for (size_t i = 0; i < labels.size(); i++) {
        labels[i] = i % 5 == 2 ? -1 : (int32_t) (i * 7 % 11);   // some masked
    }
    // the gradient of the head is set, or added to, with that of x where x is; there are none now; there is none
    enum { SET, ADDED, IN_PLACE, LOSS_ONLY, FROZEN };
    const auto add = [&](int64_t n_vocab, int64_t n_rows, bool bf16, ggml_type type, int which, int64_t n_embd = 64) {
        const auto build = [=](ggml_context * ctx, std::vector<tensor> & s) {
            tensor x = f32(ctx, s, { n_embd, n_tokens }), w = typed(ctx, s, type, { n_embd, n_vocab }), y = i32(ctx, s, n_tokens);
            tensor scale = f32(ctx, s, { 1 }), grad = f32(ctx, s, { 1 }), dx = which == IN_PLACE ? x : f32(ctx, s, { n_embd, n_tokens });
            tensor dw  = which == FROZEN ? nullptr : f32(ctx, s, { n_embd, n_vocab });
            tensor sum = ggml_linear_cross_entropy(ctx, x, w, y, scale, grad, dx, dw);
            if (n_rows > 0) {
                ggml_linear_cross_entropy_set_rows(sum, n_rows);
            }
            ggml_mul_mat_set_prec(sum, bf16 ? GGML_PREC_BF16 : GGML_PREC_F32);
            sum->flags |= which == SET ? GGML_TENSOR_FLAG_SET : which == LOSS_ONLY ? GGML_TENSOR_FLAG_LOSS_ONLY : 0;
            return sum;
        };
        // in bf16 a gradient of the logits that differs in its last bit may be rounded to the other side: by 1/256 of itself. Vulkan rounds what a
        // matrix of another type than f32 is multiplied with to f16, bf16 or q8_1
        const bool   rounded = type != GGML_TYPE_F32 && strcmp(toy::DEVICE, "vulkan") == 0;
        const double limit   = rounded ? 4e-3 : bf16 ? 1e-3 : 2e-5;
        all.push_back({ format("linear_cross_entropy of %s %lld x %lld, %lld rows, %d%s", ggml_type_name(type), (long long) n_embd,
                               (long long) n_vocab, (long long) n_rows, which, bf16 ? " in bf16" : ""),
                        build, limit, labels, /*cuda =*/bf16 });
    };
    for (const bool bf16 : { false, true }) {
        for (const int which : { SET, ADDED, IN_PLACE, LOSS_ONLY, FROZEN }) {
            add(257, /*n_rows =*/5, bf16, GGML_TYPE_F32, which);
        }
        add(1027, /*n_rows =*/0, bf16, GGML_TYPE_F32, SET);   // as it is made
        add(300, /*n_rows =*/100, bf16, GGML_TYPE_F32, SET, /*n_embd =*/33);
        add(11, /*n_rows =*/100, bf16, GGML_TYPE_BF16, FROZEN);
        add(11, /*n_rows =*/4, bf16, GGML_TYPE_F16, FROZEN);
        add(11, /*n_rows =*/4, bf16, GGML_TYPE_Q8_0, FROZEN);
    }
}

// Products of f32 matrices that stay f32 on devices that would rather round them: whole tiles and not, few columns, a batch, and operands that are
// views
static void add_vulkan_cases(std::vector<op_case> & all) {
    for (const auto & [terms, n] : { std::pair<int64_t, int64_t>{ 64, 130 }, { 37, 33 }, { 37, 3 } }) {
        const std::string of = format("%lld terms, %lld", (long long) terms, (long long) n);
        all.push_back({ "mul_mat of f32, " + of, [terms = terms, n = n](ggml_context * ctx, std::vector<tensor> & s) {
                           return ggml_mul_mat(ctx, f32(ctx, s, { terms, 150, 1, 2 }), f32(ctx, s, { terms, n, 3, 2 }));
                       } });
        all.push_back({ "mul_mat of f32 views, " + of, [terms = terms, n = n](ggml_context * ctx, std::vector<tensor> & s) {
                           tensor a = ggml_permute(ctx, f32(ctx, s, { terms, 2, 70 }), 0, 2, 1, 3);
                           return ggml_mul_mat(ctx, a, ggml_permute(ctx, f32(ctx, s, { terms, 2, n }), 0, 2, 1, 3));
                       } });
    }
}

// What CUDA has besides: products of other types and in bf16, broadcast or with transposed operands, and the rest of a step
static void add_cuda_cases(std::vector<op_case> & all) {
    const auto add = [&](const std::string & name, std::function<tensor(ggml_context *, std::vector<tensor> &)> build, double limit,
                         std::vector<int32_t> ids = {}) { all.push_back({ name, build, limit, ids, /*cuda =*/true }); };
    for (const bool bf16 : { false, true }) {
        const std::string in    = bf16 ? " in bf16" : "";
        const auto        as    = [=](tensor t) { t->op_params[0] = bf16 ? GGML_PREC_BF16 : GGML_PREC_DEFAULT; };
        const double      limit = 1e-5;
        for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_K }) {
            for (const int64_t n : { 1, 35 }) {
                const std::string of = format("out_prod of %s, %lld%s", ggml_type_name(type), (long long) n, in.c_str());
                add(
                    of,
                    [=](ggml_context * ctx, std::vector<tensor> & s) {
                        tensor y = ggml_out_prod(ctx, typed(ctx, s, type, { 256, 35 }), f32(ctx, s, { n, 35 }));
                        as(y);
                        return y;
                    },
                    limit);
                add(
                    of + " transposed",
                    [=](ggml_context * ctx, std::vector<tensor> & s) {   // the gradient of what a matrix is multiplied with
                        tensor y = ggml_out_prod(ctx, typed(ctx, s, type, { 256, 35 }), ggml_transpose(ctx, f32(ctx, s, { 35, n })));
                        as(y);
                        return y;
                    },
                    limit);
            }
        }
        for (const int64_t group : { 1, 3 }) {   // grouped queries: a key's gradient, and a query's
            for (const int64_t n_batch : { 1, 2 }) {
                const std::string of = format("out_prod of heads, %lld to one, batch of %lld%s", (long long) group, (long long) n_batch, in.c_str());
                add(
                    of,
                    [=](ggml_context * ctx, std::vector<tensor> & s) {
                        tensor y = ggml_out_prod(ctx, f32(ctx, s, { 24, 17, 2, n_batch }), f32(ctx, s, { 11, 17, 2 * group, n_batch }));
                        as(y);
                        return y;
                    },
                    limit);
                add(
                    of + ", views",
                    [=](ggml_context * ctx, std::vector<tensor> & s) {
                        tensor a = ggml_permute(ctx, f32(ctx, s, { 24, 2, 17, n_batch }), 0, 2, 1, 3);
                        tensor b = ggml_permute(ctx, f32(ctx, s, { 11, 2 * group, 17, n_batch }), 0, 2, 1, 3);
                        tensor y = ggml_out_prod(ctx, a, b);
                        as(y);
                        return y;
                    },
                    limit);
            }
        }
        add(
            "out_prod_acc of a part of the rows" + in,
            [=](ggml_context * ctx, std::vector<tensor> & s) {
                tensor acc = f32(ctx, s, { 20, 9 }), a = f32(ctx, s, { 32, 40 }), b = f32(ctx, s, { 9, 40 });
                tensor y =
                    ggml_out_prod_acc(ctx, acc, ggml_view_2d(ctx, a, 20, 30, a->nb[1], 12 * sizeof(float)), ggml_view_2d(ctx, b, 9, 30, b->nb[1], 0));
                as(y);
                return y;
            },
            limit);
    }
    for (const int64_t n : { 5, 577, 3000 }) {
        add(
            format("norm_back of %lld", (long long) n),
            [=](ggml_context * ctx, std::vector<tensor> & s) { return ggml_norm_back(ctx, f32(ctx, s, { n, 9 }), f32(ctx, s, { n, 9 }), 1e-5f); },
            1e-5);
        add(
            format("repeat_back of %lld", (long long) n),
            [=](ggml_context * ctx, std::vector<tensor> & s) {
                return ggml_repeat_back(ctx, f32(ctx, s, { n, 150, 3 }), ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n));
            },
            1e-5);
        for (const int32_t first : { 7, -1 }) {   // a negative seed keeps everything
            add(format("dropout of %lld", (long long) n),
                [=](ggml_context * ctx, std::vector<tensor> & s) {
                    tensor x = f32(ctx, s, { n, 6 });
                    s.push_back(ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 2, 3));
                    return ggml_dropout(ctx, x, s.back(), 0.3f, 11);
                },
                1e-7, { first, 1, 3, -4, 5, 6 });
        }
    }
    // more weights than one launch takes, some of them small
    add(
        "adamw of many",
        [=](ggml_context * ctx, std::vector<tensor> & s) {
            tensor step = nullptr;
            for (int i = 0; i < 150; i++) {
                const int64_t n = i % 7 == 0 ? 2500 : i % 5 + 1;
                tensor        w = f32(ctx, s, { n }), g = f32(ctx, s, { n }), m = f32(ctx, s, { n }), v = f32(ctx, s, { n });
                ggml_set_param(w);
                step = ggml_opt_step_adamw(ctx, w, g, m, v, f32(ctx, s, { i % 2 ? 7 : 8 }));
            }
            return step;
        },
        2e-6);
}

// Attention and its gradient, of operands that lie apart and of one product: sizes that fill tiles and that do not, one tile and several
static void add_attention_cases(std::vector<op_case> & all) {
    struct shape {
        int64_t D, H, K, T, S, B;
        bool    causal;
    };
    const shape shapes[] = {
        { 64, 4, 2, 150, 150, 2, true },  { 16, 4, 4, 64, 64, 2, true },    { 5, 3, 1, 65, 65, 2, true },    { 33, 2, 1, 70, 70, 1, true },
        { 64, 3, 3, 197, 197, 1, false }, { 48, 9, 3, 40, 40, 2, true },    { 1, 2, 2, 7, 7, 3, true },      { 20, 4, 1, 1, 1, 2, true },
        { 40, 6, 2, 2, 130, 1, true },    { 24, 6, 3, 3, 3, 2, false },     { 80, 1, 1, 130, 241, 1, true }, { 7, 5, 5, 129, 30, 4, false },
        { 100, 2, 2, 17, 225, 2, true },  { 128, 2, 1, 64, 113, 1, false }, { 130, 2, 1, 70, 70, 1, true },  { 256, 2, 1, 9, 120, 1, true },
        { 32, 3, 1, 290, 290, 1, true },  { 64, 2, 1, 260, 300, 1, true },
    };
    for (const shape & s : shapes) {
        for (const bool joint : { false, true }) {
            // the gradients of operands that lie apart are padded to 4 elements, with whatever was there
            if (joint ? s.T != s.S : s.D * s.H * s.T * s.B % 4 != 0 || s.D * s.K * s.S * s.B % 4 != 0) {
                continue;
            }
            for (const bool bf16 : { false, true }) {
                const auto attention = [=](ggml_context * ctx, std::vector<tensor> & sources) {
                    const float scale = 6.0f / std::sqrt((float) s.D);   // so that the softmax is neither flat nor a step
                    tensor      y;
                    if (joint) {
                        y = ggml_attn_qkv(ctx, f32(ctx, sources, { s.D, s.H + 2 * s.K, s.T, s.B }), s.K, scale, s.causal);
                    } else {   // heads before tokens, and tokens with something between them
                        tensor q = ggml_permute(ctx, f32(ctx, sources, { s.D, s.T, s.H, s.B }), 0, 2, 1, 3);
                        tensor k = f32(ctx, sources, { s.D, s.K + 1, s.S, s.B });
                        k        = ggml_view_4d(ctx, k, s.D, s.K, s.S, s.B, k->nb[1], k->nb[2], k->nb[3], k->nb[1]);
                        y        = ggml_attn(ctx, q, k, f32(ctx, sources, { s.D, s.K, s.S, s.B }), scale, s.causal);
                    }
                    ggml_attn_set_bf16(y, bf16);
                    return y;
                };
                const std::string name  = format("attention of %lld, %lld heads to %lld, %lld to %lld, %lld%s%s%s", (long long) s.D, (long long) s.H,
                                                 (long long) s.K, (long long) s.T, (long long) s.S, (long long) s.B, s.causal ? ", causal" : "",
                                                 joint ? ", of one product" : "", bf16 ? ", in bf16" : "");
                // both round operands and what goes from one product into the next, to 2^-9 of each and not at the same places
                const double      limit = bf16 ? 8e-3 : 1e-5;
                all.push_back({ name, attention, limit, {}, /*cuda =*/bf16 });
                all.push_back({ name + ": gradient",
                                [=](ggml_context * ctx, std::vector<tensor> & sources) {
                                    tensor y = attention(ctx, sources);
                                    tensor g = f32(ctx, sources, { s.D, s.H + 1, s.T, s.B });
                                    return ggml_attn_back(ctx, ggml_view_4d(ctx, g, s.D, s.H, s.T, s.B, g->nb[1], g->nb[2], g->nb[3], g->nb[1]), y);
                                },
                                limit,
                                {},
                                /*cuda =*/bf16 });
            }
        }
    }
}

static std::vector<op_case> cases() {
    std::vector<op_case> all;
    const auto           set = [](tensor t, bool on) {
        t->flags |= on ? GGML_TENSOR_FLAG_SET : 0;
        return t;
    };
    for (const int64_t n : { 1, 33, 600, 70000 }) {
        const std::string size = " of " + std::to_string(n);
        for (const int64_t n_params : { 7, 8 }) {
            all.push_back({ "adamw with " + std::to_string(n_params) + size, [=](ggml_context * ctx, std::vector<tensor> & s) {
                               tensor w = f32(ctx, s, { n }), g = f32(ctx, s, { n }), m = f32(ctx, s, { n }), v = f32(ctx, s, { n });
                               ggml_set_param(w);
                               return ggml_opt_step_adamw(ctx, w, g, m, v, f32(ctx, s, { n_params }));
                           } });
        }
        all.push_back({ "sum_sqr" + size, [=](ggml_context * ctx, std::vector<tensor> & s) { return ggml_sum_sqr(ctx, f32(ctx, s, { n })); } });
        all.push_back({ "sum_sqr of a part" + size, [=](ggml_context * ctx, std::vector<tensor> & s) {
                           return ggml_sum_sqr(ctx, ggml_view_1d(ctx, f32(ctx, s, { n + 3 }), n, 3 * sizeof(float)));
                       } });
        all.push_back({ "gelu_back" + size, [=](ggml_context * ctx, std::vector<tensor> & s) {
                           return ggml_gelu_back(ctx, f32(ctx, s, { n, 3 }), f32(ctx, s, { n, 3 }));
                       } });
        all.push_back({ "swiglu_back" + size, [=](ggml_context * ctx, std::vector<tensor> & s) {
                           return ggml_swiglu_back(ctx, f32(ctx, s, { n, 2 }), f32(ctx, s, { n, 2 }), f32(ctx, s, { n, 2 }));
                       } });
    }
    for (const int64_t n : { 5, 96, 577 }) {
        for (const int64_t rows : { 1, 7, 600 }) {
            const std::string shape = format(" of %lld x %lld", (long long) n, (long long) rows);
            for (const bool more : { false, true }) {
                const auto norm = [=](bool rms) {
                    return [=](ggml_context * ctx, std::vector<tensor> & s) {
                        tensor dy = f32(ctx, s, { n, rows }), x = f32(ctx, s, { n, rows }), w = f32(ctx, s, { n });
                        tensor add = more ? f32(ctx, s, { n, rows }) : nullptr;
                        return rms ? ggml_rms_norm_mul_back(ctx, dy, x, w, add, 1e-5f) : ggml_norm_mul_back(ctx, dy, x, w, add, 1e-5f);
                    };
                };
                all.push_back({ "norm_mul_back" + shape, norm(false), 1e-5 });
                all.push_back({ "rms_norm_mul_back" + shape, norm(true), 1e-5 });
                all.push_back({ "out_prod_acc" + shape,
                                [=](ggml_context * ctx, std::vector<tensor> & s) {
                                    tensor acc = f32(ctx, s, { n, 13 }), a = f32(ctx, s, { n, rows }), b = f32(ctx, s, { 13, rows });
                                    return set(ggml_out_prod_acc(ctx, acc, a, b), more);
                                },
                                1e-5 });
            }
        }
    }
    for (const int64_t terms : { 3, 70 }) {
        all.push_back({ "out_prod of a batch, broadcast", [=](ggml_context * ctx, std::vector<tensor> & s) {
                           tensor a = f32(ctx, s, { 67, terms, 2, 3 }), b = f32(ctx, s, { 65, terms, 4, 3 });
                           return ggml_out_prod(ctx, a, b);
                       } });
        all.push_back({ "out_prod of a view and a transposed matrix", [=](ggml_context * ctx, std::vector<tensor> & s) {
                           tensor a = f32(ctx, s, { 31, 5, terms }), b = f32(ctx, s, { terms, 130 });
                           return ggml_out_prod(ctx, ggml_view_2d(ctx, a, 31, terms, a->nb[2], a->nb[1]), ggml_transpose(ctx, b));
                       } });
        for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0,
                                      GGML_TYPE_Q2_K, GGML_TYPE_Q3_K, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K }) {
            all.push_back({ format("out_prod of %s, %lld terms", ggml_type_name(type), (long long) terms),
                            [=](ggml_context * ctx, std::vector<tensor> & s) {
                                tensor w = typed(ctx, s, type, { ggml_blck_size(type) == 1 ? 77 : ggml_blck_size(type) * 3, terms });
                                return ggml_out_prod(ctx, w, ggml_transpose(ctx, f32(ctx, s, { terms, 45 })));
                            },
                            1e-5 });
        }
    }
    std::vector<int32_t> ids(37);
    for (size_t i = 0; i < ids.size(); i++) {
        ids[i] = (int32_t) (i * 7 % 11);
    }
    std::vector<int32_t> many(5000);
    for (size_t i = 0; i < many.size(); i++) {
        many[i] = (int32_t) (i * i % 11);
    }
    for (const bool first : { false, true }) {
        for (const auto & rows : { ids, many }) {
            const int64_t n_cols = rows.size() > ids.size() ? 300 : 45, n_rows = (int64_t) rows.size();
            all.push_back({ format("get_rows_back_acc of %lld", (long long) n_rows),
                            [=](ggml_context * ctx, std::vector<tensor> & s) {
                                tensor acc = f32(ctx, s, { n_cols, 13 }), dy = f32(ctx, s, { n_cols, n_rows });
                                return set(ggml_get_rows_back_acc(ctx, acc, dy, i32(ctx, s, n_rows)), first);
                            },
                            1e-5, rows });
        }
    }
    for (const float p : { 0.1f, 0.75f }) {
        all.push_back({ "dropout",
                        [=](ggml_context * ctx, std::vector<tensor> & s) {
                            tensor x = f32(ctx, s, { 77, 5, 3 });
                            return ggml_dropout(ctx, x, typed(ctx, s, GGML_TYPE_I32, { 2, 3 }), p, 0x7eadbeef);
                        },
                        0,
                        { 5, -77, -1, 3, 123456789, 42 } });   // a sequence that keeps everything
    }
    ids[3] = ids[36] = -1;   // masked
    for (const int64_t n_vocab : { 11, 300, 5001 }) {
        const std::string size = format(" of %lld", (long long) n_vocab);
        all.push_back({ "cross_entropy_sparse" + size,
                        [=](ggml_context * ctx, std::vector<tensor> & s) {
                            tensor logits = f32(ctx, s, { n_vocab, 37 }), labels = i32(ctx, s, 37);
                            return ggml_cross_entropy_sparse(ctx, logits, labels, f32(ctx, s, { 1 }));
                        },
                        1e-5, ids });
        all.push_back({ "cross_entropy_sparse_back" + size,
                        [=](ggml_context * ctx, std::vector<tensor> & s) {
                            tensor grad = f32(ctx, s, { 1 }), logits = f32(ctx, s, { n_vocab, 37 }), labels = i32(ctx, s, 37);
                            return ggml_cross_entropy_sparse_back(ctx, grad, logits, labels, f32(ctx, s, { 1 }));
                        },
                        1e-5, ids });
    }
    add_attention_cases(all);
    add_cuda_cases(all);
    add_linear_cross_entropy_cases(all);
    if (strcmp(toy::DEVICE, "vulkan") == 0) {
        add_vulkan_cases(all);
    }
    return all;
}

// test-device [part of a name]: all cases, or those of that name
int main(int argc, char ** argv) {
    ggml_backend_t cpu = ggml_backend_cpu_init();
    ggml_backend_t device;
    try {
        device = toy::open_device();
    } catch (const toy::error & e) {
        fprintf(stderr, "%s\n%s\n", e.what(), e.hint.c_str());
        return 77;   // ctest: skipped
    }
    for (const op_case & c : cases()) {
        if (argc > 1 && c.name.find(argv[1]) == std::string::npos) {
            continue;
        }
        const auto want = run_on(cpu, c), got = run_on(device, c), again = run_on(device, c);
        if (got.empty() && c.cuda && strcmp(toy::DEVICE, "cuda") != 0) {
            continue;
        }
        check(!got.empty(), c.name + ": the device has it");
        for (size_t i = 0; i < got.size(); i++) {
            const std::string name = c.name + (i + 1 < got.size() ? ", source " + std::to_string(i) : "");
            compare(got[i], std::vector<double>(want[i].begin(), want[i].end()), c.limit, name);
            check(memcmp(got[i].data(), again[i].data(), got[i].size() * sizeof(float)) == 0, name + ": the same bytes twice");
        }
    }
    ggml_backend_free(device);
    ggml_backend_free(cpu);
    return summary("test-device");
}
