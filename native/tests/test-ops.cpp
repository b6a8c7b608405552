// Every ggml operation that vendor-patches/ adds or changes: forward against a plain reference in double precision, backward
// against central finite differences, and the same bytes with 1, 2 and 3 threads.

#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

static int n_failed = 0;
static int n_checks = 0;

static void check(bool ok, const std::string & name, double error = 0.0, double limit = 0.0) {
    n_checks++;
    if (!ok) {
        n_failed++;
        fprintf(stderr, "FAIL %s (error %.3g, limit %.3g)\n", name.c_str(), error, limit);
    }
}

// --- data -----------------------------------------------------------------------------------------------------------

static uint64_t rng_state = 1;

static float rng_uniform() {   // in [-1, 1)
    rng_state = rng_state * 6364136223846793005ull + 1442695040888963407ull;
    return (float) ((double) (rng_state >> 40) / (double) (1 << 23) - 1.0);
}

static ggml_tensor * fill(ggml_tensor * t, float scale = 1.0f) {
    float * x = ggml_get_data_f32(t);
    for (int64_t i = 0; i < ggml_nelements(t); ++i) {
        x[i] = scale * rng_uniform();
    }
    return t;
}

static ggml_tensor * new_f32(ggml_context * ctx, std::vector<int64_t> ne, float scale = 1.0f) {
    return fill(ggml_new_tensor(ctx, GGML_TYPE_F32, (int) ne.size(), ne.data()), scale);
}

static ggml_tensor * new_i32(ggml_context * ctx, std::vector<int32_t> values) {
    ggml_tensor * t = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, (int64_t) values.size());
    memcpy(t->data, values.data(), values.size() * sizeof(int32_t));
    return t;
}

static ggml_tensor * new_scalar(ggml_context * ctx, float x) {
    ggml_tensor * t         = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 1);
    ggml_get_data_f32(t)[0] = x;
    return t;
}

static float get(const ggml_tensor * t, int64_t i0, int64_t i1 = 0, int64_t i2 = 0, int64_t i3 = 0) {
    return *(const float *) ((const char *) t->data + i0 * t->nb[0] + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3]);
}

struct context {
    ggml_context * ctx = ggml_init({ 256 * 1024 * 1024, nullptr, false });
    ~context() { ggml_free(ctx); }
    operator ggml_context *() { return ctx; }
};

static void compute(ggml_cgraph * graph, int n_threads) {
    ggml_cplan           plan = ggml_graph_plan(graph, n_threads, nullptr);
    std::vector<uint8_t> work(plan.work_size);
    plan.work_data = work.data();
    ggml_graph_compute(graph, &plan);
}

static ggml_cgraph * graph_of(ggml_context * ctx, ggml_tensor * out) {
    ggml_cgraph * graph = ggml_new_graph_custom(ctx, 4096, true);
    ggml_build_forward_expand(graph, out);
    return graph;
}

// the values of out, computed with 1, 2 and 3 threads, which have to be the same bytes
static std::vector<float> run(ggml_context * ctx, ggml_tensor * out, const std::string & name) {
    ggml_cgraph *      graph = graph_of(ctx, out);
    std::vector<float> first;
    for (int n_threads : { 1, 2, 3, 7 }) {
        memset(out->data, 0xff, ggml_nbytes(out));
        compute(graph, n_threads);
        std::vector<float> values(ggml_get_data_f32(out), ggml_get_data_f32(out) + ggml_nelements(out));
        if (first.empty()) {
            first = values;
        }
        check(memcmp(first.data(), values.data(), values.size() * sizeof(float)) == 0,
              name + ": same bytes with " + std::to_string(n_threads) + " threads");
    }
    return first;
}

static void compare(const std::vector<float> & got, const std::vector<double> & want, double limit, const std::string & name) {
    double scale = 0.0;
    double error = 0.0;
    for (size_t i = 0; i < want.size(); ++i) {
        scale = std::max(scale, std::fabs(want[i]));
        error = std::max(error, std::isfinite(got[i]) ? std::fabs(got[i] - want[i]) : INFINITY);
    }
    error /= std::max(scale, 1e-30);
    check(got.size() == want.size() && error <= limit, name, error, limit);
}

// --- gradients ------------------------------------------------------------------------------------------------------

