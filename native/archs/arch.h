// defines: toy::arch — what a model family gives to the loop. One file a family; a runner is linked with one of them.
//
// Dimension legend, here and in every graph:
//   B sequences   T tokens of a sequence   C n_embd   H query heads   K key/value heads   D = C/H head width
//   F feed-forward width   V vocabulary   S slots of the KV cache
// Shapes are in ggml's order: the fastest dimension first.
#pragma once

#include "engine/config.h"
#include "engine/gguf-file.h"
#include "engine/weights.h"
#include "ggml.h"

#include <string>

namespace toy {

struct arch {
    const char * name;

    // adds every trainable tensor, in forward order
    void (*declare)(const config & cfg, weights & w);

    // tokens [T*B] i32, positions [T] i32, mask [T, T] f32 -> logits [V, T*B]
    ggml_tensor * (*forward)(ggml_context * ctx, const config & cfg, const tensor_lookup & get, ggml_tensor * tokens, ggml_tensor * positions,
                             ggml_tensor * mask);

    // the architecture's GGUF keys
    void (*write_metadata)(const config & cfg, gguf_writer & out);

    // multiply-adds of one token's forward pass, times 2 (the backward pass takes twice that)
    double (*flops_per_token)(const config & cfg);
};

extern const arch ARCH_LLAMA;

}   // namespace toy
