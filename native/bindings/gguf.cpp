// toy._native: GGUF metadata for Python, read and written by the same code as in the runners
#include "gguf.h"

#include "bindings.h"
#include "engine/error.h"

namespace py = pybind11;

static py::object kv_value(const gguf_context * g, int64_t id) {
    switch (gguf_get_kv_type(g, id)) {
        case GGUF_TYPE_UINT8:
            return py::int_(gguf_get_val_u8(g, id));
        case GGUF_TYPE_INT8:
            return py::int_(gguf_get_val_i8(g, id));
        case GGUF_TYPE_UINT16:
            return py::int_(gguf_get_val_u16(g, id));
        case GGUF_TYPE_INT16:
            return py::int_(gguf_get_val_i16(g, id));
        case GGUF_TYPE_UINT32:
            return py::int_(gguf_get_val_u32(g, id));
        case GGUF_TYPE_INT32:
            return py::int_(gguf_get_val_i32(g, id));
        case GGUF_TYPE_UINT64:
            return py::int_(gguf_get_val_u64(g, id));
        case GGUF_TYPE_INT64:
            return py::int_(gguf_get_val_i64(g, id));
        case GGUF_TYPE_FLOAT32:
            return py::float_(gguf_get_val_f32(g, id));
        case GGUF_TYPE_FLOAT64:
            return py::float_(gguf_get_val_f64(g, id));
        case GGUF_TYPE_BOOL:
            return py::bool_(gguf_get_val_bool(g, id));
        // vocabularies hold bytes that are not always UTF-8
        case GGUF_TYPE_STRING: {
            const std::string s = gguf_get_val_str(g, id);
            return py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(s.data(), s.size(), "surrogateescape"));
        }
        default:
            return py::none();
    }
}

template <typename T>
static py::list number_list(const void * data, size_t n) {
    py::list out(n);
    for (size_t i = 0; i < n; i++) {
        out[i] = py::cast(((const T *) data)[i]);
    }
    return out;
}

static py::object kv_array(const gguf_context * g, int64_t id) {
    const size_t n = gguf_get_arr_n(g, id);
    if (gguf_get_arr_type(g, id) == GGUF_TYPE_STRING) {
        py::list out(n);
        for (size_t i = 0; i < n; i++) {
            const std::string s = gguf_get_arr_str(g, id, i);
            out[i]              = py::reinterpret_steal<py::object>(PyUnicode_DecodeUTF8(s.data(), s.size(), "surrogateescape"));
        }
        return out;
    }
    const void * data = gguf_get_arr_data(g, id);
    switch (gguf_get_arr_type(g, id)) {
        case GGUF_TYPE_UINT8:
            return number_list<uint8_t>(data, n);
        case GGUF_TYPE_INT8:
            return number_list<int8_t>(data, n);
        case GGUF_TYPE_UINT16:
            return number_list<uint16_t>(data, n);
        case GGUF_TYPE_INT16:
            return number_list<int16_t>(data, n);
        case GGUF_TYPE_UINT32:
            return number_list<uint32_t>(data, n);
        case GGUF_TYPE_INT32:
            return number_list<int32_t>(data, n);
        case GGUF_TYPE_UINT64:
            return number_list<uint64_t>(data, n);
        case GGUF_TYPE_INT64:
            return number_list<int64_t>(data, n);
        case GGUF_TYPE_FLOAT32:
            return number_list<float>(data, n);
        case GGUF_TYPE_FLOAT64:
            return number_list<double>(data, n);
        case GGUF_TYPE_BOOL:
            return number_list<bool>(data, n);
        default:
            return py::none();
    }
}

static py::dict gguf_read(const std::string & path) {
    toy::gguf_file       file(path);
    const gguf_context * g = file.gguf;

    py::dict metadata;
    for (int64_t i = 0; i < gguf_get_n_kv(g); i++) {
        metadata[gguf_get_key(g, i)] = gguf_get_kv_type(g, i) == GGUF_TYPE_ARRAY ? kv_array(g, i) : kv_value(g, i);
    }
    py::list tensors;
    for (int64_t i = 0; i < gguf_get_n_tensors(g); i++) {
        const ggml_tensor * t = file.tensor(gguf_get_tensor_name(g, i));
        py::list            shape;
        for (int d = 0; d < ggml_n_dims(t); d++) {
            shape.append(t->ne[d]);
        }
        py::dict e;
        e["name"]        = t->name;
        e["shape"]       = shape;
        std::string type = ggml_type_name(t->type);   // "q4_K" -> "Q4_K": the spelling of llama.cpp's file types
        for (char & c : type) {
            c = toupper(c);
        }
        e["type"]    = type;
        e["n_bytes"] = ggml_nbytes(t);
        e["offset"]  = gguf_get_tensor_offset(g, i);
        tensors.append(e);
    }
    py::dict out;
    out["version"]     = gguf_get_version(g);
    out["alignment"]   = gguf_get_alignment(g);
    out["metadata"]    = metadata;
    out["tensors"]     = tensors;
    out["data_offset"] = gguf_get_data_offset(g);
    out["file_size"]   = file.file_size;
    return out;
}

void set_metadata(toy::gguf_writer & w, const py::dict & metadata) {
    for (const auto & kv : metadata) {
        const std::string key = py::cast<std::string>(kv.first);
        const py::handle  v   = kv.second;
        if (py::isinstance<py::bool_>(v)) {
            w.set_bool(key, py::cast<bool>(v));
        } else if (py::isinstance<py::int_>(v)) {
            const int64_t i = py::cast<int64_t>(v);
            i < 0 ? w.set_i32(key, (int32_t) i) : w.set_u32(key, (uint32_t) i);
        } else if (py::isinstance<py::float_>(v)) {
            w.set_f32(key, py::cast<float>(v));
        } else if (py::isinstance<py::str>(v)) {
            w.set_str(key, py::cast<std::string>(v));
        } else if (py::isinstance<py::list>(v)) {
            const py::list list = py::reinterpret_borrow<py::list>(v);
            if (list.size() == 0 || py::isinstance<py::str>(list[0])) {
                w.set_strs(key, py::cast<std::vector<std::string>>(list));
            } else if (py::isinstance<py::float_>(list[0])) {
                w.set_f32s(key, py::cast<std::vector<float>>(list));
            } else {
                w.set_i32s(key, py::cast<std::vector<int32_t>>(list));
            }
        } else {
            throw py::type_error("gguf_write: " + key + " has a type that GGUF metadata cannot hold");
        }
    }
}

static void gguf_write(const std::string & path, const py::dict & metadata) {
    toy::gguf_writer w;
    set_metadata(w, metadata);
    w.write(path);
}

void bind_gguf(py::module_ & m) {
    m.def("gguf_read", &gguf_read, py::arg("path"),
          "Metadata and tensor list of a GGUF file (no tensor data is read). Shapes are in ggml's order, the fastest dimension first.\n"
          "Raises ValueError with one line when the file is missing, not a GGUF, truncated or malformed.");
    m.def("gguf_write", &gguf_write, py::arg("path"), py::arg("metadata"),
          "Write a GGUF that holds metadata only (a vocabulary, say). The file appears whole or not at all.");
}