struct function {
    ggml_tensor *              out;
    std::vector<ggml_tensor *> params;
};

// d(sum of out*r)/d(param) for a random r, from ggml_build_backward_expand, against central differences
static void check_gradients(const std::string & name, const std::function<function(ggml_context *)> & build, float eps, double limit) {
    context  ctx;
    function f = build(ctx);
    for (ggml_tensor * p : f.params) {
        ggml_set_param(p);
    }
    ggml_tensor * r    = new_f32(ctx, std::vector<int64_t>(f.out->ne, f.out->ne + 4));
    ggml_tensor * loss = ggml_sum(ctx, ggml_mul(ctx, f.out, r));
    ggml_set_loss(loss);
    ggml_cgraph * forward  = graph_of(ctx, f.out);
    ggml_cgraph * backward = graph_of(ctx, loss);
    ggml_build_backward_expand(ctx, backward, nullptr);
    ggml_graph_reset(backward);

    std::vector<std::vector<float>> grads;
    for (int n_threads : { 1, 2, 3 }) {
        compute(backward, n_threads);
        for (size_t i = 0; i < f.params.size(); ++i) {
            const ggml_tensor * g = ggml_graph_get_grad(backward, f.params[i]);
            std::vector<float>  values;
            for (int64_t j = 0; j < ggml_nelements(g); ++j) {
                const int64_t i0 = j % g->ne[0], i1 = j / g->ne[0] % g->ne[1], i2 = j / g->ne[0] / g->ne[1] % g->ne[2],
                              i3 = j / g->ne[0] / g->ne[1] / g->ne[2];
                values.push_back(get(g, i0, i1, i2, i3));
            }
            if (n_threads == 1) {
                grads.push_back(values);
            }
            check(memcmp(values.data(), grads[i].data(), values.size() * sizeof(float)) == 0, name + ": gradient, same bytes with other threads");
        }
    }

    auto value = [&]() {
        compute(forward, 1);
        double sum = 0.0;
        for (int64_t i = 0; i < ggml_nelements(f.out); ++i) {
            sum += (double) ggml_get_data_f32(f.out)[i] * ggml_get_data_f32(r)[i];
        }
        return sum;
    };
    for (size_t i = 0; i < f.params.size(); ++i) {
        float *             x = ggml_get_data_f32(f.params[i]);
        const int64_t       n = ggml_nelements(f.params[i]);
        std::vector<float>  got;
        std::vector<double> want;
        for (int64_t j = 0; j < n; j += std::max<int64_t>(1, n / 97)) {
            const float x0  = x[j];
            x[j]            = x0 + eps;
            const double xp = x[j], yp = value();
            x[j]            = x0 - eps;
            const double xm = x[j], ym = value();
            x[j] = x0;
            want.push_back((yp - ym) / (xp - xm));
            got.push_back(grads[i][j]);
        }
        compare(got, want, limit, name + ": gradient " + std::to_string(i));
    }
}

// --- matrix products ------------------------------------------------------------------------------------------------

static std::vector<double> mul_mat_reference(const ggml_tensor * a, const ggml_tensor * b, bool out_prod) {
    const int64_t       n  = out_prod ? a->ne[0] : a->ne[1];
    const int64_t       m  = out_prod ? b->ne[0] : b->ne[1];
    const int64_t       nk = out_prod ? a->ne[1] : a->ne[0];
    std::vector<double> c;
    for (int64_t i3 = 0; i3 < b->ne[3]; ++i3) {
        for (int64_t i2 = 0; i2 < b->ne[2]; ++i2) {
            const int64_t a2 = i2 / (b->ne[2] / a->ne[2]), a3 = i3 / (b->ne[3] / a->ne[3]);
            for (int64_t i1 = 0; i1 < m; ++i1) {
                for (int64_t i0 = 0; i0 < n; ++i0) {
                    double sum = 0.0;
                    for (int64_t k = 0; k < nk; ++k) {
                        sum += out_prod ? (double) get(a, i0, k, a2, a3) * get(b, i1, k, i2, i3)
                                        : (double) get(a, k, i0, a2, a3) * get(b, k, i1, i2, i3);
                    }
                    c.push_back(sum);
                }
            }
        }
    }
    return c;
}

