// Tests of the fused head and cross-entropy: the loss against double, its gradients against the unfused graph and by finite differences;
// masks, odd sizes, several chunks of rows, weights of other types, two micro-batches into one accumulator.

#include "ops.h"

struct shape {
    int64_t   n_embd, n_vocab, n_tokens;
    int       keep;   // one of `keep` labels is not masked; 0: all are masked
    ggml_type type;
    bool      bf16 = false;   // products of operands rounded to bf16
    int64_t   gap  = 0;       // elements between two rows, of everything that has rows
};

static std::string name_of(const shape & s) {
    return std::string("linear_cross_entropy ") + ggml_type_name(s.type) + " " + std::to_string(s.n_embd) + " x " + std::to_string(s.n_vocab) +
           ", tokens " + std::to_string(s.n_tokens) + (s.bf16 ? ", in bf16" : "") + (s.gap ? ", rows with gaps" : "") +
           (s.keep == 0  ? ", all masked"
            : s.keep > 1 ? ", some masked"
                         : "");
}

struct problem {
    ggml_tensor *x, *w, *labels, *scale, *grad, *dx, *dw;
    bool         bf16;

    problem(ggml_context * ctx, const shape & s) : bf16(s.bf16) {
        const auto    rows  = [&](ggml_tensor * t) { return s.gap ? ggml_view_2d(ctx, t, s.n_embd, t->ne[1], t->nb[1], 0) : t; };
        const int64_t width = s.n_embd + s.gap;

        x                   = rows(new_f32(ctx, { width, s.n_tokens }, 2.0f));
        ggml_tensor * w_f32 = new_f32(ctx, { width, s.n_vocab });
        w                   = w_f32;
        if (s.type != GGML_TYPE_F32) {
            w = ggml_new_tensor_2d(ctx, s.type, width, s.n_vocab);
            ggml_quantize_chunk(s.type, ggml_get_data_f32(w_f32), w->data, 0, s.n_vocab, width, nullptr);
        }
        w = rows(w);
        std::vector<int32_t> ids(s.n_tokens, -1);
        for (int64_t i = 0; i < s.n_tokens; i++) {
            if (s.keep > 0 && i % s.keep == s.keep / 2) {
                ids[i] = (int32_t) ((rng_uniform() + 1) / 2 * s.n_vocab);
            }
        }
        labels = new_i32(ctx, ids);
        scale  = new_scalar(ctx, 0.3f / (float) s.n_tokens);
        grad   = new_scalar(ctx, 1.5f);
        dx     = rows(new_f32(ctx, { width, s.n_tokens }));
        dw     = s.type == GGML_TYPE_F32 ? rows(new_f32(ctx, { width, s.n_vocab })) : nullptr;
    }

    ggml_tensor * loss(ggml_context * ctx) const { return loss_of(ctx, grad, dx, dw); }
    ggml_tensor * loss_alone(ggml_context * ctx) const { return loss_of(ctx, nullptr, nullptr, nullptr); }

    ggml_tensor * loss_of(ggml_context * ctx, ggml_tensor * grad, ggml_tensor * dx, ggml_tensor * dw) const {
        ggml_tensor * loss = ggml_linear_cross_entropy(ctx, x, w, labels, scale, grad, dx, dw);
        if (bf16) {
            ggml_mul_mat_set_prec(loss, GGML_PREC_BF16);
        }
        return loss;
    }
};

static std::vector<float> values(const ggml_tensor * t) {
    return t ? values_of(t) : std::vector<float>();
}

// the same in double, from the weights as they are after their conversion
struct expected {
    double              loss = 0;
    std::vector<double> dx, dw;
};

