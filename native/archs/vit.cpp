// The vision transformer: patches as tokens, learned positions, pre-norm blocks with GELU, a class head (Dosovitskiy et al. 2020,
// arXiv 2010.11929; the tiny shape is that of Touvron et al. 2020, arXiv 2012.12877). The dimension legend is in hparams.h.
#include "arch.h"

#include <cmath>

namespace toy {

using tensor = ggml_tensor *;

static void vit_declare(const hparams & hp, float std, weights & w) {
    const int C = hp.n_embd;
    w.add_matrix("patch_embd.weight", hp.patch_dim(), C, init::normal(1.0f / std::sqrt((float) hp.patch_dim())));   // LeCun
    w.add_vector("patch_embd.bias", C, init::zeros());
    if (hp.pool_cls) {
        w.add_vector("cls_embd.weight", C, init::normal(std));
    }
    w.add_matrix("position_embd.weight", C, hp.n_ctx, init::normal(std));
    for (int il = 0; il < hp.n_layer; il++) {
        declare_gelu_block(hp, il, std, std, w);
    }
    w.add_vector("output_norm.weight", C, init::ones());
    w.add_vector("output_norm.bias", C, init::zeros());
    w.add_matrix("output.weight", C, hp.n_vocab, init::normal(std));
    w.add_vector("output.bias", hp.n_vocab, init::zeros());
}

static tensor vit_hidden(const net & n, const inputs & in) {
    const hparams & hp  = n.hp;
    ggml_context *  ctx = n.ctx;
    const int64_t   C = hp.n_embd, N = hp.n_patches(), T = hp.n_ctx, B = in.patches->ne[1] / N;

    tensor x = ggml_reshape_3d(ctx, n.linear("patch_embd", in.patches), C, N, B);
    if (hp.pool_cls) {
        tensor cls = ggml_reshape_3d(ctx, n.get("cls_embd.weight"), C, 1, 1);
        x          = ggml_concat(ctx, ggml_repeat_4d(ctx, cls, C, 1, B, 1), x, 1);   // [C, T, B], the class token first
    }
    x = ggml_add(ctx, x, n.get("position_embd.weight"));
    x = ggml_reshape_2d(ctx, x, C, T * B);
    ggml_set_name(x, "embeddings");
    for (int il = 0; il < hp.n_layer; il++) {
        x = gelu_block(n, il, x, T, /*causal =*/false);
    }
    if (hp.pool_cls) {
        x = ggml_cont(ctx, ggml_view_2d(ctx, x, C, B, T * x->nb[1], 0));
        x = n.layer_norm("output_norm", x);   // [C, B]
    } else {
        x = ggml_reshape_3d(ctx, n.layer_norm("output_norm", x), C, T, B);
        x = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_permute(ctx, x, 1, 0, 2, 3)));   // [1, C, B]
        x = ggml_scale(ctx, ggml_reshape_2d(ctx, x, C, B), 1.0f / (float) T);
    }
    return x;
}

static const char * vit_head(const hparams &) {
    return "output";
}

static void vit_write_metadata(const hparams & hp, gguf_writer & out) {
    out.set_str("general.architecture", "vit");
    out.set_u32("toy.vit.block_count", hp.n_layer);
    out.set_u32("toy.vit.embedding_length", hp.n_embd);
    out.set_u32("toy.vit.feed_forward_length", hp.n_ff);
    out.set_u32("toy.vit.attention.head_count", hp.n_head);
    out.set_f32("toy.vit.attention.layer_norm_epsilon", hp.norm_eps);
    out.set_u32("toy.vit.image_size", hp.image_size);
    out.set_u32("toy.vit.patch_size", hp.patch_size);
    out.set_u32("toy.vit.channel_count", hp.n_channel);
    out.set_u32("toy.vit.class_count", hp.n_vocab);
    out.set_str("toy.vit.pooling", hp.pool_cls ? "cls" : "mean");
}

// of one patch (or class token)
static double vit_flops_per_token(const hparams & hp) {
    return 2 * (hp.n_layer * gelu_block_products(hp) + (double) hp.n_embd * (hp.patch_dim() + (double) hp.n_vocab / hp.n_ctx));
}

const arch ARCH_VIT = { "vit", vit_declare, vit_hidden, vit_head, vit_write_metadata, vit_flops_per_token };

}   // namespace toy
