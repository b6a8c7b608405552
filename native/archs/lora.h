// defines: low-rank adapters over a frozen GGUF — which products get one, their tensors, and reading one from llama.cpp's adapter format
#pragma once

#include "engine/config.h"
#include "engine/model-file.h"
#include "net.h"

#include <memory>

namespace toy {

// Adds <tensor>.lora_a [in, r] and .lora_b [r, out] for each of cfg.lora.targets in every block of the base.
// Throws toy::error (bad_config): an unknown target, or a rank above a matrix' width.
void declare_lora(const config & cfg, const hparams & hp, const gguf_file & base, weights & w);

// llama.cpp's adapter keys and our own
void write_lora_metadata(const config & cfg, const hparams & hp, gguf_writer & out);

// An adapter file, mapped. Throws toy::error (bad_file) when it is not one, or was not made for this base.
struct lora_file {
    model_file   file;
    lora_adapter adapter;

    lora_file(const std::string & path, const gguf_file & base);
};

}   // namespace toy
