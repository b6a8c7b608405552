#include "session.h"

#include "engine/error.h"
#include "ggml-impl.h"   // ggml_graph_view

#include <algorithm>
#include <cmath>

namespace toy {

session::session(const config & cfg_in, const arch & model) : cfg(cfg_in), model(model), be(cfg_in.run.device, cfg_in.run.threads) {
    model.declare(cfg, w);
    w.alloc(be.handle);
    build_step();
    opt = std::make_unique<adamw>(cfg, w, be);
}

session::~session() {
    ggml_gallocr_free(galloc);
    ggml_free(ctx_graph);
    ggml_backend_buffer_free(buf_inputs);
    ggml_free(ctx_inputs);
}

void session::build_step() {
    const int64_t T = cfg.model.context, n = (int64_t) cfg.train.micro_batch * T;

    // inputs live outside the graph's buffer: positions and mask are written once and stay
    ctx_inputs = ggml_init({ /*mem_size =*/8 * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true });
    tokens     = ggml_new_tensor_1d(ctx_inputs, GGML_TYPE_I32, n);
    labels     = ggml_new_tensor_1d(ctx_inputs, GGML_TYPE_I32, n);
    positions  = ggml_new_tensor_1d(ctx_inputs, GGML_TYPE_I32, T);
    mask       = ggml_new_tensor_2d(ctx_inputs, GGML_TYPE_F32, T, T);
    scale      = ggml_new_tensor_1d(ctx_inputs, GGML_TYPE_F32, 1);
    loss_grad  = ggml_new_tensor_1d(ctx_inputs, GGML_TYPE_F32, 1);
    buf_inputs = ggml_backend_alloc_ctx_tensors(ctx_inputs, be.handle);

    // forward and loss
    const size_t graph_size = 64 * (w.params.size() + 16);
    ctx_graph =
        ggml_init({ /*mem_size =*/graph_size * ggml_tensor_overhead() + ggml_graph_overhead_custom(graph_size, true), nullptr, /*no_alloc =*/true });
    graph                = ggml_new_graph_custom(ctx_graph, graph_size, true);
    ggml_tensor * logits = model.forward(ctx_graph, cfg, w.lookup(), tokens, positions, mask);
    ggml_set_name(logits, "logits");
    loss = ggml_cross_entropy_sparse(ctx_graph, logits, labels, scale);
    ggml_set_name(loss, "loss");
    ggml_set_loss(loss);
    ggml_set_output(loss);
    ggml_build_forward_expand(graph, loss);
    n_forward = ggml_graph_n_nodes(graph);

    // backward, into the gradient buffers: they are added to, so that micro-batches accumulate
    std::vector<ggml_tensor *> grad_accs(n_forward, nullptr);
    for (int i = 0; i < n_forward; i++) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        for (const param & p : w.params) {
            if (node == p.w) {
                grad_accs[i] = p.g;
            }
        }
        if (node == loss) {
            grad_accs[i] = loss_grad;
        }
    }
    ggml_build_backward_expand(ctx_graph, graph, grad_accs.data());

    galloc = ggml_gallocr_new(ggml_backend_get_default_buffer_type(be.handle));
    if (!buf_inputs || !ggml_gallocr_alloc_graph(galloc, graph)) {
        throw error("oom", EXIT_FAILED, "cannot allocate the compute buffer of the step",
                    "lower train.micro_batch (more rounds, the same update), model.context or model.n_embd; `--dry-run` says what is needed");
    }

    std::vector<int32_t> pos(T);
    std::vector<float>   causal(T * T);
    for (int64_t i = 0; i < T; i++) {
        pos[i] = (int32_t) i;
        for (int64_t j = 0; j < T; j++) {
            causal[i * T + j] = j <= i ? 0.0f : -INFINITY;
        }
    }
    const float one = 1.0f;
    ggml_backend_tensor_set(positions, pos.data(), 0, ggml_nbytes(positions));
    ggml_backend_tensor_set(mask, causal.data(), 0, ggml_nbytes(mask));
    ggml_backend_tensor_set(loss_grad, &one, 0, sizeof(one));
}

void session::set_data(const std::string & corpus_path, const std::string & val_path) {
    const int T    = cfg.model.context;
    corpus         = std::make_unique<token_file>(corpus_path);
    size_t n_train = corpus->n;
    if (val_path.empty()) {
        const size_t n_val = (size_t) (cfg.data.val_fraction * (double) corpus->n);
        n_train            = corpus->n - n_val;
        val                = { corpus->tokens + n_train, n_val, T };
    } else {
        val_corpus = std::make_unique<token_file>(val_path);
        val        = { val_corpus->tokens, val_corpus->n, T };
    }
    for (const token_file * f : { corpus.get(), val_corpus.get() }) {
        if (f && f->max_token() >= cfg.model.vocab_size) {
            throw error("bad_file", EXIT_BAD_INPUT,
                        format("%s holds token id %d, but model.vocab_size is %d", f->path.c_str(), f->max_token(), cfg.model.vocab_size),
                        "raise model.vocab_size above the largest id, or pack the corpus with this model's tokenizer");
        }
    }
    reader = std::make_unique<window_reader>(corpus->tokens, n_train, T, cfg.run.seed, cfg.data.shuffle);
}

