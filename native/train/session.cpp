#include "session.h"

#include "archs/lora.h"
#include "engine/error.h"

#include <algorithm>
#include <cmath>

namespace toy {

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
    graph = std::make_unique<step_graph>(cfg, be, hp, model, w, base.get());
    opt   = std::make_unique<adamw>(cfg, w, be);
}

void session::declare() {
    if (base) {
        declare_lora(cfg, hp, base->file, w);
    } else {
        model.declare(hp, cfg.model.init_std, w);
    }
    w.freeze(cfg.train.freeze);
    if (cfg.run.device != "cpu") {
        w.join_none();   // what follows a joined product is fused there, with operations that other devices lack
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
        sum += graph->round(last_batch, loss_scale, i == 0, i == n_rounds - 1);
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
        r.grad_norm = opt->grad_norm(graph->squares, &bad);
    }
    if (!std::isfinite(r.loss) || !std::isfinite(r.grad_norm)) {
        r.bad_tensor = graph->find_bad_tensor();
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
    double        sum = 0;
    int64_t       n = 0, hits = 0;
    batch         b;
    for (int64_t first = 0; first < end; first += stride * n_seq) {
        read_in_order(*val_set, first, stride, end, n_seq, b);
        if (b.n_labels == 0) {
            continue;
        }
        sum += (double) graph->forward(b, 1.0f / (float) b.n_labels) * (double) b.n_labels;
        n += b.n_labels;
        hits += is_vision() ? graph->count_hits(b) : 0;
    }
    return { sum / (double) n, is_vision() ? (double) hits / (double) n : NAN, n };
}

memory_plan session::memory(size_t corpus_bytes) const {
    memory_plan m;
    m.weights   = w.bytes_weights();
    m.gradients = w.bytes_gradients();
    m.moments   = w.bytes_moments();
    m.compute   = graph->bytes();
    m.inputs    = graph->bytes_inputs() + opt->bytes();
    m.work      = graph->bytes_work();
    m.base      = base ? base->file.file_size : 0;
    m.corpus    = corpus_bytes;
    m.runtime   = graph->bytes_nodes() + 6500 * 1000;
    return m;
}

}   // namespace toy
