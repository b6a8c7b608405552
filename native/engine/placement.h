// defines: toy::placement — where a graph's nodes lie and compute: on the device, and on the cpu what the device cannot
#pragma once

#include "backend.h"
#include "ggml-alloc.h"
#include "ggml.h"

#include <functional>
#include <string>
#include <vector>

namespace toy {

// Of a step, laid out once. On the cpu a graph has one buffer, and all is as ggml-alloc left it. With a device ggml's scheduler cuts the graph where
// the device lacks an operation and carries what is needed across.
struct placement {
    // ctx holds every tensor of the graph but the weights and the inputs
    placement(backend & be, ggml_context * ctx);
    ~placement();
    placement(const placement &)             = delete;
    placement & operator=(const placement &) = delete;

    bool alloc(ggml_cgraph * graph);     // false: out of memory. Throws toy::error (oom)
    void compute(ggml_cgraph * graph);   // the graph of alloc(), or its first nodes. Throws toy::error (runner_failed, oom)
    // Computes the graph of alloc() until `seen`, which may read the node just computed, says false.
    void walk(const std::function<bool(ggml_tensor * node)> & seen);

    size_t      needed();              // on the device: what a failed alloc() asked for, 0: unknown. Nothing lies anywhere afterwards
    size_t      bytes() const;         // on the device and for the cpu
    std::string left_to_cpu() const;   // "ATTN (8), ATTN_BACK (4)": what the device lacks; "" on the cpu

  private:
    backend &      be;
    ggml_context * ctx;
    ggml_cgraph *  graph = nullptr;

    ggml_gallocr_t       galloc   = nullptr;   // cpu
    ggml_backend_sched_t sched    = nullptr;   // another device
    int                  n_placed = 0;         // nodes that lie where the scheduler put them last

    // the graph as it was built: the scheduler reorders its nodes and puts copies in the place of their sources
    std::vector<ggml_tensor>   tensors;
    std::vector<ggml_tensor *> nodes;

    void check_in_place() const;
    bool stays_here(const ggml_tensor * node) const;
    void assign();
    void restore();
    bool place(int n_nodes);
};

// Of graphs that are built anew for each computation: their memory is kept from one to the next. Inputs are set between alloc() and compute().
struct graph_memory {
    graph_memory(backend & be, size_t most_nodes);
    ~graph_memory();
    graph_memory(const graph_memory &)             = delete;
    graph_memory & operator=(const graph_memory &) = delete;

    bool alloc(ggml_cgraph * graph);     // false: out of memory
    void compute(ggml_cgraph * graph);   // the one of alloc(). Throws toy::error (runner_failed, oom)

  private:
    backend &            be;
    ggml_gallocr_t       galloc = nullptr;   // cpu
    ggml_backend_sched_t sched  = nullptr;   // another device
};

}   // namespace toy
