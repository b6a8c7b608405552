// defines: toy::weights — the tensors of a model that training owns, with their gradients and AdamW moments, each kind in one buffer
#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace toy {

struct gguf_file;

using tensor_lookup = std::function<ggml_tensor *(const std::string &)>;   // nullptr: the model has no such tensor

// How a tensor begins.
struct init {
    enum { NORMAL, UNIFORM, CONSTANT } kind;
    float value;   // standard deviation; half width around 0; value

    static init normal(float std) { return { NORMAL, std }; }
    static init uniform(float half_width) { return { UNIFORM, half_width }; }
    static init ones() { return { CONSTANT, 1 }; }
    static init zeros() { return { CONSTANT, 0 }; }
};

struct param {
    std::string   name;   // as in the GGUF: blk.0.attn_q.weight
    init          start;
    bool          decay     = true;      // decoupled weight decay: matrices yes, norms and biases no
    bool          embedding = false;     // of the learning-rate group of the embeddings
    bool          frozen    = false;     // no gradient, no moments, no update
    ggml_tensor * w         = nullptr;   // weight
    ggml_tensor * g         = nullptr;   // gradient, summed over the micro-batches of a step
    ggml_tensor * m         = nullptr;   // first moment
    ggml_tensor * v         = nullptr;   // second moment
};

struct weights {
    std::vector<param> params;                // in forward order
    std::vector<param> trained;               // those that are not frozen, joined where they can be: what graphs and the optimizer see
    ggml_tensor *      gradients = nullptr;   // all of them as one row, with zeros between: what is summed over all is summed at once

    weights();
    ~weights();
    weights(const weights &)             = delete;
    weights & operator=(const weights &) = delete;

    void          add_matrix(const std::string & name, int64_t ne0, int64_t ne1, init start);
    void          add_vector(const std::string & name, int64_t ne0, init start);
    // Neighbours of equal width that one product may take as one matrix, `name`. Before alloc(): after it lookup() finds it, unless one is frozen
    // or they do not lie one right after the other.
    void          join(const std::string & name, const std::vector<std::string> & parts);
    void          join_none();
    tensor_lookup lookup() const;

    // Freezes every tensor whose name fits one of the comma-separated patterns (* and ?). Before alloc().
    // Throws toy::error (bad_config): a pattern that fits no tensor, or nothing left to train.
    void freeze(const std::string & patterns);

    void alloc(ggml_backend_t backend);   // memory is reserved, not touched: a dry run costs nothing
    // Each tensor from its own random stream, but for those that come from elsewhere (`drawn` is false); moments to zero.
    void start(uint64_t seed, int n_threads, const std::function<bool(const std::string & name)> & drawn);

    int64_t n_params(bool with_frozen) const;
    size_t  bytes_weights() const, bytes_gradients() const, bytes_moments() const;

  private:
    struct joint {
        std::string              name;
        std::vector<std::string> parts;
    };

    ggml_context *        ctx[3];   // weights, gradients, moments
    ggml_backend_buffer_t buf[3] = {};
    std::vector<joint>    joints;

    void  add(const std::string & name, ggml_tensor * w, init start);
    void  join_gradients();
    bool  can_join(const joint & j, size_t first) const;
    param joined(const joint & j, size_t first);
};

// Copies tensors of a GGUF, dequantised to f32, into those of the same name; `wanted` picks the names.
// Throws toy::error (bad_file) naming a tensor that is missing there or of another shape.
void copy_from_gguf(weights & w, const gguf_file & donor, const std::function<bool(const std::string &)> & wanted);

}   // namespace toy