size_t session::train_tokens() const {
    return reader ? reader->n : 0;
}
size_t session::val_tokens() const {
    return val.n;
}
size_t session::corpus_bytes() const {
    return ((corpus ? corpus->n : 0) + (val_corpus ? val_corpus->n : 0)) * sizeof(int32_t);
}

float session::run(ggml_cgraph * g, const batch & b, float loss_scale) {
    ggml_backend_tensor_set(tokens, b.tokens.data(), 0, ggml_nbytes(tokens));
    ggml_backend_tensor_set(labels, b.labels.data(), 0, ggml_nbytes(labels));
    ggml_backend_tensor_set(scale, &loss_scale, 0, sizeof(loss_scale));
    be.compute(g);
    float value;
    ggml_backend_tensor_get(loss, &value, 0, sizeof(value));
    return value;
}

float session::loss_and_gradients() {
    const auto &               t        = cfg.train;
    const int                  n_rounds = t.batch / t.micro_batch;
    const window_reader::state start    = reader->tell();

    // the step's unmasked tokens are counted first: every round is scaled by the same number
    int64_t n_labels = 0;
    for (int i = 0; i < n_rounds; i++) {
        reader->next(t.micro_batch, last_batch);
        n_labels += last_batch.n_labels;
    }
    if (n_rounds > 1) {
        reader->seek(start);
    }

    w.zero_gradients();
    const float loss_scale = 1.0f / (float) std::max<int64_t>(n_labels, 1);
    double      sum        = 0;
    for (int i = 0; i < n_rounds; i++) {
        if (n_rounds > 1) {
            reader->next(t.micro_batch, last_batch);
        }
        sum += run(graph, last_batch, loss_scale);
        if (!std::isfinite(sum)) {
            break;   // last_batch stays the one that did it
        }
    }
    return (float) sum;
}

step_result session::step() {
    const window_reader::state start = reader->tell();
    step_result                r;
    r.loss            = loss_and_gradients();
    r.learning_rate   = learning_rate(cfg, (int) steps_done + 1);
    r.grad_norm       = NAN;
    const param * bad = nullptr;
    if (std::isfinite(r.loss)) {
        r.grad_norm = opt->grad_norm(&bad);
    }
    if (!std::isfinite(r.loss) || !std::isfinite(r.grad_norm)) {
        r.bad_tensor = find_bad_tensor();
        if (r.bad_tensor.empty()) {
            r.bad_tensor = bad ? "gradient of " + bad->name : "the sum of squared gradients";
        }
        reader->seek(start);   // the weights and the place in the data are those of the last good step
        return r;
    }
    steps_done++;
    opt->step((int) steps_done, r.learning_rate, r.grad_norm);
    return r;
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
std::string session::find_bad_tensor() {
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
    w.zero_gradients();
    for (int i = 0; i < ggml_graph_n_nodes(graph); i++) {
        ggml_tensor * node = ggml_graph_node(graph, i);
        if (node->op == GGML_OP_NONE) {
            continue;
        }
        ggml_cgraph one = ggml_graph_view(graph, i, i + 1);
        be.compute(&one);
        if (node->type == GGML_TYPE_F32 && ggml_is_contiguous(node) && !is_finite(node)) {
            return format("%s at %s", ggml_op_desc(node), nearest_name(node).c_str());
        }
    }
    return "";
}

eval_result session::evaluate() {
    const int64_t n_windows = val.n_windows();
    const int     n_seq     = cfg.train.micro_batch;
    int64_t       want      = cfg.eval.batches > 0 ? (int64_t) cfg.eval.batches * n_seq : n_windows;
    want                    = std::min(want, n_windows);
    if (want == 0) {
        return { NAN, 0 };
    }
    // fewer windows than there are: spread evenly, the same ones each time
    const int64_t stride = n_windows / want, end = stride * (want - 1) + 1;
    ggml_cgraph   forward = ggml_graph_view(graph, 0, n_forward);
    double        sum     = 0;
    int64_t       n       = 0;
    batch         b;
    for (int64_t first = 0; first < end; first += stride * n_seq) {
        val.read(first, stride, end, n_seq, b);
        sum += (double) run(&forward, b, 1.0f / (float) b.n_labels) * (double) b.n_labels;
        n += b.n_labels;
    }
    return { sum / (double) n, n };
}

memory_plan session::memory(size_t corpus_bytes) const {
    memory_plan m;
    m.weights   = w.bytes_weights();
    m.gradients = w.bytes_gradients();
    m.moments   = w.bytes_moments();
    m.compute   = ggml_gallocr_get_buffer_size(galloc, 0);
    m.inputs    = ggml_backend_buffer_get_size(buf_inputs) + opt->bytes();
    m.work      = be.work_bytes(graph);
    m.corpus    = corpus_bytes;
    m.runtime   = ggml_used_mem(ctx_graph) + 6500 * 1000;
    return m;
}

}   // namespace toy
