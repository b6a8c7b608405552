#include "engine/device.h"
#include "engine/error.h"
#include "ggml-vulkan.h"

#include <cstdlib>

namespace toy {

const char * const DEVICE = "vulkan";

// The first device that ggml finds, or that GGML_VK_VISIBLE_DEVICES names: a device that is made of software has to be named.
ggml_backend_t open_device() {
    // a node may read what another one wrote in place without naming it (see session::with_squares): their order stays
    setenv("GGML_VK_DISABLE_GRAPH_OPTIMIZE", "1", 1);
    // f32 is f32, whatever the device would rather take
    setenv("GGML_VK_STRICT_F32", "1", 1);
    const char * hint = "GGML_VK_VISIBLE_DEVICES=0 takes a device made of software too; --device cpu works without one";
    try {
        if (ggml_backend_vk_get_device_count() == 0) {
            throw error("not_available", EXIT_BAD_INPUT, "Vulkan finds no GPU on this machine", hint);
        }
        if (ggml_backend_t handle = ggml_backend_vk_init(0)) {
            return handle;
        }
    } catch (const error &) {
        throw;
    } catch (const std::exception & e) {   // of the driver: Vulkan's C++ binding throws
        throw error("not_available", EXIT_BAD_INPUT, format("Vulkan does not answer: %s", e.what()), hint);
    }
    throw error("not_available", EXIT_BAD_INPUT, "Vulkan's device could not be opened", hint);
}

}   // namespace toy
