#include "model-file.h"

#include "error.h"
#include "ggml-alloc.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <cerrno>
#include <cstring>

namespace toy {

model_file::model_file(const std::string & path) : file(path) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    map          = fd < 0 ? MAP_FAILED : mmap(nullptr, file.file_size, PROT_READ, MAP_SHARED, fd, 0);
    const int e  = errno;
    if (fd >= 0) {
        close(fd);
    }
    if (map == MAP_FAILED) {
        map = nullptr;
        throw error("bad_file", EXIT_BAD_INPUT, format("cannot map %s: %s", path.c_str(), strerror(e)), "check that you may read the file");
    }
    buf = ggml_backend_cpu_buffer_from_ptr(map, file.file_size);
    for (ggml_tensor * t = ggml_get_first_tensor(file.ctx); t; t = ggml_get_next_tensor(file.ctx, t)) {
        ggml_backend_tensor_alloc(buf, t, (char *) map + file.tensor_offset(t->name));
    }
}

void model_file::move_to(ggml_backend_t device) {
    if (ggml_backend_buft_is_host(ggml_backend_get_default_buffer_type(device))) {
        return;
    }
    ggml_backend_buffer_free(buf);
    for (ggml_tensor * t = ggml_get_first_tensor(file.ctx); t; t = ggml_get_next_tensor(file.ctx, t)) {
        t->buffer = nullptr;
        t->data   = nullptr;
    }
    buf = ggml_backend_alloc_ctx_tensors(file.ctx, device);
    if (buf) {
        ggml_backend_buffer_set_usage(buf, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);   // the scheduler computes where they are
        for (ggml_tensor * t = ggml_get_first_tensor(file.ctx); t; t = ggml_get_next_tensor(file.ctx, t)) {
            ggml_backend_tensor_set(t, (const char *) map + file.tensor_offset(t->name), 0, ggml_nbytes(t));
        }
    }
    munmap(map, file.file_size);
    map = nullptr;
    if (!buf) {
        throw error("oom", EXIT_FAILED, format("the device has no memory for %s (%zu bytes)", file.path.c_str(), file.file_size),
                    "choose a smaller base, or one of a smaller type");
    }
}

model_file::~model_file() {
    ggml_backend_buffer_free(buf);
    if (map) {
        munmap(map, file.file_size);
    }
}

tensor_lookup model_file::lookup() const {
    return [this](const std::string & name) { return file.tensor(name); };
}

}   // namespace toy
