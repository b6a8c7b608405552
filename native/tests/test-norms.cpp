// The norms with their gain and bias: fused forward and backward against double, backward against central differences, and the same bytes with
// 1, 2, 3 and 7 threads.

#include "ggml-impl.h"   // the nodes of a graph
#include "ops.h"

struct norm_case {
    bool                 rms;
    std::vector<int64_t> ne;
    float                offset;   // of x: far from zero, a variance from sums of squares would cancel
};

static std::vector<norm_case> cases() {
    std::vector<norm_case> all;
    for (bool rms : { true, false }) {
        for (int64_t n : { 1, 2, 15, 16, 17, 31, 33, 100, 769 }) {
            for (int64_t rows : { 1, 15, 16, 17, 50 }) {
                all.push_back({ rms, { n, rows }, 0.0f });
            }
            all.push_back({ rms, { n, 5, 3, 2 }, rms ? 0.0f : 30.0f });
        }
    }
    return all;
}

static std::string name_of(const norm_case & c) {
    std::string name = c.rms ? "rms_norm" : "norm";
    for (int64_t n : c.ne) {
        name += " " + std::to_string(n);
    }
    return name + (c.offset > 0 ? " offset" : "");
}

static ggml_tensor * norm_mul(ggml_context * ctx, bool rms, ggml_tensor * x, ggml_tensor * w, ggml_tensor * b) {
    return rms ? ggml_mul(ctx, ggml_rms_norm(ctx, x, 1e-5f), w) : ggml_add(ctx, ggml_mul(ctx, ggml_norm(ctx, x, 1e-5f), w), b);
}

// y = (x - mean)*r*w + b; dx, dw and db of the sum of y*dy
struct reference {
    std::vector<double> y, dx, dw, db;

    reference(bool rms, ggml_tensor * x, ggml_tensor * w, ggml_tensor * b, ggml_tensor * dy) {
        const int64_t n = x->ne[0];
        dw.assign(n, 0.0);
        db.assign(n, 0.0);
        for (int64_t r = 0; r < ggml_nrows(x); ++r) {
            const int64_t r1 = r % x->ne[1], r2 = r / x->ne[1] % x->ne[2], r3 = r / x->ne[1] / x->ne[2];
            const float * row  = (const float *) ((const char *) x->data + r1 * x->nb[1] + r2 * x->nb[2] + r3 * x->nb[3]);
            double        mean = 0.0, var = 0.0, mean_g = 0.0, mean_zg = 0.0;
            for (int64_t i = 0; i < n && !rms; ++i) {
                mean += (double) row[i] / (double) n;
            }
            for (int64_t i = 0; i < n; ++i) {
                var += (row[i] - mean) * (row[i] - mean) / (double) n;
            }
            const double rstd = 1.0 / std::sqrt(var + 1e-5f);
            for (int64_t i = 0; i < n; ++i) {
                const double z = (row[i] - mean) * rstd, d = get(dy, i, r1, r2, r3), g = d * get(w, i);
                y.push_back(z * get(w, i) + (rms ? 0.0 : get(b, i)));
                mean_g += rms ? 0.0 : g / (double) n;
                mean_zg += z * g / (double) n;
                dw[i] += d * z;
                db[i] += d;
            }
            for (int64_t i = 0; i < n; ++i) {
                const double z = (row[i] - mean) * rstd, g = (double) get(dy, i, r1, r2, r3) * get(w, i);
                dx.push_back((g - mean_g - z * mean_zg) * rstd);
            }
        }
    }
};

static void test_values() {
    for (const norm_case & c : cases()) {
        const std::string name = name_of(c);
        context           ctx;
        ggml_tensor *     x   = new_f32(ctx, c.ne);
        ggml_tensor *     dy  = new_f32(ctx, c.ne);
        ggml_tensor *     add = new_f32(ctx, c.ne);
        ggml_tensor *     w   = new_f32(ctx, { c.ne[0] });
        ggml_tensor *     b   = new_f32(ctx, { c.ne[0] });
        for (int64_t i = 0; i < ggml_nelements(x); ++i) {
            ggml_get_data_f32(x)[i] += c.offset;
        }
        const reference want(c.rms, x, w, b, dy);
        // a row of one is constant to LayerNorm: what is left of its gradient is rounding
        const double    limit = c.offset > 0 ? 3e-5 : 3e-6;
        compare(run(ctx, norm_mul(ctx, c.rms, x, w, b), name), want.y, limit, name);
        for (ggml_tensor * a : { (ggml_tensor *) nullptr, add }) {
            std::vector<double> all = want.dx;
            for (size_t i = 0; i < all.size(); ++i) {
                all[i] += a ? ggml_get_data_f32(a)[i] : 0.0;
            }
            all.insert(all.end(), want.dw.begin(), want.dw.end());
            if (!c.rms) {
                all.insert(all.end(), want.db.begin(), want.db.end());
            }
            ggml_tensor * back = c.rms ? ggml_rms_norm_mul_back(ctx, dy, x, w, a, 1e-5f) : ggml_norm_mul_back(ctx, dy, x, w, a, 1e-5f);
            compare(run(ctx, back, name + " back"), all, limit, name + (a ? " back, added" : " back"));
        }
    }
    for (bool rms : { true, false }) {   // rows with gaps
        const std::string name = rms ? "rms_norm of a view" : "norm of a view";
        context           ctx;
        ggml_tensor *     all = new_f32(ctx, { 40, 6, 4, 3 });
        ggml_tensor *     x   = ggml_view_4d(ctx, all, 33, 5, 3, 2, all->nb[1], all->nb[2], all->nb[3], 3 * sizeof(float));
        ggml_tensor *     w   = new_f32(ctx, { 33 });
        ggml_tensor *     b   = new_f32(ctx, { 33 });
        compare(run(ctx, norm_mul(ctx, rms, x, w, b), name), reference(rms, x, w, b, new_f32(ctx, { 33, 5, 3, 2 })).y, 3e-6, name);
    }
}

