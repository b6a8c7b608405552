// What stands between the products: rotary positions, SwiGLU's gradient, that of the embedding, the update of many parameters; against double,
// by central differences, and the same bytes with 1, 2, 3 and 7 threads.

#include "ops.h"

// --- rotary positions -----------------------------------------------------------------------------------------------

struct rope_case {
    int64_t d, n_rot, n_head, n_batch;
    bool    factors;
};

// Two products, each rounded, and their sum: a compiler may not make one FMA of them, which would differ from one to the next. The sines are
// those of a row whose pairs are 1 and 0.
static void check_rope_rounding(ggml_tensor * x, const std::vector<int32_t> & positions, const rope_case & c, int mode, const std::string & name) {
    context       ctx;
    const int64_t T       = (int64_t) positions.size();
    const int64_t n_pairs = c.n_rot / 2;
    const int64_t step = mode == GGML_ROPE_TYPE_NORMAL ? 2 : 1, off = mode == GGML_ROPE_TYPE_NORMAL ? 1 : n_pairs;
    ggml_tensor * unit = new_f32(ctx, { c.d, 1, T }, 0.0f);
    for (int64_t i = 0; i < n_pairs * T; ++i) {
        ggml_get_data_f32(unit)[i / n_pairs * c.d + i % n_pairs * step] = 1.0f;
    }
    for (bool back : { false, true }) {
        const auto rotate = [&](ggml_tensor * a) {
            const auto rope = back ? ggml_rope_ext_back : ggml_rope_ext;
            return run(ctx, rope(ctx, a, new_i32(ctx, positions), nullptr, (int) c.n_rot, mode, 0, 10000.0f, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f), name);
        };
        const std::vector<float> sines = rotate(unit), got = rotate(x);
        const auto               sum = [](float a, float b, float c, float d) {
            const float ab = (float) ((double) a * b), cd = (float) ((double) c * d);   // exact in double, and so rounded once
            return (float) ((double) ab + cd);
        };
        std::vector<float> want = got;   // what is not rotated stays
        for (int64_t row = 0; row < ggml_nrows(x); ++row) {
            for (int64_t i = 0; i < n_pairs; ++i) {
                const float * at = &sines[row / c.n_head % T * c.d + i * step];
                const int64_t i1 = row % c.n_head, i2 = row / c.n_head % T, i3 = row / c.n_head / T;
                const float   x0 = get(x, i * step, i1, i2, i3), x1 = get(x, i * step + off, i1, i2, i3);
                float *       pair = &want[row * c.d + i * step];
                pair[0]            = sum(x0, at[0], -x1, at[off]);
                pair[off]          = sum(x0, at[off], x1, at[0]);
            }
        }
        check(got == want, name + (back ? " back" : "") + ": each product and sum rounded");
    }
}

