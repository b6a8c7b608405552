// defines: toy::recompute_blocks — activation checkpointing: a block's activations are computed again when its gradients are due
#pragma once

#include "ggml.h"

namespace toy {

// Of a forward and backward graph (its first n_forward nodes: the forward pass), a graph that keeps of the forward pass only what a block hands
// to the next (the tensors named "embeddings" and "blk.<i>.ffn_residual") and computes the rest of a block a second time, right before the first
// gradient that needs it (Chen et al. 2016, arXiv 1604.06174, with one segment a block). The same operations over the same numbers: the results
// are the same bytes. New nodes are made in ctx: at most n_forward of them, and the graph itself.
ggml_cgraph * recompute_blocks(ggml_context * ctx, ggml_cgraph * graph, int n_forward);

}   // namespace toy
