// Matrix products: forward against a plain reference in double precision, backward against central finite differences, and the
// same bytes with 1, 2, 3 and 7 threads.

#include "ggml-cpu/gemm-q8.h"
#include "ops.h"

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
        const int64_t m = s[0], k = s[1], n = s[2];
        if (too_long(m * k * n)) {
            continue;
        }
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

// --- weights of other types, converted as they are packed -----------------------------------------------------------

static ggml_tensor * new_of(ggml_context * ctx, ggml_type type, std::vector<int64_t> ne) {
    ggml_tensor *      t = ggml_new_tensor(ctx, type, (int) ne.size(), ne.data());
    std::vector<float> x(ggml_nelements(t));
    for (float & v : x) {
        v = rng_uniform();
    }
    ggml_quantize_chunk(type, x.data(), t->data, 0, ggml_nrows(t), ne[0], nullptr);
    return t;
}

// the same numbers in f32, contiguous
static ggml_tensor * as_f32(ggml_context * ctx, const ggml_tensor * t) {
    ggml_tensor *            y        = ggml_new_tensor(ctx, GGML_TYPE_F32, 4, t->ne);
    const ggml_type_traits * traits   = ggml_get_type_traits(t->type);
    const int64_t            n_rows[] = { t->ne[1], t->ne[2], t->ne[3] };
    for (int64_t r = 0; r < ggml_nrows(t); ++r) {
        const int64_t i1 = r % n_rows[0], i2 = r / n_rows[0] % n_rows[1], i3 = r / n_rows[0] / n_rows[1];
        traits->to_float((const char *) t->data + i1 * t->nb[1] + i2 * t->nb[2] + i3 * t->nb[3], ggml_get_data_f32(y) + r * t->ne[0], t->ne[0]);
    }
    return y;
}

static ggml_tensor * mul_mat_f32(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b) {
    ggml_tensor * c = ggml_mul_mat(ctx, a, b);
    ggml_mul_mat_set_prec(c, GGML_PREC_F32);
    return c;
}

// a product with a has to have the bytes of the product with a in f32, which is close to a reference in double
static void check_converted(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, bool out_prod, const std::string & name) {
    ggml_tensor *            f    = as_f32(ctx, a);
    ggml_tensor *            want = out_prod ? ggml_out_prod(ctx, f, b) : mul_mat_f32(ctx, f, b);
    const std::vector<float> got  = run(ctx, out_prod ? ggml_out_prod(ctx, a, b) : mul_mat_f32(ctx, a, b), name);
    compute(graph_of(ctx, want), 1);
    check(memcmp(got.data(), want->data, got.size() * sizeof(float)) == 0, name + ": the bytes of the product with src0 in f32");
    compare(got, mul_mat_reference(f, b, out_prod), 1e-5, name);
}