static void test_mul_mat() {
    const std::vector<std::vector<int64_t>> shapes = {
        // m, k, n
        { 1, 1, 1 },      { 4, 1, 1 },     { 1, 65, 33 },     { 3, 40, 17 },   { 4, 5, 7 },      { 5, 16, 16 },
        { 13, 33, 31 },   { 14, 64, 32 },  { 15, 100, 33 },   { 28, 384, 48 }, { 29, 385, 65 },  { 40, 769, 63 },
        { 300, 17, 600 }, { 601, 50, 70 }, { 57, 1153, 530 }, { 6, 8, 513 },   { 2, 400, 1000 },
    };
    for (const auto & s : shapes) {
        const int64_t     m = s[0], k = s[1], n = s[2];
        const std::string name  = " m=" + std::to_string(m) + " k=" + std::to_string(k) + " n=" + std::to_string(n);
        const double      limit = 2e-7 * std::sqrt((double) k) + 2e-7;
        context           ctx;
        {
            ggml_tensor * a = new_f32(ctx, { k, n });
            ggml_tensor * b = new_f32(ctx, { k, m });
            compare(run(ctx, ggml_mul_mat(ctx, a, b), "mul_mat" + name), mul_mat_reference(a, b, false), limit, "mul_mat" + name);
        }
        {   // rows with gaps
            ggml_tensor * a = ggml_view_2d(ctx, new_f32(ctx, { k + 3, n }), k, n, (k + 3) * sizeof(float), sizeof(float));
            ggml_tensor * b = ggml_view_2d(ctx, new_f32(ctx, { k + 5, m }), k, m, (k + 5) * sizeof(float), 2 * sizeof(float));
            compare(run(ctx, ggml_mul_mat(ctx, a, b), "mul_mat view" + name), mul_mat_reference(a, b, false), limit, "mul_mat view" + name);
        }
        {
            ggml_tensor * a = new_f32(ctx, { n, k });
            ggml_tensor * b = new_f32(ctx, { m, k });
            compare(run(ctx, ggml_out_prod(ctx, a, b), "out_prod" + name), mul_mat_reference(a, b, true), limit, "out_prod" + name);
        }
        {
            ggml_tensor * a = new_f32(ctx, { n, k });
            ggml_tensor * b = ggml_transpose(ctx, new_f32(ctx, { k, m }));
            compare(run(ctx, ggml_out_prod(ctx, a, b), "out_prod transposed" + name), mul_mat_reference(a, b, true), limit,
                    "out_prod transposed" + name);
        }
    }
    for (int64_t r3 : { 1, 2 }) {   // dims 2 and 3 broadcast; heads permuted as in attention
        context           ctx;
        const std::string name = " broadcast r3=" + std::to_string(r3);
        ggml_tensor *     a    = ggml_permute(ctx, new_f32(ctx, { 20, 3, 37, 2 }), 0, 2, 1, 3);
        ggml_tensor *     b    = ggml_permute(ctx, new_f32(ctx, { 20, 9, 19, 2 * r3 }), 0, 2, 1, 3);
        compare(run(ctx, ggml_mul_mat(ctx, a, b), "mul_mat" + name), mul_mat_reference(a, b, false), 1e-6, "mul_mat" + name);
        ggml_tensor * c = ggml_permute(ctx, new_f32(ctx, { 20, 3, 19, 2 }), 0, 2, 1, 3);
        ggml_tensor * d = ggml_permute(ctx, new_f32(ctx, { 23, 9, 19, 2 * r3 }), 0, 2, 1, 3);
        compare(run(ctx, ggml_out_prod(ctx, c, d), "out_prod" + name), mul_mat_reference(c, d, true), 1e-6, "out_prod" + name);
        ggml_tensor * e = ggml_permute(ctx, new_f32(ctx, { 19, 23, 9, 2 * r3 }), 1, 0, 2, 3);
        compare(run(ctx, ggml_out_prod(ctx, c, e), "out_prod permuted" + name), mul_mat_reference(c, e, true), 1e-6, "out_prod permuted" + name);
    }
    {   // a row's bytes depend neither on its position nor on the other rows
        context                  ctx;
        ggml_tensor *            a    = new_f32(ctx, { 500, 700 });
        ggml_tensor *            b    = new_f32(ctx, { 500, 90 });
        ggml_tensor *            part = ggml_view_2d(ctx, b, 500, 9, b->nb[1], 37 * b->nb[1]);
        ggml_tensor *            cols = ggml_view_2d(ctx, a, 500, 41, a->nb[1], 333 * a->nb[1]);
        const std::vector<float> all  = run(ctx, ggml_mul_mat(ctx, a, b), "mul_mat");
        const std::vector<float> few  = run(ctx, ggml_mul_mat(ctx, a, part), "mul_mat");
        const std::vector<float> sub  = run(ctx, ggml_mul_mat(ctx, cols, b), "mul_mat");
        check(memcmp(all.data() + 37 * 700, few.data(), few.size() * sizeof(float)) == 0, "mul_mat: some rows have the bytes of all rows");
        bool same = true;
        for (int64_t i = 0; i < 90; ++i) {
            same = same && memcmp(all.data() + i * 700 + 333, sub.data() + i * 41, 41 * sizeof(float)) == 0;
        }
        check(same, "mul_mat: some columns have the bytes of all columns");
    }
    const std::vector<std::vector<int64_t>> broadcasts = {
        // a2, a3, b2, b3
        { 1, 1, 1, 1 }, { 3, 2, 3, 2 }, { 3, 1, 9, 1 }, { 3, 2, 9, 2 }, { 1, 1, 4, 3 }, { 2, 1, 2, 4 }, { 2, 2, 6, 6 },
    };
    for (const auto & s : broadcasts) {
        const std::string name =
            "mul_mat " + std::to_string(s[0]) + "," + std::to_string(s[1]) + " on " + std::to_string(s[2]) + "," + std::to_string(s[3]);
        check_gradients(
            name,
            [&](ggml_context * ctx) {
                ggml_tensor * a = new_f32(ctx, { 7, 11, s[0], s[1] });
                ggml_tensor * b = new_f32(ctx, { 7, 5, s[2], s[3] });
                return function{ ggml_mul_mat(ctx, a, b), { a, b } };
            },
            0.5f, 1e-5);
    }
}

