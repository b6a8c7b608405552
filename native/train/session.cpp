#include "session.h"

#include "engine/device.h"
#include "engine/error.h"
#include "ggml-impl.h"   // ggml_graph_view
#include "recompute.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <unordered_map>

namespace toy {

// Of the rows of logits that exist at once on a device: enough that reading the head and its gradient once for each of them costs little.
static const int64_t DEVICE_LOGITS = 512 << 20;   // bytes

static hparams shape_of(const config & cfg, const model_file * base) {
    if (!base) {
        return hparams::from_config(cfg);
    }
    hparams hp = hparams::from_gguf(base->file);
    hp.n_ctx   = cfg.model.context;
    if (&arch_of(hp.arch) != &ARCH_LLAMA) {
        throw error("not_available", EXIT_BAD_INPUT, base->file.path + " is a " + hp.arch + " model", "adapters are trained over llama and qwen2");
    }
    return hp;
}

session::session(const config & cfg_in, const inputs_lookup & paths, const std::string & device)
    : cfg(cfg_in),
      be(device.empty() ? cfg.run.device : device, cfg.run.threads, cfg.train.offload),
      base(cfg.run.recipe == "lora" ? std::make_unique<model_file>(paths("GGUF")) : nullptr),
      hp(shape_of(cfg, base.get())),
      model(arch_of(hp.arch)) {
    if (base) {
        base->move_to(be.handle);
    }
    declare();
    w.alloc(be.states);
    build_inputs();
    build_step();
    opt = std::make_unique<adamw>(cfg, w, be);
}

session::~session() {
    place.reset();
    ggml_free(ctx_graph);
    ggml_backend_buffer_free(buf_inputs);
    ggml_free(ctx_inputs);
}

void session::declare() {
    if (base) {
        declare_lora(cfg, hp, base->file, w);
    } else {
        model.declare(hp, cfg.model.init_std, w);
    }
    w.freeze(cfg.train.freeze);
    if (!fused()) {
        w.join_none();   // what follows a joined product is fused too
    }
}

// Another device's graph on the cpu, which cannot ask that device: of those that there are, metal has no such operation.
bool session::fused_attention() const {
    const int64_t T = is_vision() ? hp.n_ctx : cfg.model.context;
    return cfg.run.device == DEVICE ? has_attention(be.handle, hp, T, cfg.train.micro_batch, !is_vision(), cfg.train.dtype == "bf16", true)
                                    : cfg.run.device != "metal";
}

// Inputs live outside the graph's buffer: positions are written once and stay.
void session::build_inputs() {
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
        throw error("oom", EXIT_FAILED, "cannot allocate the inputs of the step", "lower train.micro_batch or model.context");
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
ggml_tensor * session::class_loss(const net & n) {
    logits = model.forward(n, in);
    ggml_set_name(logits, "logits");
    ggml_set_output(logits);
    return ggml_cross_entropy_sparse(n.ctx, logits, labels, scale);
}

// A vocabulary: its logits would be the largest tensor of all, so that the loss, the gradient of what the head reads and that of the head
// itself (if it is trained, straight into its buffer) come from one operation that makes some rows of them at a time.
ggml_tensor * session::token_loss(const net & n) {
    ggml_tensor * x    = model.hidden(n, in);   // [C, T*B]
    ggml_tensor * head = n.get(model.head(hp) + std::string(".weight"));
    ggml_tensor * dx   = ggml_new_tensor_2d(n.ctx, GGML_TYPE_F32, x->ne[0], x->ne[1]);
    const auto    own  = std::find_if(w.params.begin(), w.params.end(), [&](const param & p) { return p.w == head; });
    ggml_tensor * sum  = ggml_linear_cross_entropy(n.ctx, x, head, labels, scale, loss_grad, dx, own == w.params.end() ? nullptr : own->g);
    if (cfg.run.device != "cpu") {
        ggml_linear_cross_entropy_set_rows(sum, std::max<int64_t>(256, DEVICE_LOGITS / (int64_t) sizeof(float) / head->ne[1]));
    }
    if (n.bf16) {
        ggml_mul_mat_set_prec(sum, GGML_PREC_BF16);
    }
    return sum;
}

bool session::fused_loss(const net & n) const {
    const ggml_tensor * head = n.get(model.head(hp) + std::string(".weight"));
    if (is_vision() || n.get(model.head(hp) + std::string(".bias"))) {
        return false;
    }
    if (cfg.run.device != DEVICE) {
        return cfg.run.device == "cuda";   // a step that another program computes
    }
    const bool     trained = std::any_of(w.trained.begin(), w.trained.end(), [&](const param & p) { return p.w == head; });
    ggml_context * ctx     = ggml_init({ /*mem_size =*/16 * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true });
    ggml_tensor *  own = ggml_new_tensor_2d(ctx, head->type, head->ne[0], head->ne[1]), *x = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, head->ne[0], 1);
    ggml_tensor *  one = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 1), *id = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1);
    ggml_tensor *  sum = ggml_linear_cross_entropy(ctx, x, own, id, one, one, ggml_dup_tensor(ctx, x), trained ? ggml_dup_tensor(ctx, own) : nullptr);
    ggml_mul_mat_set_prec(sum, n.bf16 ? GGML_PREC_BF16 : GGML_PREC_DEFAULT);
    // what writes a gradient that the cpu keeps is the cpu's: not the products with the whole vocabulary
    const bool there = (!trained || be.states == be.handle) && ggml_backend_supports_op(be.handle, sum);
    ggml_free(ctx);
    return there;
}

