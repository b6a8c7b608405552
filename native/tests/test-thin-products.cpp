// Products with a matrix of few rows or columns, or of few terms, as those of low-rank adapters are: they have kernels of their own,
// and the bytes of the same elements in a wide product. Forward against double and gradients are in test-products, with odd sizes.

#include "ops.h"

// the wide operand has as many rows (or columns) as no thin kernel takes
static const int64_t WIDE = 41;

static ggml_tensor * some_rows(ggml_context * ctx, ggml_tensor * t, int64_t n) {
    return ggml_view_2d(ctx, t, t->ne[0], n, t->nb[1], 0);
}

static ggml_tensor * some_columns(ggml_context * ctx, ggml_tensor * t, int64_t n) {
    return ggml_view_2d(ctx, t, n, t->ne[1], t->nb[1], 0);
}

// thin is the corner [n0, n1] of wide
static void check_corner(ggml_context * ctx, ggml_tensor * thin, ggml_tensor * wide, ggml_prec prec, const std::string & name) {
    ggml_mul_mat_set_prec(thin, prec);
    ggml_mul_mat_set_prec(wide, prec);
    const std::vector<float> some = run(ctx, thin, name), all = run(ctx, wide, name + ", wide");
    bool                     same = true;
    for (int64_t i = 0; i < thin->ne[1]; ++i) {
        same = same && memcmp(&some[i * thin->ne[0]], &all[i * wide->ne[0]], thin->ne[0] * sizeof(float)) == 0;
    }
    check(same, name + ": the bytes of a wide product");
}

// a product added to what is there, in place
static void check_sum(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, int64_t n0, int64_t n1, ggml_prec prec, const std::string & name) {
    ggml_tensor * wide  = new_f32(ctx, { a->ne[0], b->ne[0] });
    ggml_tensor * start = ggml_dup_tensor(ctx, wide);
    memcpy(start->data, wide->data, ggml_nbytes(wide));
    ggml_tensor * all = ggml_out_prod_acc(ctx, wide, a, b);
    ggml_mul_mat_set_prec(all, prec);
    compute(graph_of(ctx, all), 1);
    for (int n_threads : thread_counts) {
        ggml_tensor * thin = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n0, n1);
        for (int64_t i = 0; i < n1; ++i) {
            memcpy((char *) thin->data + i * thin->nb[1], (char *) start->data + i * start->nb[1], n0 * sizeof(float));
        }
        ggml_tensor * some = ggml_out_prod_acc(ctx, thin, some_columns(ctx, a, n0), some_columns(ctx, b, n1));
        ggml_mul_mat_set_prec(some, prec);
        compute(graph_of(ctx, some), n_threads);
        bool same = true;
        for (int64_t i = 0; i < n1; ++i) {
            same = same && memcmp((char *) thin->data + i * thin->nb[1], (char *) wide->data + i * wide->nb[1], n0 * sizeof(float)) == 0;
        }
        check(same, name + ": the bytes of a wide sum with " + std::to_string(n_threads) + " threads");
    }
}

static ggml_tensor * with_zeros_behind(ggml_context * ctx, ggml_tensor * t, int64_t n) {   // along dim 0
    ggml_tensor * out = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n, t->ne[1]);
    memset(out->data, 0, ggml_nbytes(out));
    for (int64_t i = 0; i < t->ne[1]; ++i) {
        memcpy((char *) out->data + i * out->nb[1], (char *) t->data + i * t->nb[1], t->ne[0] * sizeof(float));
    }
    return out;
}

