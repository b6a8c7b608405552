#include "backend.h"

#include "device.h"
#include "error.h"
#include "ggml-cpu.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <new>
#include <thread>
#ifdef __linux__
#include <sched.h>
#endif

namespace toy {

// Whether a device has what works in place on weights, gradients and moments: that cannot be left to the cpu where they are in the device's memory.
static bool updates_in_place(ggml_backend_t device) {
    ggml_context * ctx = ggml_init({ /*mem_size =*/16 * ggml_tensor_overhead(), nullptr, /*no_alloc =*/true });
    ggml_tensor *  w = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 32, 32), *g = ggml_dup_tensor(ctx, w);
    ggml_tensor *  m = ggml_dup_tensor(ctx, w), *v = ggml_dup_tensor(ctx, w);
    ggml_tensor *  hyper = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 8), *ids = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 32);
    ggml_set_param(w);
    bool all = true;
    for (const ggml_tensor * op :
         { ggml_opt_step_adamw(ctx, w, g, m, v, hyper), ggml_out_prod_acc(ctx, g, m, v), ggml_get_rows_back_acc(ctx, g, m, ids) }) {
        all = all && ggml_backend_supports_op(device, op);
    }
    ggml_free(ctx);
    return all;
}

backend::backend(const std::string & device, int n_threads, bool offload) : n_threads(n_threads) {
    if (device != DEVICE) {
        throw error("not_available", EXIT_BAD_INPUT, format("this runner computes on the %s, not on %s", DEVICE, device.c_str()),
                    format("use --device %s", DEVICE));
    }
    if (n_threads > GGML_MAX_N_THREADS) {
        throw error("bad_flag", EXIT_BAD_INPUT, format("%d threads are more than ggml's %d", n_threads, GGML_MAX_N_THREADS),
                    "use --threads 0: all usable cores");
    }
    handle                        = open_device();
    cpu                           = ggml_backend_cpu_init();
    handle                        = handle ? handle : cpu;
    states                        = offload || !updates_in_place(handle) ? cpu : handle;
    // one pool for the whole run; more threads than cores must not spin, or the one that is needed cannot run
    ggml_threadpool_params params = ggml_threadpool_params_default(n_threads);
    params.poll                   = n_threads > usable_cores() ? 0 : 50;
    pool                          = ggml_threadpool_new(&params);
    ggml_backend_cpu_set_n_threads(cpu, n_threads);
    ggml_backend_cpu_set_threadpool(cpu, pool);
}

backend::~backend() {
    if (!is_cpu()) {
        try {
            ggml_backend_free(handle);
        } catch (const std::exception &) {
            // a device that was lost: whoever computed there has been told
        }
    }
    ggml_backend_free(cpu);
    ggml_threadpool_free(pool);
}

void check_status(ggml_status status, const char * lower) {
    if (status == GGML_STATUS_ALLOC_FAILED) {
        throw error("oom", EXIT_FAILED, "out of memory while computing", lower);
    }
    if (status != GGML_STATUS_SUCCESS) {
        throw error("runner_failed", EXIT_FAILED, format("the graph did not compute (%s)", ggml_status_to_string(status)),
                    "please report this with the run's config.json");
    }
}

void checked(ggml_backend_t device, const char * lower, const std::function<ggml_status()> & compute) {
    try {
        check_status(compute(), lower);
    } catch (const std::bad_alloc & e) {
        const std::string what = e.what();   // of C++ itself it says nothing
        size_t            left = 0, total = 0;
        if (what == std::bad_alloc().what()) {
            throw;
        }
        ggml_backend_dev_memory(ggml_backend_get_device(device), &left, &total);
        const double gib = 1 << 30;
        throw error(
            "oom", EXIT_FAILED,
            format("the %s device is out of memory: %s; %.2f of %.2f GiB are free", DEVICE, what.c_str(), (double) left / gib, (double) total / gib),
            lower);
    }
}

void backend::compute(ggml_cgraph * graph, const char * lower) {
    checked(handle, lower, [&]() { return ggml_backend_graph_compute(handle, graph); });
}

size_t backend::work_bytes(ggml_cgraph * graph) const {
    if (!is_cpu()) {
        return 0;   // the driver's own
    }
    return ggml_graph_plan(graph, n_threads, pool).work_size;
}

void use_huge_pages(ggml_backend_buffer_t buffer) {
#ifdef MADV_HUGEPAGE
    const size_t worth_it = 16 << 20, page = (size_t) sysconf(_SC_PAGESIZE), size = ggml_backend_buffer_get_size(buffer);
    if (size < worth_it || !ggml_backend_buffer_is_host(buffer)) {
        return;
    }
    const uintptr_t base  = (uintptr_t) ggml_backend_buffer_get_base(buffer);
    const uintptr_t begin = (base + page - 1) / page * page, end = (base + size) / page * page;
    madvise((void *) begin, end - begin, MADV_HUGEPAGE);   // where the system refuses, all is as it was
#else
    (void) buffer;
#endif
}

int usable_cores() {
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) {
        return CPU_COUNT(&set);
    }
#endif
    const int n = (int) std::thread::hardware_concurrency();
    return n > 0 ? n : 1;
}

size_t resident_bytes() {
    if (FILE * f = fopen("/proc/self/statm", "r")) {
        unsigned long size, resident = 0;
        const int     n = fscanf(f, "%lu %lu", &size, &resident);
        fclose(f);
        if (n == 2) {
            return resident * sysconf(_SC_PAGESIZE);
        }
    }
    return peak_resident_bytes();
}

size_t peak_resident_bytes() {
    // VmHWM, not ru_maxrss: the latter still holds the peak of the process that started this one
    if (FILE * f = fopen("/proc/self/status", "r")) {
        char          line[256];
        unsigned long kib = 0;
        while (fgets(line, sizeof(line), f) && sscanf(line, "VmHWM: %lu", &kib) != 1) {
        }
        fclose(f);
        if (kib > 0) {
            return kib * 1024;
        }
    }
    struct rusage ru;
    getrusage(RUSAGE_SELF, &ru);
#ifdef __APPLE__
    return ru.ru_maxrss;
#else
    return (size_t) ru.ru_maxrss * 1024;
#endif
}

}   // namespace toy
