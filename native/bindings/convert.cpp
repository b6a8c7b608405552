// toy._native: weights from one file to another, in other types and layouts, with an adapter added
#include "engine/convert.h"

#include "bindings.h"
#include "engine/error.h"
#include "gguf.h"

namespace py = pybind11;

// Runs `f` without the interpreter's lock. What it throws keeps its kind: the exception has an attribute `kind`.
template <typename F>
static void run(const F & f) {
    try {
        py::gil_scoped_release release;
        f();
    } catch (const toy::error & e) {
        const py::object type = py::reinterpret_borrow<py::object>(e.exit_code == toy::EXIT_BAD_INPUT ? PyExc_ValueError : PyExc_RuntimeError);
        py::object       made = type(std::string(e.what()) + "\n" + e.hint);
        made.attr("kind")     = e.kind;
        PyErr_SetObject(type.ptr(), made.ptr());
        throw py::error_already_set();
    }
}

// Passes progress on, and lets Ctrl-C end the work: Python's signal handlers run here.
static toy::convert_progress to_python(const py::object & progress) {
    return [&progress](size_t done, size_t total) {
        py::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals() != 0) {
            throw py::error_already_set();
        }
        if (!progress.is_none()) {
            progress(done, total);
        }
    };
}

static void convert(const std::string & source, const std::string & out, const std::string & type, const std::string & adapter,
                    const py::object & progress) {
    const toy::convert_progress tell = to_python(progress);
    run([&]() { toy::convert(source, adapter, out, type, tell); });
}

static ggml_type type_of(const std::string & name) {
    for (const ggml_type t : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16 }) {
        if (name == ggml_type_name(t)) {
            return t;
        }
    }
    throw py::value_error("no type " + name + " here: f32, f16 or bf16");
}

static toy::row_order order_of(const std::string & name) {
    if (name == "as_is") {
        return toy::row_order::as_is;
    }
    if (name == "transposed") {
        return toy::row_order::transposed;
    }
    if (name == "split") {
        return toy::row_order::split;
    }
    if (name == "paired") {
        return toy::row_order::paired;
    }
    throw py::value_error("no row order " + name);
}

static void set_order(toy::tensor_rows & rows, const std::string & order, int64_t n_head) {
    rows.order  = order_of(order);
    rows.n_head = n_head;
    if ((rows.order == toy::row_order::split || rows.order == toy::row_order::paired) && (n_head < 1 || rows.n_rows() % (2 * n_head) != 0)) {
        throw toy::error("bad_file", toy::EXIT_BAD_INPUT,
                         toy::format("%s has %lld rows for %lld heads", rows.name.c_str(), (long long) rows.n_rows(), (long long) n_head),
                         "the numbers of heads and of rows do not go together: the file is damaged or of a variant that toy does not know");
    }
}

// (name, type, order, heads, first row, rows; 0: to the last)
using part = std::tuple<std::string, std::string, std::string, int64_t, int64_t, int64_t>;

static void export_tensors(const std::string & source, const std::string & adapter, const std::string & out, const std::string & header,
                           const std::vector<part> & parts, const py::object & progress) {
    const toy::convert_progress tell = to_python(progress);
    run([&]() {
        const toy::merged_model     model(source, adapter);
        std::vector<toy::raw_entry> entries;
        for (const auto & [name, type, order, n_head, first, count] : parts) {
            toy::tensor_rows rows = model.rows(name);
            if (count > 0) {
                const bool vector = rows.n_rows() == 1;   // of which a part is some of its numbers
                if (first < 0 || first + count > (vector ? rows.ne[0] : rows.n_rows()) || rows.delta) {
                    throw py::value_error(name + " has no such rows");
                }
                rows.data += vector ? ggml_row_size(rows.type, first) : first * ggml_row_size(rows.type, rows.ne[0]);
                rows.ne[vector ? 0 : 1] = count;
            }
            set_order(rows, order, n_head);
            toy::raw_entry e{ rows, type_of(type), {} };
            std::copy(rows.ne, rows.ne + GGML_MAX_DIMS, e.ne);
            entries.push_back(e);
        }
        toy::write_raw(out, header, entries, tell);
    });
}

// (name, shape as written and in ggml's order, file, offset in bytes, type there, order, heads)
using piece = std::tuple<std::string, std::vector<int64_t>, std::string, size_t, std::string, std::string, int64_t>;

static void import_tensors(const std::string & out, const py::dict & metadata, const std::vector<piece> & pieces, const std::string & type,
                           const py::object & progress) {
    const toy::convert_progress tell = to_python(progress);
    toy::gguf_writer            gguf;
    set_metadata(gguf, metadata);
    run([&]() {
        std::map<std::string, std::unique_ptr<toy::raw_file>> files;
        std::vector<toy::raw_entry>                           entries;
        for (const auto & [name, shape, path, offset, from, order, n_head] : pieces) {
            std::unique_ptr<toy::raw_file> & file = files[path];
            if (!file) {
                file = std::make_unique<toy::raw_file>(path);
            }
            toy::raw_entry e{ {}, GGML_TYPE_F32, { 1, 1, 1, 1 } };
            std::copy(shape.begin(), shape.begin() + std::min<size_t>(shape.size(), GGML_MAX_DIMS), e.ne);
            e.rows.name = name;
            e.rows.type = type_of(from);
            e.rows.data = file->data + offset;
            std::copy(e.ne, e.ne + GGML_MAX_DIMS, e.rows.ne);
            if (order == "transposed") {
                std::swap(e.rows.ne[0], e.rows.ne[1]);
            }
            if (offset + ggml_row_size(e.rows.type, e.rows.ne[0]) * e.rows.n_rows() > file->size) {
                throw toy::error("bad_file", toy::EXIT_BAD_INPUT, path + " ends before its tensor " + name, "copy or download the file again");
            }
            set_order(e.rows, order, n_head);
            entries.push_back(std::move(e));
        }
        toy::write_model(gguf, out, entries, type, tell);
    });
}

void bind_convert(py::module_ & m) {
    m.def("file_types", &toy::file_type::names, "The types that `convert` writes.");
    m.def("convert", &convert, py::arg("source"), py::arg("out"), py::arg("type"), py::arg("adapter") = "", py::arg("progress") = py::none(),
          "Write the GGUF `source` again with its matrices in `type` (\"\": each keeps its own), an adapter added first. progress(done, total) in "
          "bytes.\n"
          "The file appears whole or not at all. Raises ValueError or RuntimeError: a line, a hint, and `kind`.");
    m.def("export_tensors", &export_tensors, py::arg("source"), py::arg("adapter"), py::arg("out"), py::arg("header"), py::arg("parts"),
          py::arg("progress") = py::none(),
          "Write `header` and then parts of a GGUF's tensors: (name, type f32|f16|bf16, order as_is|transposed|split|paired, heads, first row, rows "
          "or 0).");
    m.def("import_tensors", &import_tensors, py::arg("out"), py::arg("metadata"), py::arg("pieces"), py::arg("type"),
          py::arg("progress") = py::none(),
          "Write a GGUF from tensors in other files: (name, shape in ggml's order, file, offset, type f32|f16|bf16, order, heads).");
}