static void test_types() {
    const std::vector<ggml_type> types = {
        GGML_TYPE_F16,  GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0,   GGML_TYPE_Q5_1,
        GGML_TYPE_Q2_K, GGML_TYPE_Q3_K, GGML_TYPE_Q4_K, GGML_TYPE_Q5_K, GGML_TYPE_Q6_K, GGML_TYPE_IQ4_NL, GGML_TYPE_IQ4_XS,
    };
    for (ggml_type type : types) {
        const int64_t     u    = ggml_blck_size(type);   // a unit of the row length
        const std::string name = std::string(" ") + ggml_type_name(type);
        // row lengths around the blocks of terms (384 at most), which cut blocks of 32 and 256 in two
        for (int64_t ne0 : u == 1 ? std::vector<int64_t>{ 1, 385, 801 } : std::vector<int64_t>{ u, (400 + u) / u * u, (800 + u) / u * u }) {
            for (int64_t m : { 1, 3, 50 }) {
                if (too_long(m * ne0 * 75)) {
                    continue;
                }
                context           ctx;
                const std::string size = name + " " + std::to_string(ne0) + " m=" + std::to_string(m);
                ggml_tensor *     a    = new_of(ctx, type, { ne0, 75 });
                check_converted(ctx, a, new_f32(ctx, { ne0, m }), false, "mul_mat" + size);
                check_converted(ctx, a, new_f32(ctx, { m, 75 }), true, "out_prod" + size);
                check_converted(ctx, a, ggml_transpose(ctx, new_f32(ctx, { 75, m })), true, "out_prod transposed" + size);
            }
        }
        {   // rows with gaps; many rows, so that there are several tiles
            context       ctx;
            ggml_tensor * all = new_of(ctx, type, { 3 * 256, 700 });
            ggml_tensor * a   = ggml_view_2d(ctx, all, 2 * 256, 350, 2 * all->nb[1], ggml_row_size(type, 256));
            check_converted(ctx, a, new_f32(ctx, { 2 * 256, 33 }), false, "mul_mat view" + name);
            check_converted(ctx, a, new_f32(ctx, { 33, 350 }), true, "out_prod view" + name);
            check_converted(ctx, all, new_f32(ctx, { 3 * 256, 40 }), false, "mul_mat tiles" + name);
        }
        {   // dims 2 and 3 broadcast
            context       ctx;
            ggml_tensor * a = new_of(ctx, type, { 256, 21, 3, 2 });
            check_converted(ctx, a, new_f32(ctx, { 256, 5, 9, 4 }), false, "mul_mat broadcast" + name);
            check_converted(ctx, a, new_f32(ctx, { 5, 21, 9, 4 }), true, "out_prod broadcast" + name);
        }
        {   // decoding, as ggml has it: src1 is rounded to blocks of 8 bits too
            context       ctx;
            ggml_tensor * a = new_of(ctx, type, { 512, 60 });
            ggml_tensor * b = new_f32(ctx, { 512, 7 });
            compare(run(ctx, ggml_mul_mat(ctx, a, b), "mul_mat" + name), mul_mat_reference(as_f32(ctx, a), b, false), 2e-2, "mul_mat" + name);
        }
        {
            context                  ctx;
            ggml_tensor *            a    = new_of(ctx, type, { 512, 11 });
            ggml_tensor *            f    = as_f32(ctx, a);
            const std::vector<float> rows = run(ctx, ggml_get_rows(ctx, a, new_i32(ctx, { 10, 0, 3, 3 })), "get_rows" + name);
            const int64_t            at[] = { 10, 0, 3, 3 };
            for (int64_t i = 0; i < 4; ++i) {
                check(memcmp(rows.data() + i * 512, ggml_get_data_f32(f) + at[i] * 512, 512 * sizeof(float)) == 0, "get_rows" + name);
            }
        }
        check_gradients(
            "mul_mat with frozen" + name,
            [&](ggml_context * ctx) {
                ggml_tensor * a = new_of(ctx, type, { 256, 19 });
                ggml_tensor * b = new_of(ctx, type, { 256, 8, 1, 2 });
                ggml_tensor * x = new_f32(ctx, { 256, 7, 3, 2 });
                ggml_tensor * y = ggml_reshape_4d(ctx, mul_mat_f32(ctx, a, ggml_reshape_2d(ctx, x, 256, 42)), 19, 7, 3, 2);
                return function{ ggml_concat(ctx, y, mul_mat_f32(ctx, b, x), 0), { x } };
            },
            0.5f, 1e-5);
    }
}

// --- products in bf16 -----------------------------------------------------------------------------------------------

static float to_bf16(float x) {
    return ggml_bf16_to_fp32(ggml_fp32_to_bf16(x));
}

// the numbers of t, rounded, in f32 and contiguous
static ggml_tensor * rounded(ggml_context * ctx, const ggml_tensor * t) {
    ggml_tensor * y = ggml_new_tensor(ctx, GGML_TYPE_F32, 4, t->ne);
    if (t->type == GGML_TYPE_F32) {
        for (int64_t i = 0; i < ggml_nelements(t); ++i) {
            const int64_t i0 = i % t->ne[0], i1 = i / t->ne[0] % t->ne[1], i2 = i / t->ne[0] / t->ne[1] % t->ne[2],
                          i3        = i / t->ne[0] / t->ne[1] / t->ne[2];
            ggml_get_data_f32(y)[i] = get(t, i0, i1, i2, i3);
        }
    } else {
        y = as_f32(ctx, t);
    }
    for (int64_t i = 0; i < ggml_nelements(y); ++i) {
        ggml_get_data_f32(y)[i] = to_bf16(ggml_get_data_f32(y)[i]);
    }
    return y;
}

