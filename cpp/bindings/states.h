// The memory of an optimizer's states.
#pragma once

#include <string>
#include <vector>

#include "arrays.h"

namespace fastopt {

// State `number` of arrays, in the model's shape and order, of this dtype, or without one of that
// in which it is computed; "bfloat16" is uint16 for NumPy. `value` is the elements', as stored.
std::vector<Array> new_states(const std::vector<Array>& models, const std::string& dtype,
                              double value, int number);

// Arrays of one float64.
std::vector<Array> new_numbers(size_t count, double value);

}  // namespace fastopt