static void test_rope() {
    const std::vector<int32_t> positions = { 0, 1, 2, 77, 4095, 100000, 3 };

    const std::vector<rope_case> cases = {
        { 2, 2, 1, 1, false },   { 16, 16, 2, 3, false }, { 18, 18, 3, 2, true }, { 64, 64, 1, 4, false },
        { 50, 34, 3, 2, false }, { 128, 32, 2, 1, true }, { 14, 14, 2, 2, true }, { 28, 28, 3, 1, false },
    };
    for (const rope_case & c : cases) {
        for (int mode : { GGML_ROPE_TYPE_NORMAL, GGML_ROPE_TYPE_NEOX }) {
            const std::string name = "rope d=" + std::to_string(c.d) + " n_rot=" + std::to_string(c.n_rot) + " mode=" + std::to_string(mode);
            context           ctx;
            const int64_t     T       = (int64_t) positions.size();
            ggml_tensor *     all     = new_f32(ctx, { c.d, c.n_head + 1, T, c.n_batch });   // one head more: the rows have gaps
            ggml_tensor *     x       = ggml_view_4d(ctx, all, c.d, c.n_head, T, c.n_batch, all->nb[1], all->nb[2], all->nb[3], all->nb[1]);
            ggml_tensor *     pos     = new_i32(ctx, positions);
            ggml_tensor *     factors = c.factors ? new_f32(ctx, { c.n_rot / 2 }) : nullptr;
            for (int64_t i = 0; c.factors && i < c.n_rot / 2; ++i) {
                ggml_get_data_f32(factors)[i] = 1.0f + (float) i;
            }
            const float         theta_scale = (float) std::pow(10000.0, (double) (-2.0f / (float) c.n_rot));
            std::vector<double> forward, backward;
            for (int64_t i3 = 0; i3 < c.n_batch; ++i3) {
                for (int64_t i2 = 0; i2 < T; ++i2) {
                    for (int64_t i1 = 0; i1 < c.n_head; ++i1) {
                        const size_t row = forward.size();
                        for (int64_t i = 0; i < c.d; ++i) {
                            forward.push_back(get(x, i, i1, i2, i3));
                            backward.push_back(get(x, i, i1, i2, i3));
                        }
                        float theta = (float) positions[i2];   // ggml's own chain of roundings; sine and cosine are what is tested
                        for (int64_t i = 0; i < c.n_rot / 2; ++i) {
                            const int64_t j0 = mode == GGML_ROPE_TYPE_NORMAL ? 2 * i : i,
                                          j1 = mode == GGML_ROPE_TYPE_NORMAL ? 2 * i + 1 : i + c.n_rot / 2;
                            const double  x0 = get(x, j0, i1, i2, i3), x1 = get(x, j1, i1, i2, i3);
                            const float   at     = factors ? theta / ggml_get_data_f32(factors)[i] : theta;
                            const double  cos_at = std::cos((double) at), sin_at = std::sin((double) at);
                            forward[row + j0]  = x0 * cos_at - x1 * sin_at;
                            forward[row + j1]  = x0 * sin_at + x1 * cos_at;
                            backward[row + j0] = x0 * cos_at + x1 * sin_at;
                            backward[row + j1] = x1 * cos_at - x0 * sin_at;
                            theta *= theta_scale;
                        }
                    }
                }
            }
            const int n_rot = (int) c.n_rot;
            compare(run(ctx, ggml_rope_ext(ctx, x, pos, factors, n_rot, mode, 0, 10000.0f, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f), name), forward, 3e-7,
                    name);
            compare(run(ctx, ggml_rope_ext_back(ctx, x, pos, factors, n_rot, mode, 0, 10000.0f, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f), name + " back"),
                    backward, 3e-7, name + " back");
            check_rope_rounding(x, positions, c, mode, name);

            // in place: y is rotated where it lies
            ggml_tensor * y     = ggml_dup_tensor(ctx, ggml_cont(ctx, x));
            ggml_tensor * place = ggml_rope_ext_inplace(ctx, y, pos, factors, n_rot, mode, 0, 10000.0f, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f);
            for (int n_threads : { 1, 3 }) {
                for (int64_t i = 0; i < ggml_nelements(y); ++i) {
                    ggml_get_data_f32(y)[i] = get(x, i % c.d, i / c.d % c.n_head, i / c.d / c.n_head % T, i / c.d / c.n_head / T);
                }
                compute(graph_of(ctx, place), n_threads);
                compare({ ggml_get_data_f32(y), ggml_get_data_f32(y) + ggml_nelements(y) }, forward, 3e-7, name + " in place");
            }
            check_gradients(
                name,
                [&](ggml_context * ctx) {
                    ggml_tensor * y = new_f32(ctx, { c.d, c.n_head, T, c.n_batch });
                    return function{ ggml_rope_ext(ctx, y, new_i32(ctx, positions), nullptr, n_rot, mode, 0, 10000.0f, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f),
                                     { y } };
                },
                0.5f, 1e-5);
        }
    }
}