static void check_bf16(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, bool out_prod, const std::string & name) {
    ggml_tensor * c = out_prod ? ggml_out_prod(ctx, a, b) : ggml_mul_mat(ctx, a, b);
    ggml_mul_mat_set_prec(c, GGML_PREC_BF16);
    // products of rounded operands are exact in f32, as are their sums in pairs but for one rounding
    const double limit = 2e-7 * std::sqrt((double) (out_prod ? a->ne[1] : a->ne[0])) + 2e-7;
    compare(run(ctx, c, name), mul_mat_reference(rounded(ctx, a), rounded(ctx, b), out_prod), limit, name);
}

static void test_bf16() {
    const std::vector<std::vector<int64_t>> shapes = {
        // m, k, n
        { 1, 1, 1 },    { 2, 2, 3 },    { 4, 1, 1 },     { 1, 65, 33 },   { 3, 40, 17 },    { 13, 33, 31 },    { 14, 64, 32 },
        { 15, 31, 49 }, { 29, 95, 65 }, { 57, 768, 63 }, { 40, 769, 63 }, { 300, 17, 600 }, { 57, 1553, 130 }, { 2, 800, 1000 },
    };
    for (const auto & s : shapes) {
        const int64_t m = s[0], k = s[1], n = s[2];
        if (too_long(m * k * n)) {
            continue;
        }
        const std::string name = " bf16 m=" + std::to_string(m) + " k=" + std::to_string(k) + " n=" + std::to_string(n);
        context           ctx;
        check_bf16(ctx, new_f32(ctx, { k, n }), new_f32(ctx, { k, m }), false, "mul_mat" + name);
        check_bf16(ctx, new_f32(ctx, { n, k }), new_f32(ctx, { m, k }), true, "out_prod" + name);
        check_bf16(ctx, new_f32(ctx, { n, k }), ggml_transpose(ctx, new_f32(ctx, { k, m })), true, "out_prod transposed" + name);
        // rows with gaps, so that what lies beside a row is not read as part of it
        ggml_tensor * a = ggml_view_2d(ctx, new_f32(ctx, { k + 3, n }), k, n, (k + 3) * sizeof(float), sizeof(float));
        ggml_tensor * b = ggml_view_2d(ctx, new_f32(ctx, { k + 5, m }), k, m, (k + 5) * sizeof(float), 2 * sizeof(float));
        check_bf16(ctx, a, b, false, "mul_mat view" + name);
        // neither side contiguous along k or along its rows
        a = ggml_permute(ctx, new_f32(ctx, { 2, k, n }), 2, 0, 1, 3);
        b = ggml_permute(ctx, new_f32(ctx, { 2, k, m }), 2, 0, 1, 3);
        check_bf16(ctx, a, b, false, "mul_mat permuted" + name);
    }
    for (int64_t r3 : { 1, 2 }) {
        context           ctx;
        const std::string name = " bf16 broadcast r3=" + std::to_string(r3);
        ggml_tensor *     a    = ggml_permute(ctx, new_f32(ctx, { 21, 3, 37, 2 }), 0, 2, 1, 3);
        ggml_tensor *     b    = ggml_permute(ctx, new_f32(ctx, { 21, 9, 19, 2 * r3 }), 0, 2, 1, 3);
        check_bf16(ctx, a, b, false, "mul_mat" + name);
    }
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q6_K }) {
        // blocks of terms begin with a block of the type, and in the middle of one
        for (int64_t k : { 1024, type == GGML_TYPE_Q6_K ? 1280 : 1056 }) {
            for (int64_t m : { 1, 50 }) {
                if (too_long(m * k * 301)) {
                    continue;
                }
                context           ctx;
                const std::string name = std::string(" bf16 ") + ggml_type_name(type) + " k=" + std::to_string(k) + " m=" + std::to_string(m);
                ggml_tensor *     a    = new_of(ctx, type, { k, 301 });
                ggml_tensor *     f    = as_f32(ctx, a);
                const auto        both = [&](ggml_tensor * b, bool out_prod, const std::string & op) {
                    check_bf16(ctx, a, b, out_prod, op + name);
                    ggml_tensor * c = out_prod ? ggml_out_prod(ctx, a, b) : ggml_mul_mat(ctx, a, b);
                    ggml_tensor * d = out_prod ? ggml_out_prod(ctx, f, b) : ggml_mul_mat(ctx, f, b);
                    ggml_mul_mat_set_prec(c, GGML_PREC_BF16);
                    ggml_mul_mat_set_prec(d, GGML_PREC_BF16);
                    const std::vector<float> x = run(ctx, c, op + name), y = run(ctx, d, op + name);
                    check(memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0, op + name + ": the bytes of the converted matrix");
                };
                both(new_f32(ctx, { k, m }), false, "mul_mat");
                both(new_f32(ctx, { m, 301 }), true, "out_prod");
            }
        }
    }
    {   // a row's bytes depend neither on its position nor on the other rows
        context       ctx;
        ggml_tensor * a       = new_f32(ctx, { 901, 700 });
        ggml_tensor * b       = new_f32(ctx, { 901, 90 });
        const auto    product = [&](ggml_tensor * x, ggml_tensor * y) {
            ggml_tensor * c = ggml_mul_mat(ctx, x, y);
            ggml_mul_mat_set_prec(c, GGML_PREC_BF16);
            return run(ctx, c, "mul_mat bf16");
        };
        const std::vector<float> all = product(a, b);
        const std::vector<float> few = product(a, ggml_view_2d(ctx, b, 901, 9, b->nb[1], 37 * b->nb[1]));
        const std::vector<float> sub = product(ggml_view_2d(ctx, a, 901, 41, a->nb[1], 333 * a->nb[1]), b);
        check(memcmp(all.data() + 37 * 700, few.data(), few.size() * sizeof(float)) == 0, "mul_mat bf16: some rows have the bytes of all rows");
        bool same = true;
        for (int64_t i = 0; i < 90; ++i) {
            same = same && memcmp(all.data() + i * 700 + 333, sub.data() + i * 41, 41 * sizeof(float)) == 0;
        }
        check(same, "mul_mat bf16: some columns have the bytes of all columns");
    }
    // gradients are products of rounded operands too; in an accumulator, in a temporary, of a broadcast and of activations
    for (bool accumulate : { true, false }) {
        context       ctx;
        ggml_tensor * w = new_f32(ctx, { 37, 50 });
        ggml_tensor * x = new_f32(ctx, { 37, 21 });
        ggml_tensor * r = new_f32(ctx, { 50, 21 });
        ggml_tensor * y = ggml_mul_mat(ctx, w, x);
        ggml_mul_mat_set_prec(y, GGML_PREC_BF16);
        ggml_set_param(w);
        ggml_set_param(x);
        ggml_tensor * loss = ggml_sum(ctx, ggml_mul(ctx, y, r));
        ggml_set_loss(loss);
        ggml_cgraph *              graph = graph_of(ctx, loss);
        std::vector<ggml_tensor *> accs(ggml_graph_n_nodes(graph), nullptr);
        for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
            ggml_tensor * node = ggml_graph_node(graph, i);
            accs[i]            = accumulate && (node == w || node == x) ? ggml_dup_tensor(ctx, node) : nullptr;
        }
        ggml_build_backward_expand(ctx, graph, accs.data());
        ggml_graph_reset(graph);
        compute(graph, 2);
        const auto values = [&](ggml_tensor * p) {
            const float * g = ggml_get_data_f32(ggml_graph_get_grad(graph, p));
            return std::vector<float>(g, g + ggml_nelements(p));
        };
        ggml_tensor *wr = rounded(ctx, w), *xr = rounded(ctx, x), *rr = rounded(ctx, r);
        compare(values(w), mul_mat_reference(xr, rr, true), 2e-6, "bf16: gradient of the weight");
        compare(values(x), mul_mat_reference(wr, ggml_transpose(ctx, rr), true), 2e-6, "bf16: gradient of the activation");
    }
}

