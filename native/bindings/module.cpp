// toy._native: the engine of the runners, in-process, for the command line, tests and notebooks
#include "bindings.h"

#include "engine/error.h"
#include "ggml.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
    m.doc() = "The engine of toy's runners, in-process.";
    py::register_exception_translator([](std::exception_ptr p) {
        try {
            if (p) {
                std::rethrow_exception(p);
            }
        } catch (const toy::error & e) {
            const std::string text = e.hint.empty() ? e.what() : std::string(e.what()) + "\n" + e.hint;
            PyErr_SetString(e.exit_code == toy::EXIT_BAD_INPUT ? PyExc_ValueError : PyExc_RuntimeError, text.c_str());
        }
    });
    // what ggml says on stderr would stand before the one error line that a user gets
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    bind_convert(m);
    bind_gguf(m);
    bind_trainer(m);
}
