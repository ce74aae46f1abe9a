// The arrays that results come in.
#pragma once

#include <pybind11/numpy.h>

#include <vector>

#include "kernels.h"

namespace fastopt {

namespace py = pybind11;

// A new array in C order whose elements are not set.
py::array new_output(const std::vector<py::ssize_t>& shape, Dtype dtype);

}  // namespace fastopt
