// The llama architecture: RMSNorm, rotary positions, grouped-query attention, SwiGLU (Touvron et al. 2023, arXiv 2302.13971; 2307.09288).
// The dimension legend is in arch.h.
#include "llama.h"

#include "engine/error.h"

#include <cmath>

namespace toy {

using tensor = ggml_tensor *;

struct llama_layer {
    tensor attn_norm, wq, wk, wv, wo;   // [C]  [C, D*H]  [C, D*K]  [C, D*K]  [D*H, C]
    tensor ffn_norm, gate, up, down;    // [C]  [C, F]    [C, F]    [F, C]
};

static llama_layer layer_tensors(const tensor_lookup & get, int il) {
    const std::string b = "blk." + std::to_string(il) + ".";
    return {
        get(b + "attn_norm.weight"), get(b + "attn_q.weight"),   get(b + "attn_k.weight"), get(b + "attn_v.weight"),   get(b + "attn_output.weight"),
        get(b + "ffn_norm.weight"),  get(b + "ffn_gate.weight"), get(b + "ffn_up.weight"), get(b + "ffn_down.weight"),
    };
}

static tensor rms_norm(ggml_context * ctx, tensor x, tensor gain, float eps) {
    return ggml_mul(ctx, ggml_rms_norm(ctx, x, eps), gain);
}

// x [D, heads, T, B] -> the same, rotated by position; neighbouring pairs, as in the original llama and in GGUF's `llama`
static tensor rope(ggml_context * ctx, const llama_hparams & hp, tensor x, tensor positions, tensor freq_factors) {
    return ggml_rope_ext(ctx, x, positions, freq_factors, hp.n_rot, GGML_ROPE_TYPE_NORMAL, hp.n_ctx, hp.rope_freq_base, 1.0f, 0.0f, 1.0f, 32.0f,
                         1.0f);
}

// q [D, H, T, B], k [D, K, S, B], v [S, D, K, B], mask [S, T] -> [D*H, T*B]
static tensor attention(ggml_context * ctx, tensor q, tensor k, tensor v, tensor mask) {
    const int64_t D = q->ne[0], H = q->ne[1], T = q->ne[2], B = q->ne[3];
    q          = ggml_permute(ctx, q, 0, 2, 1, 3);   // [D, T, H, B]
    k          = ggml_permute(ctx, k, 0, 2, 1, 3);   // [D, S, K, B]
    tensor kq  = ggml_mul_mat(ctx, k, q);            // [S, T, H, B]: each key head serves H/K query heads
    kq         = ggml_soft_max_ext(ctx, kq, mask, 1.0f / std::sqrt((float) D), 0.0f);
    tensor out = ggml_mul_mat(ctx, v, kq);                             // [D, T, H, B]
    out        = ggml_cont(ctx, ggml_permute(ctx, out, 0, 2, 1, 3));   // [D, H, T, B]
    return ggml_reshape_2d(ctx, out, D * H, T * B);
}

static tensor feed_forward(ggml_context * ctx, const llama_layer & l, tensor x) {
    tensor gate = ggml_mul_mat(ctx, l.gate, x);                           // [F, T*B]
    tensor up   = ggml_mul_mat(ctx, l.up, x);                             // [F, T*B]
    return ggml_mul_mat(ctx, l.down, ggml_swiglu_split(ctx, gate, up));   // [C, T*B]
}

static tensor output_matrix(const tensor_lookup & get) {
    tensor out = get("output.weight");
    return out ? out : get("token_embd.weight");   // tied: the embeddings are the head
}

//
// training
//

static void llama_declare(const config & cfg, weights & w) {
    const llama_hparams hp      = llama_hparams::from_config(cfg);
    const float         std     = cfg.model.init_std;
    const float         std_res = std / std::sqrt(2.0f * hp.n_layer);   // what is added to the residual stream 2 L times (GPT-2)
    const int           n_q = hp.head_dim * hp.n_head, n_kv = hp.head_dim * hp.n_head_kv;

    w.add("token_embd.weight", hp.n_embd, hp.n_vocab, std);
    for (int il = 0; il < hp.n_layer; il++) {
        const std::string b = "blk." + std::to_string(il) + ".";
        w.add(b + "attn_norm.weight", hp.n_embd, 0, 0);
        w.add(b + "attn_q.weight", hp.n_embd, n_q, std);
        w.add(b + "attn_k.weight", hp.n_embd, n_kv, std);
        w.add(b + "attn_v.weight", hp.n_embd, n_kv, std);
        w.add(b + "attn_output.weight", n_q, hp.n_embd, std_res);
        w.add(b + "ffn_norm.weight", hp.n_embd, 0, 0);
        w.add(b + "ffn_gate.weight", hp.n_embd, hp.n_ff, std);
        w.add(b + "ffn_up.weight", hp.n_embd, hp.n_ff, std);
        w.add(b + "ffn_down.weight", hp.n_ff, hp.n_embd, std_res);
    }
    w.add("output_norm.weight", hp.n_embd, 0, 0);
    if (!cfg.model.tie_embeddings) {
        w.add("output.weight", hp.n_embd, hp.n_vocab, std);
    }
}

static tensor llama_forward(ggml_context * ctx, const config & cfg, const tensor_lookup & get, tensor tokens, tensor positions, tensor mask) {
    const llama_hparams hp = llama_hparams::from_config(cfg);
    const int64_t       D = hp.head_dim, H = hp.n_head, K = hp.n_head_kv, T = positions->ne[0], B = tokens->ne[0] / T;

    tensor x = ggml_get_rows(ctx, get("token_embd.weight"), tokens);   // [C, T*B]
    for (int il = 0; il < hp.n_layer; il++) {
        const llama_layer l = layer_tensors(get, il);

        tensor h = rms_norm(ctx, x, l.attn_norm, hp.norm_eps);
        tensor q = ggml_reshape_4d(ctx, ggml_mul_mat(ctx, l.wq, h), D, H, T, B);
        tensor k = ggml_reshape_4d(ctx, ggml_mul_mat(ctx, l.wk, h), D, K, T, B);
        tensor v = ggml_reshape_4d(ctx, ggml_mul_mat(ctx, l.wv, h), D, K, T, B);
        q        = rope(ctx, hp, q, positions, nullptr);
        k        = rope(ctx, hp, k, positions, nullptr);
        v        = ggml_cont(ctx, ggml_permute(ctx, v, 1, 2, 0, 3));   // [T, D, K, B]
        x        = ggml_add(ctx, x, ggml_mul_mat(ctx, l.wo, attention(ctx, q, k, v, mask)));
        ggml_format_name(x, "blk.%d.attn_residual", il);

        h = rms_norm(ctx, x, l.ffn_norm, hp.norm_eps);
        x = ggml_add(ctx, x, feed_forward(ctx, l, h));
        ggml_format_name(x, "blk.%d.ffn_residual", il);
    }
    x = rms_norm(ctx, x, get("output_norm.weight"), hp.norm_eps);
    return ggml_mul_mat(ctx, output_matrix(get), x);   // [V, T*B]
}

static void llama_write_metadata(const config & cfg, gguf_writer & out) {
    const llama_hparams hp = llama_hparams::from_config(cfg);
    out.set_str("general.architecture", "llama");
    out.set_u32("llama.block_count", hp.n_layer);
    out.set_u32("llama.context_length", hp.n_ctx);
    out.set_u32("llama.embedding_length", hp.n_embd);
    out.set_u32("llama.feed_forward_length", hp.n_ff);
    out.set_u32("llama.attention.head_count", hp.n_head);
    out.set_u32("llama.attention.head_count_kv", hp.n_head_kv);
    out.set_f32("llama.attention.layer_norm_rms_epsilon", hp.norm_eps);
    out.set_u32("llama.rope.dimension_count", hp.n_rot);
    out.set_f32("llama.rope.freq_base", hp.rope_freq_base);
    out.set_u32("llama.vocab_size", hp.n_vocab);
}

static double llama_flops_per_token(const config & cfg) {
    const llama_hparams hp = llama_hparams::from_config(cfg);
    const double        C = hp.n_embd, F = hp.n_ff, V = hp.n_vocab, Q = hp.head_dim * hp.n_head, KV = hp.head_dim * hp.n_head_kv;
    const double        layer = 2 * C * Q + 2 * C * KV + 3 * C * F + 2 * Q * hp.n_ctx;
    return 2 * (hp.n_layer * layer + C * V);
}

const arch ARCH_LLAMA = { "llama", llama_declare, llama_forward, llama_write_metadata, llama_flops_per_token };

//
// decoding
//

tensor llama_decode(ggml_context * ctx, ggml_cgraph * gf, const llama_hparams & hp, const tensor_lookup & get, kv_cache & cache, tensor tokens,
                    tensor positions, tensor mask) {
    const int64_t D = hp.head_dim, H = hp.n_head, K = hp.n_head_kv, N = tokens->ne[0], past = cache.n_past, S = past + N;
    tensor        freq_factors = get("rope_freqs.weight");

    tensor x = ggml_get_rows(ctx, get("token_embd.weight"), tokens);   // [C, N]
    for (int il = 0; il < hp.n_layer; il++) {
        const llama_layer l = layer_tensors(get, il);

        tensor h = rms_norm(ctx, x, l.attn_norm, hp.norm_eps);
        tensor q = rope(ctx, hp, ggml_reshape_3d(ctx, ggml_mul_mat(ctx, l.wq, h), D, H, N), positions, freq_factors);
        tensor k = rope(ctx, hp, ggml_reshape_3d(ctx, ggml_mul_mat(ctx, l.wk, h), D, K, N), positions, freq_factors);
        tensor v = ggml_mul_mat(ctx, l.wv, h);   // [D*K, N]

        // append to the cache, then attend over all of it; values lie transposed there, as the product with kq wants them
        tensor ck = cache.k[il], cv = cache.v[il];
        ggml_build_forward_expand(gf, ggml_cpy(ctx, ggml_reshape_2d(ctx, k, D * K, N), ggml_view_2d(ctx, ck, D * K, N, ck->nb[1], past * ck->nb[1])));
        ggml_build_forward_expand(gf, ggml_cpy(ctx, ggml_transpose(ctx, v), ggml_view_2d(ctx, cv, N, D * K, cv->nb[1], past * cv->nb[0])));
        k = ggml_view_3d(ctx, ck, D, K, S, D * sizeof(float), ck->nb[1], 0);
        v = ggml_view_3d(ctx, cv, S, D, K, cv->nb[1], D * cv->nb[1], 0);
        x = ggml_add(ctx, x, ggml_mul_mat(ctx, l.wo, attention(ctx, q, k, v, mask)));

        h = rms_norm(ctx, x, l.ffn_norm, hp.norm_eps);
        x = ggml_add(ctx, x, feed_forward(ctx, l, h));
    }
    x = ggml_view_2d(ctx, x, hp.n_embd, 1, x->nb[1], (N - 1) * x->nb[1]);   // only the last token is asked for
    x = rms_norm(ctx, x, get("output_norm.weight"), hp.norm_eps);
    return ggml_mul_mat(ctx, output_matrix(get), x);   // [V, 1]
}

//
// hyperparameters
//

llama_hparams llama_hparams::from_config(const config & cfg) {
    const auto & m        = cfg.model;
    const int    head_dim = m.n_embd / m.n_head;
    return { m.n_layer, m.n_embd, m.n_head, m.n_head_kv, m.n_ff, m.vocab_size, m.context, head_dim, head_dim, m.rope_freq_base, m.norm_eps };
}

static void check_shape(const gguf_file & file, const std::string & name, int64_t ne0, int64_t ne1) {
    const ggml_tensor * t = file.tensor(name);
    if (!t) {
        throw error("bad_file", EXIT_BAD_INPUT, format("%s has no tensor %s", file.path.c_str(), name.c_str()),
                    "the file is not a complete llama model: export it again from where it came");
    }
    if (t->ne[0] != ne0 || t->ne[1] != ne1 || t->ne[2] != 1 || t->ne[3] != 1) {
        throw error("bad_file", EXIT_BAD_INPUT,
                    format("%s: tensor %s is %lld x %lld where its metadata says %lld x %lld", file.path.c_str(), name.c_str(), (long long) t->ne[0],
                           (long long) t->ne[1], (long long) ne0, (long long) ne1),
                    "the file is damaged or of a variant that toy does not know");
    }
}

llama_hparams llama_hparams::from_gguf(const gguf_file & file) {
    const std::string a = file.get_str("general.architecture", "");
    if (a != "llama") {
        throw error("bad_file", EXIT_BAD_INPUT, format("%s has architecture '%s'", file.path.c_str(), a.c_str()), "toy runs architecture llama");
    }
    llama_hparams hp;
    hp.n_layer          = file.need_int("llama.block_count");
    hp.n_embd           = file.need_int("llama.embedding_length");
    hp.n_head           = file.need_int("llama.attention.head_count");
    hp.n_head_kv        = file.get_int("llama.attention.head_count_kv", hp.n_head);
    hp.n_ff             = file.need_int("llama.feed_forward_length");
    hp.n_ctx            = file.need_int("llama.context_length");
    hp.rope_freq_base   = file.get_num("llama.rope.freq_base", 10000.0);
    hp.norm_eps         = file.get_num("llama.attention.layer_norm_rms_epsilon", 1e-5);
    const bool positive = hp.n_layer > 0 && hp.n_embd > 0 && hp.n_head > 0 && hp.n_head_kv > 0 && hp.n_ff > 0 && hp.n_ctx > 0;
    if (!positive || hp.n_head % hp.n_head_kv != 0 || (hp.n_embd % hp.n_head != 0 && !file.has("llama.attention.key_length"))) {
        throw error("bad_file", EXIT_BAD_INPUT, format("%s: its llama metadata does not fit together", file.path.c_str()),
                    "the file is damaged: copy or download it again");
    }
    hp.head_dim              = file.get_int("llama.attention.key_length", hp.n_embd / hp.n_head);
    hp.n_rot                 = file.get_int("llama.rope.dimension_count", hp.head_dim);
    const ggml_tensor * embd = file.tensor("token_embd.weight");
    hp.n_vocab               = embd ? embd->ne[1] : 0;
    if (file.get_int("llama.expert_count", 0) > 0 ||
        (file.has("llama.rope.scaling.type") && file.get_str("llama.rope.scaling.type", "none") != "none")) {
        throw error("bad_file", EXIT_BAD_INPUT,
                    format("%s uses %s", file.path.c_str(), file.get_int("llama.expert_count", 0) > 0 ? "experts" : "scaled rotary positions"),
                    "toy runs dense llama models without rope scaling");
    }

    const int n_q = hp.head_dim * hp.n_head, n_kv = hp.head_dim * hp.n_head_kv;
    check_shape(file, "token_embd.weight", hp.n_embd, hp.n_vocab);
    check_shape(file, "output_norm.weight", hp.n_embd, 1);
    if (file.tensor("output.weight")) {
        check_shape(file, "output.weight", hp.n_embd, hp.n_vocab);
    }
    for (int il = 0; il < hp.n_layer; il++) {
        const std::string b = "blk." + std::to_string(il) + ".";
        check_shape(file, b + "attn_norm.weight", hp.n_embd, 1);
        check_shape(file, b + "attn_q.weight", hp.n_embd, n_q);
        check_shape(file, b + "attn_k.weight", hp.n_embd, n_kv);
        check_shape(file, b + "attn_v.weight", hp.n_embd, n_kv);
        check_shape(file, b + "attn_output.weight", n_q, hp.n_embd);
        check_shape(file, b + "ffn_norm.weight", hp.n_embd, 1);
        check_shape(file, b + "ffn_gate.weight", hp.n_embd, hp.n_ff);
        check_shape(file, b + "ffn_up.weight", hp.n_embd, hp.n_ff);
        check_shape(file, b + "ffn_down.weight", hp.n_ff, hp.n_embd);
        if (file.tensor(b + "attn_q.bias")) {
            throw error("bad_file", EXIT_BAD_INPUT, format("%s has attention biases", file.path.c_str()), "toy runs llama models without biases");
        }
    }
    return hp;
}

}   // namespace toy
