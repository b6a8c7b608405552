// defines: toy::recompute — activations that are computed again when their gradients are due, instead of being kept
#pragma once

#include "ggml.h"

namespace toy {

// What of the forward pass is computed a second time, right before the first gradient that needs it:
//   CHEAP   what norms, activation functions and dropout make out of tensors that are kept anyway: a percent of the work, a third of the memory;
//           nothing where all of it is small
//   BLOCKS  all of a block but what it hands to the next (Chen et al. 2016, arXiv 1604.06174, one segment a block): a third more work
enum class recompute { CHEAP, BLOCKS };

// Of a forward and backward graph (its first n_forward nodes: the forward pass), one that does so. The same operations over the same numbers: the
// results are the same bytes. New nodes are made in ctx: at most n_forward of them, and the graph itself.
ggml_cgraph * recompute_activations(ggml_context * ctx, ggml_cgraph * graph, int n_forward, recompute what);

}   // namespace toy
