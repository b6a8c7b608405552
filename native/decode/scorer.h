// defines: toy::scorer — a GGUF model that says how likely given tokens (or the classes of given images) are: whole windows, no KV cache
#pragma once

#include "archs/arch.h"
#include "archs/lora.h"
#include "engine/backend.h"
#include "engine/corpus.h"
#include "engine/images.h"
#include "engine/model-file.h"
#include "engine/placement.h"

#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace toy {

// Negative log-likelihood in nats, summed over the labels of one sequence.
struct scored {
    double  nll = 0;
    int64_t n   = 0;
    bool    cut = false;   // the sequence did not fit
};

struct classified {
    int32_t            label;
    double             nll;
    std::vector<float> logits;   // [n_class]
};

// A stretch of tokens with what is scored of it: labels[i] = -1 is context only.
struct sequence {
    std::vector<int32_t> tokens, labels;   // as long as each other; labels[i] is what follows tokens[i]
    bool                 cut = false;
};

struct scorer {
    model_file                 model;
    hparams                    hp;
    const arch &               family;
    backend                    be;
    std::unique_ptr<lora_file> adapter;

    // adapter_path empty: none; n_threads 0: the usable cores. Throws toy::error (missing_file, bad_file, not_available).
    scorer(const std::string & gguf_path, const std::string & adapter_path, int n_threads);
    scorer(const scorer &)             = delete;
    scorer & operator=(const scorer &) = delete;

    // One result a sequence. The numbers depend neither on the threads nor on how sequences are put together.
    std::vector<scored> score(const std::vector<sequence> & sequences);

    // Logits [V] of what follows n tokens.
    std::vector<float> next(const int32_t * tokens, int n);

    // One result an image of [first, end): the classes' logits, and the NLL of its label (NaN where it has none). The images are normalised
    // as the model was trained, whatever their own mean is. Throws toy::error (bad_file): images of another size.
    std::vector<classified> classify(image_file & images, int64_t first, int64_t end);

  private:
    void normalise_as_trained(image_file & images) const;

    graph_memory         memory, memory_head;
    std::vector<uint8_t> graph_mem, head_mem;

    using reader = std::function<void(const ggml_tensor * logits, size_t first, size_t n)>;

    // Computes one batch, and calls `read` with the logits of some of its columns at a time: columns[first], …, columns[first + n - 1].
    // Those of all at once would be the largest tensor of all.
    void compute(int T, int B, const std::vector<int32_t> & tokens, const std::vector<float> & patches, bool last_only,
                 const std::vector<int32_t> & columns, const reader & read);
    void head(const ggml_tensor * hidden, const std::vector<int32_t> & columns, const reader & read);
};

// -log p(label) of logits [V], in double.
double nll_of(const float * logits, int64_t n, int32_t label);

// The windows of a corpus, so that every token but the first is scored once. stride 0: side by side; else each window but the first
// scores its last `stride` tokens.
struct window_plan {
    int64_t n_tokens;
    int     context, stride;

    int64_t  n_windows() const;
    sequence window(const int32_t * tokens, int64_t i) const;
};

// Packed examples: tokens, where each begins, and which tokens are learned.
struct example_files {
    token_file tokens;
    data_file  offsets, mask;
    int64_t    n;

    example_files(const std::string & tokens, const std::string & offsets, const std::string & mask);   // throws toy::error (missing_file, bad_file)

    // longer than the context: its first tokens, as in training, or with keep_end its last ones
    sequence example(int64_t i, int context, bool keep_end) const;
};

}   // namespace toy