static expected compute_in_double(const problem & p) {
    const auto         rounded = [&](double x) { return p.bf16 ? (double) ggml_bf16_to_fp32(ggml_fp32_to_bf16((float) x)) : x; };
    const int64_t      C = p.x->ne[0], V = p.w->ne[1], N = p.x->ne[1];
    std::vector<float> w(C * V);
    if (p.w->type == GGML_TYPE_F32) {
        w = values(p.w);
    }
    for (int64_t v = 0; v < V && p.w->type != GGML_TYPE_F32; v++) {
        ggml_get_type_traits(p.w->type)->to_float((const char *) p.w->data + v * p.w->nb[1], w.data() + v * C, C);
    }
    const std::vector<float> all_x = values(p.x);
    const double             scale = ggml_get_data_f32(p.scale)[0], grad = ggml_get_data_f32(p.grad)[0];
    expected                 e = { 0, std::vector<double>(C * N), std::vector<double>(C * V) };
    std::vector<double>      l(V);
    for (int64_t i = 0; i < N; i++) {
        const int32_t label = ((const int32_t *) p.labels->data)[i];
        if (label < 0) {
            continue;
        }
        const float * x   = all_x.data() + i * C;
        double        max = -INFINITY, sum = 0;
        for (int64_t v = 0; v < V; v++) {
            l[v] = 0;
            for (int64_t c = 0; c < C; c++) {
                l[v] += rounded(x[c]) * rounded(w[v * C + c]);
            }
            max = std::max(max, l[v]);
        }
        for (int64_t v = 0; v < V; v++) {
            sum += std::exp(l[v] - max);
        }
        e.loss += scale * (std::log(sum) - (l[label] - max));
        for (int64_t v = 0; v < V; v++) {
            const double d = rounded(grad * scale * (std::exp(l[v] - max) / sum - (v == label)));
            for (int64_t c = 0; c < C; c++) {
                e.dx[i * C + c] += d * rounded(w[v * C + c]);
                e.dw[v * C + c] += d * rounded(x[c]);
            }
        }
    }
    return e;
}

// whether what lies between the rows of t is still the byte that was there
static bool has_gaps_of(const ggml_tensor * t, uint8_t byte) {
    bool ok = true;
    for (int64_t i = 0; i + 1 < t->ne[1]; i++) {
        const uint8_t * row = (const uint8_t *) t->data + i * t->nb[1];
        ok                  = ok && std::all_of(row + t->ne[0] * t->nb[0], row + t->nb[1], [&](uint8_t x) { return x == byte; });
    }
    return ok;
}

// loss and gradients with 1, 2, 3 and 7 threads: the same bytes, and those that double gives
static void test_values(const shape & s) {
    context            ctx;
    const problem      p     = { ctx, s };
    ggml_tensor *      loss  = p.loss(ctx);
    ggml_cgraph *      graph = graph_of(ctx, loss);
    const std::string  name  = name_of(s);
    std::vector<float> first_dx, first_dw, first_loss;
    for (int n_threads : thread_counts) {
        memset(loss->data, 0xff, sizeof(float));
        memset(p.dx->data, 0xff, ggml_nbytes(p.dx));
        if (p.dw) {
            memset(p.dw->data, 0, ggml_nbytes(p.dw));
        }
        compute(graph, n_threads);
        if (n_threads == 1) {
            first_loss = values(loss);
            first_dx   = values(p.dx);
            first_dw   = values(p.dw);
        }
        const auto same = [](const std::vector<float> & a, const std::vector<float> & b) {
            return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
        };
        check(same(values(loss), first_loss) && same(values(p.dx), first_dx) && same(values(p.dw), first_dw),
              name + ": same bytes with " + std::to_string(n_threads) + " threads");
        check(has_gaps_of(p.dx, 0xff) && (!p.dw || has_gaps_of(p.dw, 0)), name + ": nothing between the rows is written");
    }
    const expected want  = compute_in_double(p);
    const double   limit = s.bf16 ? 1e-3 : 1e-5;   // bf16: a logit's last bits decide how its gradient is rounded
    compare(first_loss, { want.loss }, 5e-6, name);
    compare(first_dx, want.dx, limit, name + ": dx");
    for (int64_t i = 0; i < s.n_tokens; i++) {
        const float * row = first_dx.data() + i * s.n_embd;
        check(((const int32_t *) p.labels->data)[i] >= 0 || std::all_of(row, row + s.n_embd, [](float x) { return x == 0.0f; }),
              name + ": exactly zero where masked");
    }
    if (p.dw) {
        compare(first_dw, want.dw, limit, name + ": dw");
    }

    // one gradient alone has the bytes of both together
    if (p.dw) {
        fill(p.dx);
        compute(graph_of(ctx, p.loss_of(ctx, p.grad, p.dx, nullptr)), 3);
        memset(p.dw->data, 0, ggml_nbytes(p.dw));
        compute(graph_of(ctx, p.loss_of(ctx, p.grad, nullptr, p.dw)), 2);
        check(values(p.dx) == first_dx && values(p.dw) == first_dw, name + ": one gradient alone");
    }

    // a gradient of zero: the loss has the same bytes, and nothing else is touched
    ggml_get_data_f32(p.grad)[0] = 0.0f;
    fill(p.dx);
    first_dx = values(p.dx);
    compute(graph, 2);
    check(values(loss) == first_loss && values(p.dx) == first_dx && values(p.dw) == first_dw, name + ": the loss alone");
    ggml_tensor * alone = p.loss_alone(ctx);
    compute(graph_of(ctx, alone), 3);
    check(values(alone) == first_loss, name + ": the loss without gradients");

    // set, not added to
    if (p.dw) {
        ggml_get_data_f32(p.grad)[0] = 1.5f;
        memset(p.dw->data, 0xff, ggml_nbytes(p.dw));
        loss->flags |= GGML_TENSOR_FLAG_SET;
        compute(graph, 2);
        check(values(p.dw) == first_dw, name + ": dw set");
    }
}

