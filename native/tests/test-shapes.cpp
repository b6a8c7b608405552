// Operations that move, repeat, drop or sum what others compute: forward against plain loops, backward against central finite differences,
// and the same bytes with 1, 2, 3 and 7 threads.

#include "ops.h"

// --- concat, repeat, broadcasts -------------------------------------------------------------------------------------

static void test_concat() {
    for (int dim = 0; dim < 4; ++dim) {
        const std::string    name = "concat dim=" + std::to_string(dim);
        std::vector<int64_t> ne_a = { 5, 3, 4, 2 }, ne_b = ne_a;
        ne_b[dim] = 7;
        context             ctx;
        ggml_tensor *       a = new_f32(ctx, ne_a);
        ggml_tensor *       b = new_f32(ctx, ne_b);
        ggml_tensor *       c = ggml_concat(ctx, a, b, dim);
        std::vector<double> want;
        for (int64_t i = 0; i < ggml_nelements(c); ++i) {
            int64_t    at[4] = { i % c->ne[0], i / c->ne[0] % c->ne[1], i / c->ne[0] / c->ne[1] % c->ne[2], i / c->ne[0] / c->ne[1] / c->ne[2] };
            const bool in_a  = at[dim] < a->ne[dim];
            at[dim] -= in_a ? 0 : a->ne[dim];
            want.push_back(get(in_a ? a : b, at[0], at[1], at[2], at[3]));
        }
        compare(run(ctx, c, name), want, 0.0, name);
        check_gradients(
            name,
            [&](ggml_context * ctx) {
                ggml_tensor * a = new_f32(ctx, ne_a);
                ggml_tensor * b = new_f32(ctx, ne_b);
                return function{ ggml_concat(ctx, a, b, dim), { a, b } };
            },
            0.5f, 1e-5);
        check_gradients(
            name + " of one tensor, twice",
            [&](ggml_context * ctx) {
                ggml_tensor * a = new_f32(ctx, ne_a);
                return function{ ggml_concat(ctx, a, ggml_scale(ctx, a, 3.0f), dim), { a } };
            },
            0.5f, 1e-5);
    }
    check_gradients(
        "a class token before the patches, positions for all",
        [](ggml_context * ctx) {
            const int64_t C = 19, T = 6, B = 3;
            ggml_tensor * cls     = new_f32(ctx, { C });
            ggml_tensor * patches = new_f32(ctx, { C, T, B });
            ggml_tensor * pos     = new_f32(ctx, { C, T + 1 });
            ggml_tensor * bias    = new_f32(ctx, { C });
            ggml_tensor * x       = ggml_concat(ctx, ggml_repeat_4d(ctx, cls, C, 1, B, 1), ggml_add(ctx, patches, bias), 1);   // [C, T + 1, B]
            x                     = ggml_gelu(ctx, ggml_add(ctx, x, pos));
            return function{ ggml_cont(ctx, ggml_view_2d(ctx, x, C, B, x->nb[2], 0)), { cls, patches, pos, bias } };
        },
        1e-2f, 5e-4);
}

