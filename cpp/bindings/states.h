// The memory of an optimizer's states and counts.
#pragma once

#include <vector>

#include "arrays.h"

namespace fastopt {

// Bytes that the arrays over them share, and that none of those can resize or free.
py::array shared_memory(size_t bytes);

// State `number` of these parameters: of this value, in the parameter's shape, dtype and order.
std::vector<py::array> new_states(const std::vector<py::array>& params, double value, int number);

}  // namespace fastopt
