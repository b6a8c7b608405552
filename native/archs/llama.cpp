// The llama architecture: RMSNorm, rotary positions, grouped-query attention, SwiGLU (Touvron et al. 2023, arXiv 2302.13971; 2307.09288).
// qwen2 is the same with biases at q, k and v, and rotary pairs half a head apart. The dimension legend is in hparams.h.
#include "arch.h"

#include <cmath>

namespace toy {

using tensor = ggml_tensor *;

static void llama_declare(const hparams & hp, float std, weights & w) {
    const float std_res = std / std::sqrt(2.0f * hp.n_layer);   // what is added to the residual stream 2 L times (GPT-2)
    const int   C = hp.n_embd, F = hp.n_ff, n_q = hp.head_dim * hp.n_head, n_kv = hp.head_dim * hp.n_head_kv;

    w.add_matrix("token_embd.weight", C, hp.n_vocab, init::normal(std));
    for (int il = 0; il < hp.n_layer; il++) {
        const std::string b = block_name(il);
        w.add_vector(b + "attn_norm.weight", C, init::ones());
        w.add_matrix(b + "attn_q.weight", C, n_q, init::normal(std));
        w.add_matrix(b + "attn_k.weight", C, n_kv, init::normal(std));
        w.add_matrix(b + "attn_v.weight", C, n_kv, init::normal(std));
        w.add_matrix(b + "attn_output.weight", n_q, C, init::normal(std_res));
        w.join(b + "attn_qkv.weight", { b + "attn_q.weight", b + "attn_k.weight", b + "attn_v.weight" });
        w.add_vector(b + "ffn_norm.weight", C, init::ones());
        w.add_matrix(b + "ffn_gate.weight", C, F, init::normal(std));
        w.add_matrix(b + "ffn_up.weight", C, F, init::normal(std));
        w.add_matrix(b + "ffn_down.weight", F, C, init::normal(std_res));
        w.join(b + "ffn_gate_up.weight", { b + "ffn_gate.weight", b + "ffn_up.weight" });
    }
    w.add_vector("output_norm.weight", C, init::ones());
    if (!hp.tied) {
        w.add_matrix("output.weight", C, hp.n_vocab, init::normal(std));
    }
}

// x [D, heads, T, B] -> the same, rotated by position
static tensor rope(const net & n, tensor x, tensor positions) {
    const hparams & hp      = n.hp;
    tensor          factors = n.get("rope_freqs.weight");   // llama 3's, one a pair; absent in most
    return ggml_rope_ext(n.ctx, x, positions, factors, hp.n_rot, hp.rope_type, hp.n_ctx, hp.rope_freq_base, 1.0f, 0.0f, 1.0f, 32.0f, 1.0f);
}

// x [C, T*B] -> [D*H, T*B]
static tensor attention(const net & n, int il, tensor x, tensor positions) {
    const std::string b   = block_name(il);
    ggml_context *    ctx = n.ctx;
    const int64_t     D = n.hp.head_dim, H = n.hp.n_head, K = n.hp.n_head_kv, T = positions->ne[0], B = x->ne[1] / T;
    if (n.get(b + "attn_qkv.weight")) {   // joined, in training
        tensor qkv = rope(n, ggml_reshape_4d(ctx, n.linear(b + "attn_qkv", x), D, H + 2 * K, T, B), positions);
        ggml_rope_set_heads(qkv, (int) (H + K));
        return n.attention_qkv(il, qkv, T, /*causal =*/true);
    }
    tensor q = rope(n, ggml_reshape_4d(ctx, n.linear(b + "attn_q", x), D, H, T, B), positions);
    tensor k = rope(n, ggml_reshape_4d(ctx, n.linear(b + "attn_k", x), D, K, T, B), positions);
    tensor v = ggml_reshape_4d(ctx, n.linear(b + "attn_v", x), D, K, T, B);
    return n.attention(il, q, k, v, /*causal =*/true);
}

// x [C, N] -> SwiGLU of it, [F, N]
static tensor gated(const net & n, int il, tensor x) {
    const std::string b = block_name(il);
    if (n.get(b + "ffn_gate_up.weight")) {                           // joined, in training
        return ggml_swiglu(n.ctx, n.linear(b + "ffn_gate_up", x));   // of [2F, N]
    }
    tensor gate = n.linear(b + "ffn_gate", x), up = n.linear(b + "ffn_up", x);
    return ggml_swiglu_split(n.ctx, gate, up);
}

static tensor llama_hidden(const net & n, const inputs & in) {
    const hparams & hp  = n.hp;
    ggml_context *  ctx = n.ctx;
    const int64_t   T = in.positions->ne[0], B = in.tokens->ne[0] / T;

    tensor x = ggml_get_rows(ctx, n.get("token_embd.weight"), in.tokens);   // [C, T*B]
    ggml_set_name(x, "embeddings");
    for (int il = 0; il < hp.n_layer; il++) {
        const std::string b = block_name(il);

        tensor h = n.rms_norm(b + "attn_norm", x);
        x        = ggml_add(ctx, x, n.linear(b + "attn_output", attention(n, il, h, in.positions)));
        ggml_format_name(x, "blk.%d.attn_residual", il);

        h = n.rms_norm(b + "ffn_norm", x);
        x = ggml_add(ctx, x, n.linear(b + "ffn_down", gated(n, il, h)));
        ggml_format_name(x, "blk.%d.ffn_residual", il);
    }
    if (in.last_only) {
        x = ggml_view_2d(ctx, x, hp.n_embd, B, T * x->nb[1], (T - 1) * x->nb[1]);
    }
    return n.rms_norm("output_norm", x);
}

static const char * llama_head(const hparams & hp) {
    return hp.tied ? "token_embd" : "output";
}

static void llama_write_metadata(const hparams & hp, gguf_writer & out) {
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

static double llama_flops_per_token(const hparams & hp) {
    const double C = hp.n_embd, F = hp.n_ff, V = hp.n_vocab, Q = hp.head_dim * hp.n_head, KV = hp.head_dim * hp.n_head_kv;
    const double layer = 2 * C * Q + 2 * C * KV + 3 * C * F + 2 * Q * hp.n_ctx;
    return 2 * (hp.n_layer * layer + C * V);
}

const arch ARCH_LLAMA = { "llama", llama_declare, llama_hidden, llama_head, llama_write_metadata, llama_flops_per_token };

}   // namespace toy
