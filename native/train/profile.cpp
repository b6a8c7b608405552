#include "profile.h"

#include "engine/error.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"   // the parameters of an operation

#include <algorithm>
#include <cstring>
#include <map>
#include <tuple>

namespace toy {

static const int    N_WARM    = 2;     // steps: buffers are touched for the first time, caches fill
static const double ROOF_TIME = 0.3;   // seconds of each measurement of it

profiler::profiler(const config & cfg, backend & be, const data_reader & reader) : be(be), reader(reader), n_wanted(cfg.log.profile) {}

profiler::~profiler() {
    ggml_cpu_set_node_callback(nullptr, nullptr);
}

void profiler::begin_step(int64_t steps_left) {
    if ((int) steps.size() >= n_wanted) {
        return;
    }
    if (n_warm < 0) {
        n_warm = (int) std::min<int64_t>(N_WARM, steps_left - 1);
    }
    if (n_warm == 0 && steps.empty()) {
        nodes.clear();
        roofs[0] = measure_roof();
    }
    reader_before = reader.seconds;
    ggml_cpu_set_node_callback(on_node, this);
}

void profiler::end_step(double seconds) {
    if ((int) steps.size() >= n_wanted) {
        return;
    }
    ggml_cpu_set_node_callback(nullptr, nullptr);   // validations are no part of a step
    if (n_warm > 0) {
        n_warm--;
        return;
    }
    steps.push_back({ seconds, reader.seconds - reader_before });
}

// what a tensor is a view, a copy or a transpose of
static const ggml_tensor * root(const ggml_tensor * t) {
    while (t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE || t->op == GGML_OP_TRANSPOSE || t->op == GGML_OP_CONT ||
           t->op == GGML_OP_CPY || t->op == GGML_OP_DUP) {
        t = t->src[0];
    }
    return t;
}

static bool is_weight(const ggml_tensor * t) {
    t = root(t);
    return t->op == GGML_OP_NONE && (strstr(t->name, ".weight") || (t->flags & GGML_TENSOR_FLAG_PARAM));
}

static bool is_product(const ggml_tensor * t) {
    return strncmp(ggml_op_name(t->op), "MUL_MAT", 7) == 0 || strncmp(ggml_op_name(t->op), "OUT_PROD", 8) == 0;
}

void profiler::on_node(const ggml_tensor * node, void * data) {
    profiler &   self = *(profiler *) data;
    const double now  = monotonic_time();
    if (node) {
        node_time & at = self.nodes[node];
        at.seconds.resize(self.steps.size() + 1);
        at.seconds.back() += now - self.last;
        at.calls++;
        if (self.precision < 0 && is_product(node) && is_weight(node->src[0])) {
            self.precision = ggml_get_op_params_i32(node, 0);
        }
    }
    self.last = now;
}

// GFLOP/s of a large product in the run's own precision, in the two layouts of a step: the best of what fits into ROOF_TIME.
double profiler::measure_roof() {
    if (precision < 0) {
        return 0;
    }
    const int64_t n = be.n_threads <= 8 ? 512 : 2048;   // large for so many threads, and soon over: a busy machine lets one through whole

    ggml_context * ctx  = ggml_init({ /*mem_size =*/4 * n * n * sizeof(float) + 64 * ggml_tensor_overhead() + 2 * ggml_graph_overhead(), nullptr,
                                      /*no_alloc =*/false });
    ggml_tensor *  a    = ggml_set_f32(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n, n), 0.5f);
    ggml_tensor *  b    = ggml_set_f32(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n, n), 0.25f);
    double         best = 0;
    for (ggml_tensor * c : { ggml_mul_mat(ctx, a, b), ggml_out_prod(ctx, a, b) }) {
        ggml_set_op_params_i32(c, 0, precision);
        ggml_cgraph * graph = ggml_new_graph(ctx);
        ggml_build_forward_expand(graph, c);
        for (const double end = monotonic_time() + ROOF_TIME / 2; monotonic_time() < end;) {
            const double t0 = monotonic_time();
            be.compute(graph, LOWER_STEP);
            best = std::max(best, 2e-9 * (double) (n * n * n) / (monotonic_time() - t0));
        }
    }
    ggml_free(ctx);
    return best;
}

//
// what an operation is for
//

static bool has(const std::string & text, const char * word) {
    return text.find(word) != std::string::npos;
}

static const char * group_of(const ggml_tensor * t, const std::string & op) {
    if (is_product(t)) {
        const bool with_weight = is_weight(t->src[0]) || is_weight(t->src[1]);
        if (!with_weight && t->ne[2] * t->ne[3] > 1) {
            return "attention";
        }
        return t->op == GGML_OP_MUL_MAT ? "products, forward" : with_weight ? "products, activation gradients" : "products, weight gradients";
    }
    static const std::vector<std::pair<const char *, const char *>> words = {
        { "CROSS_ENTROPY", "head and loss" },
        { "ATTN", "attention" },
        { "SOFT_MAX", "attention" },
        { "ROPE", "positions" },
        { "NORM", "norms" },
        { "GLU", "activations" },
        { "SILU", "activations" },
        { "GELU", "activations" },
        { "GET_ROWS", "embeddings" },
        { "OPT_STEP", "optimizer" },
        { "SUM_SQR", "optimizer" },
        { "DROPOUT", "dropout" },
    };
    for (const auto & w : words) {
        if (has(op, w.first)) {
            return w.second;
        }
    }
    return "sums and copies";
}