// Of the first heads only: the bytes of a rotation of them all there, those of the source elsewhere.
static void test_rope_heads() {
    const std::vector<int32_t> positions = { 0, 1, 2, 77, 4095 };
    for (int64_t d : { 2, 16, 18, 64 }) {
        for (int n_heads : { 1, 3, 4, 0 }) {
            for (bool back : { false, true }) {
                const std::string name = "rope d=" + std::to_string(d) + " of " + std::to_string(n_heads) + " heads" + (back ? " back" : "");
                context           ctx;
                const int64_t     H = 4, T = (int64_t) positions.size(), B = 2;
                ggml_tensor *     all  = new_f32(ctx, { d, H + 1, T, B });   // rows with gaps
                ggml_tensor *     x    = ggml_view_4d(ctx, all, d, H, T, B, all->nb[1], all->nb[2], all->nb[3], 0);
                ggml_tensor *     pos  = new_i32(ctx, positions);
                const auto        rope = [&](ggml_tensor * x) {
                    return back ? ggml_rope_ext_back(ctx, x, pos, nullptr, (int) d, 0, 0, 10000.0f, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f)
                                : ggml_rope_ext(ctx, x, pos, nullptr, (int) d, 0, 0, 10000.0f, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f);
                };
                std::vector<float> want = run(ctx, rope(x), name);
                for (int64_t i = 0; i < (int64_t) want.size(); ++i) {
                    const int64_t i1 = i / d % H;
                    want[i]          = n_heads && i1 >= n_heads ? get(x, i % d, i1, i / d / H % T, i / d / H / T) : want[i];
                }
                ggml_tensor * y = rope(x);
                ggml_rope_set_heads(y, n_heads);
                check(run(ctx, y, name) == want, name);

                // in place, from a copy
                ggml_tensor * copy  = new_f32(ctx, { d, H, T, B });
                ggml_tensor * place = rope(copy);
                ggml_rope_set_heads(place, n_heads);
                place->data = copy->data;
                for (int n_threads : { 1, 2, 3 }) {
                    for (int64_t i = 0; i < ggml_nelements(copy); ++i) {
                        ggml_get_data_f32(copy)[i] = get(x, i % d, i / d % H, i / d / H % T, i / d / H / T);
                    }
                    compute(graph_of(ctx, place), n_threads);
                    check(values_of(copy) == want, name + " in place, " + std::to_string(n_threads) + " threads");
                }
            }
        }
    }
    check_gradients(
        "rope of some heads",
        [&](ggml_context * ctx) {
            ggml_tensor * x = new_f32(ctx, { 18, 4, (int64_t) positions.size(), 2 });
            ggml_tensor * y = ggml_rope_ext(ctx, x, new_i32(ctx, positions), nullptr, 18, 0, 0, 10000.0f, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f);
            ggml_rope_set_heads(y, 3);
            return function{ y, { x } };
        },
        0.5f, 1e-5);
}

// A thread keeps sines: they have to be those of the positions and parameters at hand, whatever came before.
static void test_rope_kept_sines() {
    struct call {
        std::vector<int32_t> positions;
        int                  n_rot;
        float                base, factor;   // factor 0: no tensor of factors
    };

    const int64_t D = 64, H = 2;
    const auto    rotate = [&](const call & c) {
        context       ctx;
        ggml_tensor * x       = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, H, (int64_t) c.positions.size());
        ggml_tensor * factors = c.factor != 0 ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c.n_rot / 2) : nullptr;
        for (int64_t i = 0; i < ggml_nelements(x); ++i) {
            ggml_get_data_f32(x)[i] = (float) (i % 17) - 8.0f;
        }
        for (int64_t i = 0; factors && i < c.n_rot / 2; ++i) {
            ggml_get_data_f32(factors)[i] = c.factor;
        }
        ggml_tensor * y =
            ggml_rope_ext(ctx, x, new_i32(ctx, c.positions), factors, c.n_rot, GGML_ROPE_TYPE_NORMAL, 0, c.base, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f);
        compute(graph_of(ctx, y), 1);
        return std::vector<float>{ ggml_get_data_f32(y), ggml_get_data_f32(y) + ggml_nelements(y) };
    };
    std::vector<int32_t> many(16500);   // more than are kept
    for (size_t i = 0; i < many.size(); ++i) {
        many[i] = (int32_t) (7 * i % 30000);
    }
    const std::vector<call> calls = {
        { { 0, 1, 2, 3 }, 64, 10000.0f, 0 }, { { 0, 1, 5, 3 }, 64, 10000.0f, 0 },
        { { 9 }, 64, 10000.0f, 0 },          { { 9, 1, 2, 3, 4, 5 }, 64, 10000.0f, 0 },
        { { 9, 1 }, 32, 10000.0f, 0 },       { { 9, 1 }, 32, 10000.0f, 2 },
        { { 9, 1 }, 32, 10000.0f, 3 },       { { 9, 1 }, 32, 500000.0f, 3 },
        { many, 64, 10000.0f, 0 },
    };
    std::vector<std::vector<float>> alone;
    for (const call & c : calls) {
        rotate({ { 0 }, 2, 77.0f, 0 });   // nothing of this is of use to the next
        alone.push_back(rotate(c));
    }
    for (size_t i = 0; i < calls.size(); ++i) {
        for (size_t before = 0; before < calls.size(); ++before) {
            rotate(calls[before]);
            check(rotate(calls[i]) == alone[i], "rope " + std::to_string(i) + " after rope " + std::to_string(before));
        }
    }
}

