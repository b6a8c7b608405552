// defines: toy::step_graph — what a training step computes: forward, loss and backward as one graph, laid out once, and its inputs
#pragma once

#include "archs/arch.h"
#include "engine/backend.h"
#include "engine/config.h"
#include "engine/corpus.h"
#include "engine/model-file.h"
#include "engine/placement.h"
#include "engine/weights.h"

#include <memory>
#include <string>
#include <vector>

namespace toy {

// Of one micro-batch: T*B tokens, or B images. A step is one or more rounds of it, whose gradients add up in w.
struct step_graph {
    // w is allocated; base: the frozen model under an adapter, or nullptr. Throws toy::error (oom)
    step_graph(const config & cfg, backend & be, const hparams & hp, const arch & model, const weights & w, const model_file * base);
    ~step_graph();
    step_graph(const step_graph &)             = delete;
    step_graph & operator=(const step_graph &) = delete;

    // -> the micro-batch's loss: the sum over its labels, times `scale`. Throws toy::error (runner_failed, oom)
    float forward(const batch & b, float scale);
    // The same, and its gradients: the first round of a step sets them, the others add to them; after the last they are complete, `squares` with
    // them.
    float round(const batch & b, float scale, bool first, bool last);

    // Of the micro-batch computed last.
    int64_t     count_hits(const batch & b) const;   // images: labels that are the likeliest class; of equals the first
    std::string find_bad_tensor();                   // a weight that is not finite, or where the round got what is not; "": neither

    std::vector<ggml_tensor *> squares;   // [1] each: of the gradients, one stretch after the other

    size_t      bytes() const { return place->bytes(); }   // activations and temporaries
    size_t      bytes_inputs() const { return ggml_backend_buffer_get_size(buf_inputs); }
    size_t      bytes_work() const { return be.work_bytes(graph); }        // the kernels' scratch
    size_t      bytes_nodes() const { return ggml_used_mem(ctx_graph); }   // the graph's description
    std::string left_to_cpu() const { return place->left_to_cpu(); }       // operations that the device lacks

  private:
    const config &  cfg;
    backend &       be;
    const hparams & hp;
    const arch &    model;
    const weights & w;

    ggml_context *        ctx_inputs;
    ggml_backend_buffer_t buf_inputs = nullptr;
    inputs                in;
    ggml_tensor *         labels, *seeds, *scale, *loss_grad, *mask = nullptr;

    ggml_context *             ctx_graph;
    std::unique_ptr<placement> place;
    ggml_tensor *              logits = nullptr;   // where they are kept whole
    ggml_tensor *              loss;
    ggml_cgraph *              graph;       // forward, loss and backward
    int                        n_forward;   // its first nodes, which forward() computes in the same buffer

    // gradients begin with an operation that can set them instead of adding to them, or with zeros
    std::vector<ggml_tensor *> first_sums, zeroed;

    bool          is_vision() const { return hp.arch == "vit"; }
    bool          fused_attention() const;           // attention is one operation (net::fused)
    bool          fused_loss(const net & n) const;   // the head and its loss are one operation
    void          build_inputs();
    void          build_graph(const model_file * base);
    ggml_tensor * class_loss(const net & n);
    ggml_tensor * token_loss(const net & n);
    void          find_first_sums();
    ggml_cgraph * with_squares(ggml_cgraph * graph);
    void          begin_round(bool first, bool last);
    float         run(ggml_cgraph * g, const batch & b, float loss_scale, float grad);
};

}   // namespace toy
