// defines: toy::config — every resolved knob of a run, read from config.kv (`section.key=value` a line)
//
// The command line resolves and validates (toy/config); the runner reads the result, so nothing here has a default.
// An unknown, missing or malformed key is an error: it means that the two sides are not of one version.
#pragma once

#include <cstdint>
#include <string>

namespace toy {

struct config {
    struct {
        std::string recipe, arch, device, name, notes, build;
        int64_t     seed;
        int         threads;
    } run;

    struct {
        int   n_layer, n_embd, n_head, n_head_kv, n_ff, vocab_size, context;
        float rope_freq_base, norm_eps, init_std;
        bool  tie_embeddings;
    } model;

    struct {
        std::string corpus, tokenizer, val_corpus;
        double      val_fraction;
        bool        shuffle;
    } data;

    struct {
        int         steps, batch, micro_batch, warmup_steps;
        double      learning_rate, min_learning_rate, beta1, beta2, eps, weight_decay, grad_clip;
        std::string schedule, optimizer, dtype;
    } train;

    struct {
        int every, batches, patience;
    } eval;

    struct {
        int         every, keep;
        bool        keep_best;
        std::string resume;
    } checkpoint;

    struct {
        int         every;
        std::string trackers;
    } log;

    static config parse(const std::string & text);   // throws toy::error (bad_config)
    static config load(const std::string & path);    // throws toy::error (missing_file, bad_config)

    // what a resumed run must share with the checkpoint: a hash over the model, data and train sections
    uint64_t hash() const;

  private:
    template <typename F>
    void each(F && f);
};

}   // namespace toy