// --- weights in blocks of 32, in integers ---------------------------------------------------------------------------

// what ggml's vec_dot makes of each row of a with each of b, rounded as it wants them
static std::vector<double> vec_dot_reference(const ggml_tensor * a, const ggml_tensor * b) {
    const ggml_type_traits_cpu * traits  = ggml_get_type_traits_cpu(a->type);
    const ggml_type_traits_cpu * rounded = ggml_get_type_traits_cpu(traits->vec_dot_type);
    std::vector<uint8_t>         row(ggml_row_size(traits->vec_dot_type, b->ne[0]));
    std::vector<double>          c;
    for (int64_t r = 0; r < ggml_nrows(b); ++r) {
        const int64_t i1 = r % b->ne[1], i2 = r / b->ne[1] % b->ne[2], i3 = r / b->ne[1] / b->ne[2];
        rounded->from_float((const float *) ((const char *) b->data + i1 * b->nb[1] + i2 * b->nb[2] + i3 * b->nb[3]), row.data(), b->ne[0]);
        const char * mat = (const char *) a->data + i2 / (b->ne[2] / a->ne[2]) * a->nb[2] + i3 / (b->ne[3] / a->ne[3]) * a->nb[3];
        for (int64_t i0 = 0; i0 < a->ne[1]; ++i0) {
            float x;
            traits->vec_dot((int) a->ne[0], &x, 0, mat + i0 * a->nb[1], 0, row.data(), 0, 1);
            c.push_back(x);
        }
    }
    return c;
}

