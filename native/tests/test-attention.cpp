// Attention by tiles: forward against a plain reference in double precision, backward against a reference in double and against central
// finite differences, and the same bytes with 1, 2, 3 and 7 threads.

#include "ops.h"

struct shape {
    int64_t D, H, K, T, S, B;
    bool    causal;

    std::string name() const {
        std::string s = "attn";
        for (const int64_t n : { D, H, K, T, S, B }) {
            s += " " + std::to_string(n);
        }
        return s + (causal ? " causal" : "");
    }

    bool too_long() const { return ::too_long(D * H * T * S * B); }
};

static const std::vector<shape> SHAPES = {
    // heads of one to several vectors, and of no whole number of them; one to several tiles of queries and blocks of keys
    { 64, 4, 2, 150, 150, 2, true },
    { 32, 2, 2, 256, 256, 1, true },
    { 16, 4, 4, 64, 64, 2, true },
    { 5, 3, 1, 65, 65, 2, true },
    { 33, 2, 1, 70, 70, 1, true },
    { 64, 3, 3, 197, 197, 1, false },
    { 48, 9, 3, 40, 40, 2, true },
    { 1, 2, 2, 7, 7, 3, true },
    { 20, 4, 1, 1, 1, 2, true },
    { 40, 6, 2, 2, 130, 1, true },
    { 24, 6, 3, 3, 3, 2, false },
    { 64, 6, 2, 1, 300, 1, true },
    { 80, 1, 1, 130, 241, 1, true },
    { 7, 5, 5, 129, 30, 2, false },
    { 100, 2, 2, 17, 225, 2, true },
    { 128, 2, 1, 64, 113, 1, false },
    { 12, 8, 2, 5, 5, 1, true },
    { 9, 2, 1, 300, 300, 1, true },
    { 256, 2, 1, 9, 120, 1, true },
    // enough heads of k for one part each, whose sums are the result; odd distances from the keys to the diagonal
    { 16, 24, 24, 150, 150, 1, true },
    { 32, 16, 8, 100, 100, 3, true },
    { 32, 20, 20, 67, 92, 1, true },
};

// how q, k and v lie: one after the other, or as parts of the rows of one product (and their gradients likewise, or not), as heads
// before tokens, and with gaps
enum class layout { plain, joint, shared, permuted, gaps };

static ggml_tensor * new_heads(ggml_context * ctx, layout l, int64_t D, int64_t N, int64_t T, int64_t B, float scale = 1.0f) {
    switch (l) {
        case layout::permuted:
            return ggml_permute(ctx, new_f32(ctx, { D, T, N, B }, scale), 0, 2, 1, 3);
        case layout::gaps: {
            ggml_tensor * t = new_f32(ctx, { D + 3, N + 1, T + 2, B }, scale);
            return ggml_view_4d(ctx, t, D, N, T, B, t->nb[1], t->nb[2], t->nb[3], 2 * sizeof(float) + t->nb[1]);
        }
        default:
            return new_f32(ctx, { D, N, T, B }, scale);
    }
}

struct operands {
    ggml_tensor * q, *k, *v;
    float         scale;
    ggml_tensor * qkv = nullptr;   // layout::joint

    bool bf16 = false;

    ggml_tensor * attn(ggml_context * ctx, bool causal) const {
        ggml_tensor * out = qkv ? ggml_attn_qkv(ctx, qkv, k->ne[1], scale, causal) : ggml_attn(ctx, q, k, v, scale, causal);
        ggml_attn_set_bf16(out, bf16);
        return out;
    }
};

static operands new_operands(ggml_context * ctx, const shape & s, layout l) {
    // scores of a few units, so that the softmax is neither flat nor a step
    const float scale = 3.0f / std::sqrt((float) s.D);
    if (l == layout::shared || l == layout::joint) {
        ggml_tensor * t    = new_f32(ctx, { s.D, s.H + 2 * s.K, std::max(s.T, s.S), s.B });
        const auto    view = [&](int64_t first, int64_t n, int64_t rows) {
            return ggml_view_4d(ctx, t, s.D, n, rows, s.B, t->nb[1], t->nb[2], t->nb[3], first * t->nb[1]);
        };
        return { view(0, s.H, s.T), view(s.H, s.K, s.S), view(s.H + s.K, s.K, s.S), scale, l == layout::joint ? t : nullptr };
    }
    return { new_heads(ctx, l, s.D, s.H, s.T, s.B, 2.0f), new_heads(ctx, l, s.D, s.K, s.S, s.B, 2.0f), new_heads(ctx, l, s.D, s.K, s.S, s.B), scale };
}