// --- SwiGLU ---------------------------------------------------------------------------------------------------------

static void test_swiglu_back() {
    for (int64_t n : { 1, 7, 15, 16, 17, 100, 333 }) {
        const std::string name = "swiglu_back n=" + std::to_string(n);
        context           ctx;
        ggml_tensor *     all     = new_f32(ctx, { n + 3, 5, 3, 2 }, 20.0f);   // far out, exp runs over on one side
        ggml_tensor *     x       = ggml_view_4d(ctx, all, n, 5, 3, 2, all->nb[1], all->nb[2], all->nb[3], 2 * sizeof(float));
        ggml_tensor *     g       = new_f32(ctx, { n, 5, 3, 2 });
        ggml_tensor *     dy      = new_f32(ctx, { n, 5, 3, 2 });
        ggml_get_data_f32(all)[2] = -200.0f;
        std::vector<double> want_x, want_g;
        for (int64_t i = 0; i < ggml_nelements(g); ++i) {
            const double xi = get(x, i % n, i / n % 5, i / n / 5 % 3, i / n / 15), gi = ggml_get_data_f32(g)[i], di = ggml_get_data_f32(dy)[i];
            const double s = 1.0 / (1.0 + std::exp(-xi));
            want_x.push_back(di * gi * s * (1.0 + xi * (1.0 - s)));
            want_g.push_back(di * xi * s);
        }
        const std::vector<float> got = run(ctx, ggml_swiglu_back(ctx, dy, x, g), name);
        compare({ got.begin(), got.begin() + (long) want_x.size() }, want_x, 1e-6, name + ": of what goes through SILU");
        compare({ got.begin() + (long) want_x.size(), got.end() }, want_g, 1e-6, name + ": of the factor");
    }
    check_gradients(
        "swiglu of both, in a chain",
        [](ggml_context * ctx) {
            ggml_tensor * x = new_f32(ctx, { 37, 3, 2 }, 3.0f);
            ggml_tensor * g = new_f32(ctx, { 37, 3, 2 });
            return function{ ggml_silu(ctx, ggml_swiglu_split(ctx, ggml_scale(ctx, x, 2.0f), ggml_scale(ctx, g, 3.0f))), { x, g } };
        },
        1e-2f, 1e-3);
    for (int which : { 0, 1 }) {
        check_gradients(
            "swiglu of one",
            [which](ggml_context * ctx) {
                ggml_tensor * x = new_f32(ctx, { 37, 3, 2 }, 3.0f);
                ggml_tensor * g = new_f32(ctx, { 37, 3, 2 });
                return function{ ggml_swiglu_split(ctx, x, g), { which == 0 ? x : g } };
            },
            1e-2f, 1e-3);
    }
    check_gradients(
        "swiglu of one tensor twice",
        [](ggml_context * ctx) {
            ggml_tensor * x = new_f32(ctx, { 37, 3 }, 3.0f);
            return function{ ggml_swiglu_split(ctx, x, x), { x } };
        },
        1e-2f, 1e-3);
}

