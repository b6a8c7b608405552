// defines: AdamW over all weights with global-norm clipping (as a small ggml graph), and the learning-rate schedules
#pragma once

#include "backend.h"
#include "config.h"
#include "weights.h"

#include <vector>

namespace toy {

// Learning rate of step 1..steps: linear warm-up to learning_rate, then
//   constant; cosine or linear down to min_learning_rate at the last step; wsd: constant, then linear down over the last fifth.
double learning_rate(const config & cfg, int step);

// Decoupled weight decay (Loshchilov, Hutter 2017, arXiv 1711.05101), bias-corrected moments, as torch.optim.AdamW.
struct adamw {
    adamw(const config & cfg, const weights & w, backend & be);
    ~adamw();
    adamw(const adamw &)             = delete;
    adamw & operator=(const adamw &) = delete;

    // Global L2 norm of the gradients, from the sums of squares of their parts, each [1].
    // Not finite: `first_bad` is the first parameter, in forward order, whose gradient is not; null where only the sum runs over.
    double grad_norm(const std::vector<ggml_tensor *> & squares, const param ** first_bad) const;

    // One update. step counts from 1; gradients are scaled by min(1, grad_clip/norm).
    void step(int step, double lr, double norm);

    size_t bytes() const;

  private:
    const config &  cfg;
    const weights & w;
    backend &       be;

    ggml_context *        ctx;
    ggml_backend_buffer_t buf;
    ggml_tensor *         hyper[2][2];   // [8]; of the embeddings or not; with weight decay or not
    ggml_cgraph *         graph;
};

}   // namespace toy