// the order of sums may differ: by rounding of their terms, whatever is left of them
static void compare_sums(const std::vector<float> & got, const std::vector<double> & want, int64_t k, const std::string & name) {
    double error = 0.0;
    for (size_t i = 0; i < want.size(); ++i) {
        error = std::max(error, std::isfinite(got[i]) ? std::fabs(got[i] - want[i]) : INFINITY);
    }
    error /= std::sqrt((double) k);
    check(got.size() == want.size() && error <= 1e-6, name, error, 1e-6);
}

static void test_blocks_of_32() {
    for (ggml_type type : { GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_Q8_0, GGML_TYPE_IQ4_NL }) {
        const std::string name = std::string("mul_mat in integers ") + ggml_type_name(type);
        bool              ours = false;
        for (int64_t n : { 1, 16, 33, 100 }) {
            for (int64_t m : { 1, 2, 3, 4, 7, 31 }) {
                for (int64_t k : { 32, 608 }) {
                    context           ctx;
                    const std::string size = name + " n=" + std::to_string(n) + " m=" + std::to_string(m) + " k=" + std::to_string(k);
                    ggml_tensor *     a    = new_of(ctx, type, { k, n });
                    ggml_tensor *     b    = new_f32(ctx, { k, m });
                    ggml_tensor *     c    = ggml_mul_mat(ctx, a, b);
                    ours                   = ggml_gemm_q8_supported(c);
                    compare_sums(run(ctx, c, size), vec_dot_reference(a, b), k, size);
                }
            }
        }
        {   // rows with gaps, in both
            context       ctx;
            ggml_tensor * all  = new_of(ctx, type, { 320, 70 });
            ggml_tensor * a    = ggml_view_2d(ctx, all, 256, 35, 2 * all->nb[1], ggml_row_size(type, 64));
            ggml_tensor * rows = new_f32(ctx, { 300, 9 });
            ggml_tensor * b    = ggml_view_2d(ctx, rows, 256, 9, rows->nb[1], 5 * sizeof(float));
            compare_sums(run(ctx, ggml_mul_mat(ctx, a, b), name + " view"), vec_dot_reference(a, b), 256, name + " view");
            b = ggml_view_2d(ctx, rows, 256, 2, rows->nb[1], 7 * sizeof(float));
            compare_sums(run(ctx, ggml_mul_mat(ctx, a, b), name + " few, view"), vec_dot_reference(a, b), 256, name + " few, view");
        }
        for (int64_t m : { 2, 5 }) {   // dims 2 and 3 broadcast
            context       ctx;
            ggml_tensor * a = new_of(ctx, type, { 64, 21, 3, 2 });
            ggml_tensor * b = new_f32(ctx, { 64, m, 9, 4 });
            compare_sums(run(ctx, ggml_mul_mat(ctx, a, b), name + " broadcast"), vec_dot_reference(a, b), 64, name + " broadcast");
        }
        if (ours) {   // one row of src1 alone has its bytes among many: a token decoded is the token of a prompt
            context                  ctx;
            ggml_tensor *            a   = new_of(ctx, type, { 1536, 77 });
            ggml_tensor *            b   = new_f32(ctx, { 1536, 50 });
            const std::vector<float> all = run(ctx, ggml_mul_mat(ctx, a, b), name);
            for (int64_t m : { 1, 2, 3, 5 }) {
                ggml_tensor *            part = ggml_view_2d(ctx, b, 1536, m, b->nb[1], 37 * b->nb[1]);
                const std::vector<float> few  = run(ctx, ggml_mul_mat(ctx, a, part), name);
                check(memcmp(all.data() + 37 * 77, few.data(), few.size() * sizeof(float)) == 0, name + ": some rows have the bytes of all rows");
            }
        }
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

// --- gradients that are added up in place ---------------------------------------------------------------------------

// a weight that is used twice, one that is an embedding and the head, one product of matrices with a batch: sum of out*r
static ggml_tensor * model_with_shared_weights(ggml_context * ctx, int64_t n_embd, int64_t n_vocab, int64_t n_tokens,
                                               std::vector<ggml_tensor *> & params) {
    params = { new_f32(ctx, { n_embd, n_vocab }), new_f32(ctx, { n_embd, n_embd }), new_f32(ctx, { n_vocab, 3 }) };
    for (ggml_tensor * p : params) {
        ggml_set_param(p);
    }
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < n_tokens; ++i) {
        ids.push_back((int32_t) (i * i % n_vocab));
    }
    ggml_tensor * x = ggml_get_rows(ctx, params[0], new_i32(ctx, ids));
    x               = ggml_mul_mat(ctx, params[1], ggml_mul_mat(ctx, params[1], x));
    x               = ggml_mul_mat(ctx, params[0], x);
    x               = ggml_mul_mat(ctx, params[2], ggml_reshape_3d(ctx, x, n_vocab, n_tokens / 2, 2));
    return ggml_sum(ctx, ggml_mul(ctx, x, new_f32(ctx, { 3, n_tokens / 2, 2 })));
}

static void test_accumulators() {
    const std::vector<std::vector<int64_t>> shapes = {
        // n_embd, n_vocab, n_tokens
        { 5, 7, 4 },      { 33, 65, 18 },
        { 32, 64, 2 },    { 47, 530, 800 },   // the gradient of a square weight is summed up by halves, of one block of terms
        { 45, 33, 1540 },                     // and of two
    };
    for (const auto & s : shapes) {
        const std::string          name = "accumulators " + std::to_string(s[0]) + "," + std::to_string(s[1]) + "," + std::to_string(s[2]);
        context                    ctx;
        std::vector<ggml_tensor *> params;
        ggml_tensor *              loss = model_with_shared_weights(ctx, s[0], s[1], s[2], params);
        ggml_set_loss(loss);
        ggml_cgraph * plain = graph_of(ctx, loss);
        ggml_build_backward_expand(ctx, plain, nullptr);
        ggml_graph_reset(plain);
        compute(plain, 1);

        ggml_cgraph *              graph = graph_of(ctx, loss);
        const int                  n     = ggml_graph_n_nodes(graph);
        std::vector<ggml_tensor *> accs(n, nullptr);
        std::vector<ggml_tensor *> sums;
        for (int i = 0; i < n; ++i) {
            for (ggml_tensor * p : params) {
                if (ggml_graph_node(graph, i) == p) {
                    sums.push_back(accs[i] = ggml_dup_tensor(ctx, p));
                }
            }
        }
        ggml_build_backward_expand(ctx, graph, accs.data());
        ggml_get_data_f32(ggml_graph_get_grad(graph, loss))[0] = 1.0f;

        // the first operation that writes to each accumulator
        std::vector<ggml_tensor *> first;
        for (ggml_tensor * sum : sums) {
            int i = n;
            while (ggml_graph_node(graph, i)->view_src != sum) {
                i++;
            }
            first.push_back(ggml_graph_node(graph, i));
        }
        std::vector<std::vector<float>> bytes;
        for (int n_threads : thread_counts) {
            for (int round = 0; round < 3; ++round) {
                for (size_t i = 0; i < first.size(); ++i) {
                    if (ggml_adds_in_place(first[i]) && round == 0) {
                        first[i]->flags |= GGML_TENSOR_FLAG_SET;
                        memset(sums[i]->data, 0xff, ggml_nbytes(sums[i]));
                    } else if (round == 0) {
                        memset(sums[i]->data, 0, ggml_nbytes(sums[i]));
                    } else {
                        first[i]->flags &= ~GGML_TENSOR_FLAG_SET;
                    }
                }
                compute(graph, n_threads);
                for (size_t i = 0; i < sums.size(); ++i) {
                    ggml_tensor *       p = nullptr;
                    std::vector<double> want;
                    for (ggml_tensor * q : params) {
                        p = ggml_graph_get_grad_acc(graph, q) == sums[i] ? q : p;
                    }
                    const float * once = ggml_get_data_f32(ggml_graph_get_grad(plain, p));
                    for (int64_t j = 0; j < ggml_nelements(p); ++j) {
                        want.push_back((round + 1) * (double) once[j]);
                    }
                    const std::vector<float> got(ggml_get_data_f32(sums[i]), ggml_get_data_f32(sums[i]) + ggml_nelements(sums[i]));
                    compare(got, want, 1e-6, name + ": round " + std::to_string(round));
                    if (n_threads == 1) {
                        bytes.push_back(got);
                    }
                    check(memcmp(got.data(), bytes[round * sums.size() + i].data(), got.size() * sizeof(float)) == 0,
                          name + ": same bytes with " + std::to_string(n_threads) + " threads");
                }
            }
        }
        int n_in_place = 0;
        for (int i = n; i < ggml_graph_n_nodes(graph); ++i) {
            n_in_place += ggml_adds_in_place(ggml_graph_node(graph, i));
        }
        check(n_in_place == 4, name + ": three products and the embedding add in place");
    }
}

// --- sums without terms ---------------------------------------------------------------------------------------------

// as the gradient of a weight that met no tokens: what they sum up to is 0, not what was there
static void test_no_terms() {
    for (const auto & s : std::vector<std::vector<int64_t>>{ { 1, 40 }, { 9, 1 }, { 50, 70 }, { 3, 400 }, { 600, 5 } }) {
        for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_Q8_0 }) {
            for (ggml_prec prec : { GGML_PREC_F32, GGML_PREC_BF16 }) {
                const int64_t            m = s[0], n = type == GGML_TYPE_F32 ? s[1] : GGML_PAD(s[1], 32);
                const std::string        name = " of no terms, m=" + std::to_string(m) + " n=" + std::to_string(n) + " " + ggml_type_name(type);
                context                  ctx;
                ggml_tensor *            a   = ggml_new_tensor_2d(ctx, type, n, 0);
                ggml_tensor *            b   = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, m, 0);
                ggml_tensor *            acc = new_f32(ctx, { n, m });
                const std::vector<float> was = values_of(acc);
                ggml_tensor *            y   = ggml_out_prod(ctx, a, b);
                ggml_tensor *            sum = ggml_out_prod_acc(ctx, acc, a, b);
                ggml_mul_mat_set_prec(y, prec);
                ggml_mul_mat_set_prec(sum, prec);
                compare(run(ctx, y, "out_prod" + name), std::vector<double>(n * m, 0.0), 0.0, "out_prod" + name);
                compute(graph_of(ctx, sum), 2);
                check(values_of(acc) == was, "out_prod_acc" + name);
                sum->flags |= GGML_TENSOR_FLAG_SET;
                compare(run(ctx, sum, "out_prod_acc" + name), std::vector<double>(n * m, 0.0), 0.0, "out_prod_acc, set" + name);
            }
        }
    }
}

int main() {
    ggml_cpu_init();
    test_mul_mat();
    test_types();
    test_bf16();
    test_no_terms();
    test_blocks_of_32();
    test_attention();
    test_accumulators();
    return summary("test-products");
}
