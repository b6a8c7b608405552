// defines: toy::arch — what a model family gives to training, decoding and scoring. One file a family; shapes and their legend are in hparams.h.
#pragma once

#include "engine/gguf-file.h"
#include "engine/weights.h"
#include "ggml.h"
#include "net.h"

#include <string>

namespace toy {

struct arch {
    const char * name;

    // adds every tensor of the model, in forward order
    void (*declare)(const hparams & hp, float init_std, weights & w);

    // -> what the head reads, normalised: [C, T*B]; with inputs.last_only [C, B]; vit [C, B]
    ggml_tensor * (*hidden)(const net & n, const inputs & in);

    // the product that makes logits of it: `name`.weight [C, V]
    const char * (*head)(const hparams & hp);

    // the architecture's GGUF keys
    void (*write_metadata)(const hparams & hp, gguf_writer & out);

    // multiply-adds of one token's forward pass, times 2 (the backward pass takes twice that)
    double (*flops_per_token)(const hparams & hp);

    // -> logits [V, T*B]; with inputs.last_only [V, B]; vit [V, B]
    ggml_tensor * forward(const net & n, const inputs & in) const { return n.linear(head(n.hp), hidden(n, in)); }
};

extern const arch ARCH_LLAMA, ARCH_GPT2, ARCH_VIT;

// by general.architecture (qwen2 is computed by llama's graph); throws toy::error (not_available)
const arch & arch_of(const std::string & name);

}   // namespace toy
