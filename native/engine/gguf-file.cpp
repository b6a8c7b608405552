#include "gguf-file.h"

#include "error.h"
#include "files.h"
#include "ggml-backend.h"

#include <sys/stat.h>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <mutex>

namespace toy {

// ggml reports what is wrong with a GGUF through its log; the first line of it is the reason the user sees.
static std::mutex  g_log_mutex;
static std::string g_log_first;

static void keep_first_line(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR && g_log_first.empty()) {
        g_log_first = text;
        g_log_first.erase(g_log_first.find_last_not_of("\r\n ") + 1);
        const size_t colon = g_log_first.find(": ");   // the name of the C function
        if (colon != std::string::npos && g_log_first.find(' ') > colon) {
            g_log_first.erase(0, colon + 2);
        }
        for (char & c : g_log_first) {
            c = (unsigned char) c < 0x20 ? ' ' : c;
        }
    }
}

static const char * HINT_BAD = "the file may be cut short or damaged: copy or download it again";

gguf_file::gguf_file(const std::string & path) : path(path) {
    struct stat st;
    if (stat(path.c_str(), &st) != 0) {
        throw error("missing_file", EXIT_BAD_INPUT, format("cannot open %s: %s", path.c_str(), strerror(errno)),
                    "name a GGUF file that exists; `toy list` shows those on this machine");
    }
    file_size     = st.st_size;
    char magic[4] = { 0 };
    if (FILE * f = S_ISREG(st.st_mode) ? fopen(path.c_str(), "rb") : nullptr) {
        const size_t n = fread(magic, 1, 4, f);
        fclose(f);
        if (n != 4 || memcmp(magic, GGUF_MAGIC, 4) != 0) {
            throw error("bad_file", EXIT_BAD_INPUT, format("%s is not a GGUF file", path.c_str()),
                        "name a file that begins with the letters GGUF; `toy list` shows those on this machine");
        }
    } else {
        throw error("bad_file", EXIT_BAD_INPUT, format("cannot read %s: %s", path.c_str(), S_ISREG(st.st_mode) ? strerror(errno) : "not a file"),
                    "name a GGUF file that you may read");
    }

    std::lock_guard<std::mutex> lock(g_log_mutex);
    ggml_log_callback           old_cb;
    void *                      old_data;
    ggml_log_get(&old_cb, &old_data);
    g_log_first.clear();
    ggml_log_set(keep_first_line, nullptr);
    gguf_init_params params = { /*no_alloc =*/true, /*ctx =*/&ctx };
    gguf                    = gguf_init_from_file(path.c_str(), params);
    ggml_log_set(old_cb, old_data);
    if (!gguf) {
        throw error("bad_file", EXIT_BAD_INPUT,
                    format("%s is not a readable GGUF: %s", path.c_str(), g_log_first.empty() ? "unknown reason" : g_log_first.c_str()), HINT_BAD);
    }
    const int64_t n = gguf_get_n_tensors(gguf);
    for (int64_t i = 0; i < n; i++) {
        const uint64_t end = gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, i) + gguf_get_tensor_size(gguf, i);
        if (end > file_size) {
            const std::string name = gguf_get_tensor_name(gguf, i);
            gguf_free(gguf);
            ggml_free(ctx);
            throw error("bad_file", EXIT_BAD_INPUT,
                        format("%s is truncated: tensor %s ends at byte %llu of %llu", path.c_str(), name.c_str(), (unsigned long long) end,
                               (unsigned long long) file_size),
                        HINT_BAD);
        }
    }
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        tensors.emplace(t->name, t);
    }
}

gguf_file::~gguf_file() {
    gguf_free(gguf);
    ggml_free(ctx);
}

bool gguf_file::has(const std::string & key) const {
    return gguf_find_key(gguf, key.c_str()) >= 0;
}

std::string gguf_file::get_str(const std::string & key, const std::string & def) const {
    const int64_t id = gguf_find_key(gguf, key.c_str());
    return id >= 0 && gguf_get_kv_type(gguf, id) == GGUF_TYPE_STRING ? gguf_get_val_str(gguf, id) : def;
}