// dx may be where x was: the same bytes
static void test_in_place(const shape & s) {
    context       ctx;
    const problem p = { ctx, s };
    if (!p.dw) {
        return;
    }
    memset(p.dw->data, 0, ggml_nbytes(p.dw));
    compute(graph_of(ctx, p.loss(ctx)), 1);
    const std::vector<float> dx = values(p.dx), dw = values(p.dw);

    memset(p.dw->data, 0, ggml_nbytes(p.dw));
    compute(graph_of(ctx, p.loss_of(ctx, p.grad, p.x, p.dw)), 3);
    check(values(p.x) == dx && values(p.dw) == dw, name_of(s) + ": dx in the place of x");
}

// through ggml_build_backward_expand, two micro-batches into the same accumulator, against the graph whose logits exist
static void test_graph(const shape & s, bool tied) {
    context       ctx;
    const problem p      = { ctx, s };
    ggml_tensor * h      = new_f32(ctx, { s.n_embd, s.n_tokens });
    ggml_tensor * gain   = new_f32(ctx, { s.n_embd });
    ggml_tensor * tokens = new_i32(ctx, std::vector<int32_t>(s.n_tokens, (int32_t) s.n_vocab / 2));
    ggml_tensor * d_gain = new_f32(ctx, { s.n_embd }, 0.0f);
    ggml_set_param(gain);
    ggml_set_param(p.w);
    const std::string name = name_of(s) + (tied ? ", tied" : "");

    std::vector<float> grads[2];
    float              losses[2];
    for (bool fused : { false, true }) {
        ggml_tensor * dw   = p.dw;
        ggml_tensor * in   = tied ? ggml_add(ctx, h, ggml_get_rows(ctx, p.w, tokens)) : h;
        ggml_tensor * x    = ggml_mul(ctx, in, gain);
        ggml_tensor * loss = fused ? ggml_linear_cross_entropy(ctx, x, p.w, p.labels, p.scale, p.grad, p.dx, dw)
                                   : ggml_cross_entropy_sparse(ctx, ggml_mul_mat(ctx, p.w, x), p.labels, p.scale);
        ggml_set_loss(loss);
        ggml_cgraph *              graph = graph_of(ctx, loss);
        std::vector<ggml_tensor *> accs(ggml_graph_n_nodes(graph), nullptr);
        for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
            ggml_tensor * node = ggml_graph_node(graph, i);
            accs[i]            = node == p.w ? dw : node == gain ? d_gain : node == loss ? p.grad : nullptr;
        }
        ggml_build_backward_expand(ctx, graph, accs.data());
        check(ggml_adds_in_place(loss) == fused, name + ": the loss adds in place");
        memset(dw->data, fused ? 0xff : 0, ggml_nbytes(dw));   // fused: set by the first micro-batch
        memset(d_gain->data, 0, ggml_nbytes(d_gain));
        loss->flags |= fused ? GGML_TENSOR_FLAG_SET : 0;
        compute(graph, 2);
        loss->flags &= ~GGML_TENSOR_FLAG_SET;
        compute(graph, 3);
        losses[fused] = ggml_get_data_f32(loss)[0];
        grads[fused]  = values(dw);
        grads[fused].insert(grads[fused].end(), ggml_get_data_f32(d_gain), ggml_get_data_f32(d_gain) + s.n_embd);
    }
    compare({ losses[1] }, { losses[0] }, 1e-6, name + ": loss as that of the logits");
    compare(grads[1], std::vector<double>(grads[0].begin(), grads[0].end()), 1e-5, name + ": gradients as those of the logits, twice");
}