// Both in one row, as one product gives them: the bytes of the split form, also in their place.
static void test_swiglu_halves() {
    for (int64_t n : { 1, 7, 16, 17, 333 }) {
        const std::string        name = "swiglu_back of halves n=" + std::to_string(n);
        context                  ctx;
        ggml_tensor *            x     = new_f32(ctx, { n, 5, 3, 2 }, 20.0f);
        ggml_tensor *            g     = new_f32(ctx, { n, 5, 3, 2 });
        ggml_tensor *            dy    = new_f32(ctx, { n, 5, 3, 2 });
        ggml_tensor *            wide  = new_f32(ctx, { 2 * n + 3, 5, 3, 2 });   // rows with gaps
        ggml_tensor *            xg    = ggml_view_4d(ctx, wide, 2 * n, 5, 3, 2, wide->nb[1], wide->nb[2], wide->nb[3], sizeof(float));
        ggml_tensor *            tight = new_f32(ctx, { 2 * n, 5, 3, 2 });
        const std::vector<float> split = run(ctx, ggml_swiglu_back(ctx, dy, x, g), name);
        std::vector<float>       want, before;
        for (int64_t i = 0; i < 2 * ggml_nelements(g); ++i) {
            const int64_t i0 = i % (2 * n), ir = i / (2 * n), i1 = ir % 5, i2 = ir / 5 % 3, i3 = ir / 15;
            before.push_back(i0 < n ? get(x, i0, i1, i2, i3) : get(g, i0 - n, i1, i2, i3));
            want.push_back(split[i0 < n ? ir * n + i0 : ggml_nelements(g) + ir * n + i0 - n]);
            ((float *) ((char *) xg->data + i1 * xg->nb[1] + i2 * xg->nb[2] + i3 * xg->nb[3]))[i0] = before.back();
        }
        check(run(ctx, ggml_swiglu_back(ctx, dy, xg, nullptr), name) == want, name);
        ggml_tensor * place = ggml_swiglu_back(ctx, dy, tight, nullptr);
        place->data         = tight->data;
        for (int n_threads : { 1, 2, 3 }) {
            memcpy(tight->data, before.data(), ggml_nbytes(tight));
            compute(graph_of(ctx, place), n_threads);
            check(values_of(tight) == want, name + ", in place, " + std::to_string(n_threads) + " threads");
        }
    }
    check_gradients(
        "swiglu of halves, in a chain",
        [](ggml_context * ctx) {
            ggml_tensor * x = new_f32(ctx, { 74, 3, 2 }, 2.0f);
            return function{ ggml_silu(ctx, ggml_swiglu(ctx, ggml_scale(ctx, x, 2.0f))), { x } };
        },
        1e-2f, 1e-3);
}

// --- the embedding's gradient ---------------------------------------------------------------------------------------

static void test_get_rows_back() {
    struct shape {
        int64_t              n_embd, n_vocab;
        std::vector<int32_t> rows;
    };
    const std::vector<shape> shapes = {
        { 1, 1, { 0, 0, 0 } },
        { 15, 4, { 3, 0, 3, 3 } },
        { 33, 7, { 6, 6, 1, 0, 6, 1, 2, 6, 6 } },
        { 130, 50, { 49, 3, 17, 3, 3, 0 } },
    };
    for (const shape & s : shapes) {
        const std::string   name = "get_rows_back n_embd=" + std::to_string(s.n_embd);
        context             ctx;
        ggml_tensor *       table = new_f32(ctx, { s.n_embd, s.n_vocab });
        ggml_tensor *       wide  = new_f32(ctx, { s.n_embd + 3, (int64_t) s.rows.size() });   // rows with gaps
        ggml_tensor *       grad  = ggml_view_2d(ctx, wide, s.n_embd, wide->ne[1], wide->nb[1], sizeof(float));
        ggml_tensor *       rows  = new_i32(ctx, s.rows);
        std::vector<double> want(s.n_embd * s.n_vocab);
        for (size_t i = 0; i < s.rows.size(); ++i) {
            for (int64_t j = 0; j < s.n_embd; ++j) {
                want[s.rows[i] * s.n_embd + j] += get(grad, j, (int64_t) i);
            }
        }
        compare(run(ctx, ggml_get_rows_back(ctx, grad, rows, table), name), want, 1e-6, name);

        ggml_tensor *            acc   = new_f32(ctx, { s.n_embd, s.n_vocab });
        const std::vector<float> start = { ggml_get_data_f32(acc), ggml_get_data_f32(acc) + ggml_nelements(acc) };
        ggml_tensor *            sum   = ggml_get_rows_back_acc(ctx, acc, grad, rows);
        ggml_cgraph *            graph = graph_of(ctx, sum);
        std::vector<double>      added = want;
        for (size_t i = 0; i < added.size(); ++i) {
            added[i] += start[i];
        }
        check(ggml_adds_in_place(sum), name + ": in place");
        for (bool set : { false, true }) {
            std::vector<float> first;
            for (int n_threads : thread_counts) {
                std::copy(start.begin(), start.end(), ggml_get_data_f32(acc));
                sum->flags = set ? sum->flags | GGML_TENSOR_FLAG_SET : sum->flags & ~GGML_TENSOR_FLAG_SET;
                compute(graph, n_threads);
                const std::vector<float> got = { ggml_get_data_f32(acc), ggml_get_data_f32(acc) + ggml_nelements(acc) };
                first                        = first.empty() ? got : first;
                compare(got, set ? want : added, 1e-6, name + (set ? ": set" : ": added"));
                check(memcmp(got.data(), first.data(), got.size() * sizeof(float)) == 0, name + ": same bytes with other threads");
            }
        }
    }
}

