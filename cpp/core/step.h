// One optimizer step over a list of arrays, as pointers and sizes: nothing of Python or NumPy.
#pragma once

#include <vector>

#include "parallel.h"

namespace fastopt {

// Where the elements of an array's streams lie when they do not all lie one after the other.
struct Strided {
  std::vector<index_t> shape;                 // outer to inner
  std::vector<std::vector<index_t>> strides;  // of every stream, in bytes
};

struct Task {
  const Update* update;
  const double* coefficients;
  void* const* streams;    // gradient, parameter, state...
  const Strided* strided;  // nullptr: dense, in one common order
  int stream_count;
  index_t size;
};

// With `zero_grads` the gradients are zero afterwards.
void update(const Settings& settings, const std::vector<Task>& tasks, bool zero_grads);

void zero_gradients(const Settings& settings, const std::vector<Task>& tasks);

struct GradientSum {
  double norm;
  bool finite;  // every element is
};

GradientSum gradient_norm(const Settings& settings, const std::vector<Task>& tasks);

}  // namespace fastopt
