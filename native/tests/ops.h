// What the tests of ggml's operations share: data, a run with several numbers of threads, gradients by finite differences.

#pragma once

#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

inline int n_failed = 0;
inline int n_checks = 0;

inline void check(bool ok, const std::string & name, double error = 0.0, double limit = 0.0) {
    n_checks++;
    if (!ok) {
        n_failed++;
        fprintf(stderr, "FAIL %s (error %.3g, limit %.3g)\n", name.c_str(), error, limit);
    }
}

// TOY_TEST_EMULATED: the CPU is emulated, so that all takes twenty times as long: every check is made, of fewer numbers of threads, of
// fewer elements, and of no product of more than two million terms
inline const bool emulated = getenv("TOY_TEST_EMULATED") != nullptr;

inline const std::vector<int> thread_counts = emulated ? std::vector<int>{ 1, 2 } : std::vector<int>{ 1, 2, 3, 7 };

inline bool too_long(int64_t n_terms) {
    return emulated && n_terms > 2 << 20;
}

// --- data -----------------------------------------------------------------------------------------------------------

inline uint64_t rng_state = 1;

inline float rng_uniform() {   // in [-1, 1)
    rng_state = rng_state * 6364136223846793005ull + 1442695040888963407ull;
    return (float) ((double) (rng_state >> 40) / (double) (1 << 23) - 1.0);
}

inline ggml_tensor * fill(ggml_tensor * t, float scale = 1.0f) {
    float * x = ggml_get_data_f32(t);
    for (int64_t i = 0; i < ggml_nelements(t); ++i) {
        x[i] = scale * rng_uniform();
    }
    return t;
}

inline ggml_tensor * new_f32(ggml_context * ctx, std::vector<int64_t> ne, float scale = 1.0f) {
    return fill(ggml_new_tensor(ctx, GGML_TYPE_F32, (int) ne.size(), ne.data()), scale);
}

inline ggml_tensor * new_i32(ggml_context * ctx, std::vector<int32_t> values) {
    ggml_tensor * t = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, (int64_t) values.size());
    memcpy(t->data, values.data(), values.size() * sizeof(int32_t));
    return t;
}

inline ggml_tensor * new_scalar(ggml_context * ctx, float x) {
    ggml_tensor * t         = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 1);
    ggml_get_data_f32(t)[0] = x;
    return t;
}

inline float get(const ggml_tensor * t, int64_t i0, int64_t i1 = 0, int64_t i2 = 0, int64_t i3 = 0) {
    return *(const float *) ((const char *) t->data + i0 * t->nb[0] + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3]);
}

// Memory for tensors, full of NaN where nothing has been put: what is read before it is written shows
struct context {
    inline static const size_t n_bytes = 320 * 1024 * 1024;

    struct freed {
        void operator()(void * p) const { free(p); }
    };
    using block = std::unique_ptr<void, freed>;

    inline static std::vector<block> unused;   // given back, full of NaN again

    block          memory;
    ggml_context * ctx;

    context() {
        if (unused.empty()) {
            unused.emplace_back(memset(malloc(n_bytes), 0xff, n_bytes));
        }
        memory = std::move(unused.back());
        unused.pop_back();
        ctx = ggml_init({ n_bytes, memory.get(), false });
    }
    context(const context &) = delete;
    ~context() {
        memset(memory.get(), 0xff, ggml_used_mem(ctx));
        ggml_free(ctx);
        unused.push_back(std::move(memory));
    }
    operator ggml_context *() { return ctx; }
};

// The work memory is full of NaN, so that what an operation reads there and has not written shows, and ends where the plan says
inline void compute(ggml_cgraph * graph, int n_threads) {
    static const size_t  n_after = 4096;
    ggml_cplan           plan    = ggml_graph_plan(graph, n_threads, nullptr);
    std::vector<uint8_t> work(plan.work_size + n_after, 0xff);
    plan.work_data = work.data();
    ggml_graph_compute(graph, &plan);
    check(std::all_of(work.end() - n_after, work.end(), [](uint8_t x) { return x == 0xff; }), "nothing is written after the work memory");
}

inline ggml_cgraph * graph_of(ggml_context * ctx, ggml_tensor * out) {
    ggml_cgraph * graph = ggml_new_graph_custom(ctx, 4096, true);
    ggml_build_forward_expand(graph, out);
    return graph;
}