static void test_attention() {
    check_gradients(
        "grouped-query attention, 9 heads on 3, batch 2",
        [](ggml_context * ctx) {
            const int64_t d = 6, n_tokens = 10, n_batch = 2;
            ggml_tensor * q    = new_f32(ctx, { d, 9, n_tokens, n_batch });
            ggml_tensor * k    = new_f32(ctx, { d, 3, n_tokens, n_batch });
            ggml_tensor * v    = new_f32(ctx, { d, 3, n_tokens, n_batch });
            ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_tokens, n_tokens);
            for (int64_t i = 0; i < n_tokens * n_tokens; ++i) {
                ggml_get_data_f32(mask)[i] = i % n_tokens > i / n_tokens ? -INFINITY : 0.0f;
            }
            ggml_tensor * kq  = ggml_mul_mat(ctx, ggml_permute(ctx, k, 0, 2, 1, 3), ggml_permute(ctx, q, 0, 2, 1, 3));
            kq                = ggml_soft_max_ext(ctx, kq, mask, 0.4f, 0.0f);
            ggml_tensor * kqv = ggml_mul_mat(ctx, ggml_cont(ctx, ggml_permute(ctx, v, 1, 2, 0, 3)), kq);
            return function{ ggml_cont(ctx, ggml_permute(ctx, kqv, 0, 2, 1, 3)), { q, k, v } };
        },
        1e-2f, 2e-4);
}

// --- element-wise, soft_max, rope: no libm --------------------------------------------------------------------------

static double silu(double x) {
    return x / (1.0 + std::exp(-x));
}