static void test_repeat_back() {
    struct shape {
        std::vector<int64_t> to, from;
    };
    const std::vector<shape> shapes = {
        { { 1 }, { 999 } },
        { { 17 }, { 17, 300 } },
        { { 768 }, { 768, 50, 2 } },
        { { 100, 7 }, { 100, 7, 9 } },
        { { 33, 1, 5 }, { 33, 4, 5, 3 } },
        { { 3, 2, 2, 2 }, { 9, 4, 6, 4 } },
        { { 20, 1, 3, 2 }, { 40, 5, 3, 2 } },
    };
    for (const shape & s : shapes) {
        context       ctx;
        ggml_tensor * x    = new_f32(ctx, s.from);
        ggml_tensor * like = ggml_new_tensor(ctx, GGML_TYPE_F32, (int) s.to.size(), s.to.data());
        std::string   name = "repeat_back";
        for (int64_t n : s.from) {
            name += " " + std::to_string(n);
        }
        std::vector<float> want(ggml_nelements(like), 0.0f);   // one chain of additions in the order of x: the same bytes
        for (int64_t i3 = 0; i3 < x->ne[3]; ++i3) {
            for (int64_t i2 = 0; i2 < x->ne[2]; ++i2) {
                for (int64_t i1 = 0; i1 < x->ne[1]; ++i1) {
                    for (int64_t i0 = 0; i0 < x->ne[0]; ++i0) {
                        const int64_t j = i2 % like->ne[2] + like->ne[2] * (i3 % like->ne[3]);
                        want[i0 % like->ne[0] + like->ne[0] * (i1 % like->ne[1] + like->ne[1] * j)] += get(x, i0, i1, i2, i3);
                    }
                }
            }
        }
        const std::vector<float> got = run(ctx, ggml_repeat_back(ctx, x, like), name);
        check(memcmp(got.data(), want.data(), got.size() * sizeof(float)) == 0, name + ": the bytes of a plain loop");
    }
    check_gradients(
        "repeat",
        [](ggml_context * ctx) {
            ggml_tensor * x = new_f32(ctx, { 5, 1, 3 });
            return function{ ggml_repeat_4d(ctx, x, 10, 4, 3, 2), { x } };
        },
        0.5f, 1e-5);
    check_gradients(
        "broadcasts of add and mul",
        [](ggml_context * ctx) {
            ggml_tensor * x    = new_f32(ctx, { 21, 5, 3 });
            ggml_tensor * pos  = new_f32(ctx, { 21, 5 });
            ggml_tensor * bias = new_f32(ctx, { 21 });
            ggml_tensor * gain = new_f32(ctx, { 21 });
            return function{ ggml_add(ctx, ggml_mul(ctx, ggml_add(ctx, x, pos), gain), bias), { x, pos, bias, gain } };
        },
        0.5f, 1e-5);
}

// --- views, permutations, sums of rows ------------------------------------------------------------------------------

// softmax(q k^T) v from the rows of one product, as gpt2 and vit cut them
static ggml_tensor * fused_attention(ggml_context * ctx, ggml_tensor * qkv, int64_t D, int64_t H, int64_t T, int64_t B, bool cont) {
    ggml_tensor * part[3];
    for (int i = 0; i < 3; ++i) {
        part[i] = ggml_view_4d(ctx, qkv, D, H, T, B, D * sizeof(float), qkv->nb[1], qkv->nb[1] * T, i * D * H * sizeof(float));
        part[i] = cont ? ggml_cont(ctx, part[i]) : part[i];
    }
    ggml_tensor * kq = ggml_mul_mat(ctx, ggml_permute(ctx, part[1], 0, 2, 1, 3), ggml_permute(ctx, part[0], 0, 2, 1, 3));
    kq               = ggml_soft_max_ext(ctx, kq, nullptr, 0.5f, 0.0f);
    ggml_tensor * x  = ggml_mul_mat(ctx, ggml_cont(ctx, ggml_permute(ctx, part[2], 1, 2, 0, 3)), kq);   // [D, T, H, B]
    return ggml_reshape_2d(ctx, ggml_cont(ctx, ggml_permute(ctx, x, 0, 2, 1, 3)), D * H, T * B);
}

