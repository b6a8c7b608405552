#include "decoder.h"

#include "engine/device.h"
#include "engine/error.h"
#include "engine/rng.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace toy {

static constexpr int    PREFILL_BATCH = 512;
static constexpr int    SLOTS_STEP = 256;   // of what a device's graph reads: a new graph for each so many tokens. ggml-cuda's attention wants them
static constexpr size_t NODES_A_LAYER = 128;

decoder::decoder(std::unique_ptr<model_file> model_, int n_ctx, int n_threads, const std::string & adapter)
    : model(std::move(model_)),
      hp(hparams::from_gguf(model->file)),
      family(arch_of(hp.arch)),
      lora(adapter.empty() ? nullptr : std::make_unique<lora_file>(adapter, model->file)),
      be(DEVICE, n_threads),
      memory(be, NODES_A_LAYER * (hp.n_layer + 2)) {
    const std::string & path = model->file.path;
    if (hp.arch == "vit") {
        throw error("bad_flag", EXIT_BAD_INPUT, path + " classifies images: it makes no text", "give images with --image");
    }
    if (hp.arch == "gpt2" && n_ctx > hp.n_ctx) {
        throw error("bad_flag", EXIT_BAD_INPUT, format("%s has %d positions, fewer than %d", path.c_str(), hp.n_ctx, n_ctx), "lower --context");
    }
    model->move_to(be.handle);
    if (lora) {
        lora->file.move_to(be.handle);
    }
    cache.n_ctx           = n_ctx > 0 ? n_ctx : hp.n_ctx;
    const int64_t   n_kv  = (int64_t) hp.head_dim * hp.n_head_kv;
    const int64_t   slots = be.is_cpu() ? cache.n_ctx : GGML_PAD(cache.n_ctx, SLOTS_STEP);
    const ggml_type type  = !be.is_cpu() && has_flash_attention(be.handle, hp, 1, SLOTS_STEP) ? GGML_TYPE_F16 : GGML_TYPE_F32;
    ctx_cache             = ggml_init({ /*mem_size =*/2 * hp.n_layer * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true });
    for (int il = 0; il < hp.n_layer; il++) {
        cache.k.push_back(ggml_new_tensor_2d(ctx_cache, type, n_kv, slots));
        cache.v.push_back(ggml_new_tensor_2d(ctx_cache, type, n_kv, slots));
    }
    buf_cache = ggml_backend_alloc_ctx_tensors(ctx_cache, be.handle);
    if (!buf_cache) {
        ggml_free(ctx_cache);
        throw error("oom", EXIT_FAILED, format("cannot allocate a KV cache for %d tokens", cache.n_ctx), "lower --context");
    }
    if (!be.is_cpu()) {
        ggml_backend_buffer_clear(buf_cache, 0);   // what is masked is read, too
    }
    const size_t graph_size = NODES_A_LAYER * (hp.n_layer + 2);
    graph_mem.resize(graph_size * ggml_tensor_overhead() + ggml_graph_overhead_custom(graph_size, false));
}

decoder::~decoder() {
    ggml_free(ctx_graph);
    ggml_backend_buffer_free(buf_cache);
    ggml_free(ctx_cache);
}

void decoder::build(int n) {
    n_built = 0;
    ggml_free(ctx_graph);
    ctx_graph    = ggml_init({ graph_mem.size(), graph_mem.data(), /*no_alloc =*/true });
    graph        = ggml_new_graph_custom(ctx_graph, NODES_A_LAYER * (hp.n_layer + 2), false);
    in_tokens    = ggml_new_tensor_1d(ctx_graph, GGML_TYPE_I32, n);
    in_positions = ggml_new_tensor_1d(ctx_graph, GGML_TYPE_I32, n);
    in_mask      = nullptr;
    cache.slots  = nullptr;
    bool fused   = true;
    if (!be.is_cpu()) {
        cache.slots      = ggml_new_tensor_1d(ctx_graph, GGML_TYPE_I64, n);
        cache.n_read     = GGML_PAD(cache.n_past + n, SLOTS_STEP);
        const bool flash = cache.k[0]->type == GGML_TYPE_F16 && has_flash_attention(be.handle, hp, n, cache.n_read);
        fused            = !flash && cache.n_past == 0 && has_attention(be.handle, hp, n, 1, /*causal =*/true, /*bf16 =*/false, /*trained =*/false);
        in_mask          = fused ? nullptr : ggml_new_tensor_2d(ctx_graph, flash ? GGML_TYPE_F16 : GGML_TYPE_F32, cache.n_read, n);
    }
    for (ggml_tensor * t : { in_tokens, in_positions, in_mask, cache.slots }) {
        if (t) {
            ggml_set_input(t);
        }
    }
    const inputs in = { in_tokens, in_positions, nullptr, /*last_only =*/true };
    net          n_ = { ctx_graph, model->lookup(), hp, lora ? &lora->adapter : nullptr, /*f32 =*/false, &cache, graph };
    n_.fused        = fused;
    n_.mask         = in_mask;
    cache.begin_graph();
    out = family.forward(n_, in);
    ggml_set_output(out);
    ggml_build_forward_expand(graph, out);
    if (!memory.alloc(graph)) {
        throw error("oom", EXIT_FAILED, "out of memory while decoding", LOWER_CONTEXT);
    }
    n_built = n;
}

