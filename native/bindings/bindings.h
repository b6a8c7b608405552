#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

void bind_convert(pybind11::module_ & m);
void bind_gguf(pybind11::module_ & m);
void bind_trainer(pybind11::module_ & m);
