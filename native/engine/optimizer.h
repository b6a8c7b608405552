// defines: AdamW over all weights with global-norm clipping (as two small ggml graphs), and the learning-rate schedules
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
    adamw(const config & cfg, weights & w, backend & be);
    ~adamw();
    adamw(const adamw &)             = delete;
    adamw & operator=(const adamw &) = delete;

    // Global L2 norm of the gradients, summed in double.
    // Not finite: `first_bad` is the first parameter, in forward order, whose gradient is not; null where only the sum runs over.
    double grad_norm(const param ** first_bad);

    // One update. step counts from 1; gradients are scaled by min(1, grad_clip/norm).
    void step(int step, double lr, double norm);

    size_t bytes() const;

  private:
    const config & cfg;
    weights &      w;
    backend &      be;

    ggml_context *             ctx;
    ggml_backend_buffer_t      buf;
    std::vector<const param *> trained;       // those that are not frozen
    ggml_tensor *              sum;           // [1]: of all squared gradients
    ggml_tensor *              hyper[2][2];   // [8]; of the embeddings or not; with weight decay or not
    ggml_cgraph *              graph_norm;
    ggml_cgraph *              graph_update;
};

}   // namespace toy
