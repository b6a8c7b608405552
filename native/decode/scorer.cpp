#include "scorer.h"

#include "engine/device.h"
#include "engine/error.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <thread>

namespace toy {

static constexpr size_t NODES_A_LAYER = 128;
static constexpr size_t COLUMNS       = 128;   // whose logits are there at a time
static constexpr size_t PADDED_TO     = 16;    // few columns would be computed another way than many, with other bits

scorer::scorer(const std::string & gguf_path, const std::string & adapter_path, int n_threads)
    : model(gguf_path),
      hp(hparams::from_gguf(model.file)),
      family(arch_of(hp.arch)),
      be(DEVICE, n_threads > 0 ? n_threads : usable_cores()),
      memory(be, NODES_A_LAYER * (hp.n_layer + 2)),
      memory_head(be, NODES_A_LAYER) {
    if (!adapter_path.empty()) {
        adapter = std::make_unique<lora_file>(adapter_path, model.file);
        adapter->file.move_to(be.handle);
    }
    model.move_to(be.handle);
    const size_t n_nodes = NODES_A_LAYER * (hp.n_layer + 2);
    graph_mem.resize(n_nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_nodes, false));
    head_mem.resize(NODES_A_LAYER * ggml_tensor_overhead() + ggml_graph_overhead_custom(NODES_A_LAYER, false));
}

void scorer::compute(int T, int B, const std::vector<int32_t> & tokens, const std::vector<float> & patches, bool last_only,
                     const std::vector<int32_t> & columns, const reader & read) {
    if (T > hp.n_ctx && patches.empty() && model.file.tensor("position_embd.weight")) {
        throw error("bad_flag", EXIT_BAD_INPUT, format("%d tokens at once, and %s has %d positions", T, model.file.path.c_str(), hp.n_ctx),
                    "shorten the prompt or lower --context");
    }
    std::unique_ptr<ggml_context, decltype(&ggml_free)> ctx(ggml_init({ graph_mem.size(), graph_mem.data(), /*no_alloc =*/true }), ggml_free);
    ggml_cgraph *                                       gf = ggml_new_graph_custom(ctx.get(), NODES_A_LAYER * (hp.n_layer + 2), false);
    inputs                                              in;
    if (patches.empty()) {
        in.tokens    = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, (int64_t) T * B);
        in.positions = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, T);
    } else {
        in.patches = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, hp.patch_dim(), (int64_t) hp.n_patches() * B);
    }
    in.last_only        = last_only;
    const int64_t seen  = patches.empty() ? T : hp.n_ctx;
    const bool    fused = has_attention(be.handle, hp, seen, B, patches.empty(), /*bf16 =*/false, /*trained =*/false);
    ggml_tensor * mask  = fused || in.patches ? nullptr : ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, T, T);
    for (ggml_tensor * t : { in.tokens, in.positions, in.patches, mask }) {
        if (t) {
            ggml_set_input(t);
        }
    }
    net n   = { ctx.get(), model.lookup(), hp };
    n.lora  = adapter ? &adapter->adapter : nullptr;
    n.f32   = false;   // products of quantised weights as the decoder does them
    n.gf    = gf;
    n.fused = fused;
    n.mask  = mask;

    ggml_tensor * hidden = family.hidden(n, in);
    ggml_set_output(hidden);
    ggml_build_forward_expand(gf, hidden);
    if (!memory.alloc(gf)) {
        throw error("oom", EXIT_FAILED, "out of memory while scoring", LOWER_CONTEXT);
    }
    if (patches.empty()) {
        std::vector<int32_t> positions(T);
        std::iota(positions.begin(), positions.end(), 0);
        ggml_backend_tensor_set(in.tokens, tokens.data(), 0, tokens.size() * sizeof(int32_t));
        ggml_backend_tensor_set(in.positions, positions.data(), 0, positions.size() * sizeof(int32_t));
    } else {
        ggml_backend_tensor_set(in.patches, patches.data(), 0, patches.size() * sizeof(float));
    }
    if (mask) {
        set_causal_mask(mask, 0);
    }
    memory.compute(gf);
    head(hidden, columns, read);
}