void decoder::eval_batch(const int32_t * tokens, int n) {
    const bool again = n == n_built && (be.is_cpu() || (in_mask && cache.n_past + n <= cache.n_read));
    if (!again) {
        build(n);
    } else if (be.is_cpu()) {
        cache.move_graph(n);
    }
    std::vector<int32_t> positions(n);
    std::iota(positions.begin(), positions.end(), cache.n_past);
    ggml_backend_tensor_set(in_tokens, tokens, 0, n * sizeof(int32_t));
    ggml_backend_tensor_set(in_positions, positions.data(), 0, n * sizeof(int32_t));
    if (cache.slots) {
        const std::vector<int64_t> slots(positions.begin(), positions.end());
        ggml_backend_tensor_set(cache.slots, slots.data(), 0, n * sizeof(int64_t));
    }
    if (in_mask) {
        set_causal_mask(in_mask, cache.n_past);
    }
    memory.compute(graph);
    logits.resize(hp.n_vocab);
    ggml_backend_tensor_get(out, logits.data(), 0, logits.size() * sizeof(float));
    cache.n_past += n;
}

const std::vector<float> & decoder::eval(const int32_t * tokens, int n) {
    if (n < 1 || cache.n_past + n > cache.n_ctx) {
        throw error("bad_flag", EXIT_BAD_INPUT, format("%d tokens after %d do not fit into a context of %d", n, cache.n_past, cache.n_ctx),
                    "shorten the prompt or raise --context");
    }
    for (int at = 0; at < n; at += PREFILL_BATCH) {
        eval_batch(tokens + at, std::min(PREFILL_BATCH, n - at));
    }
    return logits;
}

static void sort_best_first(std::vector<int32_t> & ids, const std::vector<float> & logits, size_t k) {
    k = std::min(k, ids.size());
    std::partial_sort(ids.begin(), ids.begin() + k, ids.end(),
                      [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
    ids.resize(k);
}

std::vector<candidate> top_logprobs(const std::vector<float> & logits, int k) {
    std::vector<int32_t> ids(logits.size());
    std::iota(ids.begin(), ids.end(), 0);
    sort_best_first(ids, logits, k);
    const double max = *std::max_element(logits.begin(), logits.end());
    double       sum = 0;
    for (const float l : logits) {
        sum += std::exp(l - max);
    }
    std::vector<candidate> out;
    for (const int32_t id : ids) {
        out.push_back({ id, (float) (logits[id] - max - std::log(sum)) });
    }
    return out;
}

int32_t sampler::sample(const std::vector<float> & logits) {
    if (temperature <= 0) {
        return (int32_t) (std::max_element(logits.begin(), logits.end()) - logits.begin());
    }
    std::vector<int32_t> ids(logits.size());
    std::iota(ids.begin(), ids.end(), 0);
    sort_best_first(ids, logits, top_k > 0 ? top_k : logits.size());

    std::vector<double> p(ids.size());
    double              sum = 0;
    for (size_t i = 0; i < ids.size(); i++) {
        p[i] = std::exp((logits[ids[i]] - logits[ids[0]]) / temperature);
        sum += p[i];
    }
    if (top_p < 1.0f) {   // the smallest set of the most likely that holds top_p of the mass
        double mass = 0;
        size_t n    = 0;
        while (n < p.size() && mass < top_p * sum) {
            mass += p[n++];
        }
        p.resize(std::max<size_t>(n, 1));
        sum = std::accumulate(p.begin(), p.end(), 0.0);
    }
    double u = rng(seed, "sample").uniform(n_drawn++) * sum;
    for (size_t i = 0; i < p.size(); i++) {
        u -= p[i];
        if (u <= 0) {
            return ids[i];
        }
    }
    return ids[p.size() - 1];
}

}   // namespace toy