static void test_unary() {
    for (int64_t n : { 1, 3, 15, 16, 17, 31, 100 }) {
        const std::string   name = " n=" + std::to_string(n);
        context             ctx;
        ggml_tensor *       x = new_f32(ctx, { n, 5 }, 8.0f);
        ggml_tensor *       g = new_f32(ctx, { n, 5 });
        std::vector<double> want_silu, want_swiglu, want_back;
        for (int64_t i = 0; i < n * 5; ++i) {
            const double xi = ggml_get_data_f32(x)[i], gi = ggml_get_data_f32(g)[i], s = 1.0 / (1.0 + std::exp(-xi));
            want_silu.push_back(silu(xi));
            want_swiglu.push_back(silu(xi) * gi);
            want_back.push_back(gi * s * (1.0 + xi * (1.0 - s)));
        }
        compare(run(ctx, ggml_silu(ctx, x), "silu" + name), want_silu, 1e-6, "silu" + name);
        compare(run(ctx, ggml_swiglu_split(ctx, x, g), "swiglu" + name), want_swiglu, 1e-6, "swiglu" + name);
        compare(run(ctx, ggml_silu_back(ctx, g, x), "silu_back" + name), want_back, 1e-6, "silu_back" + name);
    }
    {   // the same number everywhere in a row gives the same bytes everywhere
        context       ctx;
        ggml_tensor * x = new_f32(ctx, { 45, 1 });
        ggml_set_f32(x, 0.7310585f);
        for (ggml_tensor * t : { ggml_silu(ctx, x), ggml_swiglu_split(ctx, x, x), ggml_silu_back(ctx, x, x), ggml_soft_max(ctx, x) }) {
            const std::vector<float> y = run(ctx, t, ggml_op_desc(t));
            check(std::count(y.begin(), y.end(), y[0]) == 45, std::string(ggml_op_desc(t)) + ": body and tail of a row agree");
        }
    }
    check_gradients(
        "swiglu",
        [](ggml_context * ctx) {
            ggml_tensor * x = new_f32(ctx, { 37, 3 }, 3.0f);
            ggml_tensor * g = new_f32(ctx, { 37, 3 });
            return function{ ggml_swiglu_split(ctx, x, g), { x, g } };
        },
        1e-2f, 5e-4);
    check_gradients(
        "rms_norm",
        [](ggml_context * ctx) {
            ggml_tensor * x = new_f32(ctx, { 37, 3, 2 });
            ggml_tensor * w = new_f32(ctx, { 37 });
            return function{ ggml_mul(ctx, ggml_rms_norm(ctx, x, 1e-5f), w), { x, w } };
        },
        1e-2f, 5e-4);
}

static void test_soft_max() {
    for (int64_t n : { 1, 7, 16, 33, 300 }) {
        context           ctx;
        const std::string name = "soft_max n=" + std::to_string(n);
        ggml_tensor *     x    = new_f32(ctx, { n, 4, 3, 2 }, 20.0f);
        ggml_tensor *     mask = new_f32(ctx, { n, 4 });
        for (int64_t i = 1; i < n; i += 3) {
            ggml_get_data_f32(mask)[i] = -INFINITY;
        }
        std::vector<double> want;
        for (int64_t r = 0; r < 24; ++r) {
            std::vector<double> y(n);
            double              max = -INFINITY, sum = 0.0;
            for (int64_t i = 0; i < n; ++i) {
                y[i] = 0.3 * ggml_get_data_f32(x)[r * n + i] + ggml_get_data_f32(mask)[r % 4 * n + i];
                max  = std::max(max, y[i]);
            }
            for (int64_t i = 0; i < n; ++i) {
                y[i] = std::exp(y[i] - max);
                sum += y[i];
            }
            for (int64_t i = 0; i < n; ++i) {
                want.push_back(y[i] / sum);
            }
        }
        compare(run(ctx, ggml_soft_max_ext(ctx, x, mask, 0.3f, 0.0f), name), want, 2e-6, name);
    }
    check_gradients(
        "soft_max",
        [](ggml_context * ctx) {
            ggml_tensor * x = new_f32(ctx, { 21, 4 }, 2.0f);
            return function{ ggml_soft_max_ext(ctx, x, nullptr, 0.7f, 0.0f), { x } };
        },
        1e-2f, 5e-4);
}

