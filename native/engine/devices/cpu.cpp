#include "engine/device.h"

namespace toy {

const char * const DEVICE = "cpu";

ggml_backend_t open_device() {
    return nullptr;
}

}   // namespace toy