double gguf_file::get_num(const std::string & key, double def) const {
    const int64_t id = gguf_find_key(gguf, key.c_str());
    if (id < 0) {
        return def;
    }
    switch (gguf_get_kv_type(gguf, id)) {
        case GGUF_TYPE_UINT8:
            return gguf_get_val_u8(gguf, id);
        case GGUF_TYPE_INT8:
            return gguf_get_val_i8(gguf, id);
        case GGUF_TYPE_UINT16:
            return gguf_get_val_u16(gguf, id);
        case GGUF_TYPE_INT16:
            return gguf_get_val_i16(gguf, id);
        case GGUF_TYPE_UINT32:
            return gguf_get_val_u32(gguf, id);
        case GGUF_TYPE_INT32:
            return gguf_get_val_i32(gguf, id);
        case GGUF_TYPE_UINT64:
            return (double) gguf_get_val_u64(gguf, id);
        case GGUF_TYPE_INT64:
            return (double) gguf_get_val_i64(gguf, id);
        case GGUF_TYPE_FLOAT32:
            return gguf_get_val_f32(gguf, id);
        case GGUF_TYPE_FLOAT64:
            return gguf_get_val_f64(gguf, id);
        case GGUF_TYPE_BOOL:
            return gguf_get_val_bool(gguf, id);
        default:
            return def;
    }
}

static int64_t whole(const gguf_file & file, const std::string & key, double v) {
    if (!(std::fabs(v) <= INT32_MAX) || v != std::floor(v)) {
        throw error("bad_file", EXIT_BAD_INPUT, format("%s: %s = %g is not a whole number of 32 bits", file.path.c_str(), key.c_str(), v),
                    "the file is damaged: export it again from where it came");
    }
    return (int64_t) v;
}

int64_t gguf_file::get_int(const std::string & key, int64_t def) const {
    return whole(*this, key, get_num(key, (double) def));
}

int64_t gguf_file::need_int(const std::string & key) const {
    const double missing = -1e300;
    const double v       = get_num(key, missing);
    if (v == missing) {
        throw error("bad_file", EXIT_BAD_INPUT, format("%s has no %s", path.c_str(), key.c_str()),
                    "the file is not a complete model: export it again from where it came");
    }
    return whole(*this, key, v);
}

size_t gguf_file::tensor_offset(const std::string & name) const {
    const int64_t id = gguf_find_tensor(gguf, name.c_str());
    return gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, id);
}

ggml_tensor * gguf_file::tensor(const std::string & name) const {
    const auto it = tensors.find(name);
    return it == tensors.end() ? nullptr : it->second;
}

gguf_writer::gguf_writer() : gguf(gguf_init_empty()) {
    // room for the declarations only: a tensor's data is read from its own buffer at write()
    ctx = ggml_init({ /*mem_size =*/65536 * ggml_tensor_overhead(), /*mem_buffer =*/nullptr, /*no_alloc =*/true });
}

gguf_writer::~gguf_writer() {
    gguf_free(gguf);
    ggml_free(ctx);
}

void gguf_writer::set_str(const std::string & key, const std::string & v) {
    gguf_set_val_str(gguf, key.c_str(), v.c_str());
}
void gguf_writer::set_u32(const std::string & key, uint32_t v) {
    gguf_set_val_u32(gguf, key.c_str(), v);
}
void gguf_writer::set_u64(const std::string & key, uint64_t v) {
    gguf_set_val_u64(gguf, key.c_str(), v);
}
void gguf_writer::set_i32(const std::string & key, int32_t v) {
    gguf_set_val_i32(gguf, key.c_str(), v);
}
void gguf_writer::set_f32(const std::string & key, float v) {
    gguf_set_val_f32(gguf, key.c_str(), v);
}
void gguf_writer::set_f64(const std::string & key, double v) {
    gguf_set_val_f64(gguf, key.c_str(), v);
}
void gguf_writer::set_bool(const std::string & key, bool v) {
    gguf_set_val_bool(gguf, key.c_str(), v);
}

void gguf_writer::set_strs(const std::string & key, const std::vector<std::string> & values) {
    std::vector<const char *> ptrs;
    for (const std::string & v : values) {
        ptrs.push_back(v.c_str());
    }
    gguf_set_arr_str(gguf, key.c_str(), ptrs.data(), ptrs.size());
}

void gguf_writer::set_i32s(const std::string & key, const std::vector<int32_t> & v) {
    gguf_set_arr_data(gguf, key.c_str(), GGUF_TYPE_INT32, v.data(), v.size());
}

