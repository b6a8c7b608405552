// defines: toy::weights — the trainable tensors of a model with their gradients and AdamW moments, each kind in one buffer
#pragma once

#include "ggml-backend.h"
#include "ggml.h"

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace toy {

using tensor_lookup = std::function<ggml_tensor *(const std::string &)>;   // nullptr: the model has no such tensor

struct param {
    std::string   name;          // as in the GGUF: blk.0.attn_q.weight
    float         init_std;      // normal(0, init_std); 0: ones (norm gains)
    bool          decay;         // decoupled weight decay: matrices yes, norms and biases no
    ggml_tensor * w = nullptr;   // weight
    ggml_tensor * g = nullptr;   // gradient, summed over the micro-batches of a step
    ggml_tensor * m = nullptr;   // first moment
    ggml_tensor * v = nullptr;   // second moment
};

struct weights {
    std::vector<param> params;   // in forward order

    weights();
    ~weights();
    weights(const weights &)             = delete;
    weights & operator=(const weights &) = delete;

    ggml_tensor * add(const std::string & name, int64_t ne0, int64_t ne1, float init_std);   // ne1 = 0: a vector
    tensor_lookup lookup() const;

    void alloc(ggml_backend_t backend);   // memory is reserved, not touched: a dry run costs nothing
    void init(uint64_t seed);             // each tensor from its own random stream; moments to zero
    void zero_gradients();

    int64_t  n_params() const;
    size_t   bytes_weights() const, bytes_gradients() const, bytes_moments() const;
    uint64_t names_hash() const;   // the trainable set: names and shapes

  private:
    ggml_context *        ctx[3];   // weights, gradients, moments
    ggml_backend_buffer_t buf[3] = {};
};

}   // namespace toy