struct row_key {
    std::string group, op, type;
    int64_t     m, k, n, batch;   // of a product C[m,n] = A[m,k] B[k,n]; else 0

    auto tie() const { return std::tie(group, op, type, m, k, n, batch); }
    bool operator<(const row_key & o) const { return tie() < o.tie(); }
};

static row_key key_of(const ggml_tensor * t) {
    const std::string op  = ggml_op_desc(t);
    row_key           key = { group_of(t, op), op, "", 0, 0, 0, 0 };
    if (is_product(t)) {
        const ggml_tensor * w = t->src[0];
        key.m                 = t->ne[1];
        key.k                 = t->op == GGML_OP_MUL_MAT ? w->ne[0] : w->ne[1];
        key.n                 = t->ne[0];
        key.batch             = t->ne[2] * t->ne[3];
        key.type              = ggml_type_name(w->type);
    }
    return key;
}

// Floating-point operations that one call is needed for; 0 where they are not what it takes time for. Causal attention is half of a square.
static double flops_of(const ggml_tensor * t) {
    if (is_product(t)) {
        const row_key key = key_of(t);
        return 2.0 * (double) (key.m * key.k * key.n * key.batch);
    }
    const std::string op = ggml_op_name(t->op);
    if (op == "ATTN" || op == "ATTN_BACK") {
        const ggml_tensor *q = t->src[0], *k = t->src[1];
        int32_t            causal;   // behind the scale
        memcpy(&causal, t->op_params + 1, sizeof(causal));
        const double scores = (double) (q->ne[0] * q->ne[1] * q->ne[2] * q->ne[3] * k->ne[2]) * (causal ? 0.5 : 1.0);
        return scores * (op == "ATTN" ? 4 : 8);
    }
    if (op == "LINEAR_CROSS_ENTROPY") {   // logits, dx and dw
        return 2.0 * (double) (t->src[0]->ne[0] * t->src[0]->ne[1] * t->src[1]->ne[1]) * (t->src[6] ? 3 : 2);
    }
    return 0;
}

void profiler::write(json_object & event) {
    roofs[1]          = measure_roof();
    const double roof = std::max(roofs[0], roofs[1]);

    const auto median = [&](auto && seconds_of) {
        std::vector<double> all(steps.size());
        for (size_t i = 0; i < all.size(); i++) {
            all[i] = seconds_of(i);
        }
        std::sort(all.begin(), all.end());
        return all[all.size() / 2];
    };

    struct sums {
        double seconds = 0, flops = 0, calls = 0;
    };
    std::map<row_key, sums> rows;
    std::vector<double>     inside(steps.size());   // operations and data, of each step
    for (const auto & [node, time] : nodes) {
        const std::vector<double> & seconds = time.seconds;
        sums &                      at      = rows[key_of(node)];
        const double                calls   = (double) time.calls / (double) steps.size();
        const auto                  of      = [&](size_t i) { return i < seconds.size() ? seconds[i] : 0.0; };
        at.seconds += median(of);
        for (size_t i = 0; i < inside.size(); i++) {
            inside[i] += of(i);
        }
        at.flops += flops_of(node) * calls;
        at.calls += calls;
    }

    const double data  = median([&](size_t i) { return steps[i].data; });
    const double host  = median([&](size_t i) { return steps[i].total - steps[i].data - inside[i]; });
    double       total = data + host;
    for (const auto & [key, sum] : rows) {
        total += sum.seconds;
    }

    std::string list = "[";
    const auto  add  = [&](json_object & row, double seconds) {
        row.num("ms", 1e3 * seconds).num("share", seconds / total);
        list += (list.size() > 1 ? "," : "") + row.done();
    };
    for (const auto & [key, sum] : rows) {
        json_object row;
        row.str("group", key.group).str("op", key.op).num("calls", sum.calls);
        if (key.batch) {
            row.str("type", key.type).num("m", key.m).num("k", key.k).num("n", key.n).num("batch", key.batch);
        }
        if (sum.flops > 0) {
            const double gflops = 1e-9 * sum.flops / sum.seconds;
            row.num("gflops", gflops).num("roof_share", gflops / roof);
        }
        add(row, sum.seconds);
    }
    for (const auto & [name, seconds] : { std::make_pair("data", data), std::make_pair("host", host) }) {
        json_object row;
        add(row.str("group", name).str("op", name).num("calls", 1), seconds);
    }
    const bool is_bf16 = precision != GGML_PREC_DEFAULT && precision != GGML_PREC_F32;
    event.num("steps", steps.size())
        .num("threads", be.n_threads)
        .str("precision", is_bf16 ? "bf16" : "f32")
        .num("ms_per_step", 1e3 * total)   // the sum of all rows
        .num("median_ms", 1e3 * median([&](size_t i) { return steps[i].total; }))
        .num("roof_gflops", roof)
        .raw("roof_before_after", "[" + shortest(roofs[0]) + "," + shortest(roofs[1]) + "]")
        .raw("rows", list + "]");
}

}   // namespace toy
