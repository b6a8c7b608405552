// The GPT-2 architecture: LayerNorm with bias, learned positions, GELU, a tied head (Radford et al. 2019). The dimension legend is in hparams.h.
#include "arch.h"

#include <cmath>

namespace toy {

using tensor = ggml_tensor *;

static void gpt2_declare(const hparams & hp, float std, weights & w) {
    const float std_res = std / std::sqrt(2.0f * hp.n_layer);
    w.add_matrix("token_embd.weight", hp.n_embd, hp.n_vocab, init::normal(std));
    w.add_matrix("position_embd.weight", hp.n_embd, hp.n_ctx, init::normal(std));
    for (int il = 0; il < hp.n_layer; il++) {
        declare_gelu_block(hp, il, std, std_res, w);
    }
    w.add_vector("output_norm.weight", hp.n_embd, init::ones());
    w.add_vector("output_norm.bias", hp.n_embd, init::zeros());
    if (!hp.tied) {
        w.add_matrix("output.weight", hp.n_embd, hp.n_vocab, init::normal(std));
    }
}

static tensor gpt2_hidden(const net & n, const inputs & in) {
    const hparams & hp  = n.hp;
    ggml_context *  ctx = n.ctx;
    const int64_t   C = hp.n_embd, T = in.positions->ne[0], B = in.tokens->ne[0] / T;

    tensor x         = ggml_get_rows(ctx, n.get("token_embd.weight"), in.tokens);         // [C, T*B]
    tensor positions = ggml_get_rows(ctx, n.get("position_embd.weight"), in.positions);   // [C, T]
    x                = ggml_add(ctx, ggml_reshape_3d(ctx, x, C, T, B), positions);
    x                = ggml_reshape_2d(ctx, x, C, T * B);
    ggml_set_name(x, "embeddings");
    for (int il = 0; il < hp.n_layer; il++) {
        x = gelu_block(n, il, x, T, /*causal =*/true);
    }
    if (in.last_only) {
        x = ggml_view_2d(ctx, x, C, B, T * x->nb[1], (T - 1) * x->nb[1]);
    }
    return n.layer_norm("output_norm", x);
}

static const char * gpt2_head(const hparams & hp) {
    return hp.tied ? "token_embd" : "output";
}

static void gpt2_write_metadata(const hparams & hp, gguf_writer & out) {
    out.set_str("general.architecture", "gpt2");
    out.set_u32("gpt2.block_count", hp.n_layer);
    out.set_u32("gpt2.context_length", hp.n_ctx);
    out.set_u32("gpt2.embedding_length", hp.n_embd);
    out.set_u32("gpt2.feed_forward_length", hp.n_ff);
    out.set_u32("gpt2.attention.head_count", hp.n_head);
    out.set_f32("gpt2.attention.layer_norm_epsilon", hp.norm_eps);
    out.set_u32("gpt2.vocab_size", hp.n_vocab);
}

static double gpt2_flops_per_token(const hparams & hp) {
    return 2 * (hp.n_layer * gelu_block_products(hp) + (double) hp.n_embd * hp.n_vocab);
}

const arch ARCH_GPT2 = { "gpt2", gpt2_declare, gpt2_hidden, gpt2_head, gpt2_write_metadata, gpt2_flops_per_token };

}   // namespace toy