static void test_views() {
    for (bool cont : { false, true }) {
        check_gradients(
            std::string("attention from a fused product") + (cont ? ", parts copied" : ""),
            [&](ggml_context * ctx) {
                const int64_t D = 4, H = 3, T = 5, B = 2;
                ggml_tensor * x   = new_f32(ctx, { 7, T * B });
                ggml_tensor * w   = new_f32(ctx, { 7, 3 * D * H });
                ggml_tensor * b   = new_f32(ctx, { 3 * D * H });
                ggml_tensor * qkv = ggml_add(ctx, ggml_mul_mat(ctx, w, x), b);
                return function{ fused_attention(ctx, qkv, D, H, T, B, cont), { x, w, b } };
            },
            1e-2f, 1e-3);
    }
    check_gradients(
        "2d views of columns, one of them twice, and the whole",
        [](ggml_context * ctx) {
            ggml_tensor * x = new_f32(ctx, { 12, 5 });
            ggml_tensor * y = ggml_scale(ctx, x, 2.0f);
            ggml_tensor * a = ggml_view_2d(ctx, y, 4, 5, y->nb[1], 0);
            ggml_tensor * b = ggml_view_2d(ctx, y, 4, 5, y->nb[1], 5 * sizeof(float));
            ggml_tensor * c = ggml_view_2d(ctx, y, 4, 5, y->nb[1], 7 * sizeof(float));
            ggml_tensor * d = ggml_mul(ctx, ggml_cont(ctx, a), ggml_add(ctx, ggml_cont(ctx, b), ggml_cont(ctx, c)));
            return function{ ggml_concat(ctx, d, y, 0), { x } };
        },
        1e-2f, 5e-4);
    {   // the value of what is viewed does not matter for the gradient, even where it is not finite
        context       ctx;
        ggml_tensor * x = new_f32(ctx, { 6, 2 });
        ggml_set_param(x);
        ggml_get_data_f32(x)[4] = INFINITY;
        ggml_tensor * y         = ggml_scale(ctx, x, 2.0f);
        ggml_tensor * loss      = ggml_sum(ctx, ggml_cont(ctx, ggml_view_2d(ctx, y, 3, 2, y->nb[1], 0)));
        ggml_set_loss(loss);
        ggml_cgraph * graph = graph_of(ctx, loss);
        ggml_build_backward_expand(ctx, graph, nullptr);
        ggml_graph_reset(graph);
        compute(graph, 2);
        const ggml_tensor * g = ggml_graph_get_grad(graph, x);
        compare({ ggml_get_data_f32(g), ggml_get_data_f32(g) + 12 }, { 2, 2, 2, 0, 0, 0, 2, 2, 2, 0, 0, 0 }, 0.0, "gradient of a view of inf");
    }
    for (bool mean : { false, true }) {   // mean pooling over the tokens
        check_gradients(
            mean ? "mean over tokens" : "sum over tokens",
            [&](ggml_context * ctx) {
                ggml_tensor * x    = new_f32(ctx, { 13, 6, 3 });
                ggml_tensor * gain = new_f32(ctx, { 13 });
                ggml_tensor * bias = new_f32(ctx, { 13 });
                ggml_tensor * w    = new_f32(ctx, { 13, 4 });
                ggml_tensor * y    = ggml_add(ctx, ggml_mul(ctx, ggml_norm(ctx, x, 1e-5f), gain), bias);
                y                  = ggml_cont(ctx, ggml_permute(ctx, y, 1, 0, 2, 3));   // [T, C, B]
                y                  = mean ? ggml_mean(ctx, y) : ggml_sum_rows(ctx, y);
                return function{ ggml_mul_mat(ctx, w, ggml_reshape_2d(ctx, y, 13, 3)), { x, gain, bias, w } };
            },
            1e-2f, 1e-3);
    }
    check_gradients(
        "mean and the whole of one tensor",
        [](ggml_context * ctx) {
            ggml_tensor * x = new_f32(ctx, { 9, 4, 2 });
            return function{ ggml_add(ctx, ggml_mul(ctx, x, x), ggml_mean(ctx, x)), { x } };
        },
        1e-2f, 5e-4);
    check_gradients(
        "permutations and transposes, copied or not",
        [](ggml_context * ctx) {
            ggml_tensor * x = new_f32(ctx, { 5, 4, 3, 2 });
            ggml_tensor * y = ggml_cont(ctx, ggml_permute(ctx, ggml_scale(ctx, x, 0.5f), 2, 0, 3, 1));
            ggml_tensor * z = ggml_permute(ctx, ggml_cont(ctx, ggml_transpose(ctx, ggml_mul(ctx, x, x))), 1, 0, 2, 3);   // [5, 4, 3, 2]
            return function{ ggml_mul(ctx, ggml_cont(ctx, ggml_permute(ctx, z, 2, 0, 3, 1)), y), { x } };
        },
        1e-2f, 1e-3);
}

// --- dropout --------------------------------------------------------------------------------------------------------

