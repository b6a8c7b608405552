// toy._native: plans (exact bytes of a configuration) and a Trainer that runs the runners' session step by step
#include "bindings.h"

#include "decode/decoder.h"
#include "engine/checkpoint.h"
#include "engine/error.h"
#include "engine/events.h"
#include "train/session.h"

#include <pybind11/numpy.h>

#include <map>

namespace py = pybind11;

using paths = std::map<std::string, std::string>;

static toy::inputs_lookup lookup(const paths & env) {
    return [env](const char * key) {
        const auto it = env.find(key);
        return it == env.end() ? std::string() : it->second;
    };
}

static py::dict plan(const std::string & config_kv, size_t corpus_tokens, const std::string & base) {
    const toy::session     s(toy::config::parse(config_kv), lookup({ { "GGUF", base } }), /*device =*/"cpu");
    const toy::memory_plan m = s.memory(corpus_tokens * sizeof(int32_t));
    py::list               tensors;
    for (const toy::param & p : s.w.params) {
        py::dict t;
        t["name"]  = p.name;
        t["shape"] = ggml_n_dims(p.w) == 1 ? std::vector<int64_t>{ p.w->ne[0] } : std::vector<int64_t>{ p.w->ne[0], p.w->ne[1] };
        tensors.append(t);
    }
    py::dict d;
    d["parameters"]       = s.w.n_params(false);
    d["total_parameters"] = s.total_params();
    d["weights"]          = m.weights;
    d["gradients"]        = m.gradients;
    d["moments"]          = m.moments;
    d["compute"]          = m.compute;
    d["inputs"]           = m.inputs;
    d["work"]             = m.work;
    d["base"]             = m.base;
    d["corpus"]           = m.corpus;
    d["runtime"]          = m.runtime;
    d["total"]            = m.total();
    d["tokens_per_step"]  = s.tokens_per_step();
    d["flops_per_token"]  = 3 * s.model.flops_per_token(s.hp);
    d["tensors"]          = tensors;
    return d;
}

// a tensor as a numpy array, slowest dimension first (as PyTorch shows it)
static py::array_t<float> to_numpy(const ggml_tensor * t) {
    std::vector<py::ssize_t> shape;
    for (int d = ggml_n_dims(t) - 1; d >= 0; d--) {
        shape.push_back(t->ne[d]);
    }
    py::array_t<float> out(shape);
    ggml_backend_tensor_get(t, out.mutable_data(), 0, ggml_nbytes(t));
    return out;
}

static py::array_t<int32_t> to_numpy(const std::vector<int32_t> & v, int64_t T) {
    py::array_t<int32_t> out(std::vector<py::ssize_t>{ (py::ssize_t) (v.size() / T), (py::ssize_t) T });
    std::copy(v.begin(), v.end(), out.mutable_data());
    return out;
}

