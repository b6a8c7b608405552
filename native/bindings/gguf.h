#pragma once

#include "engine/gguf-file.h"

#include <pybind11/pybind11.h>

void set_metadata(toy::gguf_writer & w, const pybind11::dict & metadata);   // throws TypeError for a value that GGUF cannot hold