// the values of out, computed with several numbers of threads, which have to be the same bytes
inline std::vector<float> run(ggml_context * ctx, ggml_tensor * out, const std::string & name) {
    ggml_cgraph *      graph = graph_of(ctx, out);
    std::vector<float> first;
    for (int n_threads : thread_counts) {
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

// the largest error, as a share of the largest value
inline void compare(const std::vector<float> & got, const std::vector<double> & want, double limit, const std::string & name) {
    double scale = 0.0;
    double error = got.size() == want.size() ? 0.0 : INFINITY;
    for (size_t i = 0; i < std::min(got.size(), want.size()); ++i) {
        scale = std::max(scale, std::fabs(want[i]));
        error = std::max(error, std::isfinite(got[i]) && std::isfinite(want[i]) ? std::fabs(got[i] - want[i]) : INFINITY);
    }
    error /= std::max(scale, 1e-30);
    check(error <= limit, name, error, limit);
}

// --- gradients ------------------------------------------------------------------------------------------------------

struct function {
    ggml_tensor *              out;
    std::vector<ggml_tensor *> params;
};

// all of t, contiguous
inline std::vector<float> values_of(const ggml_tensor * t) {
    std::vector<float> values;
    for (int64_t j = 0; j < ggml_nelements(t); ++j) {
        const int64_t i0 = j % t->ne[0], i1 = j / t->ne[0] % t->ne[1], i2 = j / t->ne[0] / t->ne[1] % t->ne[2],
                      i3 = j / t->ne[0] / t->ne[1] / t->ne[2];
        values.push_back(get(t, i0, i1, i2, i3));
    }
    return values;
}

// the gradients of the parameters, computed with several numbers of threads: the same bytes; with an accumulator for each parameter, or with none
inline std::vector<std::vector<float>> gradients_of(ggml_context * ctx, const std::string & name, ggml_tensor * loss,
                                                    const std::vector<ggml_tensor *> & params, bool accumulate) {
    ggml_cgraph *              graph = graph_of(ctx, loss);
    std::vector<ggml_tensor *> accs(ggml_graph_n_nodes(graph), nullptr);
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        accs[i]            = accumulate && (node->flags & GGML_TENSOR_FLAG_PARAM) ? ggml_new_tensor(ctx, GGML_TYPE_F32, 4, node->ne) : nullptr;
    }
    ggml_build_backward_expand(ctx, graph, accs.data());

    std::vector<std::vector<float>> first;
    for (int n_threads : thread_counts) {
        ggml_graph_reset(graph);
        compute(graph, n_threads);
        std::vector<std::vector<float>> grads;
        for (ggml_tensor * p : params) {
            grads.push_back(values_of(ggml_graph_get_grad(graph, p)));
        }
        first = n_threads == 1 ? grads : first;
        for (size_t i = 0; i < params.size(); ++i) {
            check(memcmp(grads[i].data(), first[i].data(), grads[i].size() * sizeof(float)) == 0, name + ": gradient, same bytes with other threads");
        }
    }
    return first;
}

// d(sum of out*r)/d(param) for a random r, from ggml_build_backward_expand, against central differences
inline void check_gradients(const std::string & name, const std::function<function(ggml_context *)> & build, float eps, double limit) {
    context  ctx;
    function f = build(ctx);
    for (ggml_tensor * p : f.params) {
        ggml_set_param(p);
    }
    ggml_tensor * r    = new_f32(ctx, std::vector<int64_t>(f.out->ne, f.out->ne + 4));
    ggml_tensor * loss = ggml_sum(ctx, ggml_mul(ctx, f.out, r));
    ggml_set_loss(loss);
    ggml_cgraph * forward = graph_of(ctx, f.out);

    const std::vector<std::vector<float>> grads = gradients_of(ctx, name, loss, f.params, /*accumulate =*/false);
    const std::vector<std::vector<float>> accs  = gradients_of(ctx, name, loss, f.params, /*accumulate =*/true);
    for (size_t i = 0; i < grads.size(); ++i) {   // where several are added up, their order may differ
        compare(accs[i], std::vector<double>(grads[i].begin(), grads[i].end()), 1e-6, name + ": gradient " + std::to_string(i) + " accumulated");
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
        float *              x = ggml_get_data_f32(f.params[i]);
        const int64_t        n = ggml_nelements(f.params[i]);
        std::vector<float>   got;
        std::vector<double>  want;
        std::vector<int64_t> picked = { 0 };   // and the largest, of which errors are shares
        for (int64_t j = 0; j < n; ++j) {
            picked[0] = std::fabs(grads[i][j]) > std::fabs(grads[i][picked[0]]) ? j : picked[0];
        }
        for (int64_t j = 0; j < n; j += std::max<int64_t>(1, n / (emulated ? 7 : 97))) {
            picked.push_back(j);
        }
        check(std::all_of(grads[i].begin(), grads[i].end(), [](float g) { return std::isfinite(g); }),
              name + ": gradient " + std::to_string(i) + " is finite");
        for (const int64_t j : picked) {
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

// the last line of a test program, and its exit status
inline int summary(const char * program) {
    printf("%s: %d checks, %d failed\n", program, n_checks, n_failed);
    return n_failed == 0 ? 0 : 1;
}
