#include "engine/device.h"
#include "engine/error.h"
#include "ggml-metal.h"

namespace toy {

const char * const DEVICE = "metal";

ggml_backend_t open_device() {
    if (ggml_backend_t handle = ggml_backend_metal_init()) {
        return handle;
    }
    throw error("not_available", EXIT_BAD_INPUT, "Metal finds no GPU on this machine", "--device cpu works without one");
}

}   // namespace toy
