// Memory of output arrays. Mapping fresh memory costs as much as the work on it, so the memory of
// an output that was dropped is kept, within a bound, for the next one of its size.
#pragma once

#include <pybind11/numpy.h>

#include <vector>

#include "kernels.h"

namespace fastopt {

namespace py = pybind11;

// A new C-ordered array, not initialised.
py::array new_output(const std::vector<py::ssize_t>& shape, Dtype dtype);

// Returns what is kept to the system.
void empty_cache();

// The same, and nothing is kept from now on.
void close_cache();

}  // namespace fastopt
