#include "convert.h"

#include "error.h"
#include "files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <thread>

namespace toy {

static bool ends_with(const std::string & s, const char * end) {
    const size_t n = strlen(end);
    return s.size() >= n && s.compare(s.size() - n, n, end) == 0;
}

static bool contains(const std::string & s, const char * part) {
    return s.find(part) != std::string::npos;
}

// whether its values can be read as f32; indices and the like cannot
static bool is_real(ggml_type type) {
    return type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float;
}

//
// file types
//

static const std::vector<file_type> FILE_TYPES = {
    { "f32", GGML_TYPE_F32, 0 },      { "f16", GGML_TYPE_F16, 1 },      { "bf16", GGML_TYPE_BF16, 32 },   { "q8_0", GGML_TYPE_Q8_0, 7 },
    { "q4_0", GGML_TYPE_Q4_0, 2 },    { "q4_1", GGML_TYPE_Q4_1, 3 },    { "q5_0", GGML_TYPE_Q5_0, 8 },    { "q5_1", GGML_TYPE_Q5_1, 9 },
    { "q4_k_s", GGML_TYPE_Q4_K, 14 }, { "q4_k_m", GGML_TYPE_Q4_K, 15 }, { "q5_k_s", GGML_TYPE_Q5_K, 16 }, { "q5_k_m", GGML_TYPE_Q5_K, 17 },
    { "q6_k", GGML_TYPE_Q6_K, 18 },
};

std::vector<std::string> file_type::names() {
    std::vector<std::string> out;
    for (const file_type & t : FILE_TYPES) {
        out.push_back(t.name);
    }
    return out;
}

const file_type & file_type::of(const std::string & name) {
    std::string wanted = name;
    for (char & c : wanted) {
        c = tolower(c);
    }
    if (wanted == "q4_k" || wanted == "q5_k") {
        wanted += "_m";   // what llama.cpp means by the short name
    }
    for (const file_type & t : FILE_TYPES) {
        if (t.name == wanted) {
            return t;
        }
    }
    std::string all;
    for (const file_type & t : FILE_TYPES) {
        all += (all.empty() ? "" : ", ") + t.name;
    }
    throw error("bad_flag", EXIT_BAD_INPUT, "no tensor type " + name, "choose one of " + all);
}

// The layers where a little more precision pays: the first and last eighth, and every third between (llama.cpp).
static bool use_more_bits(int layer, int n_layer) {
    return layer < n_layer / 8 || layer >= 7 * n_layer / 8 || (layer - n_layer / 8) % 3 == 2;
}

// rows that are no whole number of blocks
static ggml_type fitting(ggml_type type, int64_t n_per_row) {
    if (n_per_row % ggml_blck_size(type) == 0) {
        return type;
    }
    const ggml_type other = type == GGML_TYPE_Q4_K ? GGML_TYPE_Q5_0 : type == GGML_TYPE_Q5_K ? GGML_TYPE_Q5_1 : GGML_TYPE_Q8_0;
    return n_per_row % ggml_blck_size(other) == 0 && ggml_blck_size(type) == 256 ? other : GGML_TYPE_F16;
}

ggml_type file_type::choose(const std::string & tensor, ggml_type from, const int64_t * ne, int n_layer, bool tied) const {
    if (!is_real(from)) {
        return from;
    }
    const bool matrix = ends_with(tensor, "weight") && ne[1] * ne[2] * ne[3] > 1;
    for (const char * part : { "_norm", "position_embd", "token_types", "cls_embd", "ffn_gate_inp", "conv1d", "shortconv" }) {
        if (contains(tensor, part)) {
            return GGML_TYPE_F32;
        }
    }
    if (!matrix) {
        return GGML_TYPE_F32;
    }
    ggml_type to = type;
    if (!ggml_is_quantized(to)) {
        return to;
    }
    int  layer = -1;
    bool mix = name == "q4_k_m" || name == "q5_k_m", small = name == "q4_k_s";
    sscanf(tensor.c_str(), "blk.%d.", &layer);
    if (tensor == "output.weight" || (tied && tensor == "token_embd.weight")) {
        to = ne[0] % ggml_blck_size(to) != 0 ? GGML_TYPE_Q8_0 : to == GGML_TYPE_Q8_0 ? to : GGML_TYPE_Q6_K;
    } else if (contains(tensor, "attn_v.weight")) {
        to = mix && use_more_bits(layer, n_layer) ? GGML_TYPE_Q6_K : small && layer < 4 ? GGML_TYPE_Q5_K : to;
    } else if (contains(tensor, "attn_qkv.weight")) {
        to = name == "q4_k_m" ? GGML_TYPE_Q5_K : name == "q5_k_m" ? GGML_TYPE_Q6_K : to;
    } else if (contains(tensor, "ffn_down.weight")) {
        to = mix && use_more_bits(layer, n_layer) ? GGML_TYPE_Q6_K : small && layer < n_layer / 8 ? GGML_TYPE_Q5_K : to;
    }
    return fitting(to, ne[0]);
}

//
// rows
//

tensor_rows tensor_rows::of(const ggml_tensor * tensor) {
    tensor_rows t;
    t.name = tensor->name;
    t.type = tensor->type;
    t.data = (const uint8_t *) tensor->data;
    std::copy(tensor->ne, tensor->ne + GGML_MAX_DIMS, t.ne);
    return t;
}

// rows of a head: pair i is (2 i, 2 i + 1) in GGUF's llama, and (i, D/2 + i) at Hugging Face
int64_t tensor_rows::source_row(int64_t row) const {
    if (order != row_order::split && order != row_order::paired) {
        return row;
    }
    const int64_t D = n_rows() / n_head, head = row / D, at = row % D;
    return head * D + (order == row_order::split ? at % (D / 2) * 2 + at / (D / 2) : at % 2 * (D / 2) + at / 2);
}

void tensor_rows::read(int64_t first, int64_t n, float * out) const {
    const size_t row_size = ggml_row_size(type, ne[0]);
    for (int64_t i = 0; i < n; i++, out += ne[0]) {
        const int64_t   row  = source_row(first + i);
        const uint8_t * from = data + row * row_size;
        if (type == GGML_TYPE_F32) {
            memcpy(out, from, row_size);
        } else {
            ggml_get_type_traits(type)->to_float(from, out, ne[0]);
        }
        for (int64_t k = 0; delta && k < delta->rank; k++) {
            const float   s = delta->scale * delta->b[row * delta->rank + k];
            const float * a = &delta->a[k * ne[0]];
            for (int64_t j = 0; j < ne[0]; j++) {
                out[j] += s * a[j];
            }
        }
    }
}

enum class fit { yes, not_finite, too_large };

// bf16 and f32 hold what any float holds; f16, and the f16 scales of quantised blocks, end at 65504
static fit holds(ggml_type to, const float * x, int64_t n) {
    float largest = 0, poison = 0;
    for (int64_t i = 0; i < n; i++) {
        const float a = std::fabs(x[i]);
        largest       = a > largest ? a : largest;
        poison += x[i] * 0.0f;   // stays 0 until an inf or a nan comes
    }
    return !(poison == 0.0f) ? fit::not_finite : to != GGML_TYPE_F32 && to != GGML_TYPE_BF16 && largest > 65504.0f ? fit::too_large : fit::yes;
}

static const int64_t CHUNK = 1 << 21;   // floats read at once
static const int64_t BATCH = 16;        // rows written at once

void tensor_rows::write(ggml_type to, int n_threads, const put_bytes & put) const {
    if (order == row_order::transposed) {
        return write_transposed(to, n_threads, put);
    }
    if (ne[0] * n_rows() == 0) {
        return;
    }
    const int64_t rows = n_rows(), per_chunk = std::max<int64_t>(1, CHUNK / ne[0]);
    const size_t  out_size = ggml_row_size(to, ne[0]);
    if (to == type && !delta && order == row_order::as_is) {   // the very bytes
        const size_t size = out_size * rows, piece = 4 << 20;
        for (size_t at = 0; at < size; at += piece) {
            put(data + at, std::min(piece, size - at));
        }
        return;
    }
    if (!is_real(type)) {
        throw error("bad_file", EXIT_BAD_INPUT, format("tensor %s is of type %s, which holds no weights", name.c_str(), ggml_type_name(type)),
                    "the file is of a variant that toy does not know");
    }
    std::vector<float>   f32(std::min(rows, per_chunk) * ne[0]);
    std::vector<uint8_t> bytes(std::min(rows, per_chunk) * out_size);
    for (int64_t first = 0; first < rows; first += per_chunk) {
        const int64_t            n = std::min(per_chunk, rows - first), share = (n + n_threads - 1) / n_threads;
        std::atomic<fit>         bad{ fit::yes };
        std::vector<std::thread> threads;
        const auto               work = [&](int64_t from, int64_t upto) {
            for (int64_t at = from; at < upto; at += BATCH) {   // a few rows: what is read is still in the cache when it is written
                const int64_t m = std::min(BATCH, upto - at);
                float *       x = &f32[at * ne[0]];
                read(first + at, m, x);
                const fit f = holds(to, x, m * ne[0]);
                if (f != fit::yes) {
                    bad = f;
                    return;
                }
                ggml_quantize_chunk(to, x, &bytes[at * out_size], 0, m, ne[0], nullptr);
            }
        };
        for (int64_t from = share; from < n; from += share) {
            threads.emplace_back(work, from, std::min(n, from + share));
        }
        work(0, std::min(n, share));
        for (std::thread & t : threads) {
            t.join();
        }
        if (bad == fit::not_finite) {
            throw error("non_finite", EXIT_FAILED, "tensor " + name + " holds values that are not finite",
                        "the model is damaged: go back to an earlier one");
        }
        if (bad == fit::too_large) {
            throw error("bad_flag", EXIT_BAD_INPUT, format("tensor %s has values beyond 65504, the end of %s", name.c_str(), ggml_type_name(to)),
                        "use --type bf16 or f32");
        }
        put(bytes.data(), n * out_size);
    }
}

void tensor_rows::write_transposed(ggml_type to, int n_threads, const put_bytes & put) const {
    const int64_t      n_in = ne[0], n_out = n_rows();
    std::vector<float> row(n_in), turned(n_in * n_out);
    for (int64_t r = 0; r < n_out; r++) {
        read(r, 1, row.data());
        for (int64_t c = 0; c < n_in; c++) {
            turned[c * n_out + r] = row[c];
        }
    }
    tensor_rows t;
    t.name  = name;
    t.ne[0] = n_out;
    t.ne[1] = n_in;
    t.data  = (const uint8_t *) turned.data();
    t.write(to, n_threads, put);
}

//
// adapters
//

static const char * HINT_OTHER = "merge an adapter into the model that it was trained on";

static std::vector<float> floats(const ggml_tensor * t) {
    std::vector<float> out(ggml_nelements(t));
    tensor_rows        rows = tensor_rows::of(t);
    float *            at   = out.data();
    rows.write(GGML_TYPE_F32, 1, [&](const void * data, size_t size) {
        memcpy(at, data, size);
        at += size / sizeof(float);
    });
    return out;
}

static std::vector<float> turned(const std::vector<float> & x, int64_t n_in, int64_t n_out) {
    std::vector<float> out(x.size());
    for (int64_t r = 0; r < n_out; r++) {
        for (int64_t c = 0; c < n_in; c++) {
            out[c * n_out + r] = x[r * n_in + c];
        }
    }
    return out;
}

static void check_adapter(const gguf_file & base, const gguf_file & adapter) {
    const auto fail = [&](const std::string & what, const char * hint) { throw error("bad_file", EXIT_BAD_INPUT, adapter.path + " " + what, hint); };
    if (adapter.get_str("general.type", "") != "adapter") {
        fail("is no adapter", "name the GGUF that `toy train lora` leaves: weights/adapter.gguf of its run");
    }
    if (adapter.get_str("adapter.type", "") != "lora") {
        fail("is an adapter of kind '" + adapter.get_str("adapter.type", "") + "', not lora", "toy merges LoRA adapters");
    }
    if (adapter.has("adapter.alora.invocation_tokens")) {
        fail("is an adapter that certain tokens switch on, which no merged model can do", "apply it at run time instead");
    }
    const std::string mine = adapter.get_str("general.architecture", ""), other = base.get_str("general.architecture", "");
    if (mine != other) {
        fail(format("is for architecture %s, and %s is %s", mine.c_str(), base.path.c_str(), other.c_str()), HINT_OTHER);
    }
}

static std::shared_ptr<const low_rank> delta_of(const gguf_file & base, const gguf_file & adapter, const std::string & name) {
    const ggml_tensor * w = base.tensor(name);
    const ggml_tensor * a = adapter.tensor(name + ".lora_a");
    const ggml_tensor * b = adapter.tensor(name + ".lora_b");
    if (!a || !b) {
        throw error("bad_file", EXIT_BAD_INPUT, format("%s has no %s.%s", adapter.path.c_str(), name.c_str(), a ? "lora_b" : "lora_a"),
                    "the adapter is not complete: export it again from where it came");
    }
    if (!w) {
        throw error("bad_file", EXIT_BAD_INPUT, format("%s adapts %s, which %s does not have", adapter.path.c_str(), name.c_str(), base.path.c_str()),
                    HINT_OTHER);
    }
    // the embeddings are looked up, not multiplied, so llama.cpp keeps theirs the other way: a [r, n_vocab], b [r, n_embd]
    const bool embeddings = name == "token_embd.weight";
    const bool fits       = embeddings ? a->ne[0] == b->ne[0] && a->ne[1] == w->ne[1] && b->ne[1] == w->ne[0]
                                       : a->ne[1] == b->ne[0] && a->ne[0] == w->ne[0] && b->ne[1] == w->ne[1];
    if (!fits || w->ne[2] * w->ne[3] * a->ne[2] * a->ne[3] * b->ne[2] * b->ne[3] != 1) {
        throw error("bad_file", EXIT_BAD_INPUT,
                    format("%s: %s is %lld x %lld by %lld x %lld, for a tensor of %lld x %lld where %s has %lld x %lld", adapter.path.c_str(),
                           name.c_str(), (long long) a->ne[0], (long long) a->ne[1], (long long) b->ne[0], (long long) b->ne[1],
                           (long long) a->ne[embeddings], (long long) b->ne[1], base.path.c_str(), (long long) w->ne[0], (long long) w->ne[1]),
                    HINT_OTHER);
    }
    auto        d     = std::make_shared<low_rank>();
    const float alpha = (float) adapter.get_num("adapter.lora.alpha", 0);
    d->rank           = b->ne[0];
    d->scale          = alpha != 0 ? alpha / (float) d->rank : 1.0f;   // as llama.cpp reads an absent alpha
    d->a              = embeddings ? turned(floats(b), b->ne[0], b->ne[1]) : floats(a);
    d->b              = floats(embeddings ? a : b);
    return d;
}

merged_model::merged_model(const std::string & path, const std::string & adapter_path) : base(path) {
    if (base.file.get_str("general.type", "model") == "adapter") {
        throw error("bad_file", EXIT_BAD_INPUT, path + " is an adapter, not a model", "toy merge BASE ADAPTER OUT makes a model of both");
    }
    if (base.file.get_int("split.count", 1) > 1) {
        throw error("bad_file", EXIT_BAD_INPUT, path + " is one part of a model in several files",
                    "join them first (llama.cpp's llama-gguf-split --merge)");
    }
    if (adapter_path.empty()) {
        return;
    }
    adapter = std::make_unique<model_file>(adapter_path);
    check_adapter(base.file, adapter->file);
    for (ggml_tensor * t = ggml_get_first_tensor(adapter->file.ctx); t; t = ggml_get_next_tensor(adapter->file.ctx, t)) {
        const std::string name = t->name;
        if (!ends_with(name, ".lora_a") && !ends_with(name, ".lora_b")) {
            throw error("bad_file", EXIT_BAD_INPUT, format("%s has a tensor %s, which is no part of a LoRA", adapter_path.c_str(), name.c_str()),
                        "toy merges LoRA adapters");
        }
        const std::string target = name.substr(0, name.size() - strlen(".lora_a"));
        if (!deltas.count(target)) {
            deltas[target] = delta_of(base.file, adapter->file, target);
        }
    }
    if (deltas.empty()) {
        throw error("bad_file", EXIT_BAD_INPUT, adapter_path + " holds no tensors",
                    "the adapter is not complete: export it again from where it came");
    }
}

tensor_rows merged_model::rows(const std::string & name) const {
    const ggml_tensor * t = base.file.tensor(name);
    if (!t) {
        throw error("bad_file", EXIT_BAD_INPUT, format("%s has no tensor %s", base.file.path.c_str(), name.c_str()),
                    "the file is not a complete model: export it again from where it came");
    }
    tensor_rows r    = tensor_rows::of(t);
    const auto  find = deltas.find(name);
    r.delta          = find == deltas.end() ? nullptr : find->second;
    return r;
}

//
// files
//

raw_file::raw_file(const std::string & path) {
    const int   fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat st;
    void *      map = MAP_FAILED;
    if (fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size > 0) {
        size = st.st_size;
        map  = mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
    }
    const int e = errno;
    if (fd >= 0) {
        close(fd);
    }
    if (map == MAP_FAILED) {
        throw error(fd < 0 ? "missing_file" : "bad_file", EXIT_BAD_INPUT,
                    format("cannot read %s: %s", path.c_str(), fd < 0 ? strerror(e) : "no such data"),
                    "check the path, and that you may read the file");
    }
    data = (const uint8_t *) map;
}

raw_file::~raw_file() {
    munmap((void *) data, size);
}

// Hands bytes on, and tells how many of all have passed.
struct meter {
    const convert_progress & progress;
    size_t                   total, done = 0;

