#include "weights.h"

#include "error.h"
#include "ggml-alloc.h"
#include "rng.h"

#include <algorithm>

namespace toy {

weights::weights() {
    for (ggml_context *& c : ctx) {
        c = ggml_init({ /*mem_size =*/65536 * ggml_tensor_overhead(), /*mem_buffer =*/nullptr, /*no_alloc =*/true });
    }
}

weights::~weights() {
    for (int i = 0; i < 3; i++) {
        ggml_backend_buffer_free(buf[i]);
        ggml_free(ctx[i]);
    }
}

ggml_tensor * weights::add(const std::string & name, int64_t ne0, int64_t ne1, float init_std) {
    const bool vector = ne1 == 0;
    param      p;
    p.name     = name;
    p.init_std = init_std;
    p.decay    = !vector;
    p.w        = vector ? ggml_new_tensor_1d(ctx[0], GGML_TYPE_F32, ne0) : ggml_new_tensor_2d(ctx[0], GGML_TYPE_F32, ne0, ne1);
    p.g        = ggml_dup_tensor(ctx[1], p.w);
    p.m        = ggml_dup_tensor(ctx[2], p.w);
    p.v        = ggml_dup_tensor(ctx[2], p.w);
    ggml_set_name(p.w, name.c_str());
    ggml_format_name(p.g, "grad:%s", name.c_str());
    ggml_set_param(p.w);
    params.push_back(p);
    return p.w;
}

tensor_lookup weights::lookup() const {
    return [this](const std::string & name) -> ggml_tensor * {
        for (const param & p : params) {
            if (p.name == name) {
                return p.w;
            }
        }
        return nullptr;
    };
}

void weights::alloc(ggml_backend_t backend) {
    for (int i = 0; i < 3; i++) {
        buf[i] = ggml_backend_alloc_ctx_tensors(ctx[i], backend);
        if (!buf[i]) {
            throw error("oom", EXIT_FAILED,
                        format("cannot allocate %s for %lld parameters",
                               i == 0   ? "weights"
                               : i == 1 ? "gradients"
                                        : "moments",
                               (long long) n_params()),
                        "lower model.n_layer, model.n_embd or model.vocab_size; `--dry-run` says what is needed");
        }
    }
}

void weights::init(uint64_t seed) {
    std::vector<float> chunk(1 << 16);   // small, so that starting needs no memory of a tensor's size
    for (const param & p : params) {
        const rng    r(seed, "init." + p.name);
        const size_t n = ggml_nelements(p.w);
        for (size_t at = 0; at < n; at += chunk.size()) {
            const size_t len = std::min(chunk.size(), n - at);
            for (size_t i = 0; i < len; i++) {
                chunk[i] = p.init_std == 0 ? 1.0f : p.init_std * r.normal(at + i);
            }
            ggml_backend_tensor_set(p.w, chunk.data(), at * sizeof(float), len * sizeof(float));
        }
    }
    ggml_backend_buffer_clear(buf[2], 0);
}

void weights::zero_gradients() {
    ggml_backend_buffer_clear(buf[1], 0);
}

int64_t weights::n_params() const {
    int64_t n = 0;
    for (const param & p : params) {
        n += ggml_nelements(p.w);
    }
    return n;
}

size_t weights::bytes_weights() const {
    return ggml_backend_buffer_get_size(buf[0]);
}
size_t weights::bytes_gradients() const {
    return ggml_backend_buffer_get_size(buf[1]);
}
size_t weights::bytes_moments() const {
    return ggml_backend_buffer_get_size(buf[2]);
}

uint64_t weights::names_hash() const {
    uint64_t h = 0;
    for (const param & p : params) {
        h = hash_bytes(p.name.data(), p.name.size(), h);
        h = hash_bytes(p.w->ne, sizeof(p.w->ne), h);
    }
    return h;
}

}   // namespace toy
