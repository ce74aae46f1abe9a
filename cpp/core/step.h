// One optimizer step over a list of arrays, as pointers and sizes: nothing of Python or NumPy. Its
// phases: what is summed over the gradients is measured, from that follows their scale, and with it
// the rules are applied; what some of them need for that is prepared before.
#pragma once

#include <optional>
#include <vector>

#include "layout.h"
#include "parallel.h"

namespace fastopt {

constexpr int most_streams = 6, most_coefficients = 16, most_sums = 4;

struct ArrayStep {
  const Rule* rule;
  const double* coefficients;  // most_coefficients of them
  const Layout* layout;        // nullptr: dense, in one common order
  index_t size;
  int stream_count;
  void* streams[most_streams];  // gradient, parameter, state..., what is prepared
};

// fraction * 2^exponent, which reaches beyond a double.
struct Wide {
  double fraction;
  int exponent;
};

struct GradientNorm {
  Wide norm;    // of all gradients, as they are
  bool finite;  // every element is
};

GradientNorm measure(const Settings& settings, const std::vector<ArrayStep>& steps);

// What gradients are multiplied by: a factor for the rules' coefficients, or where that is beyond
// the numbers of a dtype, which its products need not be, two for the gradients themselves.
struct GradientScale {
  double factor = 1;
  bool is_beyond = false;
  double beyond[2] = {1, 1};
  double norm = 0;     // where it was measured: of all gradients, divided by the loss scale
  bool finite = true;  // every element is
};

// Divides by the loss scale, and clips to a norm of `max_norm` where there is one.
GradientScale scale_of(const Settings& settings, const std::vector<ArrayStep>& steps,
                       const std::optional<GradientNorm>& measured, double loss_scale,
                       std::optional<double> max_norm);

// For rules that prepare a stream: nothing else is written.
void prepare(const Settings& settings, const std::vector<ArrayStep>& steps,
             const GradientScale& scale);

// With `zero_grads` the gradients are zero afterwards.
void apply(const Settings& settings, const std::vector<ArrayStep>& steps,
           const GradientScale& scale, bool zero_grads);

void zero_gradients(const Settings& settings, const std::vector<ArrayStep>& steps);

}  // namespace fastopt