void gguf_writer::set_f32s(const std::string & key, const std::vector<float> & v) {
    gguf_set_arr_data(gguf, key.c_str(), GGUF_TYPE_FLOAT32, v.data(), v.size());
}

void gguf_writer::copy_metadata(const gguf_file & from) {
    gguf_set_kv(gguf, from.gguf);
    // how the other file was laid out, not what it holds
    for (const char * key : { GGUF_KEY_GENERAL_ALIGNMENT, "split.no", "split.count", "split.tensors.count" }) {
        gguf_remove_key(gguf, key);
    }
}

void gguf_writer::copy_key(const gguf_file & from, const std::string & key) {
    const char *  k  = key.c_str();
    const int64_t id = gguf_find_key(from.gguf, k);
    switch (id < 0 ? GGUF_TYPE_COUNT : gguf_get_kv_type(from.gguf, id)) {
        case GGUF_TYPE_STRING:
            return gguf_set_val_str(gguf, k, gguf_get_val_str(from.gguf, id));
        case GGUF_TYPE_UINT32:
            return gguf_set_val_u32(gguf, k, gguf_get_val_u32(from.gguf, id));
        case GGUF_TYPE_INT32:
            return gguf_set_val_i32(gguf, k, gguf_get_val_i32(from.gguf, id));
        case GGUF_TYPE_UINT64:
            return gguf_set_val_u64(gguf, k, gguf_get_val_u64(from.gguf, id));
        case GGUF_TYPE_FLOAT32:
            return gguf_set_val_f32(gguf, k, gguf_get_val_f32(from.gguf, id));
        case GGUF_TYPE_BOOL:
            return gguf_set_val_bool(gguf, k, gguf_get_val_bool(from.gguf, id));
        default:
            return;
    }
}

void gguf_writer::add_tensor(const ggml_tensor * tensor, const std::string & name) {
    add_tensor(name, tensor->type, tensor->ne, [tensor](const put_bytes & put) {
        std::vector<uint8_t> buf(1 << 16);   // through a small buffer, so that saving needs no memory of the model's size
        const size_t         n = ggml_nbytes(tensor);
        for (size_t at = 0; at < n; at += buf.size()) {
            const size_t len = std::min(buf.size(), n - at);
            ggml_backend_tensor_get(tensor, buf.data(), at, len);
            put(buf.data(), len);
        }
    });
}

void gguf_writer::add_tensor(const std::string & name, ggml_type type, const int64_t * ne, tensor_source source) {
    ggml_tensor * t = ggml_new_tensor(ctx, type, GGML_MAX_DIMS, ne);
    ggml_set_name(t, name.c_str());
    gguf_add_tensor(gguf, t);
    sources.push_back(std::move(source));
}

size_t gguf_writer::size() const {
    size_t n = gguf_get_meta_size(gguf);
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        n += GGML_PAD(ggml_nbytes(t), gguf_get_alignment(gguf));
    }
    return n;
}

void gguf_writer::write(const std::string & path) {
    atomic_file          out(path);
    std::vector<uint8_t> meta(gguf_get_meta_size(gguf));
    gguf_get_meta_data(gguf, meta.data());
    out.write(meta.data(), meta.size());

    const size_t  align = gguf_get_alignment(gguf);
    ggml_tensor * t     = ggml_get_first_tensor(ctx);
    for (const tensor_source & source : sources) {
        size_t n = 0;
        source([&](const void * data, size_t size) {
            out.write(data, size);
            n += size;
        });
        if (n != ggml_nbytes(t)) {
            throw error("bug", EXIT_FAILED, format("tensor %s came with %zu bytes where it has %zu", t->name, n, ggml_nbytes(t)),
                        "this is a fault of toy's own; please report it");
        }
        const std::vector<uint8_t> pad(GGML_PAD(n, align) - n, 0);
        out.write(pad.data(), pad.size());
        t = ggml_get_next_tensor(ctx, t);
    }
    out.commit();
}

void check_free_space(const std::string & path, size_t size) {
    const size_t slash = path.rfind('/');
    const size_t left  = free_bytes(slash == std::string::npos ? "." : slash == 0 ? "/" : path.substr(0, slash));
    if (left < size) {
        throw error("disk_full", EXIT_FAILED,
                    format("%s needs %.1f MiB, and its disk has %.1f MiB left", path.c_str(), size / 1048576.0, left / 1048576.0),
                    "free some space, or name a place on another disk");
    }
}

}   // namespace toy
