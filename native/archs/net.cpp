#include "net.h"

#include "engine/rng.h"

#include <algorithm>
#include <cmath>

namespace toy {

using tensor = ggml_tensor *;

tensor net::product(tensor w, tensor x) const {
    tensor y = ggml_mul_mat(ctx, w, x);
    if (bf16) {
        ggml_mul_mat_set_prec(y, GGML_PREC_BF16);
    } else if (f32 && w->type != GGML_TYPE_F32) {
        ggml_mul_mat_set_prec(y, GGML_PREC_F32);
    }
    return y;
}

tensor net::linear(const std::string & name, tensor x) const {
    const std::string weight = name + ".weight";
    tensor            y      = product(get(weight), x);
    if (tensor a = lora ? lora->get(weight + ".lora_a") : nullptr) {
        tensor in = x;
        if (lora->dropout > 0) {
            // every product its own random numbers: the same x goes into several
            in = ggml_dropout(ctx, x, lora->seeds, lora->dropout, (int32_t) (hash_bytes(weight.data(), weight.size()) & 0x7fffffff));
        }
        tensor low = product(a, in);   // [r, N]
        if (lora->alpha != 0) {
            low = ggml_scale(ctx, low, (float) (lora->alpha / (double) a->ne[1]));   // here, where it is small
        }
        y = ggml_add(ctx, y, product(lora->get(weight + ".lora_b"), low));   // [out, N]
    }
    if (tensor b = get(name + ".bias")) {
        y = ggml_add(ctx, y, b);
    }
    return y;
}

tensor net::rms_norm(const std::string & name, tensor x) const {
    return ggml_mul(ctx, ggml_rms_norm(ctx, x, hp.norm_eps), get(name + ".weight"));
}

tensor net::layer_norm(const std::string & name, tensor x) const {
    x = ggml_mul(ctx, ggml_norm(ctx, x, hp.norm_eps), get(name + ".weight"));
    return ggml_add(ctx, x, get(name + ".bias"));
}

void kv_cache::begin_graph() {
    ends.clear();
    used.clear();
}

void kv_cache::move_graph(int T) {
    for (tensor t : ends) {
        t->view_offs = n_past * t->view_src->nb[1];
        t->data      = (char *) t->view_src->data + t->view_offs;
    }
    for (tensor t : used) {
        t->ne[2] = n_past + T;
        t->nb[3] = t->ne[2] * t->nb[2];
    }
}

void set_causal_mask(tensor mask, int64_t n_past) {
    const int64_t      S = mask->ne[0], T = mask->ne[1];
    std::vector<float> all(S * T, 0.0f);
    for (int64_t i = 0; i < T; i++) {
        std::fill(all.begin() + i * S + n_past + i + 1, all.begin() + (i + 1) * S, -INFINITY);
    }
    std::vector<ggml_fp16_t> halves(mask->type == GGML_TYPE_F16 ? S * T : 0);
    ggml_fp32_to_fp16_row(all.data(), halves.data(), (int64_t) halves.size());
    ggml_backend_tensor_set(mask, halves.empty() ? (const void *) all.data() : halves.data(), 0, ggml_nbytes(mask));
}

bool has_attention(ggml_backend_t device, const hparams & hp, int64_t T, int64_t B, bool causal, bool bf16, bool trained) {
    const int64_t       D = hp.head_dim, H = hp.n_head, K = hp.n_head_kv;
    const float         scale = 1.0f / std::sqrt((float) D);
    ggml_context *      ctx   = ggml_init({ /*mem_size =*/32 * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true });
    const tensor        q = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, D, H, T, B), kv = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, D, K, T, B);
    const tensor        qkv = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, D, H + 2 * K, T, B);
    std::vector<tensor> ops = { ggml_attn(ctx, q, kv, kv, scale, causal), ggml_attn_qkv(ctx, qkv, K, scale, causal) };   // a family takes either
    for (const tensor out : ops) {
        ggml_attn_set_bf16(out, bf16);
    }
    if (trained) {
        ops.insert(ops.end(), { ggml_attn_back(ctx, q, ops[0]), ggml_attn_back(ctx, q, ops[1]) });
    }
    const bool all = std::all_of(ops.begin(), ops.end(), [&](const tensor op) { return ggml_backend_supports_op(device, op); });
    ggml_free(ctx);
    return all;
}

