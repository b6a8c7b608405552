#include "recompute.h"

#include "ggml-impl.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <unordered_map>
#include <unordered_set>

namespace toy {

using tensors = std::unordered_set<ggml_tensor *>;

static const size_t WORTH_IT = 16 << 20;   // bytes: fewer are not missed, and to compute them again takes a few percent of so small a step

// Handed from block to block: "embeddings", then "blk.<i>.ffn_residual".
static bool is_between_blocks(const ggml_tensor * t) {
    const std::string name = t->name, end = ".ffn_residual";
    return name == "embeddings" || (name.size() > end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0);
}

static tensors inside_blocks(ggml_cgraph * graph, int n_forward) {
    int first = n_forward, last = -1;
    for (int i = 0; i < n_forward; i++) {
        if (is_between_blocks(ggml_graph_node(graph, i))) {
            first = std::min(first, i);
            last  = i;
        }
    }
    tensors out;
    for (int i = first; i < last; i++) {
        ggml_tensor * t = ggml_graph_node(graph, i);
        if (t->op != GGML_OP_NONE && !is_between_blocks(t)) {
            out.insert(t);
        }
    }
    return out;
}

// The gradients of norms and activation functions read what went in, so that it is there; what came out is read by the product after them only.
static tensors cheap(ggml_cgraph * graph, int n_forward) {
    tensors out;
    for (int i = 0; i < n_forward; i++) {
        ggml_tensor * t = ggml_graph_node(graph, i);
        switch (t->op) {
            case GGML_OP_RMS_NORM:
            case GGML_OP_NORM:
            case GGML_OP_UNARY:
            case GGML_OP_GLU:
            case GGML_OP_DROPOUT:
                out.insert(t);
                break;
            case GGML_OP_MUL:   // a norm's gain
            case GGML_OP_ADD:   // and bias
                if (out.count(t->src[0]) && (t->src[1]->op == GGML_OP_NONE)) {
                    out.insert(t);
                }
                break;
            default:
                break;
        }
    }
    return out;
}

// Those of `some` that the gradients read: what it takes to keep them all.
static size_t bytes_kept(ggml_cgraph * graph, int n_forward, const tensors & some) {
    tensors read;
    for (int i = n_forward; i < ggml_graph_n_nodes(graph); i++) {
        for (ggml_tensor * src : ggml_graph_node(graph, i)->src) {
            if (src && some.count(src)) {
                read.insert(src);
            }
        }
    }
    size_t n = 0;
    for (const ggml_tensor * t : read) {
        n += ggml_nbytes(t);
    }
    return n;
}

namespace {

struct recomputation {
    ggml_context *                                   ctx;
    tensors                                          dropped;   // nodes of the forward pass that are not kept
    std::unordered_map<ggml_tensor *, ggml_tensor *> again;     // -> their second computation

    // t as a gradient is to see it
    ggml_tensor * of(ggml_tensor * t) {
        if (dropped.count(t) == 0) {
            return t;
        }
        if (const auto it = again.find(t); it != again.end()) {
            return it->second;
        }
        ggml_tensor * copy = ggml_new_tensor(ctx, t->type, GGML_MAX_DIMS, t->ne);
        copy->op           = t->op;
        copy->flags        = t->flags;
        copy->view_offs    = t->view_offs;
        memcpy(copy->nb, t->nb, sizeof(t->nb));
        memcpy(copy->op_params, t->op_params, sizeof(t->op_params));
        ggml_set_name(copy, t->name);
        again[t] = copy;
        take_sources(t, copy);
        return copy;
    }

    void take_sources(ggml_tensor * from, ggml_tensor * to) {
        for (int i = 0; i < GGML_MAX_SRC; i++) {
            to->src[i] = from->src[i] ? of(from->src[i]) : nullptr;
        }
        to->view_src = from->view_src ? of(from->view_src) : nullptr;
    }
};

}   // namespace

// The gradient of a bias is summed up by the product that gives the weight's, where the two are neighbours: nothing may come between.
// -> that product, if node i begins such a sum
static ggml_tensor * weight_gradient_after(ggml_cgraph * graph, int i) {
    const ggml_tensor * t = ggml_graph_node(graph, i);
    if (t->op != GGML_OP_REPEAT_BACK || i + 2 >= ggml_graph_n_nodes(graph)) {
        return nullptr;
    }
    ggml_tensor * product = ggml_graph_node(graph, i + 2);
    return product->op == GGML_OP_OUT_PROD && product->src[1] == t->src[0] ? product : nullptr;
}

ggml_cgraph * recompute_activations(ggml_context * ctx, ggml_cgraph * graph, int n_forward, recompute what) {
    recomputation r = { ctx, what == recompute::CHEAP ? cheap(graph, n_forward) : inside_blocks(graph, n_forward), {} };
    if (what == recompute::CHEAP && bytes_kept(graph, n_forward, r.dropped) < WORTH_IT) {
        r.dropped.clear();
    }
    // in the old order: what a gradient needs and is not there yet comes right before it
    ggml_cgraph * out = ggml_new_graph_custom(ctx, graph->size, false);
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        ggml_tensor * t = ggml_graph_node(graph, i);
        if (i >= n_forward) {
            r.take_sources(t, t);
        }
        if (ggml_tensor * product = weight_gradient_after(graph, i)) {
            ggml_build_forward_expand(out, r.of(product->src[0]));
        }
        ggml_build_forward_expand(out, t);
    }
    return out;
}

}   // namespace toy