void session::build_step() {
    // forward and loss
    const size_t graph_size = 64 * w.params.size() + 512 * (hp.n_layer + 2);
    ctx_graph               = ggml_init({ /*mem_size =*/graph_size * ggml_tensor_overhead() + ggml_graph_overhead_custom(graph_size, true) +
                                              2 * ggml_graph_overhead_custom(graph_size, false),
                                          nullptr, /*no_alloc =*/true });
    graph                   = ggml_new_graph_custom(ctx_graph, graph_size, true);
    net n                   = { ctx_graph, base ? base->lookup() : w.lookup(), hp };
    n.bf16                  = cfg.train.dtype == "bf16";
    n.fused                 = fused_attention();
    n.mask                  = mask;
    if (base) {
        lora   = std::make_unique<lora_adapter>(lora_adapter{ w.lookup(), cfg.lora.alpha, (float) cfg.lora.dropout, seeds });
        n.lora = lora.get();
    }
    loss = fused_loss(n) ? token_loss(n) : class_loss(n);
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
        throw error("oom", EXIT_FAILED, "cannot allocate the compute buffer of the step" + text,
                    "lower train.micro_batch (more rounds, the same update), model.context or model.n_embd; `--dry-run` says what is needed");
    }
    use_huge_pages(loss->buffer);
}

static bool takes(const ggml_tensor * node, const ggml_tensor * t) {
    return std::find(node->src, node->src + GGML_MAX_SRC, t) != node->src + GGML_MAX_SRC;
}

