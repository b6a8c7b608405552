// defines: toy::file_type, toy::tensor_rows, toy::convert, toy::merge, toy::write_raw — weights from one file to another: other types, an adapter
//          added, other layouts. Tensors pass through row by row, so memory does not grow with the model.
#pragma once

#include "model-file.h"

#include <map>

namespace toy {

// Called with the bytes done and to do. It may throw (an interrupt, say): then no file is left.
using convert_progress = std::function<void(size_t done, size_t total)>;

// What a whole file is called after: the type of its matrices, and llama.cpp's number for it (`general.file_type`).
struct file_type {
    std::string name;     // "q4_k_m"
    ggml_type   type;     // of most matrices
    int         number;   // llama_ftype

    static const file_type &        of(const std::string & name);   // throws toy::error (bad_flag)
    static std::vector<std::string> names();

    // The type of one tensor of a model, as llama.cpp chooses it: matrices only, the head finer than the rest, and another type
    // where a row is no whole number of blocks. `tied`: the embeddings are the head too.
    ggml_type choose(const std::string & tensor, ggml_type from, const int64_t * ne, int n_layer, bool tied) const;
};

// How the rows of a tensor are written, read against how they lie in memory.
enum class row_order {
    as_is,
    transposed,   // [n_in, n_out] <-> [n_out, n_in]: GPT-2's Conv1D
    split,        // rotary pairs (0,1)(2,3)… of each head -> first halves, then second halves: GGUF's llama -> Hugging Face
    paired,       // the other way
};

// Low-rank update of one tensor: W[row] += scale * sum_k b[row, k] a[k].
struct low_rank {
    std::vector<float> a;   // [n_in, r]
    std::vector<float> b;   // [r, n_out]
    int64_t            rank  = 0;
    float              scale = 0;
};

// A tensor in memory (a file's mapping), handed out row by row.
struct tensor_rows {
    std::string                     name;
    ggml_type                       type              = GGML_TYPE_F32;
    int64_t                         ne[GGML_MAX_DIMS] = { 1, 1, 1, 1 };   // as it lies in memory
    const uint8_t *                 data              = nullptr;
    row_order                       order             = row_order::as_is;
    int64_t                         n_head            = 1;   // of the rows, for split and paired
    std::shared_ptr<const low_rank> delta;

    static tensor_rows of(const ggml_tensor * tensor);

    int64_t n_rows() const { return ne[1] * ne[2] * ne[3]; }

    // All rows in type `to`, in order; `put` gets them in pieces. Throws toy::error (non_finite, bad_flag) for values that `to` cannot hold.
    void write(ggml_type to, int n_threads, const put_bytes & put) const;

  private:
    int64_t source_row(int64_t row) const;
    void    read(int64_t first, int64_t n, float * out) const;
    void    write_transposed(ggml_type to, int n_threads, const put_bytes & put) const;
};

// A model with, or without, an adapter in llama.cpp's format added: the tensors of its file, in its order.
// Throws toy::error (bad_file) naming what does not fit.
struct merged_model {
    model_file                  base;
    std::unique_ptr<model_file> adapter;

    merged_model(const std::string & base, const std::string & adapter);

    tensor_rows rows(const std::string & name) const;   // throws toy::error (bad_file) when absent
    bool        touched(const std::string & name) const { return deltas.count(name) != 0; }
    size_t      n_touched() const { return deltas.size(); }

  private:
    std::map<std::string, std::shared_ptr<const low_rank>> deltas;
};

// A GGUF whose matrices have another type. `type` "": each keeps its own. An adapter, unless "", is added first (f32).
void convert(const std::string & in, const std::string & adapter, const std::string & out, const std::string & type,
             const convert_progress & progress);

// A file in memory, read only, for tensors that are not in a GGUF.
struct raw_file {
    const uint8_t * data = nullptr;
    size_t          size = 0;

    explicit raw_file(const std::string & path);   // throws toy::error (missing_file, bad_file)
    ~raw_file();
    raw_file(const raw_file &)             = delete;
    raw_file & operator=(const raw_file &) = delete;
};

// One tensor of a file to be written: where its rows come from, and its type there.
struct raw_entry {
    tensor_rows rows;
    ggml_type   to;
    int64_t     ne[GGML_MAX_DIMS];   // as it is written
};

// A file of `header` and then the tensors' bytes, one after the other (safetensors). Whole or absent.
void write_raw(const std::string & out, const std::string & header, const std::vector<raw_entry> & entries, const convert_progress & progress);

// The tensors of a GGUF whose metadata is in `gguf` already; matrices get `type`.
void write_model(gguf_writer & gguf, const std::string & out, const std::vector<raw_entry> & entries, const std::string & type,
                 const convert_progress & progress);

}   // namespace toy
