// defines: toy::backend — the device that computes, and the cpu with its threads
#pragma once

#include "ggml-backend.h"

#include <cstddef>
#include <functional>
#include <string>

struct ggml_threadpool;

namespace toy {

struct backend {
    ggml_backend_t handle = nullptr;   // of the device
    ggml_backend_t cpu    = nullptr;   // the same, where the device is the cpu
    ggml_backend_t states = nullptr;   // holds weights, gradients and moments and updates them: the device, if it can, or the cpu
    int            n_threads;

    // offload: the states stay with the cpu. Throws toy::error (not_available)
    backend(const std::string & device, int n_threads, bool offload = false);
    ~backend();
    backend(const backend &)             = delete;
    backend & operator=(const backend &) = delete;

    bool   is_cpu() const { return handle == cpu; }
    // A graph that the device computes whole. Throws toy::error (runner_failed, oom).
    void   compute(ggml_cgraph * graph, const char * lower);
    size_t work_bytes(ggml_cgraph * graph) const;   // scratch that compute() needs besides the graph's own buffer

  private:
    ggml_threadpool * pool = nullptr;
};

void check_status(ggml_status status, const char * lower);   // of a computation. Throws toy::error (runner_failed, oom)

// A computation of `device` and its status. A device's library takes scratch memory as it computes: where there is none left, toy::error (oom) says
// how much was wanted, and `lower` (LOWER_STEP, LOWER_CONTEXT) what needs less. Throws toy::error (runner_failed, oom)
void checked(ggml_backend_t device, const char * lower, const std::function<ggml_status()> & compute);

// Advice that a large buffer lie in large pages, before it is touched: passes over all weights miss the processor's table of pages less often.
void use_huge_pages(ggml_backend_buffer_t buffer);

int    usable_cores();     // those this process may run on
size_t resident_bytes();   // now
size_t peak_resident_bytes();

}   // namespace toy
