// defines: toy::session — a model with its compiled step (forward, loss, backward), its optimizer and its data; what the loop drives
#pragma once

#include "archs/arch.h"
#include "engine/backend.h"
#include "engine/config.h"
#include "engine/corpus.h"
#include "engine/optimizer.h"
#include "engine/weights.h"
#include "ggml-alloc.h"

#include <memory>
#include <string>

namespace toy {

struct memory_plan {
    size_t weights, gradients, moments;
    size_t compute;   // activations and temporaries: the allocated graph's buffer
    size_t inputs;    // tokens, labels, positions, mask, optimizer scalars
    size_t work;      // the kernels' scratch
    size_t corpus;    // packed tokens, mapped: the system takes these pages back when memory is short
    size_t runtime;   // program, libraries and stacks, as measured, and the description of the graph
    size_t total() const { return weights + gradients + moments + compute + inputs + work + corpus + runtime; }
};

struct step_result {
    float       loss;
    double      grad_norm;
    double      learning_rate;
    std::string bad_tensor;   // not empty: loss or gradient is not finite, nothing was updated
};

struct eval_result {
    double  loss;   // mean over all evaluated tokens
    int64_t n_tokens;
};

struct session {
    config                 cfg;
    const arch &           model;
    backend                be;
    weights                w;
    std::unique_ptr<adamw> opt;
    int64_t                steps_done = 0;

    // Compiles the step and allocates it. Without data(): enough for a plan.
    session(const config & cfg, const arch & model);
    ~session();
    session(const session &)             = delete;
    session & operator=(const session &) = delete;

    void set_data(const std::string & corpus, const std::string & val_corpus);   // val_corpus empty: the tail of corpus
    void init_weights() { w.init(cfg.run.seed); }

    // One optimizer step: train.batch sequences in batch/micro_batch rounds, losses summed and divided once by the step's unmasked tokens.
    step_result step();
    // The same without the update: gradients stay in w.params[i].g.
    float       loss_and_gradients();
    eval_result evaluate();

    memory_plan memory(size_t corpus_bytes) const;
    int64_t     tokens_per_step() const { return (int64_t) cfg.train.batch * cfg.model.context; }
    size_t      train_tokens() const;
    size_t      val_tokens() const;
    size_t      corpus_bytes() const;

    std::unique_ptr<window_reader> reader;
    batch                          last_batch;   // the micro-batch read last

  private:
    std::unique_ptr<token_file> corpus, val_corpus;
    eval_reader                 val = { nullptr, 0, 0 };

    ggml_context *        ctx_inputs;
    ggml_backend_buffer_t buf_inputs = nullptr;
    ggml_tensor *         tokens, *labels, *positions, *mask, *scale, *loss_grad;

    ggml_context * ctx_graph;
    ggml_gallocr_t galloc;
    ggml_tensor *  loss;
    ggml_cgraph *  graph;       // forward, loss and backward
    int            n_forward;   // its first nodes: what an evaluation computes, in the same buffer

    void        build_step();
    float       run(ggml_cgraph * g, const batch & b, float loss_scale);
    std::string find_bad_tensor();
};

}   // namespace toy