// how many operations of a kind the backward graph of a function has
static int count_ops(const std::function<function(ggml_context *)> & build, ggml_op op) {
    context  ctx;
    function f = build(ctx);
    for (ggml_tensor * p : f.params) {
        ggml_set_param(p);
    }
    ggml_tensor * loss = ggml_sum(ctx, f.out);
    ggml_set_loss(loss);
    ggml_cgraph * graph = graph_of(ctx, loss);
    ggml_build_backward_expand(ctx, graph, nullptr);
    int n = 0;
    for (int i = 0; i < graph->n_nodes; ++i) {
        n += graph->nodes[i]->op == op;
    }
    return n;
}

static void test_gradients() {
    struct shape {
        const char *                            name;
        int                                     n_fused;
        std::function<function(ggml_context *)> build;
    };
    for (bool rms : { true, false }) {
        const auto norm   = [rms](ggml_context * ctx, ggml_tensor * x, ggml_tensor * w, ggml_tensor * b) { return norm_mul(ctx, rms, x, w, b); };
        const auto params = [rms](ggml_tensor * x, ggml_tensor * w, ggml_tensor * b) {
            return rms ? std::vector<ggml_tensor *>{ x, w } : std::vector<ggml_tensor *>{ x, w, b };
        };
        const auto some = [](ggml_context * ctx, const std::vector<int64_t> & ne) { return new_f32(ctx, ne); };

        const std::vector<shape> shapes = {
            { "plain", 1,
              [&](ggml_context * ctx) {
                  ggml_tensor *x = some(ctx, { 37, 19 }), *w = some(ctx, { 37 }), *b = some(ctx, { 37 });
                  return function{ norm(ctx, x, w, b), params(x, w, b) };
              } },
            { "in a residual stream, twice", 2,
              [&](ggml_context * ctx) {
                  ggml_tensor * x = some(ctx, { 21, 5, 3 }), *w = some(ctx, { 21 }), *b = some(ctx, { 21 });
                  ggml_tensor * h = ggml_scale(ctx, x, 2.0f);
                  h               = ggml_add(ctx, h, ggml_silu(ctx, norm(ctx, h, w, b)));
                  h               = ggml_add(ctx, ggml_silu(ctx, norm(ctx, h, w, b)), h);
                  return function{ h, params(x, w, b) };
              } },
            { "frozen gain", 1,
              [&](ggml_context * ctx) {
                  ggml_tensor *x = some(ctx, { 18, 4 }), *w = some(ctx, { 18 }), *b = some(ctx, { 18 });
                  return function{ norm(ctx, x, w, b), { x } };
              } },
            { "gain only", 0,
              [&](ggml_context * ctx) {
                  ggml_tensor *x = some(ctx, { 18, 4 }), *w = some(ctx, { 18 }), *b = some(ctx, { 18 });
                  return function{ norm(ctx, x, w, b), { w } };
              } },
            { "read between", 0,   // what is normalised is used once more without its gain
              [&](ggml_context * ctx) {
                  ggml_tensor * x = some(ctx, { 18, 4 }), *w = some(ctx, { 18 }), *b = some(ctx, { 18 });
                  ggml_tensor * z = rms ? ggml_rms_norm(ctx, x, 1e-5f) : ggml_norm(ctx, x, 1e-5f);
                  ggml_tensor * y = ggml_mul(ctx, z, w);
                  return function{ ggml_add(ctx, rms ? y : ggml_add(ctx, y, b), ggml_silu(ctx, z)), params(x, w, b) };
              } },
            { "of a view, whose rows have gaps", 0,
              [&](ggml_context * ctx) {
                  ggml_tensor * x = some(ctx, { 21, 4 }), *w = some(ctx, { 18 }), *b = some(ctx, { 18 });
                  ggml_tensor * h = ggml_scale(ctx, x, 2.0f);
                  return function{ norm(ctx, ggml_view_2d(ctx, h, 18, 4, h->nb[1], sizeof(float)), w, b), params(x, w, b) };
              } },
            { "a gain that is computed, and one row", 1,
              [&](ggml_context * ctx) {
                  ggml_tensor *x = some(ctx, { 18 }), *w = some(ctx, { 18 });
                  return function{ norm(ctx, ggml_scale(ctx, x, 2.0f), ggml_silu(ctx, w), ggml_scale(ctx, x, 3.0f)), { x, w } };
              } },
            { "a gain for each row", 0,
              [&](ggml_context * ctx) {
                  ggml_tensor *x = some(ctx, { 18, 4 }), *w = some(ctx, { 18, 4 }), *b = some(ctx, { 18 });
                  return function{ norm(ctx, x, w, b), params(x, w, b) };
              } },
        };
        for (const shape & s : shapes) {
            const std::string name = std::string(rms ? "rms_norm " : "norm ") + s.name;
            check_gradients(name, s.build, 1e-2f, 1e-3);
            const int n = count_ops(s.build, rms ? GGML_OP_RMS_NORM_MUL_BACK : GGML_OP_NORM_MUL_BACK);
            check(n == s.n_fused, name + ": fused", n, s.n_fused);
        }
    }
}

int main() {
    ggml_cpu_init();
    test_values();
    test_gradients();
    return summary("test-norms");
}
