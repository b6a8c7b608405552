// defines: toy::model_file — the tensors of a GGUF, memory-mapped: weights are read from the page cache, whatever their type
#pragma once

#include "backend.h"
#include "gguf-file.h"
#include "weights.h"

namespace toy {

struct model_file {
    gguf_file file;

    explicit model_file(const std::string & path);   // throws toy::error (missing_file, bad_file)
    ~model_file();

    tensor_lookup lookup() const;

  private:
    void *                map = nullptr;
    ggml_backend_buffer_t buf = nullptr;
};

}   // namespace toy
