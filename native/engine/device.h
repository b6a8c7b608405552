// defines: the device of a program besides the cpu. One source under devices/ has it, and CMake's use_toy_device says which
#pragma once

#include "ggml-backend.h"

namespace toy {

extern const char * const DEVICE;   // "cpu", "vulkan", …

// nullptr on the cpu, which each program has. Throws toy::error (not_available): the machine has no such device, or its driver does not answer
ggml_backend_t open_device();

}   // namespace toy