void scorer::head(const ggml_tensor * hidden, const std::vector<int32_t> & columns, const reader & read) {
    for (size_t first = 0; first < columns.size(); first += COLUMNS) {
        const size_t         n = std::min(COLUMNS, columns.size() - first);
        std::vector<int32_t> picked(columns.begin() + first, columns.begin() + first + n);
        picked.resize((n + PADDED_TO - 1) / PADDED_TO * PADDED_TO, picked.back());

        std::unique_ptr<ggml_context, decltype(&ggml_free)> ctx(ggml_init({ head_mem.size(), head_mem.data(), /*no_alloc =*/true }), ggml_free);
        ggml_cgraph *                                       gf = ggml_new_graph_custom(ctx.get(), NODES_A_LAYER, false);

        ggml_tensor * all = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, hidden->ne[0], hidden->ne[1]);   // without what it was computed from
        ggml_tensor * ids = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, (int64_t) picked.size());
        ggml_backend_tensor_alloc(hidden->buffer, all, hidden->data);
        ggml_set_input(ids);
        net net_             = { ctx.get(), model.lookup(), hp };
        net_.lora            = adapter ? &adapter->adapter : nullptr;
        net_.f32             = false;
        ggml_tensor * logits = net_.linear(family.head(hp), ggml_get_rows(ctx.get(), all, ids));
        ggml_set_output(logits);
        ggml_build_forward_expand(gf, logits);
        if (!memory_head.alloc(gf)) {
            throw error("oom", EXIT_FAILED, "out of memory while scoring", LOWER_CONTEXT);
        }
        ggml_backend_tensor_set(ids, picked.data(), 0, ggml_nbytes(ids));
        memory_head.compute(gf);
        read(logits, first, n);
    }
}

double nll_of(const float * logits, int64_t n, int32_t label) {
    const double max = *std::max_element(logits, logits + n);
    double       sum = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += std::exp(logits[i] - max);
    }
    return max + std::log(sum) - logits[label];
}

std::vector<scored> scorer::score(const std::vector<sequence> & sequences) {
    const int B = (int) sequences.size();
    size_t    T = 1;
    for (const sequence & s : sequences) {
        T = std::max(T, s.tokens.size());
    }
    std::vector<int32_t> tokens(T * B), labels(T * B, -1);   // what pads the shorter ones comes after them: nothing sees it
    for (int b = 0; b < B; b++) {
        std::copy(sequences[b].tokens.begin(), sequences[b].tokens.end(), tokens.begin() + b * T);
        std::copy(sequences[b].labels.begin(), sequences[b].labels.end(), labels.begin() + b * T);
    }
    for (const std::vector<int32_t> * ids : { &tokens, &labels }) {
        for (const int32_t id : *ids) {
            if (id >= hp.n_vocab || (id < 0 && ids == &tokens)) {
                throw error("bad_file", EXIT_BAD_INPUT, format("the corpus has the id %d, and the model a vocabulary of %d", id, hp.n_vocab),
                            "pack the text with the model's own tokenizer");
            }
        }
    }
    std::vector<int32_t> learned;   // columns with a label
    for (size_t i = 0; i < T * B; i++) {
        if (labels[i] >= 0) {
            learned.push_back((int32_t) i);
        }
    }
    std::vector<double> nll(T * B, 0.0);
    compute((int) T, B, tokens, {}, false, learned, [&](const ggml_tensor * logits, size_t first, size_t n) {
        // each token's own sum is in one thread, so that their number changes nothing
        const int  n_threads = be.is_cpu() ? be.n_threads : 1;
        const auto part      = [&](size_t from) {
            std::vector<float> row(hp.n_vocab);
            for (size_t i = from; i < n; i += n_threads) {
                const int32_t at = learned[first + i];
                ggml_backend_tensor_get(logits, row.data(), i * logits->nb[1], row.size() * sizeof(float));
                nll[at] = nll_of(row.data(), hp.n_vocab, labels[at]);
            }
        };
        std::vector<std::thread> threads;
        for (int t = 1; t < n_threads; t++) {
            threads.emplace_back(part, t);
        }
        part(0);
        for (std::thread & t : threads) {
            t.join();
        }
    });
    std::vector<scored> out(B);
    for (int b = 0; b < B; b++) {
        out[b].cut = sequences[b].cut;
        for (size_t i = b * T; i < (b + 1) * T; i++) {
            out[b].nll += nll[i];
            out[b].n += labels[i] >= 0;
        }
    }
    return out;
}

std::vector<float> scorer::next(const int32_t * tokens, int n) {
    std::vector<float> out(hp.n_vocab);
    compute(n, 1, std::vector<int32_t>(tokens, tokens + n), {}, true, { 0 },
            [&](const ggml_tensor * logits, size_t, size_t) { ggml_backend_tensor_get(logits, out.data(), 0, out.size() * sizeof(float)); });
    return out;
}