// whether an element is kept, written down a second time
static bool kept(int32_t seed0, int32_t seed1, int32_t salt, int64_t i, double p) {
    const uint64_t gamma = 0x9e3779b97f4a7c15ull;
    auto           mix   = [](uint64_t z) {
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    };
    const uint64_t key = mix(mix(((uint64_t) (uint32_t) seed0 << 32 | (uint32_t) seed1) + gamma) + (uint32_t) salt + gamma);
    return mix(key + gamma * (uint64_t) (i + 1)) >> 40 >= (uint64_t) (p * (1 << 24) + 0.5);
}

static ggml_tensor * new_seeds(ggml_context * ctx, std::vector<int32_t> seeds) {
    return ggml_reshape_2d(ctx, new_i32(ctx, seeds), 2, (int64_t) seeds.size() / 2);
}

static void test_dropout() {
    const std::vector<int32_t> seeds = { 7, 1, 7, 2, -1, 3, 123456789, -5 };
    for (float p : { 0.0f, 0.1f, 0.5f, 0.95f }) {
        for (int32_t salt : { 0, 1, -3 }) {
            const std::string   name = "dropout p=" + std::to_string(p) + " salt=" + std::to_string(salt);
            context             ctx;
            ggml_tensor *       x = new_f32(ctx, { 37, 11 * 4 });
            std::vector<double> want;
            for (int64_t i = 0; i < ggml_nelements(x); ++i) {
                const int64_t b = i / (37 * 11), at = i % (37 * 11);
                const bool    pass = seeds[2 * b] < 0;
                want.push_back(pass                                                ? ggml_get_data_f32(x)[i]
                               : kept(seeds[2 * b], seeds[2 * b + 1], salt, at, p) ? ggml_get_data_f32(x)[i] / (1.0 - p)
                                                                                   : 0.0);
            }
            const std::vector<float> all = run(ctx, ggml_dropout(ctx, x, new_seeds(ctx, seeds), p, salt), name);
            compare(all, want, 2e-7, name);
            for (int64_t b = 0; b < 4; ++b) {   // one sequence alone, as another micro-batch would have it
                ggml_tensor *            part = ggml_view_2d(ctx, x, 37, 11, x->nb[1], b * 11 * x->nb[1]);
                const std::vector<float> one  = run(ctx, ggml_dropout(ctx, part, new_seeds(ctx, { seeds[2 * b], seeds[2 * b + 1] }), p, salt), name);
                check(memcmp(one.data(), all.data() + b * 37 * 11, one.size() * sizeof(float)) == 0, name + ": a sequence alone");
            }
        }
    }
    {   // the share that is kept, and no mask like another
        context            ctx;
        const int64_t      n   = 100000;
        ggml_tensor *      one = ggml_set_f32(ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n), 1.0f);
        std::vector<float> masks[3];
        for (int i = 0; i < 3; ++i) {
            masks[i]           = run(ctx, ggml_dropout(ctx, one, new_seeds(ctx, { 5, i == 1 }), 0.25f, i == 2), "dropout");
            const double share = 1.0 - (double) std::count(masks[i].begin(), masks[i].end(), 0.0f) / n;
            check(std::fabs(share - 0.75) < 5 * std::sqrt(0.25 * 0.75 / n), "dropout: the share that is kept", share);
            for (int j = 0; j < i; ++j) {
                double both = 0;
                for (int64_t k = 0; k < n; ++k) {
                    both += masks[i][k] != 0.0f && masks[j][k] != 0.0f;
                }
                check(std::fabs(both / n - 0.5625) < 5 * std::sqrt(0.5625 * 0.4375 / n), "dropout: two masks are independent", both / n);
            }
        }
    }
    check_gradients(
        "dropout",
        [](ggml_context * ctx) {
            ggml_tensor * x = new_f32(ctx, { 13, 5, 2 });
            ggml_tensor * y = ggml_dropout(ctx, x, new_seeds(ctx, { 3, 4, -1, 0 }), 0.5f, 9);
            return function{ ggml_cont(ctx, ggml_permute(ctx, y, 1, 0, 2, 3)), { x } };
        },
        0.5f, 1e-5);
}

int main() {
    ggml_cpu_init();
    test_concat();
    test_repeat_back();
    test_views();
    test_dropout();
    return summary("test-shapes");
}
