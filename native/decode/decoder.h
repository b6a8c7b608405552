// defines: toy::decoder — a GGUF model with a KV cache: tokens in, logits of the last one out; and toy::sampler
#pragma once

#include "archs/arch.h"
#include "archs/lora.h"
#include "engine/backend.h"
#include "engine/model-file.h"
#include "engine/placement.h"

#include <memory>
#include <vector>

namespace toy {

struct decoder {
    std::unique_ptr<model_file> model;
    hparams                     hp;
    const arch &                family;
    std::unique_ptr<lora_file>  lora;
    backend                     be;
    kv_cache                    cache;

    // n_ctx 0: the model's own; adapter "": none. Throws toy::error (bad_file, oom).
    decoder(std::unique_ptr<model_file> model, int n_ctx, int n_threads, const std::string & adapter = "");
    ~decoder();
    decoder(const decoder &)             = delete;
    decoder & operator=(const decoder &) = delete;

    // Appends n tokens (any number that fits: a prompt goes through in batches) and returns the logits [V] after the last one.
    const std::vector<float> & eval(const int32_t * tokens, int n);

  private:
    ggml_context *        ctx_cache;
    ggml_backend_buffer_t buf_cache;
    graph_memory          memory;
    std::vector<uint8_t>  graph_mem;
    std::vector<float>    logits;

    // The graph of the last batch, which the next of as many tokens uses again: an answer builds one, on a device one in SLOTS_STEP tokens, so that
    // ggml-cuda plays back what it has captured.
    int            n_built   = 0;   // tokens
    ggml_context * ctx_graph = nullptr;
    ggml_cgraph *  graph;
    ggml_tensor *  in_tokens, *in_positions, *in_mask, *out;

    void build(int n);
    void eval_batch(const int32_t * tokens, int n);
};

struct candidate {
    int32_t id;
    float   logprob;   // natural logarithm, over the whole vocabulary
};

// The k most likely tokens, best first; ties go to the smaller id.
std::vector<candidate> top_logprobs(const std::vector<float> & logits, int k);

struct sampler {
    float    temperature;   // 0: the most likely token
    int      top_k;         // 0: off
    float    top_p;         // 1: off
    uint64_t seed;
    uint64_t n_drawn = 0;

    int32_t sample(const std::vector<float> & logits);
};

}   // namespace toy
