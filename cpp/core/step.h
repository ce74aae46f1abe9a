// One optimizer step over a list of arrays, as pointers and sizes: nothing of Python or NumPy. Its
// phases: what is summed over the gradients is measured, from that follows their scale, and with it
// the rules are applied; what some of them need for that is prepared before.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "layout.h"
#include "parallel.h"

namespace fastopt {

constexpr int most_streams = 7, most_coefficients = 20, most_sums = 4;

// What the streams of an array are stored as, where that is not what its rule computes in.
struct Storage {
  Dtype dtype[most_streams];
  bool at_random[most_streams];  // how bfloat16 is rounded
  float* scales[most_streams];   // of 8 bits, which are dense
  int master;     // the last stream, where the rule steps that and the parameter is rounded from it
  bool is_first;  // step: the master begins as its parameter
  index_t first;  // the number of the first element, where the array is a part of another
  std::uint64_t key;  // of all that is rounded at random in this step
};

// What a key is made of, one part after the other; of a stream, its number is the last.
std::uint64_t mixed(std::uint64_t key, std::uint64_t part);

struct ArrayStep {
  const Rule* rule;
  const double* coefficients;  // most_coefficients of them
  const Layout* layout;        // nullptr: dense, in one common order
  const Storage* storage;      // nullptr: all are of the rule's dtype
  index_t size;
  int stream_count;
  void* streams[most_streams];  // gradient, parameter, state..., what is prepared, master

  // The stream that the rule prepares, or -1.
  int prepared() const {
    if (rule->prepare == nullptr) return -1;
    return stream_count - 1 - (storage != nullptr && storage->master > 0);
  }
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

// Returns the sums of all blocks of whole arrays for those of the parts that are stepped here.
// So many each.
using Exchange = std::function<std::vector<double>(const std::vector<double>&, int)>;

GradientNorm measure(const Settings& settings, const std::vector<ArrayStep>& steps,
                     const Exchange& exchange = nullptr);

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

struct Applied {
  bool is_step = true;                      // false where a rule over all arrays leaves it out
  double combined[most_coefficients] = {};  // of the first array, where its rule adds up
};

// With `zero_grads` the gradients are zero afterwards.
Applied apply(const Settings& settings, const std::vector<ArrayStep>& steps,
              const GradientScale& scale, bool zero_grads, const Exchange& exchange = nullptr);

void zero_gradients(const Settings& settings, const std::vector<ArrayStep>& steps);

}  // namespace fastopt
