// Operations that vendor-patches/ adds or changes, element by element and row by row: forward against a plain reference in double
// precision, backward against central finite differences, and the same bytes with 1, 2, 3 and 7 threads.

#include "ops.h"

// --- element-wise, soft_max: no libm --------------------------------------------------------------------------------

static double silu(double x) {
    return x / (1.0 + std::exp(-x));
}

static double gelu(double x) {
    return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
}

static double gelu_gradient(double x) {
    const double t = std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x));
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * std::sqrt(2.0 / M_PI) * (1.0 + 3.0 * 0.044715 * x * x);
}

static void test_unary() {
    for (int64_t n : { 1, 3, 15, 16, 17, 31, 100 }) {
        const std::string   name = " n=" + std::to_string(n);
        context             ctx;
        ggml_tensor *       x = new_f32(ctx, { n, 5 }, 8.0f);
        ggml_tensor *       g = new_f32(ctx, { n, 5 });
        std::vector<double> want_silu, want_swiglu, want_back, want_gelu, want_geglu, want_gelu_back;
        for (int64_t i = 0; i < n * 5; ++i) {
            const double xi = ggml_get_data_f32(x)[i], gi = ggml_get_data_f32(g)[i], s = 1.0 / (1.0 + std::exp(-xi));
            want_silu.push_back(silu(xi));
            want_swiglu.push_back(silu(xi) * gi);
            want_back.push_back(gi * s * (1.0 + xi * (1.0 - s)));
            want_gelu.push_back(gelu(xi));
            want_geglu.push_back(gelu(xi) * gi);
            want_gelu_back.push_back(gi * gelu_gradient(xi));
        }
        compare(run(ctx, ggml_silu(ctx, x), "silu" + name), want_silu, 1e-6, "silu" + name);
        compare(run(ctx, ggml_swiglu_split(ctx, x, g), "swiglu" + name), want_swiglu, 1e-6, "swiglu" + name);
        compare(run(ctx, ggml_silu_back(ctx, g, x), "silu_back" + name), want_back, 1e-6, "silu_back" + name);
        compare(run(ctx, ggml_gelu(ctx, x), "gelu" + name), want_gelu, 1e-6, "gelu" + name);
        compare(run(ctx, ggml_geglu_split(ctx, x, g), "geglu" + name), want_geglu, 1e-6, "geglu" + name);
        compare(run(ctx, ggml_gelu_back(ctx, g, x), "gelu_back" + name), want_gelu_back, 1e-6, "gelu_back" + name);
    }
    {   // each value on its own, not only against the largest; and far out, where exp overflows
        context                  ctx;
        const std::vector<float> values = { 0.0f,  1e-30f, -1e-30f, 0.1f,    -0.1f,  1.0f,    -1.0f, 4.0f,  -4.0f,
                                            9.99f, -9.99f, 10.01f,  -10.01f, 100.0f, -100.0f, 1e30f, -1e30f };
        const int64_t            n      = (int64_t) values.size();
        ggml_tensor *            x      = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n);
        memcpy(x->data, values.data(), n * sizeof(float));
        ggml_tensor *            one = ggml_set_f32(ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n), 1.0f);
        const std::vector<float> y   = run(ctx, ggml_gelu(ctx, x), "gelu");
        const std::vector<float> dx  = run(ctx, ggml_gelu_back(ctx, one, x), "gelu_back");
        for (int64_t i = 0; i < n; ++i) {
            const double v = values[i], far = std::fabs(v) > 50.0, want = far ? std::max(v, 0.0) : gelu(v), slope = far ? v > 0.0 : gelu_gradient(v);
            check(std::fabs(y[i] - want) <= 2e-7 * std::fabs(v), "gelu of " + std::to_string(v), y[i] - want);
            check(std::fabs(dx[i] - slope) <= 5e-7, "gradient of gelu at " + std::to_string(v), dx[i] - slope);
        }
    }
    {   // the same number everywhere in a row gives the same bytes everywhere
        context       ctx;
        ggml_tensor * x = new_f32(ctx, { 45, 1 });
        ggml_set_f32(x, 0.7310585f);
        for (ggml_tensor * t : { ggml_silu(ctx, x), ggml_swiglu_split(ctx, x, x), ggml_silu_back(ctx, x, x), ggml_gelu(ctx, x),
                                 ggml_geglu_split(ctx, x, x), ggml_gelu_back(ctx, x, x), ggml_soft_max(ctx, x) }) {
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
        "gelu",
        [](ggml_context * ctx) {
            ggml_tensor * x = new_f32(ctx, { 37, 3, 2 }, 4.0f);
            return function{ ggml_gelu(ctx, x), { x } };
        },
        1e-2f, 5e-4);
}

