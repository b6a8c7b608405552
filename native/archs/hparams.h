// defines: toy::hparams — the shape of a model, from a configuration or from a GGUF; every graph is built from it
//
// Dimension legend, here and in every graph:
//   B sequences   T tokens of a sequence   C n_embd   H query heads   K key/value heads   D = C/H head width
//   F feed-forward width   V vocabulary (vit: classes)   S slots of the KV cache   P pixels of a patch, channels included
// Shapes are in ggml's order: the fastest dimension first.
#pragma once

#include "engine/config.h"
#include "engine/gguf-file.h"

#include <string>

namespace toy {

struct hparams {
    std::string arch;   // as in general.architecture: llama, qwen2, gpt2, vit
    int         n_layer = 0, n_embd = 0, n_head = 0, n_head_kv = 0, n_ff = 0, n_vocab = 0, n_ctx = 0;
    int         head_dim = 0, n_rot = 0, rope_type = 0;   // rope_type: GGML_ROPE_TYPE_*
    float       rope_freq_base = 10000.0f, norm_eps = 1e-5f;
    bool        tied = true;   // the token embedding is the head

    int  image_size = 0, patch_size = 0, n_channel = 0;   // vit
    bool pool_cls = true;                                 // vit: the head reads the class token, or the mean of the patches

    int n_patches() const { return (image_size / patch_size) * (image_size / patch_size); }
    int patch_dim() const { return patch_size * patch_size * n_channel; }

    static hparams from_config(const config & cfg);

    // Reads metadata and checks that every tensor is there in the shape that it says.
    // Throws toy::error (bad_file): an architecture that toy does not know, missing keys or tensors, odd shapes.
    static hparams from_gguf(const gguf_file & file);
};

}   // namespace toy
