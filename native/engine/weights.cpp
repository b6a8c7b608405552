#include "weights.h"

#include "backend.h"
#include "error.h"
#include "ggml-alloc.h"
#include "gguf-file.h"
#include "rng.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <sstream>
#include <thread>

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

void weights::add(const std::string & name, ggml_tensor * w, init start) {
    param p;
    p.name      = name;
    p.start     = start;
    p.decay     = ggml_n_dims(w) > 1;
    p.embedding = name == "token_embd.weight" || name == "position_embd.weight";
    p.w         = w;
    ggml_set_name(w, name.c_str());
    params.push_back(p);
}

void weights::add_matrix(const std::string & name, int64_t ne0, int64_t ne1, init start) {
    add(name, ggml_new_tensor_2d(ctx[0], GGML_TYPE_F32, ne0, ne1), start);
    params.back().decay = true;   // also where one side is 1
}

void weights::add_vector(const std::string & name, int64_t ne0, init start) {
    add(name, ggml_new_tensor_1d(ctx[0], GGML_TYPE_F32, ne0), start);
}

void weights::join(const std::string & name, const std::vector<std::string> & parts) {
    joints.push_back({ name, parts });
}

void weights::join_none() {
    joints.clear();
}

tensor_lookup weights::lookup() const {
    return [this](const std::string & name) -> ggml_tensor * {
        for (const std::vector<param> * all : { &params, &trained }) {
            for (const param & p : *all) {
                if (p.name == name) {
                    return p.w;
                }
            }
        }
        return nullptr;
    };
}

// * is any text, ? is one character
static bool fits(const char * pattern, const char * name) {
    if (*pattern == '*') {
        return fits(pattern + 1, name) || (*name && fits(pattern, name + 1));
    }
    if (!*pattern || !*name) {
        return *pattern == *name;
    }
    return (*pattern == '?' || *pattern == *name) && fits(pattern + 1, name + 1);
}

void weights::freeze(const std::string & patterns) {
    std::istringstream in(patterns);
    for (std::string pattern; std::getline(in, pattern, ',');) {
        bool any = false;
        for (param & p : params) {
            if (fits(pattern.c_str(), p.name.c_str())) {
                p.frozen = any = true;
            }
        }
        if (!any) {
            throw error("bad_config", EXIT_BAD_INPUT, "train.freeze: no tensor fits '" + pattern + "'",
                        "tensors are named like blk.0.attn_q.weight; blk.0.* is the first block");
        }
    }
    if (std::all_of(params.begin(), params.end(), [](const param & p) { return p.frozen; })) {
        throw error("bad_config", EXIT_BAD_INPUT, "train.freeze = " + patterns + " leaves nothing to train", "freeze fewer tensors");
    }
}

void weights::alloc(ggml_backend_t backend) {
    for (param & p : params) {
        if (p.frozen) {
            continue;
        }
        p.g = ggml_dup_tensor(ctx[1], p.w);
        p.m = ggml_dup_tensor(ctx[2], p.w);
        ggml_format_name(p.g, "grad:%s", p.name.c_str());
        ggml_set_param(p.w);
    }
    for (param & p : params) {
        p.v = p.frozen ? nullptr : ggml_dup_tensor(ctx[2], p.w);
    }
    for (int i = 0; i < 3; i++) {
        buf[i] = ggml_backend_alloc_ctx_tensors(ctx[i], backend);
        if (!buf[i]) {
            throw error("oom", EXIT_FAILED,
                        format("cannot allocate %s for %lld parameters: %.2f GiB",
                               i == 0   ? "weights"
                               : i == 1 ? "gradients"
                                        : "moments",
                               (long long) n_params(i == 0), (double) n_params(i == 0) * sizeof(float) * (i == 2 ? 2 : 1) / (1 << 30)),
                        "lower model.n_layer, model.n_embd or model.vocab_size; `--dry-run` says what is needed");
        }
        use_huge_pages(buf[i]);
    }
    ggml_backend_buffer_set_usage(buf[0], GGML_BACKEND_BUFFER_USAGE_WEIGHTS);   // no graph writes them: see placement
    join_gradients();
    for (size_t i = 0; i < params.size(); i++) {
        const auto j = std::find_if(joints.begin(), joints.end(), [&](const joint & x) { return x.parts.front() == params[i].name; });
        if (j != joints.end() && can_join(*j, i)) {
            trained.push_back(joined(*j, i));
            i += j->parts.size() - 1;
        } else if (!params[i].frozen) {
            trained.push_back(params[i]);
        }
    }
}