// mean and variance of a row, its normalised values y, and the gradient (dy - mean(dy) - y*mean(y*dy))/sqrt(variance + eps)
static void norm_reference(const float * x, const float * dy, int64_t n, double eps, std::vector<double> & y, std::vector<double> & dx) {
    double mean = 0.0, var = 0.0, mean_dy = 0.0, mean_ydy = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        mean += (double) x[i] / n;
        mean_dy += (double) dy[i] / n;
    }
    for (int64_t i = 0; i < n; ++i) {
        var += (x[i] - mean) * (x[i] - mean) / n;
    }
    const double rstd = 1.0 / std::sqrt(var + eps);
    for (int64_t i = 0; i < n; ++i) {
        y.push_back((x[i] - mean) * rstd);
        mean_ydy += y.back() * dy[i] / n;
    }
    for (int64_t i = 0; i < n; ++i) {
        dx.push_back((dy[i] - mean_dy - y[y.size() - n + i] * mean_ydy) * rstd);
    }
}

static void test_norm() {
    for (int64_t n : { 1, 2, 15, 16, 17, 100, 769 }) {
        for (float offset : { 0.0f, 30.0f }) {   // far from zero, a variance from sums of squares would cancel
            const std::string name = " n=" + std::to_string(n) + " offset=" + std::to_string((int) offset);
            context           ctx;
            ggml_tensor *     x  = new_f32(ctx, { n, 5, 3, 2 });
            ggml_tensor *     dy = new_f32(ctx, { n, 5, 3, 2 });
            for (int64_t i = 0; i < ggml_nelements(x); ++i) {
                ggml_get_data_f32(x)[i] += offset;
            }
            std::vector<double> y, dx;
            for (int64_t r = 0; r < 30; ++r) {
                norm_reference(ggml_get_data_f32(x) + r * n, ggml_get_data_f32(dy) + r * n, n, 1e-5, y, dx);
            }
            compare(run(ctx, ggml_norm(ctx, x, 1e-5f), "norm" + name), y, offset > 0.0f ? 3e-5 : 2e-6, "norm" + name);
            compare(run(ctx, ggml_norm_back(ctx, dy, x, 1e-5f), "norm_back" + name), dx, 1e-6, "norm_back" + name);
        }
    }
    {   // rows with gaps, in dims 1 to 3
        context             ctx;
        ggml_tensor *       all  = new_f32(ctx, { 40, 6, 4, 3 });
        ggml_tensor *       x    = ggml_view_4d(ctx, all, 33, 5, 3, 2, all->nb[1], all->nb[2], all->nb[3], 3 * sizeof(float));
        ggml_tensor *       dy   = new_f32(ctx, { 33, 5, 3, 2 });
        ggml_tensor *       part = ggml_view_4d(ctx, new_f32(ctx, { 35, 5, 3, 2 }), 33, 5, 3, 2, 35 * 4, 35 * 5 * 4, 35 * 15 * 4, 4);
        std::vector<double> y, dx, dx_part;
        for (int64_t r = 0; r < 30; ++r) {
            const float * row = (const float *) ((const char *) x->data + r % 5 * x->nb[1] + r / 5 % 3 * x->nb[2] + r / 15 * x->nb[3]);
            norm_reference(row, ggml_get_data_f32(dy) + r * 33, 33, 1e-5, y, dx);
            norm_reference(row, (const float *) part->data + r * 35, 33, 1e-5, y, dx_part);
        }
        compare(run(ctx, ggml_norm_back(ctx, dy, x, 1e-5f), "norm_back view"), dx, 2e-6, "norm_back view");
        compare(run(ctx, ggml_norm_back(ctx, part, x, 1e-5f), "norm_back views"), dx_part, 2e-6, "norm_back views");
    }
    check_gradients(
        "norm",
        [](ggml_context * ctx) {
            ggml_tensor * x = new_f32(ctx, { 37, 3, 2 });
            ggml_tensor * w = new_f32(ctx, { 37 });
            ggml_tensor * b = new_f32(ctx, { 37 });
            return function{ ggml_add(ctx, ggml_mul(ctx, ggml_norm(ctx, x, 1e-5f), w), b), { x, w, b } };
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
    test_unary();
    test_norm();
    test_soft_max();
    test_cross_entropy_sparse();
    test_opt_step_adamw();
    test_sum_sqr();
    return summary("test-ops");
}