void session::find_first_sums() {
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
ggml_cgraph * session::with_squares(ggml_cgraph * old) {
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

// The first round of a step sets the gradients, the others add to them; after the last they are complete.
void session::begin_round(bool first, bool last) {
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

//
// data
//

static error too_short(size_t n, const char * what, int T) {
    return error("bad_file", EXIT_BAD_INPUT, format("the training part of the corpus has %zu %s, fewer than one sequence of %d", n, what, T),
                 "give a longer corpus, a smaller model.context or a smaller data.val_fraction");
}

void session::set_data(const inputs_lookup & paths) {
    is_vision() ? set_images(paths) : set_text(paths);
    reader = std::make_unique<data_reader>(*train_set, cfg.run.seed, cfg.data.shuffle);
}

void session::set_text(const inputs_lookup & paths) {
    const int  T    = cfg.model.context;
    const auto open = [&](const std::string & path) {
        auto file = std::make_unique<token_file>(path);
        if (file->max_token() >= hp.n_vocab) {
            throw error("bad_file", EXIT_BAD_INPUT,
                        format("%s holds token id %d, but the vocabulary has %d", path.c_str(), file->max_token(), hp.n_vocab),
                        "raise model.vocab_size above the largest id, or pack the corpus with this model's tokenizer");
        }
        files.push_back(std::move(file));
        return (const token_file *) files.back().get();
    };
    const auto open_examples = [&](const token_file * tokens, const char * offsets_key, const char * mask_key) {
        files.push_back(std::make_unique<data_file>(paths(offsets_key), "packed corpus"));
        const data_file * offsets = files.back().get();
        files.push_back(std::make_unique<data_file>(paths(mask_key), "packed corpus"));
        const data_file * mask = files.back().get();
        const size_t      n    = offsets->bytes / sizeof(int64_t);
        const int64_t *   at   = (const int64_t *) offsets->data;
        if (n < 2 || offsets->bytes % sizeof(int64_t) != 0 || at[0] != 0 || at[n - 1] != (int64_t) tokens->n || mask->bytes != tokens->n ||
            !std::is_sorted(at, at + n)) {
            throw error("bad_file", EXIT_BAD_INPUT, offsets->path + " does not fit its tokens and mask", "pack the corpus again");
        }
        return std::make_pair(at, (const uint8_t *) mask->data);
    };

    const token_file * corpus  = open(paths("CORPUS"));
    const std::string  val     = paths("VAL_CORPUS");
    const double       held    = val.empty() ? cfg.data.val_fraction : 0.0;   // the end of the corpus
    const token_file * val_own = val.empty() ? nullptr : open(val);
    if (paths("OFFSETS").empty()) {
        val_tokens   = (size_t) (held * (double) corpus->n);
        train_tokens = corpus->n - val_tokens;
        if (train_tokens < (size_t) T + 1) {
            throw too_short(train_tokens, "tokens", T + 1);
        }
        train_set = std::make_unique<window_set>(corpus->tokens, train_tokens, T, cfg.run.seed, cfg.data.shuffle, false);
        val_set   = std::make_unique<window_set>(corpus->tokens + train_tokens, val_tokens, T, 0, false, true);
    } else {
        const auto   e       = open_examples(corpus, "OFFSETS", "MASK");
        const size_t n       = files[files.size() - 2]->bytes / sizeof(int64_t) - 1;
        const size_t n_train = n - (size_t) (held * (double) n);
        train_set            = std::make_unique<example_set>(corpus->tokens, e.first, e.second, 0, n_train, T);
        val_set              = std::make_unique<example_set>(corpus->tokens, e.first, e.second, n_train, n, T);
        train_tokens         = e.first[n_train];
        val_tokens           = corpus->n - train_tokens;
        if (train_set->n_items(0) == 0) {
            throw error("bad_file", EXIT_BAD_INPUT, format("no example has a token to learn within the context of %d", T), "raise model.context");
        }
    }
    if (val_own && paths("VAL_OFFSETS").empty()) {
        val_tokens = val_own->n;
        val_set    = std::make_unique<window_set>(val_own->tokens, val_own->n, T, 0, false, true);
    } else if (val_own) {
        const auto e = open_examples(val_own, "VAL_OFFSETS", "VAL_MASK");
        val_tokens   = val_own->n;
        val_set      = std::make_unique<example_set>(val_own->tokens, e.first, e.second, 0, files[files.size() - 2]->bytes / sizeof(int64_t) - 1, T);
    }
}

void session::set_images(const inputs_lookup & paths) {
    const auto open = [&](const std::string & folder) {
        auto f = std::make_unique<image_file>(folder);
        if ((int) f->width != hp.image_size || (int) f->height != hp.image_size || (int) f->n_channel != hp.n_channel ||
            (int) f->n_class != hp.n_vocab) {
            throw error("bad_file", EXIT_BAD_INPUT,
                        format("%s holds %u x %u images with %u channels in %u classes; the model takes %d x %d, %d, %d", f->file.path.c_str(),
                               f->width, f->height, f->n_channel, f->n_class, hp.image_size, hp.image_size, hp.n_channel, hp.n_vocab),
                        "pack the images in the model's shape");
        }
        return f;
    };
    images                    = open(paths("IMG_DIR"));
    const std::string val     = paths("VAL_IMG_DIR");
    const size_t      n       = images->n_images;
    const size_t      n_train = n - (val.empty() ? (size_t) (cfg.data.val_fraction * (double) n) : 0);
    if (n_train == 0) {
        throw too_short(n, "images", 1);
    }
    train_set = std::make_unique<image_set>(*images, 0, n_train, hp.patch_size, cfg.run.seed, cfg.data.augment_crop, cfg.data.augment_flip);
    if (val.empty()) {
        val_set = std::make_unique<image_set>(*images, n_train, n, hp.patch_size, 0, 0, false);
    } else {
        val_images       = open(val);
        val_images->mean = images->mean;   // seen through the same normalisation as the training images
        val_images->std  = images->std;
        val_set          = std::make_unique<image_set>(*val_images, 0, val_images->n_images, hp.patch_size, 0, 0, false);
    }
}

int64_t session::total_params() const {
    int64_t n = w.n_params(true);
    for (ggml_tensor * t = base ? ggml_get_first_tensor(base->file.ctx) : nullptr; t; t = ggml_get_next_tensor(base->file.ctx, t)) {
        n += ggml_nelements(t);
    }
    return n;
}

size_t session::corpus_bytes() const {
    size_t n = (images ? images->file.bytes : 0) + (val_images ? val_images->file.bytes : 0);
    for (const auto & f : files) {
        n += f->bytes;
    }
    return n;
}

//
// initial weights
//

static void require_same(const gguf_file & donor, const char * what, double theirs, double ours) {
    if (theirs != ours) {
        throw error("bad_config", EXIT_BAD_INPUT, format("%s has %s = %.9g, and this model has %.9g", donor.path.c_str(), what, theirs, ours),
                    "leave the model's shape to the donor, or choose --init embeddings or scratch");
    }
}

void session::start_weights(const inputs_lookup & paths) {
    const bool warm = cfg.run.recipe == "warm-start" && cfg.model.init != "scratch", whole = warm && cfg.model.init != "embeddings";
    w.start(cfg.run.seed, be.states == be.cpu ? be.n_threads : 1, [whole](const std::string &) { return !whole; });
    if (!warm) {
        return;
    }
    const gguf_file donor(paths("GGUF"));
    if (!whole) {
        copy_from_gguf(w, donor, [&](const std::string & name) {
            return name == "token_embd.weight" || (name == "output.weight" && donor.tensor("output.weight"));
        });
        return;
    }
    const hparams theirs = hparams::from_gguf(donor);
    if (theirs.arch != hp.arch || donor.tensor("rope_freqs.weight") || donor.tensor("blk.0.attn_q.bias")) {
        throw error("not_available", EXIT_BAD_INPUT,
                    donor.path + (theirs.arch != hp.arch ? " is a " + theirs.arch + " model, and this run trains a " + hp.arch
                                                         : std::string(" has scaled rotary positions or attention biases")),
                    "choose another donor, --arch " + theirs.arch + ", or the recipe lora");
    }
    require_same(donor, "n_layer", theirs.n_layer, hp.n_layer);
    require_same(donor, "n_head", theirs.n_head, hp.n_head);
    require_same(donor, "n_head_kv", theirs.n_head_kv, hp.n_head_kv);
    require_same(donor, "head width", theirs.head_dim, hp.head_dim);
    require_same(donor, "rotated width", theirs.n_rot, hp.n_rot);
    require_same(donor, "rope_freq_base", theirs.rope_freq_base, hp.rope_freq_base);
    require_same(donor, "norm_eps", theirs.norm_eps, hp.norm_eps);
    require_same(donor, "tie_embeddings", theirs.tied, hp.tied);
    copy_from_gguf(w, donor, [](const std::string &) { return true; });
}

//
// steps
//

float session::run(ggml_cgraph * g, const batch & b, float loss_scale, float grad) {
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

float session::loss_and_gradients() {
    const auto &             t        = cfg.train;
    const int                n_rounds = t.batch / t.micro_batch;
    const data_reader::state start    = reader->tell();

    // the step's unmasked labels are counted first: every round is scaled by the same number
    int64_t n_labels = 0;
    step_tokens      = 0;
    for (int i = 0; i < n_rounds; i++) {
        reader->next(t.micro_batch, last_batch);
        n_labels += last_batch.n_labels;
        step_tokens += last_batch.n_tokens;
    }
    if (n_rounds > 1) {
        reader->seek(start);
    }

    const float loss_scale = 1.0f / (float) std::max<int64_t>(n_labels, 1);
    double      sum        = 0;
    for (int i = 0; i < n_rounds; i++) {
        if (n_rounds > 1) {
            reader->next(t.micro_batch, last_batch);
        }
        begin_round(i == 0, i == n_rounds - 1);
        sum += run(graph, last_batch, loss_scale, 1.0f);
        if (!std::isfinite(sum)) {
            break;   // last_batch stays the one that did it
        }
    }
    return (float) sum;
}

step_result session::step() {
    const data_reader::state start = reader->tell();
    step_result              r;
    r.loss            = loss_and_gradients();
    r.n_tokens        = step_tokens;
    r.learning_rate   = learning_rate(cfg, (int) steps_done + 1);
    r.grad_norm       = NAN;
    const param * bad = nullptr;
    if (std::isfinite(r.loss)) {
        r.grad_norm = opt->grad_norm(squares, &bad);
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

// Labels that are the likeliest class; of equals the first.
int64_t session::count_hits(const batch & b) const {
    std::vector<float> l(ggml_nelements(logits));
    ggml_backend_tensor_get(logits, l.data(), 0, ggml_nbytes(logits));
    int64_t hits = 0;
    for (size_t i = 0; i < b.labels.size(); i++) {
        const auto row = l.begin() + i * hp.n_vocab;
        hits += b.labels[i] >= 0 && std::max_element(row, row + hp.n_vocab) - row == b.labels[i];
    }
    return hits;
}

eval_result session::evaluate() {
    const int64_t n_items = n_val();
    const int     n_seq   = cfg.train.micro_batch;
    int64_t       want    = cfg.eval.batches > 0 ? (int64_t) cfg.eval.batches * cfg.train.batch : n_items;
    want                  = std::min(want, n_items);
    if (want == 0) {
        return { NAN, NAN, 0 };
    }
    // fewer than there are: spread evenly, the same ones each time
    const int64_t stride = n_items / want, end = stride * (want - 1) + 1;
    ggml_cgraph   forward = ggml_graph_view(graph, 0, n_forward);
    double        sum     = 0;
    int64_t       n = 0, hits = 0;
    batch         b;
    for (int64_t first = 0; first < end; first += stride * n_seq) {
        read_in_order(*val_set, first, stride, end, n_seq, b);
        if (b.n_labels == 0) {
            continue;
        }
        sum += (double) run(&forward, b, 1.0f / (float) b.n_labels, 0.0f) * (double) b.n_labels;
        n += b.n_labels;
        hits += is_vision() ? count_hits(b) : 0;
    }
    return { sum / (double) n, is_vision() ? (double) hits / (double) n : NAN, n };
}

memory_plan session::memory(size_t corpus_bytes) const {
    memory_plan m;
    m.weights   = w.bytes_weights();
    m.gradients = w.bytes_gradients();
    m.moments   = w.bytes_moments();
    m.compute   = place->bytes();
    m.inputs    = ggml_backend_buffer_get_size(buf_inputs) + opt->bytes();
    m.work      = be.work_bytes(graph);
    m.base      = base ? base->file.file_size : 0;
    m.corpus    = corpus_bytes;
    m.runtime   = ggml_used_mem(ctx_graph) + 6500 * 1000;
    return m;
}

}   // namespace toy
