// defines: toy::model_file — the tensors of a GGUF, whatever their type: memory-mapped and read from the page cache, or in a device's memory
#pragma once

#include "backend.h"
#include "gguf-file.h"
#include "weights.h"

namespace toy {

struct model_file {
    gguf_file file;

    // Mapped, unless the device does not compute in this memory. Throws toy::error (missing_file, bad_file, oom).
    explicit model_file(const std::string & path, ggml_backend_t device = nullptr);
    ~model_file();

    tensor_lookup lookup() const;

  private:
    void upload(ggml_backend_t device);

    void *                map = nullptr;
    ggml_backend_buffer_t buf = nullptr;
};

}   // namespace toy
