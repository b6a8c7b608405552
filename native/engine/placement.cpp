#include "placement.h"

#include "error.h"
#include "ggml-impl.h"   // ggml_graph_view

#include <algorithm>
#include <map>

namespace toy {

placement::placement(backend & be, ggml_context * ctx) : be(be), ctx(ctx) {
    if (be.is_cpu()) {
        galloc = ggml_gallocr_new(ggml_backend_get_default_buffer_type(be.handle));
        ggml_gallocr_set_by_size(galloc, true);
    }
}

placement::~placement() {
    ggml_gallocr_free(galloc);
    ggml_backend_sched_free(sched);
}

static bool computes(const ggml_tensor * node) {
    return node->op != GGML_OP_NONE && node->op != GGML_OP_RESHAPE && node->op != GGML_OP_VIEW && node->op != GGML_OP_PERMUTE &&
           node->op != GGML_OP_TRANSPOSE;
}

// What works in place on a device's gradients cannot be done elsewhere: the scheduler would abort. The device has these operations (backend::states);
// where it refuses one, a tensor is larger than its programs see at once.
void placement::check_in_place() const {
    for (int i = 0; i < graph->n_nodes; i++) {
        const ggml_tensor * node = graph->nodes[i];
        const ggml_tensor * at   = node->view_src;
        if (computes(node) && at && at->buffer && !ggml_backend_buffer_is_host(at->buffer) && !ggml_backend_supports_op(be.handle, node)) {
            size_t largest = ggml_nbytes(node);
            for (const ggml_tensor * src : node->src) {
                largest = src ? std::max(largest, ggml_nbytes(src)) : largest;
            }
            throw error("oom", EXIT_FAILED,
                        format("%s does not take a tensor of %.2f GiB, which %s for %s reads or writes", ggml_backend_name(be.handle),
                               (double) largest / (1 << 30), ggml_op_desc(node), at->name),
                        LOWER_STEP);
        }
    }
}

// What the graph writes in memory that the cpu has: gradients, where they are kept there (backend::states).
static bool changes_here(const ggml_tensor * t) {
    const ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    return buffer && ggml_backend_buffer_is_host(buffer) && ggml_backend_buffer_get_usage(buffer) != GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
}

bool placement::stays_here(const ggml_tensor * node) const {
    return changes_here(node) || std::any_of(node->src, node->src + GGML_MAX_SRC, [](const ggml_tensor * src) { return src && changes_here(src); });
}

// With the weights in its memory the scheduler would leave everything to the cpu. It copies what a device reads once for a graph, so that
// whatever reads or writes a gradient has to be the cpu's.
void placement::assign() {
    for (int i = 0; i < graph->n_nodes && be.states != be.handle; i++) {
        ggml_tensor * node = graph->nodes[i];
        if (computes(node)) {
            const bool on_device = !stays_here(node) && ggml_backend_supports_op(be.handle, node);
            ggml_backend_sched_set_tensor_backend(sched, node, on_device ? be.handle : be.cpu);
        }
    }
}

bool placement::alloc(ggml_cgraph * g) {
    graph = g;
    if (be.is_cpu()) {
        return ggml_gallocr_alloc_graph(galloc, graph);
    }
    check_in_place();
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        tensors.push_back(*t);
    }
    nodes.assign(graph->nodes, graph->nodes + graph->n_nodes);
    ggml_backend_t backends[] = { be.handle, be.cpu };
    // trained weights are nodes too, and of another context
    const size_t   size       = tensors.size() + graph->n_nodes + graph->n_leafs;
    sched                     = ggml_backend_sched_new(backends, nullptr, 2, size, /*parallel =*/false, /*op_offload =*/false);
    return place(graph->n_nodes);
}

void placement::restore() {
    size_t i = 0;
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t), i++) {
        const int32_t flags = t->flags;   // the round's: see session::begin_round
        *t                  = tensors[i];
        t->flags            = flags;
    }
    std::copy(nodes.begin(), nodes.end(), graph->nodes);
    ggml_backend_sched_reset(sched);
}

bool placement::place(int n_nodes) {
    restore();
    assign();
    const int all  = graph->n_nodes;
    graph->n_nodes = n_nodes;   // not a view, which has no leafs
    const bool ok  = ggml_backend_sched_alloc_graph(sched, graph);
    graph->n_nodes = all;
    n_placed       = ok ? n_nodes : 0;
    return ok;
}