static void test_corners(ggml_prec prec) {
    const std::vector<std::vector<int64_t>> shapes = {
        // rows, terms, rank
        { 67, 576, 8 },  { 256, 192, 8 }, { 1, 900, 8 },   { 13, 385, 7 }, { 50, 1153, 1 }, { 97, 769, 16 },
        { 12, 1536, 9 }, { 70, 40, 4 },   { 33, 256, 15 }, { 200, 17, 2 }, { 64, 31, 14 },  { 131, 33, 12 },
    };
    for (const auto & s : shapes) {
        const int64_t     m = s[0], k = s[1], r = s[2];
        const std::string name = std::string(prec == GGML_PREC_BF16 ? " bf16" : " f32") + " m=" + std::to_string(m) + " k=" + std::to_string(k) +
                                 " r=" + std::to_string(r);
        context           ctx;
        {   // few columns
            ggml_tensor * a = new_f32(ctx, { k, WIDE });
            ggml_tensor * x = new_f32(ctx, { k, m });
            check_corner(ctx, ggml_mul_mat(ctx, some_rows(ctx, a, r), x), ggml_mul_mat(ctx, a, x), prec, "mul_mat" + name);
        }
        {   // few columns of a product whose other operand has its rows along the terms, as the gradient of what an adapter reads
            ggml_tensor * b = new_f32(ctx, { WIDE, k });
            ggml_tensor * y = ggml_transpose(ctx, new_f32(ctx, { k, m }));
            check_corner(ctx, ggml_out_prod(ctx, some_columns(ctx, b, r), y), ggml_out_prod(ctx, b, y), prec, "out_prod transposed" + name);
        }
        {   // few columns, few rows, both: the gradients of an adapter's matrices
            ggml_tensor * low = new_f32(ctx, { WIDE, k });
            ggml_tensor * y   = new_f32(ctx, { m, k });
            check_corner(ctx, ggml_out_prod(ctx, some_columns(ctx, low, r), y), ggml_out_prod(ctx, low, y), prec, "out_prod, columns" + name);
            check_corner(ctx, ggml_out_prod(ctx, y, some_columns(ctx, low, r)), ggml_out_prod(ctx, y, low), prec, "out_prod, rows" + name);
            // of an odd number of terms, of which no sum is made in halves
            low = new_f32(ctx, { WIDE, k | 1 });
            y   = new_f32(ctx, { m, k | 1 });
            check_sum(ctx, low, y, r, m, prec, "out_prod_acc, columns" + name);
            check_sum(ctx, y, low, m, r, prec, "out_prod_acc, rows" + name);
            check_sum(ctx, low, low, r, r, prec, "out_prod_acc, both" + name);
        }
        {   // few terms: zeros behind them change nothing
            ggml_tensor * b   = new_f32(ctx, { r, k });
            ggml_tensor * low = new_f32(ctx, { r, m });
            check_corner(ctx, ggml_mul_mat(ctx, b, low), ggml_mul_mat(ctx, with_zeros_behind(ctx, b, WIDE), with_zeros_behind(ctx, low, WIDE)), prec,
                         "mul_mat, terms" + name);
            ggml_tensor * a = new_f32(ctx, { k, WIDE });
            ggml_tensor * u = with_zeros_behind(ctx, low, WIDE);
            check_corner(ctx, ggml_out_prod(ctx, some_rows(ctx, a, r), ggml_transpose(ctx, low)), ggml_out_prod(ctx, a, ggml_transpose(ctx, u)), prec,
                         "out_prod, terms" + name);
        }
    }
}

// several matrices at once, one of them broadcast
static void test_broadcast(ggml_prec prec) {
    context       ctx;
    ggml_tensor * a    = new_f32(ctx, { 600, WIDE, 2 });
    ggml_tensor * x    = new_f32(ctx, { 600, 29, 4, 3 });
    ggml_tensor * thin = ggml_mul_mat(ctx, ggml_view_3d(ctx, a, 600, 8, 2, a->nb[1], a->nb[2], 0), x);
    ggml_tensor * wide = ggml_mul_mat(ctx, a, x);
    ggml_mul_mat_set_prec(thin, prec);
    ggml_mul_mat_set_prec(wide, prec);
    const std::vector<float> some = run(ctx, thin, "mul_mat, thin, broadcast"), all = run(ctx, wide, "mul_mat, wide, broadcast");
    bool                     same = true;
    for (int64_t i = 0; i < 29 * 4 * 3; ++i) {
        same = same && memcmp(&some[i * 8], &all[i * WIDE], 8 * sizeof(float)) == 0;
    }
    check(same, "mul_mat, thin, broadcast: the bytes of a wide product");
}

int main() {
    ggml_cpu_init();
    for (ggml_prec prec : { GGML_PREC_F32, GGML_PREC_BF16 }) {
        test_corners(prec);
        test_broadcast(prec);
    }
    return summary("test-thin-products");
}
