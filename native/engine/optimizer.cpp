#include "optimizer.h"

#include "error.h"
#include "ggml-alloc.h"
#include "rng.h"

#include <algorithm>
#include <cmath>

namespace toy {

double learning_rate(const config & cfg, int step) {
    const auto & t = cfg.train;
    if (step <= t.warmup_steps) {
        return t.learning_rate * step / t.warmup_steps;
    }
    const double lo = t.min_learning_rate, hi = t.learning_rate;
    const double at =
        t.steps > t.warmup_steps ? std::min(1.0, (double) (step - t.warmup_steps) / (t.steps - t.warmup_steps)) : 1.0;   // 0..1 after warm-up
    if (t.schedule == "cosine") {
        return lo + 0.5 * (hi - lo) * (1 + det_cos(3.141592653589793 * at));
    }
    if (t.schedule == "linear") {
        return hi + (lo - hi) * at;
    }
    if (t.schedule == "wsd") {
        const double decay_from = 0.8;
        return at <= decay_from ? hi : hi + (lo - hi) * (at - decay_from) / (1 - decay_from);
    }
    return hi;
}

adamw::adamw(const config & cfg, const weights & w, backend & be) : cfg(cfg), w(w), be(be) {
    const size_t n          = w.trained.size();
    const size_t graph_size = 4 * n + 16;
    ctx                     = ggml_init(
        { /*mem_size =*/(4 * n + 32) * ggml_tensor_overhead() + ggml_graph_overhead_custom(graph_size, false), nullptr, /*no_alloc =*/true });
    for (auto & group : hyper) {
        for (ggml_tensor *& h : group) {
            h = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 8);
        }
    }
    graph = ggml_new_graph_custom(ctx, graph_size, false);
    for (const param & p : w.trained) {
        ggml_build_forward_expand(graph, ggml_opt_step_adamw(ctx, p.w, p.g, p.m, p.v, hyper[p.embedding][p.decay]));
    }
    buf = ggml_backend_alloc_ctx_tensors(ctx, be.states);
    if (!buf) {
        throw error("oom", EXIT_FAILED, "cannot allocate the optimizer's parameters", LOWER_STEP);
    }
}

adamw::~adamw() {
    ggml_backend_buffer_free(buf);
    ggml_free(ctx);
}

double adamw::grad_norm(const std::vector<ggml_tensor *> & squares, const param ** first_bad) const {
    double sum = 0;
    for (const ggml_tensor * t : squares) {
        float part;
        ggml_backend_tensor_get(t, &part, 0, sizeof(part));
        sum += part;
    }
    *first_bad = nullptr;
    if (!std::isfinite(sum)) {
        std::vector<float> g;
        for (size_t i = 0; i < w.params.size() && !*first_bad; i++) {
            const param & p = w.params[i];
            if (p.frozen) {
                continue;
            }
            g.resize(ggml_nelements(p.g));
            ggml_backend_tensor_get(p.g, g.data(), 0, ggml_nbytes(p.g));
            *first_bad = std::all_of(g.begin(), g.end(), [](float x) { return std::isfinite(x); }) ? nullptr : &p;
        }
    }
    return std::sqrt(sum);
}

// x^n by squaring: libm's pow differs between machines
static double int_pow(double x, int n) {
    double r = 1;
    for (; n > 0; n >>= 1, x *= x) {
        r = n & 1 ? r * x : r;
    }
    return r;
}

void adamw::step(int step, double lr, double norm) {
    const auto & t    = cfg.train;
    const float  clip = t.grad_clip > 0 && norm > t.grad_clip ? (float) (t.grad_clip / norm) : 1.0f;
    for (const int group : { 0, 1, 2, 3 }) {
        const bool  embedding = group & 2, decay = group & 1;
        const float h[8] = {
            (float) (embedding ? lr * t.embedding_lr_scale : lr),
            (float) t.beta1,
            (float) t.beta2,
            (float) t.eps,
            decay ? (float) t.weight_decay : 0.0f,
            (float) (1 / (1 - int_pow(t.beta1, step))),
            (float) (1 / (1 - int_pow(t.beta2, step))),
            clip,
        };
        ggml_backend_tensor_set(hyper[embedding][decay], h, 0, sizeof(h));
    }
    checked(be.states, LOWER_STEP, [&]() { return ggml_backend_graph_compute(be.states, graph); });
}

size_t adamw::bytes() const {
    return ggml_backend_buffer_get_size(buf);
}

}   // namespace toy
