#include "step.h"

#include "archs/lora.h"
#include "engine/device.h"
#include "engine/error.h"
#include "ggml-impl.h"   // ggml_graph_view
#include "recompute.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <unordered_map>

namespace toy {

// Of the rows of logits that exist at once on a device: enough that reading the head and its gradient once for each of them costs little, and on
// Vulkan what a shader of any device sees.
static int64_t bytes_of_logits(const std::string & device) {
    return device == "vulkan" ? 128 << 20 : 512 << 20;
}

step_graph::step_graph(const config & cfg, backend & be, const hparams & hp, const arch & model, const weights & w, const model_file * base)
    : cfg(cfg), be(be), hp(hp), model(model), w(w) {
    build_inputs();
    build_graph(base);
}

step_graph::~step_graph() {
    place.reset();
    ggml_free(ctx_graph);
    ggml_backend_buffer_free(buf_inputs);
    ggml_free(ctx_inputs);
}

// Another device's graph on the cpu, which cannot ask that device: of those that there are, metal has no such operation.
bool step_graph::fused_attention() const {
    const int64_t T = is_vision() ? hp.n_ctx : cfg.model.context;
    return cfg.run.device == DEVICE ? has_attention(be.handle, hp, T, cfg.train.micro_batch, !is_vision(), cfg.train.dtype == "bf16", true)
                                    : cfg.run.device != "metal";
}

// Inputs live outside the graph's buffer: positions are written once and stay.
void step_graph::build_inputs() {
    const int64_t B = cfg.train.micro_batch, T = cfg.model.context;
    ctx_inputs = ggml_init({ /*mem_size =*/8 * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true });
    if (is_vision()) {
        in.patches = ggml_new_tensor_2d(ctx_inputs, GGML_TYPE_F32, hp.patch_dim(), hp.n_patches() * B);
    } else {
        in.tokens    = ggml_new_tensor_1d(ctx_inputs, GGML_TYPE_I32, T * B);
        in.positions = ggml_new_tensor_1d(ctx_inputs, GGML_TYPE_I32, T);
        mask         = fused_attention() ? nullptr : ggml_new_tensor_2d(ctx_inputs, GGML_TYPE_F32, T, T);
    }
    labels     = ggml_new_tensor_1d(ctx_inputs, GGML_TYPE_I32, is_vision() ? B : T * B);
    seeds      = ggml_new_tensor_2d(ctx_inputs, GGML_TYPE_I32, 2, B);
    scale      = ggml_new_tensor_1d(ctx_inputs, GGML_TYPE_F32, 1);
    loss_grad  = ggml_new_tensor_1d(ctx_inputs, GGML_TYPE_F32, 1);
    buf_inputs = ggml_backend_alloc_ctx_tensors(ctx_inputs, be.handle);
    if (!buf_inputs) {
        throw error("oom", EXIT_FAILED, "cannot allocate the inputs of the step", LOWER_STEP);
    }
    if (in.positions) {
        std::vector<int32_t> pos(T);
        std::iota(pos.begin(), pos.end(), 0);
        ggml_backend_tensor_set(in.positions, pos.data(), 0, ggml_nbytes(in.positions));
    }
    if (mask) {
        set_causal_mask(mask, 0);
    }
}

// Logits kept whole: few classes, because accuracy reads them, and devices that have no other loss.
ggml_tensor * step_graph::class_loss(const net & n) {
    logits = model.forward(n, in);
    ggml_set_name(logits, "logits");
    ggml_set_output(logits);
    return ggml_cross_entropy_sparse(n.ctx, logits, labels, scale);
}

// A vocabulary: its logits would be the largest tensor of all, so that the loss, the gradient of what the head reads and that of the head
// itself (if it is trained, straight into its buffer) come from one operation that makes some rows of them at a time.
ggml_tensor * step_graph::token_loss(const net & n) {
    ggml_tensor * x    = model.hidden(n, in);   // [C, T*B]
    ggml_tensor * head = n.get(model.head(hp) + std::string(".weight"));
    ggml_tensor * dx   = ggml_new_tensor_2d(n.ctx, GGML_TYPE_F32, x->ne[0], x->ne[1]);
    const auto    own  = std::find_if(w.params.begin(), w.params.end(), [&](const param & p) { return p.w == head; });
    ggml_tensor * sum  = ggml_linear_cross_entropy(n.ctx, x, head, labels, scale, loss_grad, dx, own == w.params.end() ? nullptr : own->g);
    if (cfg.run.device != "cpu") {
        ggml_linear_cross_entropy_set_rows(sum, std::max<int64_t>(256, bytes_of_logits(cfg.run.device) / (int64_t) sizeof(float) / head->ne[1]));
    }
    if (n.bf16) {
        ggml_mul_mat_set_prec(sum, GGML_PREC_BF16);
    }
    return sum;
}

bool step_graph::fused_loss(const net & n) const {
    const ggml_tensor * head = n.get(model.head(hp) + std::string(".weight"));
    if (is_vision() || n.get(model.head(hp) + std::string(".bias"))) {
        return false;
    }
    // what writes a gradient that the cpu keeps is the cpu's: not the products with the whole vocabulary
    const bool other   = cfg.run.device != DEVICE;   // a step that another program computes
    const bool kept    = other ? cfg.train.offload : be.states != be.handle;
    const bool trained = std::any_of(w.trained.begin(), w.trained.end(), [&](const param & p) { return p.w == head; });
    if (trained && kept) {
        return false;
    }
    if (other) {
        return cfg.run.device != "metal";
    }
    ggml_context * ctx = ggml_init({ /*mem_size =*/16 * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true });
    ggml_tensor *  own = ggml_new_tensor_2d(ctx, head->type, head->ne[0], head->ne[1]), *x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, head->ne[0], 1);
    ggml_tensor *  one = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 1), *id = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1);
    ggml_tensor *  sum = ggml_linear_cross_entropy(ctx, x, own, id, one, one, ggml_dup_tensor(ctx, x), trained ? ggml_dup_tensor(ctx, own) : nullptr);
    ggml_mul_mat_set_prec(sum, n.bf16 ? GGML_PREC_BF16 : GGML_PREC_DEFAULT);
    const bool there = ggml_backend_supports_op(be.handle, sum);
    ggml_free(ctx);
    return there;
}

