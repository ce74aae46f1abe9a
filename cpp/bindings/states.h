// The memory of an optimizer's states.
#pragma once

#include <vector>

#include "arrays.h"

namespace fastopt {

// State `number` of these parameters: of this value, in the parameter's shape, dtype and order.
std::vector<Array> new_states(const std::vector<Array>& params, double value, int number);

// Arrays of one float64.
std::vector<Array> new_numbers(size_t count, double value);

}  // namespace fastopt