bool weights::can_join(const joint & j, size_t first) const {
    const auto follows = [](const ggml_tensor * a, const ggml_tensor * b) {
        return a->buffer == b->buffer && (const char *) b->data == (const char *) a->data + ggml_nbytes(a) && a->ne[0] == b->ne[0];
    };
    for (size_t k = 0; k < j.parts.size(); k++) {
        if (first + k >= params.size() || params[first + k].name != j.parts[k] || params[first + k].frozen) {
            return false;
        }
        const param &b = params[first + k], &a = params[first + k - (k > 0)];
        if (k > 0 && !(follows(a.w, b.w) && follows(a.g, b.g) && follows(a.m, b.m) && follows(a.v, b.v) && a.decay == b.decay)) {
            return false;
        }
    }
    return true;
}

// The same memory once more, as one parameter.
param weights::joined(const joint & j, size_t first) {
    param   whole = params[first];
    int64_t rows  = 0;
    for (size_t k = 0; k < j.parts.size(); k++) {
        rows += params[first + k].w->ne[1];
    }
    const auto over = [&](ggml_context * c, const ggml_tensor * part) {
        ggml_tensor * t = ggml_new_tensor_2d(c, GGML_TYPE_F32, part->ne[0], rows);
        ggml_backend_tensor_alloc(part->buffer, t, part->data);
        return t;
    };
    whole.name = j.name;
    whole.w    = over(ctx[0], whole.w);
    whole.g    = over(ctx[1], whole.g);
    whole.m    = over(ctx[2], whole.m);
    whole.v    = over(ctx[2], whole.v);
    ggml_set_name(whole.w, j.name.c_str());
    ggml_format_name(whole.g, "grad:%s", j.name.c_str());
    ggml_set_param(whole.w);
    return whole;
}

// They lie one after the other in their buffer. The few bytes between two of them become zeros, and stay so.
void weights::join_gradients() {
    ggml_tensor *                          first = ggml_get_first_tensor(ctx[1]);
    std::vector<std::pair<size_t, size_t>> gaps;   // from, to
    size_t                                 end = 0;
    for (ggml_tensor * g = first; g; g = ggml_get_next_tensor(ctx[1], g)) {
        const size_t at = (size_t) ((char *) g->data - (char *) first->data);
        if (g->buffer != first->buffer) {
            throw error("oom", EXIT_FAILED, format("the device has no buffer for gradients of %lld parameters", (long long) n_params(false)),
                        "lower model.n_layer, model.n_embd or model.vocab_size");
        }
        GGML_ASSERT(at >= end);
        gaps.emplace_back(end, at);
        end = at + ggml_nbytes(g);
    }
    gradients = ggml_new_tensor_1d(ctx[1], GGML_TYPE_F32, (int64_t) (end / sizeof(float)));
    ggml_backend_tensor_alloc(buf[1], gradients, first->data);
    for (const auto & gap : gaps) {
        ggml_backend_tensor_memset(gradients, 0, gap.first, gap.second - gap.first);
    }
}

