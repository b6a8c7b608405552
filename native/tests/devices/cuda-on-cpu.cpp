// The operations that patches 0035, 0037 and 0038 give ggml-cuda as a device of their own, their kernels run by the CPU: test-device's checks of them
// need no GPU. Memory, streams and cuBLAS are native/tests/cuda's; what ggml-cuda has besides is not here.
#include "attn.cuh"
#include "engine/device.h"
#include "ggml-backend-impl.h"
#include "ggml-cpu.h"
#include "opt-step-adamw.cuh"
#include "out-prod.cuh"
#include "training.cuh"

#include <algorithm>
#include <utility>
#include <vector>

namespace toy {

const char * const DEVICE = "cuda";

static bool sums_rows(const ggml_tensor * op) {
    return op->op == GGML_OP_REPEAT_BACK && ggml_nelements(op) == op->src[0]->ne[0] && ggml_is_contiguous(op->src[0]);
}

static bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_OPT_STEP_ADAMW:
            return true;
        case GGML_OP_OUT_PROD:
            return ggml_cuda_out_prod_supported(op);
        case GGML_OP_ATTN:
        case GGML_OP_ATTN_BACK:
            return ggml_cuda_attn_supported(0, op);
        default:
            return sums_rows(op) || ggml_cuda_training_supports_op(op);
    }
}

static ggml_status graph_compute(ggml_backend_t, ggml_cgraph * graph) {
    ggml_backend_cuda_context ctx;
    for (int i = 0; i < graph->n_nodes; i++) {
        ggml_tensor * node = graph->nodes[i];
        switch (node->op) {
            case GGML_OP_NONE:
            case GGML_OP_RESHAPE:
            case GGML_OP_VIEW:
            case GGML_OP_PERMUTE:
            case GGML_OP_TRANSPOSE:
                break;
            case GGML_OP_OPT_STEP_ADAMW:
                if (const int n = ggml_cuda_opt_steps_adamw(ctx, graph, i)) {
                    i += n;
                } else {
                    ggml_cuda_opt_step_adamw(ctx, node);
                }
                break;
            case GGML_OP_OUT_PROD:
                ggml_cuda_out_prod(ctx, node);
                break;
            case GGML_OP_ATTN:
                ggml_cuda_attn(ctx, node);
                break;
            case GGML_OP_ATTN_BACK:
                ggml_cuda_attn_back(ctx, node);
                break;
            case GGML_OP_REPEAT_BACK:
                GGML_ASSERT(ggml_cuda_sum_of_rows(ctx, node));
                break;
            default:
                GGML_ASSERT(ggml_cuda_training_op(ctx, node));
        }
    }
    return GGML_STATUS_SUCCESS;
}

// Memory of a device: full of numbers that no sum forgets, and with a gap of them behind each tensor, in which nothing may be written.
static const size_t        GAP   = 256;
static const unsigned char EMPTY = 0x7f;   // 3.4e38. Not a NaN, which is the same bits after a computation

struct memory {
    std::vector<char>                                        bytes;
    std::vector<std::pair<unsigned char *, unsigned char *>> tensors;   // where each begins and ends
};

static ggml_status init_tensor(ggml_backend_buffer_t buffer, ggml_tensor * t) {
    if (!t->view_src && buffer->usage != GGML_BACKEND_BUFFER_USAGE_COMPUTE) {   // whose tensors lie where others have been
        ((memory *) buffer->context)->tensors.push_back({ (unsigned char *) t->data, (unsigned char *) t->data + ggml_nbytes(t) });
    }
    return GGML_STATUS_SUCCESS;
}

// What has to be in the gap behind the tensor that ends here: zeros where a larger one goes on, as all gradients do behind each; -1: another
// tensor begins there.
static int wanted_in_gap(const memory & m, const unsigned char * end) {
    if (end + GAP > (const unsigned char *) m.bytes.data() + m.bytes.size()) {
        return -1;
    }
    int wanted = EMPTY;
    for (const auto & other : m.tensors) {
        if (other.first >= end && other.first < end + GAP) {
            return -1;
        }
        wanted = other.first < end && other.second > end ? 0 : wanted;
    }
    return wanted;
}

static void clear_buffer(ggml_backend_buffer_t buffer, uint8_t value) {
    memory & m = *(memory *) buffer->context;
    std::fill(m.bytes.begin(), m.bytes.end(), (char) value);
    for (const auto & t : m.tensors) {
        if (wanted_in_gap(m, t.second) == EMPTY) {
            std::fill(t.second, t.second + GAP, EMPTY);
        }
    }
}

static void free_buffer(ggml_backend_buffer_t buffer) {
    memory * m = (memory *) buffer->context;
    for (const auto & t : m->tensors) {
        const int wanted = wanted_in_gap(*m, t.second);
        GGML_ASSERT((wanted < 0 || std::all_of(
                                       t.second, t.second + GAP, [&](unsigned char c) { return c == wanted; })) &&
                    "written behind the end of a tensor");
    }
    delete m;
}

static ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_i iface = {};
    iface.free_buffer           = free_buffer;
    iface.get_base              = [](ggml_backend_buffer_t buffer) { return (void *) ((memory *) buffer->context)->bytes.data(); };
    iface.init_tensor           = init_tensor;
    iface.memset_tensor = [](ggml_backend_buffer_t, ggml_tensor * t, uint8_t value, size_t at, size_t n) { memset((char *) t->data + at, value, n); };
    iface.clear         = clear_buffer;
    iface.set_tensor = [](ggml_backend_buffer_t, ggml_tensor * t, const void * data, size_t at, size_t n) { memcpy((char *) t->data + at, data, n); };
    iface.get_tensor = [](ggml_backend_buffer_t, const ggml_tensor * t, void * data, size_t at, size_t n) { memcpy(data, (char *) t->data + at, n); };
    return ggml_backend_buffer_init(type, iface, new memory{ std::vector<char>(size, EMPTY), {} }, size);
}

ggml_backend_t open_device() {
    static ggml_backend_device      device = {};
    static ggml_backend_buffer_type type   = {};
    type.device                            = &device;
    type.iface.get_name                    = [](ggml_backend_buffer_type_t) { return "CUDA on the CPU"; };
    type.iface.alloc_buffer                = alloc_buffer;
    type.iface.get_alignment               = [](ggml_backend_buffer_type_t) { return (size_t) 16; };
    type.iface.get_alloc_size              = [](ggml_backend_buffer_type_t, const ggml_tensor * t) { return ggml_nbytes(t) + GAP; };
    type.iface.is_host                     = [](ggml_backend_buffer_type_t) { return true; };
    device.iface.get_memory                = [](ggml_backend_dev_t, size_t * left, size_t * total) { *left = *total = (size_t) 1 << 30; };
    device.iface.get_name                  = [](ggml_backend_dev_t) { return "CUDA on the CPU"; };
    device.iface.get_type                  = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
    device.iface.supports_op               = supports_op;
    device.iface.get_buffer_type           = [](ggml_backend_dev_t) { return &type; };
    device.iface.supports_buft             = [](ggml_backend_dev_t, ggml_backend_buffer_type_t buft) { return ggml_backend_buft_is_host(buft); };

    ggml_backend * backend       = new ggml_backend{};
    backend->device              = &device;
    backend->iface.get_name      = [](ggml_backend_t) { return "CUDA on the CPU"; };
    backend->iface.free          = [](ggml_backend_t b) { delete b; };
    backend->iface.graph_compute = graph_compute;
    return backend;
}

}   // namespace toy
