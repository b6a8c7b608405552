#include "engine/device.h"
#include "engine/error.h"
#include "ggml-cuda.h"

#include <cstdlib>

namespace toy {

const char * const DEVICE = "cuda";

// The first device that the driver shows, or that CUDA_VISIBLE_DEVICES names.
ggml_backend_t open_device() {
    // one stream: a node may read what another one wrote in place without naming it (see session::with_squares), and cuBLAS promises the
    // same bytes for one stream only
    unsetenv("GGML_CUDA_GRAPH_OPT");
    // f32 is f32, whatever the libraries would rather take
    setenv("NVIDIA_TF32_OVERRIDE", "0", 1);
    const char * hint = "nvidia-smi shows what the driver finds; --device cpu works without one";
    if (ggml_backend_cuda_get_device_count() == 0) {   // no device, or a driver that is too old for the CUDA of this build
        throw error("not_available", EXIT_BAD_INPUT, "CUDA finds no GPU on this machine, or its driver is older than the CUDA of this build", hint);
    }
    if (ggml_backend_t handle = ggml_backend_cuda_init(0)) {
        return handle;
    }
    throw error("not_available", EXIT_BAD_INPUT, "CUDA's device could not be opened", hint);
}

}   // namespace toy