struct reference {
    std::vector<double> out, dq, dk, dv;
};

// In bf16 what goes into the products is rounded, but for p and ds. The scores are those of powers of 2, with log2(e) in q.
static const float LOG2E = 0x1.715476p+0f;

static double rounded(float x, bool bf16) {
    return bf16 ? ggml_bf16_to_fp32(ggml_fp32_to_bf16(x)) : x;
}

static reference reference_of(const shape & s, const operands & x, const ggml_tensor * dout) {
    reference  r;
    const bool bf16 = x.bf16;
    const auto at   = [](int64_t d, int64_t h, int64_t t, int64_t b, int64_t D, int64_t H, int64_t T) { return ((b * T + t) * H + h) * D + d; };
    r.out.resize(s.D * s.H * s.T * s.B);
    r.dq.resize(r.out.size());
    r.dk.resize(s.D * s.K * s.S * s.B);
    r.dv.resize(r.dk.size());
    std::vector<double> p(s.S), dp(s.S);
    for (int64_t b = 0; b < s.B; ++b) {
        for (int64_t h = 0; h < s.H; ++h) {
            const int64_t kv = h / (s.H / s.K);
            for (int64_t t = 0; t < s.T; ++t) {
                const int64_t n   = s.causal ? s.S - s.T + t + 1 : s.S;
                double        max = -INFINITY, sum = 0.0, delta = 0.0;
                for (int64_t j = 0; j < n; ++j) {
                    p[j] = dp[j] = 0.0;
                    for (int64_t d = 0; d < s.D; ++d) {
                        const float  f = x.scale * LOG2E;
                        const double q = bf16 ? rounded(get(x.q, d, h, t, b) * f, true) / LOG2E : (double) x.scale * get(x.q, d, h, t, b);
                        p[j] += q * rounded(get(x.k, d, kv, j, b), bf16);
                        dp[j] += rounded(get(dout, d, h, t, b), bf16) * rounded(get(x.v, d, kv, j, b), bf16);
                    }
                    max = std::max(max, p[j]);
                }
                for (int64_t j = 0; j < n; ++j) {
                    sum += p[j] = std::exp(p[j] - max);
                }
                for (int64_t j = 0; j < n; ++j) {
                    p[j] /= sum;
                    delta += p[j] * dp[j];
                }
                for (int64_t j = 0; j < n; ++j) {
                    const double ds = p[j] * (dp[j] - delta) * x.scale;
                    for (int64_t d = 0; d < s.D; ++d) {
                        const int64_t iq = at(d, h, t, b, s.D, s.H, s.T), ik = at(d, kv, j, b, s.D, s.K, s.S);
                        r.out[iq] += p[j] * rounded(get(x.v, d, kv, j, b), bf16);
                        r.dq[iq] += ds * rounded(get(x.k, d, kv, j, b), bf16);
                        r.dk[ik] += bf16 ? ds / x.scale * rounded(get(x.q, d, h, t, b) * x.scale, true) : ds * get(x.q, d, h, t, b);
                        r.dv[ik] += p[j] * rounded(get(dout, d, h, t, b), bf16);
                    }
                }
            }
        }
    }
    return r;
}

// the gradient of one product as if it were one of three tensors
static std::vector<float> apart(const shape & s, const std::vector<float> & grad) {
    const int64_t      heads[3] = { s.H, s.K, s.K };
    std::vector<float> parts;
    int64_t            first = 0;
    for (const int64_t n : heads) {
        for (int64_t t = 0; t < s.T * s.B; ++t) {
            const auto row = grad.begin() + (t * (s.H + 2 * s.K) + first) * s.D;
            parts.insert(parts.end(), row, row + n * s.D);
        }
        parts.resize(GGML_PAD(parts.size() * sizeof(float), GGML_MEM_ALIGN) / sizeof(float));
        first += n;
    }
    return parts;
}

