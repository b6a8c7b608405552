// defines: toy::model_file — the tensors of a GGUF, whatever their type: memory-mapped and read from the page cache, or in a device's memory
#pragma once

#include "backend.h"
#include "gguf-file.h"
#include "weights.h"

namespace toy {

struct model_file {
    gguf_file file;

    explicit model_file(const std::string & path);   // throws toy::error (missing_file, bad_file)
    ~model_file();

    // To where a device computes, if that is not this memory. Throws toy::error (oom).
    void move_to(ggml_backend_t device);

    tensor_lookup lookup() const;

  private:
    void *                map = nullptr;
    ggml_backend_buffer_t buf = nullptr;
};

}   // namespace toy