    put_bytes operator()(const put_bytes & put) {
        return [this, put](const void * data, size_t size) {
            put(data, size);
            done += size;
            if (progress) {
                progress(done, total);
            }
        };
    }
};

static void write_metered(gguf_writer & gguf, const std::string & out, const std::vector<raw_entry> & entries, const convert_progress & progress) {
    const int n_threads = usable_cores();
    meter     m{ progress, 0 };
    for (const raw_entry & e : entries) {
        m.total += ggml_row_size(e.to, e.ne[0]) * e.ne[1] * e.ne[2] * e.ne[3];
        gguf.add_tensor(e.rows.name, e.to, e.ne, [&e, &m, n_threads](const put_bytes & put) { e.rows.write(e.to, n_threads, m(put)); });
    }
    check_free_space(out, gguf.size());
    gguf.write(out);
}

static void set_type(gguf_writer & gguf, const file_type & type) {
    gguf.set_u32("general.file_type", type.number);
    if (ggml_is_quantized(type.type)) {
        gguf.set_u32("general.quantization_version", GGML_QNT_VERSION);
    }
}

void convert(const std::string & in, const std::string & adapter, const std::string & out, const std::string & type,
             const convert_progress & progress) {
    const merged_model model(in, adapter);
    const gguf_file &  file    = model.base.file;
    const file_type *  to      = type.empty() ? nullptr : &file_type::of(type);
    const int          n_layer = (int) file.get_num(file.get_str("general.architecture", "") + ".block_count", 0);

    gguf_writer gguf;
    gguf.copy_metadata(file);
    if (to) {
        set_type(gguf, *to);
    }
    if (model.adapter) {
        gguf.set_u32("toy.merged.tensors", (uint32_t) model.n_touched());
        for (const char * key : { "toy.run_id", "toy.lora.base_sha256", "toy.lora.targets", "toy.lora.rank" }) {
            gguf.copy_key(model.adapter->file, key);
        }
    }
    std::vector<raw_entry> entries;
    for (ggml_tensor * t = ggml_get_first_tensor(file.ctx); t; t = ggml_get_next_tensor(file.ctx, t)) {
        raw_entry e{ model.rows(t->name), to ? to->choose(t->name, t->type, t->ne, n_layer, !file.tensor("output.weight")) : t->type, {} };
        std::copy(t->ne, t->ne + GGML_MAX_DIMS, e.ne);
        entries.push_back(std::move(e));
    }
    write_metered(gguf, out, entries, progress);
}

void write_model(gguf_writer & gguf, const std::string & out, const std::vector<raw_entry> & entries, const std::string & type,
                 const convert_progress & progress) {
    const file_type & to      = file_type::of(type);
    int               n_layer = 0;
    bool              tied    = true;
    for (const raw_entry & e : entries) {
        int layer = -1;
        sscanf(e.rows.name.c_str(), "blk.%d.", &layer);
        n_layer = std::max(n_layer, layer + 1);
        tied    = tied && e.rows.name != "output.weight";
    }
    set_type(gguf, to);
    std::vector<raw_entry> typed = entries;
    for (raw_entry & e : typed) {
        e.to = to.choose(e.rows.name, e.rows.type, e.ne, n_layer, tied);
    }
    write_metered(gguf, out, typed, progress);
}

void write_raw(const std::string & out, const std::string & header, const std::vector<raw_entry> & entries, const convert_progress & progress) {
    const int n_threads = usable_cores();
    meter     m{ progress, 0 };
    for (const raw_entry & e : entries) {
        m.total += ggml_row_size(e.to, e.ne[0]) * e.ne[1] * e.ne[2] * e.ne[3];
    }
    check_free_space(out, header.size() + m.total);
    atomic_file     file(out);
    const put_bytes put = [&](const void * data, size_t size) { file.write(data, size); };
    put(header.data(), header.size());
    for (const raw_entry & e : entries) {
        e.rows.write(e.to, n_threads, m(put));
    }
    file.commit();
}

}   // namespace toy
