// Softmax and the losses over whole arrays, as pointers and sizes: nothing of Python or NumPy.
#pragma once

#include <optional>
#include <vector>

#include "parallel.h"

namespace fastopt {

void softmax(const Settings& settings, Dtype dtype, bool logarithm, const void* x, void* y,
             index_t rows, index_t columns);

enum class Reduction { mean, sum, none };

// Rows of logits, one after the other, each with a label or with the probabilities of all classes.
struct CrossEntropy {
  Dtype dtype;
  index_t rows, columns;
  const void* logits;
  const long long* labels;  // 0 to columns - 1, or `ignored`; nullptr for probabilities
  long long ignored;        // -1 if none is
  const void* probabilities;
  const void* weight;  // of every class, or nullptr: all are 1
  double label_smoothing;
  Reduction reduction;
  void* losses;    // of every row, for none
  void* gradient;  // may be the logits
};

// The mean or the sum of the losses.
double cross_entropy(const Settings& settings, const CrossEntropy& task);

struct BadRow {
  index_t row;
  double sum, least;
};

// The first row that is no distribution, if there is one: a probability is negative, or the sum is
// off 1 by more than 1e-3.
std::optional<BadRow> find_bad_row(const Settings& settings, Dtype dtype, const void* probabilities,
                                   index_t rows, index_t columns);

// y is the gradient of the squares of x - target; no target is zero.
struct Residual {
  Dtype dtype;
  const void* x;
  const void* target;
  void* y;  // may be x or the target
  index_t n;
};

// The mean or the sum of the squares; for none each one in `errors`.
double squared_error(const Settings& settings, const Residual& residual, Reduction reduction,
                     void* errors);

// weight_decay / 2 times the sum of all squares. Without decay it is zero, also of infinities.
double l2_penalty(const Settings& settings, const std::vector<Residual>& residuals,
                  double weight_decay);

// y = exp(x), or log(x).
void elementwise(const Settings& settings, Dtype dtype, bool logarithm, const void* x, void* y,
                 index_t n);

}  // namespace fastopt
