// Softmax and the losses over whole arrays, as pointers and sizes: nothing of Python or NumPy.
#pragma once

#include "parallel.h"

namespace fastopt {

void softmax(const Settings& settings, Dtype dtype, bool logarithm, const void* x, void* y,
             index_t rows, index_t columns);

// The sum of the losses of all rows, which are written to task.losses.
double cross_entropy(const Settings& settings, Dtype dtype, const CrossEntropy& task, index_t rows);

// y = factor * (x - target); returns the sum of (x - target)^2. Without a target that is zero.
double residual(const Settings& settings, Dtype dtype, double factor, const void* x,
                const void* target, void* y, index_t n);

// y = exp(x), or log(x).
void elementwise(const Settings& settings, Dtype dtype, bool logarithm, const void* x, void* y,
                 index_t n);

}  // namespace fastopt