static void test_rope() {
    for (int mode : { GGML_ROPE_TYPE_NORMAL, GGML_ROPE_TYPE_NEOX }) {
        const std::string          name = "rope mode=" + std::to_string(mode);
        context                    ctx;
        const int64_t              d = 20, n_head = 3;
        const std::vector<int32_t> positions   = { 0, 1, 2, 77, 4095, 100000 };
        ggml_tensor *              x           = new_f32(ctx, { d, n_head, (int64_t) positions.size(), 2 });
        ggml_tensor *              pos         = new_i32(ctx, positions);
        const float                theta_scale = (float) std::pow(10000.0, (double) (-2.0f / d));
        std::vector<double>        want(ggml_nelements(x));
        for (int64_t i3 = 0; i3 < 2; ++i3) {
            for (int64_t i2 = 0; i2 < x->ne[2]; ++i2) {
                for (int64_t i1 = 0; i1 < n_head; ++i1) {
                    float theta = (float) positions[i2];   // ggml's own chain of roundings; sine and cosine are what is tested
                    for (int64_t i = 0; i < d / 2; ++i) {
                        const int64_t j0 = mode == GGML_ROPE_TYPE_NORMAL ? 2 * i : i, j1 = mode == GGML_ROPE_TYPE_NORMAL ? 2 * i + 1 : i + d / 2;
                        const double  x0 = get(x, j0, i1, i2, i3), x1 = get(x, j1, i1, i2, i3);
                        const int64_t row = ((i3 * x->ne[2] + i2) * n_head + i1) * d;
                        want[row + j0]    = x0 * std::cos((double) theta) - x1 * std::sin((double) theta);
                        want[row + j1]    = x0 * std::sin((double) theta) + x1 * std::cos((double) theta);
                        theta *= theta_scale;
                    }
                }
            }
        }
        compare(run(ctx, ggml_rope_ext(ctx, x, pos, nullptr, d, mode, 0, 10000.0f, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f), name), want, 3e-7, name);
        check_gradients(
            name,
            [&](ggml_context * c) {
                ggml_tensor * y = new_f32(c, { d, n_head, (int64_t) positions.size(), 2 });
                return function{ ggml_rope_ext(c, y, new_i32(c, positions), nullptr, d, mode, 0, 10000.0f, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f), { y } };
            },
            0.5f, 1e-5);
    }
}

// --- cross-entropy --------------------------------------------------------------------------------------------------

static void test_cross_entropy_sparse() {
    struct shape {
        int64_t              n_vocab;
        std::vector<int32_t> labels;
        float                scale;
        float                spread;
    };
    const std::vector<shape> shapes = {
        { 1, { 0 }, 1.0f, 1.0f },
        { 5, { 4, 0, 2 }, 0.25f, 1.0f },
        { 17, { 16, -1, 3, -100, 0 }, 1 / 3.f, 4.0f },
        { 33, { -1, -1, 7, -1 }, 1.0f, 4.0f },   // all but one masked
        { 16, { -1, -1 }, 1.0f, 4.0f },          // all masked
        { 4099, { 4098, 17, -1, 2048, 5, 6 }, 0.2f, 9.0f },
        { 64, { 3, 63 }, 1.0f, 3e4f },   // exp underflows
    };
    for (const shape & s : shapes) {
        const std::string   name = "cross_entropy_sparse n_vocab=" + std::to_string(s.n_vocab);
        context             ctx;
        const int64_t       n_tokens = (int64_t) s.labels.size();
        ggml_tensor *       logits   = new_f32(ctx, { s.n_vocab, n_tokens }, s.spread);
        ggml_tensor *       labels   = new_i32(ctx, s.labels);
        ggml_tensor *       scale    = new_scalar(ctx, s.scale);
        ggml_tensor *       grad     = new_scalar(ctx, 0.5f);
        double              loss     = 0.0;
        std::vector<double> want;
        for (int64_t i = 0; i < n_tokens; ++i) {
            const float * x   = ggml_get_data_f32(logits) + i * s.n_vocab;
            const double  max = *std::max_element(x, x + s.n_vocab);
            double        sum = 0.0;
            for (int64_t j = 0; j < s.n_vocab; ++j) {
                sum += std::exp(x[j] - max);
            }
            for (int64_t j = 0; j < s.n_vocab; ++j) {
                want.push_back(s.labels[i] < 0 ? 0.0 : 0.5 * s.scale * (std::exp(x[j] - max) / sum - (j == s.labels[i])));
            }
            loss += s.labels[i] < 0 ? 0.0 : std::log(sum) + max - x[s.labels[i]];
        }
        compare(run(ctx, ggml_cross_entropy_sparse(ctx, logits, labels, scale), name), { s.scale * loss }, 2e-7, name);
        const std::vector<float> got = run(ctx, ggml_cross_entropy_sparse_back(ctx, grad, logits, labels, scale), name + " back");
        compare(got, want, 2e-6, name + " back");
        bool zero = true;
        for (int64_t i = 0; i < n_tokens * s.n_vocab; ++i) {
            zero = zero && (s.labels[i / s.n_vocab] >= 0 || got[i] == 0.0f);
        }
        check(zero, name + ": masked rows have no gradient");
    }
    check_gradients(
        "cross_entropy_sparse",
        [](ggml_context * ctx) {
            ggml_tensor * logits = new_f32(ctx, { 35, 6 }, 2.0f);
            return function{ ggml_cross_entropy_sparse(ctx, logits, new_i32(ctx, { 3, -1, 34, 0, -1, 7 }), new_scalar(ctx, 0.25f)), { logits } };
        },
        1e-2f, 1e-3);
}