static void test_values(const shape & s, layout l, const std::string & name, bool bf16 = false) {
    context  ctx;
    operands x                     = new_operands(ctx, s, l);
    x.bf16                         = bf16;
    const bool               rows  = l == layout::shared || l == layout::joint;
    ggml_tensor *            dout  = new_heads(ctx, rows ? layout::plain : l, s.D, s.H, s.T, s.B);
    const reference          want  = reference_of(s, x, dout);
    ggml_tensor *            out   = x.attn(ctx, s.causal);
    const std::vector<float> got   = run(ctx, out, name);
    // scores of up to 20, rounded to 2^-24 of that; in bf16 each p and ds is off by up to 2^-9 of itself
    const double             limit = bf16 ? 4e-3 : 5e-6;
    compare(got, want.out, limit, name);

    ggml_tensor *      back = ggml_attn_back(ctx, dout, out);
    std::vector<float> grad = run(ctx, back, name + " back");
    std::vector<float> separate;
    if (x.qkv) {
        check(ggml_are_same_shape(back, x.qkv), name + " back: one gradient");
        grad                = apart(s, grad);
        ggml_tensor * parts = ggml_attn(ctx, x.q, x.k, x.v, x.scale, s.causal);
        ggml_attn_set_bf16(parts, bf16);
        check(run(ctx, parts, name) == got, name + ": the bits of operands that are given one by one");
        separate = run(ctx, ggml_attn_back(ctx, dout, parts), name + " back");
    }
    // the parts of the gradient follow each other, padded to GGML_MEM_ALIGN
    size_t at = 0;
    for (const std::vector<double> * part : { &want.dq, &want.dk, &want.dv }) {
        const std::vector<float> got_part(grad.begin() + at, grad.begin() + at + part->size());
        const std::string        part_name = name + " back, from " + std::to_string(at);
        if (s.S == 1 && part != &want.dv) {   // a softmax of one score is flat
            check(*std::max_element(got_part.begin(), got_part.end()) < 1e-6f && *std::min_element(got_part.begin(), got_part.end()) > -1e-6f,
                  part_name);
        } else {
            compare(got_part, *part, limit, part_name);
        }
        check(!x.qkv || std::equal(got_part.begin(), got_part.end(), separate.begin() + at),
              part_name + ": the bits of operands that are given one by one");
        at += GGML_PAD(part->size() * sizeof(float), GGML_MEM_ALIGN) / sizeof(float);
    }
    check(at == grad.size(), name + " back: size");
}

// what a query does not see changes no bit of its result, be it beyond the diagonal or another sequence
static void test_hidden() {
    const shape   s = { 32, 2, 1, 100, 130, 2, true };
    context       ctx;
    operands      x      = new_operands(ctx, s, layout::plain);
    ggml_tensor * out    = ggml_attn(ctx, x.q, x.k, x.v, x.scale, true);
    const auto    before = run(ctx, out, "attn, hidden");
    for (ggml_tensor * t : { x.k, x.v }) {
        for (int64_t j = 91; j < s.S; ++j) {   // seen from query 61 on
            for (int64_t d = 0; d < s.D; ++d) {
                ggml_get_data_f32(t)[j * s.D + d] *= 1000.0f;
            }
        }
    }
    const auto    after = run(ctx, out, "attn, hidden");
    const int64_t row = s.D * s.H, second = row * s.T;
    check(memcmp(before.data(), after.data(), 61 * row * sizeof(float)) == 0, "attn: later keys change nothing");
    check(memcmp(before.data() + 61 * row, after.data() + 61 * row, row * sizeof(float)) != 0, "attn: the first query that sees them changes");
    check(memcmp(before.data() + second, after.data() + second, second * sizeof(float)) == 0, "attn: another sequence changes nothing");
}

// scores that overflow without the maximum taken off, and gradients of a softmax that is nearly a step
static void test_large() {
    const shape s = { 16, 2, 2, 80, 80, 1, true };
    context     ctx;
    operands    x          = new_operands(ctx, s, layout::plain);
    x.scale                = 100.0f;
    ggml_tensor *   dout   = new_f32(ctx, { s.D, s.H, s.T, s.B });
    const reference want   = reference_of(s, x, dout);
    ggml_tensor *   out    = ggml_attn(ctx, x.q, x.k, x.v, x.scale, true);
    const auto      values = run(ctx, out, "attn, large scores");
    compare(values, want.out, 1e-3, "attn, large scores");   // the scores' own rounding: 1000 * 2^-24 * a few terms
    for (const float g : run(ctx, ggml_attn_back(ctx, dout, out), "attn_back, large scores")) {
        check(std::isfinite(g), "attn_back, large scores: finite");
    }
}