// --- the update of many parameters ----------------------------------------------------------------------------------

static void test_adamw_of_many() {
    std::vector<std::vector<float>> first;
    for (int n_threads : thread_counts) {
        context ctx;
        rng_state = 7;
        std::vector<ggml_tensor *> tensors;
        ggml_tensor *              hyper = new_f32(ctx, { 8 });
        const float                h[8]  = { 1e-2f, 0.9f, 0.99f, 1e-8f, 0.1f, 10.0f, 100.0f, 0.5f };
        ggml_cgraph *              graph = ggml_new_graph_custom(ctx, 4096, false);
        memcpy(hyper->data, h, sizeof(h));
        for (int i = 0; i < 60; ++i) {
            const std::vector<int64_t> ne = { 1 + i * 7 % 40, 1 + i % 5 * 11 };
            ggml_tensor *              w = new_f32(ctx, ne), *g = new_f32(ctx, ne), *m = new_f32(ctx, ne), *v = new_f32(ctx, ne);
            for (int64_t j = 0; j < ggml_nelements(v); ++j) {
                ggml_get_data_f32(v)[j] = std::fabs(ggml_get_data_f32(v)[j]);
            }
            ggml_set_param(w);
            tensors.insert(tensors.end(), { w, m, v });
            ggml_build_forward_expand(graph, ggml_opt_step_adamw(ctx, w, g, m, v, hyper));
        }
        for (int step = 0; step < 20; ++step) {
            compute(graph, n_threads);
        }
        for (size_t i = 0; i < tensors.size(); ++i) {
            const std::vector<float> got = { ggml_get_data_f32(tensors[i]), ggml_get_data_f32(tensors[i]) + ggml_nelements(tensors[i]) };
            if (n_threads == 1) {
                first.push_back(got);
            }
            check(memcmp(got.data(), first[i].data(), got.size() * sizeof(float)) == 0, "adamw of many tensors: same bytes with other threads");
        }
    }
}

// what reads a weight waits for all threads to have updated it, also where an update that is not computed stands between
static void test_adamw_then_read() {
    for (int n_threads : { 2, 3, 7 }) {
        context       ctx;
        const int64_t n = 1000, rows = 600;
        ggml_tensor * hyper = new_f32(ctx, { 8 });
        const float   h[8]  = { 1.0f, 0.0f, 0.0f, 1e-8f, 0.0f, 1.0f, 1.0f, 1.0f };   // w -= sign of g
        memcpy(hyper->data, h, sizeof(h));
        ggml_cgraph * graph = ggml_new_graph(ctx);
        ggml_tensor * first = nullptr;
        for (bool is_computed : { true, false }) {
            ggml_tensor *w = new_f32(ctx, { n, rows }, 0.0f), *m = new_f32(ctx, { n, rows }), *v = new_f32(ctx, { n, rows });
            ggml_set_param(w);
            ggml_tensor * g = ggml_set_f32(ggml_dup_tensor(ctx, w), -1.0f);
            ggml_tensor * u = ggml_opt_step_adamw(ctx, w, g, m, v, hyper);
            ggml_build_forward_expand(graph, u);
            first = is_computed ? u : first;
            u->flags &= is_computed ? ~0 : ~GGML_TENSOR_FLAG_COMPUTE;
        }
        // rows of the last thread, read by the first one
        ggml_tensor * sum = ggml_sum(ctx, ggml_view_2d(ctx, first, n, 20, first->nb[1], (rows - 20) * first->nb[1]));
        ggml_build_forward_expand(graph, sum);
        bool is_updated = true;
        for (int step = 1; step <= 50; ++step) {
            compute(graph, n_threads);
            is_updated = is_updated && std::fabs(ggml_get_data_f32(sum)[0] - 20.0f * (float) n * (float) step) < 1.0f;
        }
        check(is_updated, "adamw, then a reader, " + std::to_string(n_threads) + " threads");
    }
}

int main() {
    ggml_cpu_init();
    test_rope();
    test_rope_kept_sines();
    test_swiglu_back();
    test_get_rows_back();
    test_adamw_of_many();
    test_adamw_then_read();
    test_rope_heads();
    test_swiglu_halves();
    return summary("test-elementwise");
}