static tensor flash_attention_of(ggml_context * ctx, tensor q, tensor k, tensor v, tensor mask) {
    const tensor out = ggml_flash_attn_ext(ctx, ggml_permute(ctx, q, 0, 2, 1, 3), ggml_permute(ctx, k, 0, 2, 1, 3), ggml_permute(ctx, v, 0, 2, 1, 3),
                                           mask, 1.0f / std::sqrt((float) q->ne[0]), /*max_bias =*/0.0f, /*logit_softcap =*/0.0f);
    ggml_flash_attn_ext_set_prec(out, GGML_PREC_F32);
    return out;   // [D, H, T, B]
}

bool has_flash_attention(ggml_backend_t device, const hparams & hp, int64_t T, int64_t S) {
    ggml_context * ctx = ggml_init({ /*mem_size =*/16 * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true });
    const tensor   q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, hp.head_dim, hp.n_head, T), mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, S, T);
    const tensor   kv  = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, hp.head_dim, hp.n_head_kv, S);
    const bool     has = ggml_backend_supports_op(device, flash_attention_of(ctx, q, kv, kv, mask));
    ggml_free(ctx);
    return has;
}

tensor net::flash_attention(tensor q, tensor k, tensor v) const {
    return ggml_reshape_2d(ctx, flash_attention_of(ctx, q, k, v, mask), q->ne[0] * q->ne[1], q->ne[2] * q->ne[3]);
}

// Of operations that every device has: the scores of each head exist, [S, T] of T tokens that see S.
tensor net::plain_attention(tensor q, tensor k, tensor v, bool causal) const {
    const int64_t D = q->ne[0], H = q->ne[1], T = q->ne[2], B = q->ne[3];
    q        = ggml_cont(ctx, ggml_permute(ctx, q, 0, 2, 1, 3));                                                              // [D, T, H, B]
    k        = ggml_cont(ctx, ggml_permute(ctx, k, 0, 2, 1, 3));                                                              // [D, S, K, B]
    v        = ggml_cont(ctx, ggml_permute(ctx, v, 1, 2, 0, 3));                                                              // [S, D, K, B]
    tensor p = ggml_soft_max_ext(ctx, ggml_mul_mat(ctx, k, q), causal ? mask : nullptr, 1.0f / std::sqrt((float) D), 0.0f);   // [S, T, H, B]
    p        = ggml_permute(ctx, ggml_mul_mat(ctx, v, p), 0, 2, 1, 3);                                                        // [D, H, T, B]
    return ggml_reshape_2d(ctx, ggml_cont(ctx, p), D * H, T * B);
}

tensor net::attention(int il, tensor q, tensor k, tensor v, bool causal) const {
    const int64_t D = q->ne[0], H = q->ne[1], T = q->ne[2], B = q->ne[3], K = k->ne[1];
    if (cache && cache->slots) {
        const auto append = [&](tensor x, tensor all) {
            ggml_build_forward_expand(gf, ggml_set_rows(ctx, all, ggml_view_2d(ctx, x, D * K, T, x->nb[2], 0), cache->slots));
            return ggml_view_4d(ctx, all, D, K, cache->n_read, 1, D * ggml_type_size(all->type), all->nb[1], cache->n_read * all->nb[1], 0);
        };
        tensor all_k = append(k, cache->k[il]), all_v = append(v, cache->v[il]);
        if (!fused) {   // else nothing is in the cache but these
            k = all_k;
            v = all_v;
        }
    } else if (cache) {
        // append to the cache, then attend over all of it
        const int64_t past = cache->n_past, S = past + T;
        const auto    append = [&](tensor x, tensor all) {
            tensor at  = ggml_view_2d(ctx, all, D * K, T, all->nb[1], past * all->nb[1]);
            tensor put = ggml_cpy(ctx, ggml_reshape_2d(ctx, x, D * K, T), at);
            ggml_build_forward_expand(gf, put);
            tensor seen = ggml_view_4d(ctx, all, D, K, S, 1, D * sizeof(float), all->nb[1], S * all->nb[1], 0);
            cache->ends.insert(cache->ends.end(), { at, put });
            cache->used.push_back(seen);
            return seen;
        };
        k = append(k, cache->k[il]);
        v = append(v, cache->v[il]);
    }
    if (!fused) {
        return mask && mask->type == GGML_TYPE_F16 ? flash_attention(q, k, v) : plain_attention(q, k, v, causal);
    }
    tensor out = ggml_attn(ctx, q, k, v, 1.0f / std::sqrt((float) D), causal);   // [D, H, T, B]
    ggml_attn_set_bf16(out, bf16);
    return ggml_reshape_2d(ctx, out, D * H, T * B);
}