void weights::start(uint64_t seed, int n_threads, const std::function<bool(const std::string &)> & drawn) {
    constexpr size_t CHUNK = 1 << 16;   // small, so that starting needs no memory of a tensor's size
    struct piece {
        const param * p;
        size_t        at, n;
    };
    std::vector<piece> pieces;
    for (const param & p : params) {
        const size_t n = drawn(p.name) ? ggml_nelements(p.w) : 0;
        for (size_t at = 0; at < n; at += CHUNK) {
            pieces.push_back({ &p, at, std::min(CHUNK, n - at) });
        }
    }
    // a number is a hash of its place, whichever thread draws it
    std::atomic<size_t> next{ 0 };
    const auto          draw = [&]() {
        std::vector<float> chunk(CHUNK);
        for (size_t i = next++; i < pieces.size(); i = next++) {
            const piece & x = pieces[i];
            const init    s = x.p->start;
            const rng     r(seed, "init." + x.p->name);
            for (size_t k = 0; k < x.n; k++) {
                chunk[k] = s.kind == init::NORMAL    ? s.value * r.normal(x.at + k)
                           : s.kind == init::UNIFORM ? (float) (s.value * (2 * r.uniform(x.at + k) - 1))
                                                     : s.value;
            }
            ggml_backend_tensor_set(x.p->w, chunk.data(), x.at * sizeof(float), x.n * sizeof(float));
        }
    };
    std::vector<std::thread> threads;
    for (int i = 1; i < std::min<int>(n_threads, (int) pieces.size()); i++) {
        threads.emplace_back(draw);
    }
    draw();
    for (std::thread & t : threads) {
        t.join();
    }
    ggml_backend_buffer_clear(buf[2], 0);
}

int64_t weights::n_params(bool with_frozen) const {
    int64_t n = 0;
    for (const param & p : params) {
        n += with_frozen || !p.frozen ? ggml_nelements(p.w) : 0;
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

void copy_from_gguf(weights & w, const gguf_file & donor, const std::function<bool(const std::string &)> & wanted) {
    FILE * f = fopen(donor.path.c_str(), "rb");
    if (!f) {
        throw error("missing_file", EXIT_BAD_INPUT, format("cannot open %s: %s", donor.path.c_str(), strerror(errno)), "check that you may read it");
    }
    const std::unique_ptr<FILE, int (*)(FILE *)> closer(f, fclose);
    std::vector<uint8_t>                         raw;
    std::vector<float>                           row;
    for (const param & p : w.params) {
        if (!wanted(p.name)) {
            continue;
        }
        const ggml_tensor * t       = donor.tensor(p.name);
        // a longer table of positions is used from its beginning
        const bool          shorter = t && p.name == "position_embd.weight" && t->ne[0] == p.w->ne[0] && t->ne[1] > p.w->ne[1];
        if (!t || (!ggml_are_same_shape(t, p.w) && !shorter)) {
            throw error("bad_file", EXIT_BAD_INPUT,
                        t ? format("%s: %s is %lld x %lld, and this model's is %lld x %lld", donor.path.c_str(), p.name.c_str(), (long long) t->ne[0],
                                   (long long) t->ne[1], (long long) p.w->ne[0], (long long) p.w->ne[1])
                          : donor.path + " has no tensor " + p.name,
                        "leave the model's shape to the donor, or choose --init embeddings or scratch");
        }
        const ggml_to_float_t to_float = ggml_get_type_traits(t->type)->to_float;
        if (t->type != GGML_TYPE_F32 && !to_float) {
            throw error("bad_file", EXIT_BAD_INPUT,
                        format("%s: %s is of the type %s, which is no weight", donor.path.c_str(), t->name, ggml_type_name(t->type)), "name a model");
        }
        const size_t row_bytes = ggml_row_size(t->type, t->ne[0]);
        raw.resize(row_bytes);
        row.resize(t->ne[0]);
        fseek(f, (long) donor.tensor_offset(p.name), SEEK_SET);
        for (int64_t i = 0; i < ggml_nrows(p.w); i++) {
            if (fread(raw.data(), 1, row_bytes, f) != row_bytes) {
                throw error("bad_file", EXIT_BAD_INPUT, format("cannot read %s: %s", donor.path.c_str(), strerror(errno)),
                            "copy or download it again");
            }
            if (t->type == GGML_TYPE_F32) {
                memcpy(row.data(), raw.data(), row_bytes);
            } else {
                to_float(raw.data(), row.data(), t->ne[0]);
            }
            ggml_backend_tensor_set(p.w, row.data(), i * row.size() * sizeof(float), row.size() * sizeof(float));
        }
    }
}

}   // namespace toy
