#include "placement.h"

#include "error.h"
#include "ggml-impl.h"   // ggml_graph_view

#include <algorithm>
#include <map>

namespace toy {

placement::placement(backend & be, ggml_context * ctx) : be(be), ctx(ctx) {
    if (be.is_cpu()) {
        galloc = ggml_gallocr_new(ggml_backend_get_default_buffer_type(be.handle));
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

// What works in place on a device's weights or gradients cannot be done elsewhere: the scheduler would abort.
void placement::check_in_place() const {
    for (int i = 0; i < graph->n_nodes; i++) {
        const ggml_tensor * node = graph->nodes[i];
        const ggml_tensor * at   = node->view_src;
        if (computes(node) && at && at->buffer && !ggml_backend_buffer_is_host(at->buffer) && !ggml_backend_supports_op(be.handle, node)) {
            throw error("not_available", EXIT_BAD_INPUT,
                        format("%s cannot do %s in place on %s", ggml_backend_name(be.handle), ggml_op_desc(node), at->name),
                        "--device cpu trains this");
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
    sched = ggml_backend_sched_new(backends, nullptr, 2, tensors.size() + graph->n_leafs, /*parallel =*/false, /*op_offload =*/false);
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
    const int all  = graph->n_nodes;
    graph->n_nodes = n_nodes;   // not a view, which has no leafs
    const bool ok  = ggml_backend_sched_alloc_graph(sched, graph);
    graph->n_nodes = all;
    n_placed       = ok ? n_nodes : 0;
    return ok;
}

void placement::compute(ggml_cgraph * g) {
    if (be.is_cpu()) {
        be.compute(g);
        return;
    }
    // memory is laid out for as many nodes as compute: an evaluation, which is rare, lays it out twice
    if (n_placed != g->n_nodes && !place(g->n_nodes)) {
        check_status(GGML_STATUS_ALLOC_FAILED);
    }
    check_status(ggml_backend_sched_graph_compute(sched, graph));
}

void placement::walk(const std::function<bool(ggml_tensor * node)> & seen) {
    if (be.is_cpu()) {
        for (int i = 0; i < graph->n_nodes; i++) {
            ggml_cgraph one = ggml_graph_view(graph, i, i + 1);
            be.compute(&one);
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
        if (computes(node) && ggml_backend_sched_get_tensor_backend(sched, node) == be.cpu) {
            count[ggml_op_desc(node)]++;
        }
    }
    std::string text;
    for (const auto & op : count) {
        text += format("%s%s (%d)", text.empty() ? "" : ", ", op.first.c_str(), op.second);
    }
    return text;
}

}   // namespace toy
