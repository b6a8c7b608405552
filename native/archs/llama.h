// defines: the llama graph, shared by training (one shot, whole windows) and by decoding (with a KV cache)
#pragma once

#include "arch.h"

namespace toy {

struct llama_hparams {
    int   n_layer, n_embd, n_head, n_head_kv, n_ff, n_vocab, n_ctx, head_dim, n_rot;
    float rope_freq_base, norm_eps;

    static llama_hparams from_config(const config & cfg);
    static llama_hparams from_gguf(
        const gguf_file & file);   // throws toy::error (bad_file): unknown architecture, missing keys or tensors, odd shapes
};

// Keys and values of S slots a layer, as the decoder has seen them.
struct kv_cache {
    std::vector<ggml_tensor *> k, v;         // k [D*K, S], v [S, D*K], f32, one each a layer
    int                        n_past = 0;   // slots in use
    int                        n_ctx  = 0;   // slots there are
};

// tokens [N] i32, positions [N] i32, mask [n_past + N, N] f32 -> logits [V, 1] of the last token.
// The new keys and values are written into the cache's slots [n_past, n_past + N) as part of graph `gf`.
ggml_tensor * llama_decode(ggml_context * ctx, ggml_cgraph * gf, const llama_hparams & hp, const tensor_lookup & get, kv_cache & cache,
                           ggml_tensor * tokens, ggml_tensor * positions, ggml_tensor * mask);

}   // namespace toy
