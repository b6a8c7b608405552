// defines: toy::gguf_file (reading GGUF metadata, checked against the file's size), toy::gguf_writer (the one GGUF writer of the project)
#pragma once

#include "ggml.h"
#include "gguf.h"

#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace toy {

// Metadata of a GGUF file, with its tensors declared (no data) in `ctx`.
// Throws toy::error (missing_file, bad_file) when the file is absent, not a GGUF, truncated or malformed.
struct gguf_file {
    std::string path;
    uint64_t    file_size = 0;

    gguf_context * gguf = nullptr;
    ggml_context * ctx  = nullptr;   // no_alloc: names, types and shapes

    explicit gguf_file(const std::string & path);
    ~gguf_file();
    gguf_file(const gguf_file &)             = delete;
    gguf_file & operator=(const gguf_file &) = delete;

    bool          has(const std::string & key) const;
    std::string   get_str(const std::string & key, const std::string & def) const;
    int64_t       get_int(const std::string & key, int64_t def) const;
    double        get_num(const std::string & key, double def) const;
    int64_t       need_int(const std::string & key) const;         // throws bad_file when absent
    size_t        tensor_offset(const std::string & name) const;   // from the start of the file
    ggml_tensor * tensor(const std::string & name) const;          // nullptr when absent

  private:
    std::unordered_map<std::string, ggml_tensor *> tensors;   // a graph asks for each of hundreds, at each token
};

// Where a tensor's bytes come from when a file is written: called once, it hands them to `put` in order, in as many pieces as it likes.
using put_bytes     = std::function<void(const void * data, size_t size)>;
using tensor_source = std::function<void(const put_bytes & put)>;

// Collects metadata and tensors, then writes the file whole or not at all: temporary name, fsync, rename.
struct gguf_writer {
    gguf_writer();
    ~gguf_writer();
    gguf_writer(const gguf_writer &)             = delete;
    gguf_writer & operator=(const gguf_writer &) = delete;

    void set_str(const std::string & key, const std::string & value);
    void set_u32(const std::string & key, uint32_t value);
    void set_u64(const std::string & key, uint64_t value);
    void set_i32(const std::string & key, int32_t value);
    void set_f32(const std::string & key, float value);
    void set_f64(const std::string & key, double value);
    void set_bool(const std::string & key, bool value);
    void set_strs(const std::string & key, const std::vector<std::string> & values);
    void set_i32s(const std::string & key, const std::vector<int32_t> & values);
    void set_f32s(const std::string & key, const std::vector<float> & values);
    void copy_metadata(const gguf_file & from);                                                            // alignment and split keys aside
    void copy_key(const gguf_file & from, const std::string & key);                                        // absent there: nothing
    void add_tensor(const ggml_tensor * tensor, const std::string & name);                                 // data is read at write()
    void add_tensor(const std::string & name, ggml_type type, const int64_t * ne, tensor_source source);   // ne [GGML_MAX_DIMS]; called at write()

    size_t size() const;                      // of the file, in bytes
    void   write(const std::string & path);   // throws toy::error (disk_full, runner_failed), and whatever a source throws

  private:
    gguf_context *             gguf;
    ggml_context *             ctx;
    std::vector<tensor_source> sources;
};

// Throws toy::error (disk_full) when the disk of `path` has less than `size` bytes left.
void check_free_space(const std::string & path, size_t size);

}   // namespace toy