void step_graph::build_graph(const model_file * base) {
    // forward and loss
    const size_t graph_size    = 64 * w.params.size() + 512 * (hp.n_layer + 2);
    ctx_graph                  = ggml_init({ /*mem_size =*/graph_size * ggml_tensor_overhead() + ggml_graph_overhead_custom(graph_size, true) +
                                                 2 * ggml_graph_overhead_custom(graph_size, false),
                                             nullptr, /*no_alloc =*/true });
    graph                      = ggml_new_graph_custom(ctx_graph, graph_size, true);
    const lora_adapter adapter = { w.lookup(), cfg.lora.alpha, (float) cfg.lora.dropout, seeds };
    net                n       = { ctx_graph, base ? base->lookup() : w.lookup(), hp };
    n.bf16                     = cfg.train.dtype == "bf16";
    n.fused                    = fused_attention();
    n.mask                     = mask;
    n.lora                     = base ? &adapter : nullptr;
    loss                       = fused_loss(n) ? token_loss(n) : class_loss(n);
    ggml_set_name(loss, "loss");
    ggml_set_loss(loss);
    ggml_set_output(loss);
    ggml_build_forward_expand(graph, loss);
    n_forward = ggml_graph_n_nodes(graph);

    // backward, into the gradient buffers: they are added to, so that micro-batches accumulate
    std::vector<ggml_tensor *> grad_accs(n_forward, nullptr);
    for (int i = 0; i < n_forward; i++) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        for (const param & p : w.trained) {
            if (node == p.w) {
                grad_accs[i] = p.g;
            }
        }
        if (node == loss) {
            grad_accs[i] = loss_grad;
        }
    }
    ggml_build_backward_expand(ctx_graph, graph, grad_accs.data());
    graph = recompute_activations(ctx_graph, graph, n_forward, cfg.train.recompute ? recompute::BLOCKS : recompute::CHEAP);
    find_first_sums();
    graph = with_squares(graph);

    place = std::make_unique<placement>(be, ctx_graph);
    if (!place->alloc(graph)) {
        const size_t      size = place->needed();
        const std::string text = size > 0 ? format(": %.2f GiB", (double) size / (1 << 30)) : "";
        throw error("oom", EXIT_FAILED, "cannot allocate the compute buffer of the step" + text, LOWER_STEP);
    }
    use_huge_pages(loss->buffer);
}