void scorer::normalise_as_trained(image_file & images) const {
    const std::string path = images.file.path;
    if ((int) images.n_channel != hp.n_channel || (int) images.height != hp.image_size || (int) images.width != hp.image_size) {
        throw error("bad_file", EXIT_BAD_INPUT,
                    format("%s holds images of %u x %u with %u channels, and the model takes %d x %d with %d", path.c_str(), images.width,
                           images.height, images.n_channel, hp.image_size, hp.image_size, hp.n_channel),
                    "pack the images in the model's size");
    }
    for (const auto & [key, into] : { std::make_pair("toy.vit.image_mean", &images.mean), std::make_pair("toy.vit.image_std", &images.std) }) {
        const int64_t id = gguf_find_key(model.file.gguf, key);
        if (id >= 0 && gguf_get_kv_type(model.file.gguf, id) == GGUF_TYPE_ARRAY && gguf_get_arr_type(model.file.gguf, id) == GGUF_TYPE_FLOAT32 &&
            gguf_get_arr_n(model.file.gguf, id) == images.n_channel) {
            const float * data = (const float *) gguf_get_arr_data(model.file.gguf, id);
            into->assign(data, data + images.n_channel);
        }
    }
}

std::vector<classified> scorer::classify(image_file & images, int64_t first, int64_t end) {
    normalise_as_trained(images);
    const image_set         set(images, first, end, hp.patch_size, 0, 0, false);
    const int64_t           V = hp.n_vocab;
    batch                   b;
    std::vector<classified> out;
    read_in_order(set, 0, 1, end - first, (int) (end - first), b);
    std::vector<int32_t> columns(end - first);
    std::iota(columns.begin(), columns.end(), 0);
    compute(0, (int) (end - first), {}, b.patches, false, columns, [&](const ggml_tensor * logits, size_t at, size_t n) {
        for (size_t i = 0; i < n; i++) {
            const int32_t label = b.labels[at + i] < V ? b.labels[at + i] : -1;
            out.push_back({ label, NAN, std::vector<float>(V) });
            ggml_backend_tensor_get(logits, out.back().logits.data(), i * logits->nb[1], V * sizeof(float));
            if (label >= 0) {
                out.back().nll = nll_of(out.back().logits.data(), V, label);
            }
        }
    });
    return out;
}

//
// what is scored
//

int64_t window_plan::n_windows() const {
    const int64_t labels = n_tokens - 1, S = stride > 0 ? stride : context;
    return labels < 1 ? 0 : 1 + std::max<int64_t>(0, labels - context + S - 1) / S;
}

sequence window_plan::window(const int32_t * tokens, int64_t i) const {
    const int64_t T = context, S = stride > 0 ? stride : context;
    const int64_t end   = std::min(T + i * S, n_tokens - 1);   // labels up to tokens[end]
    const int64_t from  = i == 0 ? 0 : T + (i - 1) * S;        // labels behind tokens[from] are scored
    const int64_t start = S == T ? from : std::max<int64_t>(0, end - T);
    sequence      out   = { std::vector<int32_t>(tokens + start, tokens + end), std::vector<int32_t>(end - start, -1) };
    std::copy(tokens + from + 1, tokens + end + 1, out.labels.begin() + (from - start));
    return out;
}

example_files::example_files(const std::string & tokens_path, const std::string & offsets_path, const std::string & mask_path)
    : tokens(tokens_path),
      offsets(offsets_path, "offsets of the examples"),
      mask(mask_path, "mask of the examples"),
      n((int64_t) (offsets.bytes / sizeof(int64_t)) - 1) {
    const int64_t * at = (const int64_t *) offsets.data;
    if (n < 1 || offsets.bytes % sizeof(int64_t) != 0 || mask.bytes != tokens.n || at[0] != 0 || at[n] != (int64_t) tokens.n ||
        !std::is_sorted(at, at + n + 1)) {
        throw error("bad_file", EXIT_BAD_INPUT, offsets.path + " does not fit its tokens and mask", "pack the examples again");
    }
}

sequence example_files::example(int64_t i, int context, bool keep_end) const {
    const int64_t * at    = (const int64_t *) offsets.data;
    const uint8_t * known = (const uint8_t *) mask.data;
    const int64_t   n     = std::min<int64_t>(at[i + 1] - 1 - at[i], context);
    const int64_t   start = keep_end ? at[i + 1] - 1 - n : at[i], end = start + n;
    sequence        out;
    out.cut = at[i + 1] - 1 - at[i] > context;
    for (int64_t k = start; k < end; k++) {
        out.tokens.push_back(tokens.tokens[k]);
        out.labels.push_back(known[k + 1] ? tokens.tokens[k + 1] : -1);
    }
    return out;
}

}   // namespace toy