void bind_trainer(py::module_ & m) {
    m.def("plan", &plan, py::arg("config_kv"), py::arg("corpus_tokens") = 0, py::arg("base") = "",
          "What a configuration needs, in bytes, from the allocated graph (memory is reserved, not touched), with parameters and tokens a step.");
    m.def(
        "shortest", [](float v) { return toy::shortest(v); }, py::arg("value"),
        "The shortest decimal that reads back as the same float32: a step line's value.");
    m.def("usable_cores", &toy::usable_cores, "Cores that this process may run on.");
    m.def("ggml_version", []() { return TOY_GGML_VERSION; }, "The ggml release under the patches.");

    py::class_<toy::session>(m, "Trainer", "A training session in this process, one step at a time: what a runner's loop drives.")
        .def(
            py::init([](const std::string & kv, const paths & env) {
                auto s = std::make_unique<toy::session>(toy::config::parse(kv), lookup(env), /*device =*/"cpu");
                s->set_data(lookup(env));
                s->start_weights(lookup(env));
                return s;
            }),
            py::arg("config_kv"), py::arg("env"),
            "env: what a runner finds in its environment (CORPUS, VAL_CORPUS, OFFSETS, MASK, IMG_DIR, GGUF, …). The graph of run.device, on the cpu.")
        .def(
            "step",
            [](toy::session & s) {
                const toy::step_result r = s.step();
                py::dict               d;
                d["step"]          = s.steps_done;
                d["loss"]          = r.loss;
                d["grad_norm"]     = r.grad_norm;
                d["learning_rate"] = r.learning_rate;
                d["bad_tensor"]    = r.bad_tensor;
                return d;
            },
            "One optimizer step. bad_tensor is not empty when loss or gradient is not finite; then nothing was updated.")
        .def("loss_and_gradients", &toy::session::loss_and_gradients,
             "Forward and backward over the next step's batch, without an update. Returns the loss.")
        .def(
            "evaluate", [](toy::session & s) { return s.evaluate().loss; }, "Mean validation loss, in nats a label.")
        .def(
            "accuracy", [](toy::session & s) { return s.evaluate().accuracy; }, "Share of the validation images that are classified right.")
        .def(
            "weights",
            [](const toy::session & s) {
                py::dict d;
                for (const toy::param & p : s.w.params) {
                    d[p.name.c_str()] = to_numpy(p.w);
                }
                return d;
            },
            "name -> float32 array (copies), slowest dimension first.")
        .def(
            "set_weight",
            [](toy::session & s, const std::string & name, const py::array_t<float, py::array::c_style | py::array::forcecast> & a) {
                ggml_tensor * t = s.w.lookup()(name);
                if (!t || a.size() != ggml_nelements(t)) {
                    throw toy::error("bad_flag", toy::EXIT_BAD_INPUT, "no tensor " + name + " of that size", "see weights()");
                }
                ggml_backend_tensor_set(t, a.data(), 0, ggml_nbytes(t));
            },
            py::arg("name"), py::arg("value"))
        .def(
            "gradients",
            [](const toy::session & s) {
                py::dict d;
                for (const toy::param & p : s.w.params) {
                    if (!p.frozen) {
                        d[p.name.c_str()] = to_numpy(p.g);
                    }
                }
                return d;
            },
            "name -> float32 array (copies) of the last step's summed gradients, before clipping; frozen tensors have none.")
        .def(
            "next_batch",
            [](toy::session & s) -> py::tuple {
                const toy::batch & b = s.last_batch;
                s.reader->next(s.cfg.train.micro_batch, s.last_batch);
                if (s.is_vision()) {
                    py::array_t<float> patches(std::vector<py::ssize_t>{
                        s.cfg.train.micro_batch, s.hp.n_patches(), (py::ssize_t) b.patches.size() / s.cfg.train.micro_batch / s.hp.n_patches() });
                    std::copy(b.patches.begin(), b.patches.end(), patches.mutable_data());
                    return py::make_tuple(patches, to_numpy(b.labels, (int64_t) b.labels.size()));
                }
                return py::make_tuple(to_numpy(b.tokens, s.cfg.model.context), to_numpy(b.labels, s.cfg.model.context));
            },
            "The next micro-batch as the training would read it: (tokens, labels), [sequences, context], label -1 is masked; of images\n"
            "(patches [images, patches, pixels], labels [1, images]). Moves on in the data.")
        .def(
            "save",
            [](const toy::session & s, const std::string & dir) {
                toy::train_state st;
                st.step = s.steps_done;
                st.data = s.reader->tell();
                return toy::checkpoints{ dir, "" }.save(s.cfg, s.w, st);
            },
            py::arg("dir"), "Write a checkpoint under dir; returns its path.")
        .def(
            "load",
            [](toy::session & s, const std::string & path) {
                const toy::train_state st = toy::checkpoints::load(path, s.cfg, "", s.w);
                s.steps_done              = st.step;
                s.reader->seek(st.data);
            },
            py::arg("path"), "Go on from a checkpoint directory (checkpoints/step_<N>).");

    py::class_<toy::decoder>(m, "Decoder", "A GGUF model with a KV cache, in this process.")
        .def(py::init([](const std::string & path, int context, int threads, const std::string & adapter) {
                 return std::make_unique<toy::decoder>(std::make_unique<toy::model_file>(path), context, threads, adapter);
             }),
             py::arg("path"), py::arg("context") = 0, py::arg("threads") = 1, py::arg("adapter") = "")
        .def(
            "eval",
            [](toy::decoder & d, const std::vector<int32_t> & tokens) {
                const std::vector<float> & l = d.eval(tokens.data(), (int) tokens.size());
                return py::array_t<float>((py::ssize_t) l.size(), l.data());
            },
            py::arg("tokens"), "Append tokens; returns the logits [vocabulary] after the last one.");
}