static bool takes(const ggml_tensor * node, const ggml_tensor * t) {
    return std::find(node->src, node->src + GGML_MAX_SRC, t) != node->src + GGML_MAX_SRC;
}

void step_graph::find_first_sums() {
    for (const param & p : w.trained) {
        int i = n_forward - 1;   // the loss may make the gradient of the head
        while (i < ggml_graph_n_nodes(graph) && !takes(ggml_graph_node(graph, i), p.g)) {
            i++;
        }
        if (i < ggml_graph_n_nodes(graph) && ggml_adds_in_place(ggml_graph_node(graph, i))) {
            first_sums.push_back(ggml_graph_node(graph, i));
        } else {
            zeroed.push_back(p.g);
        }
    }
}

// Of the gradients' norm, a large gradient is summed as soon as it is complete, while caches still hold it: a sum of them all at the end would
// fetch it from memory once more. Those between them come at the end, where they part no operations that are computed as one.
ggml_cgraph * step_graph::with_squares(ggml_cgraph * old) {
    const size_t large = 1 << 20;   // bytes

    std::unordered_map<const ggml_tensor *, int> last;   // node that writes a gradient
    for (int i = 0; i < ggml_graph_n_nodes(old); i++) {
        for (const ggml_tensor * src : ggml_graph_node(old, i)->src) {
            if (src) {
                last[src->view_src ? src->view_src : src] = i;
            }
        }
    }
    std::unordered_map<int, std::vector<ggml_tensor *>> after;   // the sums behind a node
    std::vector<ggml_tensor *>                          rest;
    const auto                                          sum_of = [&](size_t begin, size_t end) {
        squares.push_back(ggml_sum_sqr(ctx_graph, ggml_view_1d(ctx_graph, w.gradients, (int64_t) ((end - begin) / sizeof(float)), begin)));
        ggml_set_output(squares.back());
        return squares.back();
    };
    size_t done = 0;   // bytes of the row of all gradients
    for (const param & p : w.trained) {
        const auto it = last.find(p.g);
        if (it == last.end() || ggml_nbytes(p.g) < large) {
            continue;
        }
        const size_t at = (size_t) ((char *) p.g->data - (char *) w.gradients->data);
        if (at > done) {
            rest.push_back(sum_of(done, at));
        }
        done = at + ggml_nbytes(p.g);
        after[it->second].push_back(sum_of(at, done));
    }
    if (done < ggml_nbytes(w.gradients)) {
        rest.push_back(sum_of(done, ggml_nbytes(w.gradients)));
    }
    ggml_cgraph * out = ggml_new_graph_custom(ctx_graph, old->size, false);
    for (int i = 0; i < ggml_graph_n_nodes(old); i++) {
        ggml_build_forward_expand(out, ggml_graph_node(old, i));
        if (const auto it = after.find(i); it != after.end()) {
            for (ggml_tensor * sum : it->second) {
                ggml_build_forward_expand(out, sum);
            }
        }
    }
    for (ggml_tensor * sum : rest) {
        ggml_build_forward_expand(out, sum);
    }
    return out;
}

//
// rounds
//

void step_graph::begin_round(bool first, bool last) {
    for (ggml_tensor * sum : squares) {
        sum->flags = last ? sum->flags | GGML_TENSOR_FLAG_COMPUTE : sum->flags & ~GGML_TENSOR_FLAG_COMPUTE;
    }
    for (ggml_tensor * node : first_sums) {
        node->flags = first ? node->flags | GGML_TENSOR_FLAG_SET : node->flags & ~GGML_TENSOR_FLAG_SET;
    }
    if (first) {
        for (ggml_tensor * g : zeroed) {
            ggml_backend_tensor_memset(g, 0, 0, ggml_nbytes(g));
        }
    }
}