// --- optimizer ------------------------------------------------------------------------------------------------------

static void test_opt_step_adamw() {
    for (int n_params : { 7, 8 }) {
        const std::string  name = "opt_step_adamw with " + std::to_string(n_params) + " parameters";
        std::vector<float> first;
        for (int n_threads : { 1, 2, 3 }) {
            rng_state = 5;
            context       ctx;
            ggml_tensor * w = new_f32(ctx, { 37, 5 });
            ggml_tensor * g = new_f32(ctx, { 37, 5 });
            ggml_tensor * m = new_f32(ctx, { 37, 5 }, 0.0f);
            ggml_tensor * v = new_f32(ctx, { 37, 5 }, 0.0f);
            ggml_tensor * p = new_f32(ctx, { n_params });
            ggml_set_param(w);
            ggml_cgraph *       graph = graph_of(ctx, ggml_opt_step_adamw(ctx, w, g, m, v, p));
            const int64_t       n     = ggml_nelements(w);
            std::vector<double> dw(ggml_get_data_f32(w), ggml_get_data_f32(w) + n), dm(n, 0.0), dv(n, 0.0);
            const double        lr = 0.01, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, wd = 0.1, factor = n_params == 8 ? 0.3 : 1.0;
            for (int step = 1; step <= 5; ++step) {
                fill(g, 0.1f);
                const double c1 = 1.0 / (1.0 - std::pow(beta1, step)), c2 = 1.0 / (1.0 - std::pow(beta2, step));
                const double values[8] = { lr, beta1, beta2, eps, wd, c1, c2, factor };
                std::copy(values, values + n_params, ggml_get_data_f32(p));
                for (int64_t i = 0; i < n; ++i) {   // torch.optim.AdamW
                    const double gi = ggml_get_data_f32(g)[i] * factor;
                    dw[i] *= 1.0 - lr * wd;
                    dm[i] = beta1 * dm[i] + (1.0 - beta1) * gi;
                    dv[i] = beta2 * dv[i] + (1.0 - beta2) * gi * gi;
                    dw[i] -= lr * dm[i] * c1 / (std::sqrt(dv[i] * c2) + eps);
                }
                compute(graph, n_threads);
            }
            std::vector<float> got(ggml_get_data_f32(w), ggml_get_data_f32(w) + n);
            compare(got, dw, 1e-6, name);
            compare({ ggml_get_data_f32(v), ggml_get_data_f32(v) + n }, dv, 1e-6, name + ": v");
            if (first.empty()) {
                first = got;
            }
            check(memcmp(first.data(), got.data(), n * sizeof(float)) == 0, name + ": same bytes with other threads");
        }
    }
}

static void test_sum_sqr() {
    for (int64_t n : { 1, 15, 16, 17, 16384, 16385, 100003, 1000000 }) {
        context           ctx;
        const std::string name = "sum_sqr n=" + std::to_string(n);
        ggml_tensor *     x    = new_f32(ctx, { n });
        double            want = 0.0;
        for (int64_t i = 0; i < n; ++i) {
            want += (double) ggml_get_data_f32(x)[i] * ggml_get_data_f32(x)[i];
        }
        compare(run(ctx, ggml_sum_sqr(ctx, x), name), { want }, 1e-7, name);
    }
}

int main() {
    ggml_cpu_init();
    test_mul_mat();
    test_attention();
    test_unary();
    test_soft_max();
    test_rope();
    test_cross_entropy_sparse();
    test_opt_step_adamw();
    test_sum_sqr();
    printf("test-ops: %d checks, %d failed\n", n_checks, n_failed);
    return n_failed == 0 ? 0 : 1;
}
