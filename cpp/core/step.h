// One optimizer step over a list of arrays, as pointers and sizes: nothing of Python or NumPy.
#pragma once

#include <optional>
#include <vector>

#include "parallel.h"

namespace fastopt {

// Where the elements of an array's streams lie when they do not all lie one after the other.
struct Strided {
  std::vector<index_t> shape;                 // outer to inner
  std::vector<std::vector<index_t>> strides;  // of every stream, in bytes
};

constexpr int most_streams = 5;

struct Task {
  const Update* update;
  const double* coefficients;
  void* const* streams;    // gradient, parameter, state...
  const Strided* strided;  // nullptr: dense, in one common order
  int stream_count;
  index_t size;
};

// What gradients are multiplied by: a factor for the rules' coefficients, or where that is beyond
// the numbers of a dtype, which its products need not be, two for the gradients themselves.
struct GradientScale {
  double factor = 1;
  bool is_beyond = false;
  double beyond[2] = {1, 1};
  double norm = 0;     // of all gradients, divided by the loss scale
  bool finite = true;  // every element is
};

// Divides by the loss scale, and clips to a norm of `max_norm` where there is one. The norm is
// measured if that or `measure` asks for it.
GradientScale scale_gradients(const Settings& settings, const std::vector<Task>& tasks,
                              double loss_scale, std::optional<double> max_norm, bool measure);

// With `zero_grads` the gradients are zero afterwards.
void update(const Settings& settings, const std::vector<Task>& tasks, const GradientScale& scale,
            bool zero_grads);

void zero_gradients(const Settings& settings, const std::vector<Task>& tasks);

}  // namespace fastopt