float step_graph::run(ggml_cgraph * g, const batch & b, float loss_scale, float grad) {
    if (in.patches) {
        ggml_backend_tensor_set(in.patches, b.patches.data(), 0, ggml_nbytes(in.patches));
    } else {
        ggml_backend_tensor_set(in.tokens, b.tokens.data(), 0, ggml_nbytes(in.tokens));
    }
    ggml_backend_tensor_set(labels, b.labels.data(), 0, ggml_nbytes(labels));
    ggml_backend_tensor_set(seeds, b.seeds.data(), 0, ggml_nbytes(seeds));
    ggml_backend_tensor_set(scale, &loss_scale, 0, sizeof(loss_scale));
    ggml_backend_tensor_set(loss_grad, &grad, 0, sizeof(grad));
    // a device cannot tell before it computes
    loss->flags = grad == 0 ? loss->flags | GGML_TENSOR_FLAG_LOSS_ONLY : loss->flags & ~GGML_TENSOR_FLAG_LOSS_ONLY;
    place->compute(g);
    float value;
    ggml_backend_tensor_get(loss, &value, 0, sizeof(value));
    return value;
}

float step_graph::forward(const batch & b, float loss_scale) {
    ggml_cgraph view = ggml_graph_view(graph, 0, n_forward);
    return run(&view, b, loss_scale, 0.0f);
}

float step_graph::round(const batch & b, float loss_scale, bool first, bool last) {
    begin_round(first, last);
    return run(graph, b, loss_scale, 1.0f);
}

int64_t step_graph::count_hits(const batch & b) const {
    std::vector<float> l(ggml_nelements(logits));
    ggml_backend_tensor_get(logits, l.data(), 0, ggml_nbytes(logits));
    int64_t hits = 0;
    for (size_t i = 0; i < b.labels.size(); i++) {
        const auto row = l.begin() + i * hp.n_vocab;
        hits += b.labels[i] >= 0 && std::max_element(row, row + hp.n_vocab) - row == b.labels[i];
    }
    return hits;
}

// Where a node stands: its own name if the model gave it one, else the nearest named tensor that it is computed from.
static std::string nearest_name(const ggml_tensor * node) {
    std::vector<const ggml_tensor *> reached = { node };   // breadth first
    for (size_t i = 0; i < reached.size() && i < 256; i++) {
        const std::string name = reached[i]->name;
        if (name.rfind("blk.", 0) == 0 || name == "logits" || name == "loss" || (reached[i]->flags & GGML_TENSOR_FLAG_PARAM)) {
            // ggml marks what it derives: "blk.0.attn_q.weight (transposed)"
            return name.substr(0, name.find(' '));
        }
        for (const ggml_tensor * src : reached[i]->src) {
            if (src) {
                reached.push_back(src);
            }
        }
    }
    return node->name;
}

// Runs the last micro-batch again (its inputs are still there) one operation at a time: buffers are shared, so a value is only there right after it
// was computed.
std::string step_graph::find_bad_tensor() {
    std::vector<float> row;
    const auto         is_finite = [&](const ggml_tensor * t) {
        row.resize(ggml_nelements(t));
        ggml_backend_tensor_get(t, row.data(), 0, ggml_nbytes(t));
        return std::all_of(row.begin(), row.end(), [](float x) { return std::isfinite(x); });
    };
    for (const param & p : w.params) {
        if (!is_finite(p.w)) {
            return "weight " + p.name;
        }
    }
    begin_round(true, false);
    std::string bad;
    place->walk([&](const ggml_tensor * node) {
        const bool there = node->op != GGML_OP_NONE && (node->flags & GGML_TENSOR_FLAG_COMPUTE);
        if (there && node->type == GGML_TYPE_F32 && ggml_is_contiguous(node) && !is_finite(node)) {
            bad = format("%s at %s", ggml_op_desc(node), nearest_name(node).c_str());
        }
        return bad.empty();
    });
    return bad;
}

}   // namespace toy