// buffers grow with the tokens, not with their square
static void test_memory() {
    const auto work = [](int64_t T, bool back) {
        ggml_context * ctx    = ggml_init({ 1 << 20, nullptr, /*no_alloc =*/true });
        ggml_tensor *  q      = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, 64, 8, T, 1);
        ggml_tensor *  k      = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, 64, 4, T, 1);
        ggml_tensor *  out    = ggml_attn(ctx, q, k, k, 0.125f, true);
        ggml_tensor *  result = back ? ggml_attn_back(ctx, q, out) : out;
        const size_t   n      = ggml_graph_plan(graph_of(ctx, result), 4, nullptr).work_size + ggml_nbytes(result) + ggml_nbytes(out->src[3]);
        ggml_free(ctx);
        return (double) n;
    };
    for (const bool back : { false, true }) {
        const double growth = work(8192, back) / work(2048, back);
        check(growth <= 4.0, back ? "attn_back: memory of 4 times the tokens" : "attn: memory of 4 times the tokens", growth, 4.0);
    }
}

int main() {
    ggml_cpu_init();
    for (const shape & s : SHAPES) {
        if (s.too_long()) {
            continue;
        }
        test_values(s, layout::plain, s.name());
        if (s.T >= 8) {   // a few queries stay in f32
            test_values(s, layout::plain, s.name() + " bf16", true);
        }
    }
    for (const shape & s : { shape{ 64, 4, 2, 70, 70, 2, true }, shape{ 20, 6, 3, 33, 90, 2, true }, shape{ 16, 2, 2, 3, 40, 2, true },
                             shape{ 33, 2, 1, 70, 70, 2, false } }) {
        test_values(s, layout::shared, s.name() + " shared");
        test_values(s, layout::permuted, s.name() + " permuted");
        test_values(s, layout::gaps, s.name() + " gaps");
    }
    for (const shape & s : SHAPES) {
        if (s.T == s.S && !s.too_long()) {
            test_values(s, layout::joint, s.name() + " joint");
            if (s.T >= 8) {
                test_values(s, layout::joint, s.name() + " joint bf16", true);
            }
        }
    }
    for (const shape & s : { shape{ 6, 9, 3, 10, 10, 2, true }, shape{ 16, 2, 1, 70, 70, 1, true }, shape{ 5, 4, 2, 2, 9, 2, true },
                             shape{ 8, 3, 3, 20, 20, 2, false } }) {
        check_gradients(
            s.name(),
            [&](ggml_context * ctx) {
                const operands x = new_operands(ctx, s, layout::plain);
                return function{ ggml_attn(ctx, x.q, x.k, x.v, 0.4f, s.causal), { x.q, x.k, x.v } };
            },
            1e-2f, 1e-3);
    }
    for (const shape & s : { shape{ 6, 9, 3, 10, 10, 2, true }, shape{ 16, 2, 1, 70, 70, 1, true }, shape{ 8, 3, 3, 20, 20, 2, false } }) {
        check_gradients(
            s.name() + " of a product",
            [&](ggml_context * ctx) {
                ggml_tensor * w    = new_f32(ctx, { 12, s.D * (s.H + 2 * s.K) }, 0.5f);
                ggml_tensor * x    = new_f32(ctx, { 12, s.T * s.B });
                ggml_tensor * qkv  = ggml_mul_mat(ctx, w, x);
                ggml_tensor * attn = ggml_attn_qkv(ctx, ggml_reshape_4d(ctx, qkv, s.D, s.H + 2 * s.K, s.T, s.B), s.K, 0.4f, s.causal);
                // the product is used once more, so that gradients meet
                return function{ ggml_add(ctx, ggml_reshape_2d(ctx, attn, s.D * s.H, s.T * s.B),
                                          ggml_scale(ctx, ggml_cont(ctx, ggml_view_2d(ctx, qkv, s.D * s.H, s.T * s.B, qkv->nb[1], 0)), 0.1f)),
                                 { w, x } };
            },
            1e-2f, 1e-3);
    }
    test_hidden();
    test_large();
    test_memory();
    return summary("test-attention");
}