static void test_finite_differences(const shape & s) {
    context       ctx;
    const problem p               = { ctx, s };
    ggml_tensor * loss            = p.loss(ctx);
    ggml_cgraph * graph           = graph_of(ctx, loss);
    ggml_get_data_f32(p.scale)[0] = 0.25f;
    memset(p.dw->data, 0, ggml_nbytes(p.dw));
    compute(graph, 2);
    const std::pair<ggml_tensor *, std::vector<float>> params[] = { { p.x, values(p.dx) }, { p.w, values(p.dw) } };
    ggml_tensor *                                      alone    = p.loss_alone(ctx);
    ggml_cgraph *                                      only     = graph_of(ctx, alone);
    const double                                       grad     = ggml_get_data_f32(p.grad)[0];
    for (const auto & [param, got_all] : params) {
        std::vector<float>  got;
        std::vector<double> want;
        float *             x = ggml_get_data_f32(param);
        for (int64_t j = 0; j < ggml_nelements(param); j += std::max<int64_t>(1, ggml_nelements(param) / 97)) {
            const float x0 = x[j];
            const auto  at = [&](float shifted) {
                x[j] = shifted;
                compute(only, 1);
                return (double) ggml_get_data_f32(alone)[0];
            };
            const double up = at(x0 + 0.02f), x_up = x[j], down = at(x0 - 0.02f), x_down = x[j];
            x[j] = x0;
            want.push_back(grad * (up - down) / (x_up - x_down));
            got.push_back(got_all[j]);
        }
        compare(got, want, 2e-3, name_of(s) + (param == p.x ? ": dx" : ": dw") + " by finite differences");
    }
}

int main() {
    const shape shapes[] = {
        { 1, 2, 1, 1, GGML_TYPE_F32 },
        { 1, 1, 3, 1, GGML_TYPE_F32 },   // one class: no loss
        { 7, 33, 5, 1, GGML_TYPE_F32 },
        { 33, 17, 19, 3, GGML_TYPE_F32 },
        { 64, 256, 256, 1, GGML_TYPE_F32 },
        { 48, 1000, 300, 1, GGML_TYPE_F32 },   // two chunks
        { 40, 771, 700, 2, GGML_TYPE_F32 },    // masked rows in every chunk
        { 96, 65, 600, 1, GGML_TYPE_F32 },     // more terms than a block of the GEMM
        { 5, 70000, 250, 1, GGML_TYPE_F32 },   // chunks by the size of the vocabulary
        { 20, 50, 9, 0, GGML_TYPE_F32 },
        { 64, 300, 21, 1, GGML_TYPE_F16 },
        { 64, 300, 21, 2, GGML_TYPE_BF16 },
        { 128, 515, 270, 1, GGML_TYPE_Q8_0 },
        { 96, 515, 33, 1, GGML_TYPE_Q4_1 },
        { 576, 700, 40, 1, GGML_TYPE_Q4_0 },
        { 512, 515, 33, 3, GGML_TYPE_Q6_K },
        { 64, 256, 256, 1, GGML_TYPE_F32, true },
        { 47, 771, 700, 2, GGML_TYPE_F32, true },
        { 128, 515, 37, 1, GGML_TYPE_Q8_0, true },
        { 33, 170, 600, 2, GGML_TYPE_F32, false, 3 },
        { 64, 170, 40, 1, GGML_TYPE_F32, true, 5 },
        { 64, 515, 40, 1, GGML_TYPE_Q8_0, false, 32 },
        { 1, 50, 40, 1, GGML_TYPE_F16, false, 1 },
    };
    for (const shape & s : shapes) {
        test_values(s);
        test_in_place(s);
    }
    for (bool tied : { false, true }) {
        test_graph({ 33, 170, 19, 3, GGML_TYPE_F32 }, tied);
        test_graph({ 64, 515, 530, 1, GGML_TYPE_F32 }, tied);
    }
    test_finite_differences({ 6, 35, 7, 1, GGML_TYPE_F32 });
    test_finite_differences({ 11, 9, 20, 2, GGML_TYPE_F32 });
    return summary("test-linear-cross-entropy");
}