void placement::compute(ggml_cgraph * g) {
    if (be.is_cpu()) {
        be.compute(g, LOWER_STEP);
        return;
    }
    // memory is laid out for as many nodes as compute: an evaluation, which is rare, lays it out twice
    if (n_placed != g->n_nodes && !place(g->n_nodes)) {
        check_status(GGML_STATUS_ALLOC_FAILED, LOWER_STEP);
    }
    checked(be.handle, LOWER_STEP, [&]() { return ggml_backend_sched_graph_compute(sched, graph); });
}

void placement::walk(const std::function<bool(ggml_tensor * node)> & seen) {
    if (be.is_cpu()) {
        for (int i = 0; i < graph->n_nodes; i++) {
            ggml_cgraph one = ggml_graph_view(graph, i, i + 1);
            be.compute(&one, LOWER_STEP);
            if (!seen(graph->nodes[i])) {
                return;
            }
        }
        return;
    }
    struct state {
        const std::function<bool(ggml_tensor *)> & seen;
        bool                                       go_on;
    } s                 = { seen, true };
    // asked: whether a node's value is wanted; told: that it is there. The scheduler cannot be stopped, but it need not tell.
    const auto callback = [](ggml_tensor * node, bool ask, void * data) {
        state & s = *(state *) data;
        s.go_on   = s.go_on && (ask || s.seen(node));
        return s.go_on;
    };
    ggml_backend_sched_set_eval_callback(sched, callback, &s);
    compute(graph);
    ggml_backend_sched_set_eval_callback(sched, nullptr, nullptr);
}

size_t placement::needed() {
    size_t sizes[2] = {};
    if (sched && be.states != be.handle) {
        return 0;   // measuring forgets what assign() decided
    }
    if (sched) {
        restore();
        ggml_backend_sched_reserve_size(sched, graph, sizes);
        n_placed = 0;
    } else {
        ggml_gallocr_reserve_n_size(galloc, graph, nullptr, nullptr, sizes);
    }
    return sizes[0];
}

size_t placement::bytes() const {
    return sched ? ggml_backend_sched_get_buffer_size(sched, be.handle) + ggml_backend_sched_get_buffer_size(sched, be.cpu)
                 : ggml_gallocr_get_buffer_size(galloc, 0);
}

std::string placement::left_to_cpu() const {
    std::map<std::string, int> count;
    for (int i = 0; sched && i < graph->n_nodes; i++) {
        ggml_tensor * node = graph->nodes[i];
        if (computes(node) && ggml_backend_sched_get_tensor_backend(sched, node) == be.cpu && !stays_here(node)) {
            count[ggml_op_desc(node)]++;
        }
    }
    std::string text;
    for (const auto & op : count) {
        text += format("%s%s (%d)", text.empty() ? "" : ", ", op.first.c_str(), op.second);
    }
    return text;
}

//
// graphs that are built anew
//

graph_memory::graph_memory(backend & be, size_t most_nodes) : be(be) {
    if (be.is_cpu()) {
        galloc = ggml_gallocr_new(ggml_backend_get_default_buffer_type(be.handle));
        return;
    }
    ggml_backend_t backends[] = { be.handle, be.cpu };
    sched = ggml_backend_sched_new(backends, nullptr, 2, /*and leafs =*/2 * most_nodes, /*parallel =*/false, /*op_offload =*/false);
}

graph_memory::~graph_memory() {
    ggml_gallocr_free(galloc);
    ggml_backend_sched_free(sched);
}

bool graph_memory::alloc(ggml_cgraph * graph) {
    if (galloc) {
        return ggml_gallocr_alloc_graph(galloc, graph);
    }
    ggml_backend_sched_reset(sched);
    return ggml_backend_sched_alloc_graph(sched, graph);
}

void graph_memory::compute(ggml_cgraph * graph) {
    if (galloc) {
        be.compute(graph, LOWER_CONTEXT);
    } else {
        checked(be.handle, LOWER_CONTEXT, [&]() { return ggml_backend_sched_graph_compute(sched, graph); });
    }
}

}   // namespace toy
