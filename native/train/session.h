// defines: toy::session — a model with its compiled step (forward, loss, backward), its optimizer and its data; what the loop drives
#pragma once

#include "archs/arch.h"
#include "engine/backend.h"
#include "engine/config.h"
#include "engine/corpus.h"
#include "engine/images.h"
#include "engine/optimizer.h"
#include "engine/weights.h"
#include "step.h"

#include <functional>
#include <memory>
#include <string>

namespace toy {

// The recipe's inputs by name, "" where there is none: CORPUS, OFFSETS, MASK, IMG_DIR (each also with VAL_), GGUF.
using inputs_lookup = std::function<std::string(const char *)>;

struct memory_plan {
    size_t weights, gradients, moments;
    size_t compute;   // activations and temporaries: the allocated graph's buffer
    size_t inputs;    // tokens, labels, positions, optimizer scalars
    size_t work;      // the kernels' scratch
    size_t base;      // the frozen base of an adapter, mapped
    size_t corpus;    // packed data, mapped: the system takes these pages back when memory is short
    size_t runtime;   // program, libraries and stacks, as measured, and the description of the graph
    size_t total() const { return weights + gradients + moments + compute + inputs + work + base + corpus + runtime; }
};

struct step_result {
    float       loss;
    double      grad_norm;
    double      learning_rate;
    int64_t     n_tokens;     // without padding
    std::string bad_tensor;   // not empty: loss or gradient is not finite, nothing was updated
};

struct eval_result {
    double  loss;       // mean over all evaluated labels
    double  accuracy;   // images: share of the labels that the likeliest class is; else NAN
    int64_t n_labels;
};

struct session {
    config                      cfg;
    backend                     be;
    std::unique_ptr<model_file> base;   // lora: the frozen model
    hparams                     hp;
    const arch &                model;
    weights                     w;
    std::unique_ptr<step_graph> graph;
    std::unique_ptr<adamw>      opt;
    int64_t                     steps_done = 0;

    // Compiles the step and allocates it; reads GGUF for an adapter's base. Without set_data(): enough for a plan.
    // `device`, if given, holds and computes it instead of run.device, whose graph it stays.
    session(const config & cfg, const inputs_lookup & in, const std::string & device = "");
    session(const session &)             = delete;
    session & operator=(const session &) = delete;

    void set_data(const inputs_lookup & in);
    void start_weights(const inputs_lookup & in);   // random, or the donor's

    // One optimizer step: train.batch sequences in batch/micro_batch rounds, losses summed and divided once by the step's unmasked labels.
    step_result step();
    // The same without the update: gradients stay in w.params[i].g.
    float       loss_and_gradients();
    eval_result evaluate();

    memory_plan memory(size_t corpus_bytes) const;
    std::string left_to_cpu() const { return graph->left_to_cpu(); }   // operations of a step that the device lacks
    int64_t     total_params() const;                                  // of the whole model, frozen ones included
    bool        is_vision() const { return hp.arch == "vit"; }
    int64_t     tokens_per_step() const { return (int64_t) cfg.train.batch * (is_vision() ? hp.n_patches() : cfg.model.context); }
    size_t      corpus_bytes() const;
    size_t      n_train() const { return train_set ? train_set->n_items(0) : 0; }   // sequences or images of the first epoch
    size_t      n_val() const { return val_set ? val_set->n_items(0) : 0; }
    size_t      train_tokens = 0, val_tokens = 0;   // of text, padding and repetition aside

    std::unique_ptr<data_reader> reader;
    batch                        last_batch;        // the micro-batch read last
    int64_t                      step_tokens = 0;   // of the step computed last, without padding

  private:
    std::vector<std::unique_ptr<data_file>> files;
    std::unique_ptr<image_file>             images, val_images;
    std::unique_ptr<dataset>                train_set, val_set;

    void declare();
    void set_text(const inputs_lookup & in);
    void set_images(const inputs_lookup & in);
};

}   // namespace toy