tensor net::attention_qkv(int il, tensor qkv, int64_t T, bool causal) const {
    const int64_t D = hp.head_dim, H = hp.n_head, K = hp.n_head_kv, B = ggml_nelements(qkv) / (D * (H + 2 * K) * T);
    qkv = ggml_reshape_4d(ctx, qkv, D, H + 2 * K, T, B);
    if (cache || !fused) {
        const auto heads = [&](int64_t first, int64_t n) {
            return ggml_view_4d(ctx, qkv, D, n, T, B, qkv->nb[1], qkv->nb[2], qkv->nb[3], first * qkv->nb[1]);
        };
        if (cache && cache->slots) {
            return attention(il, heads(0, H), heads(H, K), heads(H + K, K), causal);
        }
        return attention(il, heads(0, H), ggml_cont(ctx, heads(H, K)), ggml_cont(ctx, heads(H + K, K)), causal);
    }
    tensor out = ggml_attn_qkv(ctx, qkv, K, 1.0f / std::sqrt((float) D), causal);   // [D, H, T, B]
    ggml_attn_set_bf16(out, bf16);
    return ggml_reshape_2d(ctx, out, D * H, T * B);
}

std::string block_name(int il) {
    return "blk." + std::to_string(il) + ".";
}

tensor gelu_block(const net & n, int il, tensor x, int64_t T, bool causal) {
    ggml_context *    ctx = n.ctx;
    const std::string b   = block_name(il);

    tensor h = n.layer_norm(b + "attn_norm", x);
    h        = n.attention_qkv(il, n.linear(b + "attn_qkv", h), T, causal);
    x        = ggml_add(ctx, x, n.linear(b + "attn_output", h));
    ggml_format_name(x, "blk.%d.attn_residual", il);

    h = ggml_gelu(ctx, n.linear(b + "ffn_up", n.layer_norm(b + "ffn_norm", x)));   // [F, T*B]
    x = ggml_add(ctx, x, n.linear(b + "ffn_down", h));
    ggml_format_name(x, "blk.%d.ffn_residual", il);
    return x;
}

void declare_gelu_block(const hparams & hp, int il, float std, float std_residual, weights & w) {
    const std::string b = block_name(il);
    const int         C = hp.n_embd, F = hp.n_ff;
    w.add_vector(b + "attn_norm.weight", C, init::ones());
    w.add_vector(b + "attn_norm.bias", C, init::zeros());
    w.add_matrix(b + "attn_qkv.weight", C, 3 * C, init::normal(std));
    w.add_vector(b + "attn_qkv.bias", 3 * C, init::zeros());
    w.add_matrix(b + "attn_output.weight", C, C, init::normal(std_residual));
    w.add_vector(b + "attn_output.bias", C, init::zeros());
    w.add_vector(b + "ffn_norm.weight", C, init::ones());
    w.add_vector(b + "ffn_norm.bias", C, init::zeros());
    w.add_matrix(b + "ffn_up.weight", C, F, init::normal(std));
    w.add_vector(b + "ffn_up.bias", F, init::zeros());
    w.add_matrix(b + "ffn_down.weight", F, C, init::normal(std_residual));
    w.add_vector(b + "ffn_down.bias", C, init::zeros());
}

double gelu_block_products(const hparams & hp) {
    const double C = hp.n_embd, F = hp.n_ff;
    return 4 * C * C + 2 * C * F + 2 * C * hp.n_ctx;
}

}   // namespace toy
