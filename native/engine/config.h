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
        double      stop_after;
    } run;

    struct {
        int         n_layer, n_embd, n_head, n_head_kv, n_ff, vocab_size, context, image_size, patch_size, n_channel, n_class;
        float       rope_freq_base, norm_eps, init_std;
        bool        tie_embeddings;
        std::string pool, init, donor;
    } model;

    struct {
        std::string corpus, tokenizer, val_corpus, images, val_images;
        double      val_fraction;
        bool        shuffle, augment_flip;
        int         augment_crop;
    } data;

    struct {
        int         steps, batch, micro_batch, warmup_steps;
        double      learning_rate, min_learning_rate, beta1, beta2, eps, weight_decay, grad_clip, embedding_lr_scale;
        std::string schedule, optimizer, dtype, freeze;
        bool        recompute, offload;
    } train;

    struct {
        std::string base, targets;
        int         rank;
        double      alpha, dropout;
    } lora;

    struct {
        int every, batches, patience;
    } eval;

    struct {
        int         every, keep, keep_every;
        bool        keep_best;
        std::string resume;
    } checkpoint;

    struct {
        int         every;
        std::string trackers;
        int         profile;
    } log;

    static config parse(const std::string & text);   // throws toy::error (bad_config)
    static config load(const std::string & path);    // throws toy::error (missing_file, bad_config)

    std::string text;   // what it was read from: checkpoints keep it

    // The first knob that a resumed run would have to share with `saved` and does not, as "train.batch is 8 here and 16 there"; "" when all agree.
    std::string difference(const config & saved) const;

  private:
    template <typename F>
    void each(F && f);
};

// What a resume may change, for people.
extern const char * const MAY_CHANGE;

}   // namespace toy
