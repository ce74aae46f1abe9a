// How a step walks the streams of an array, whoever has them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "arrays.h"
#include "coefficients.h"
#include "core/step.h"

namespace fastopt {

// Which stream of an array: the gradient, itself, or a state; then what is prepared, and a master.
constexpr size_t grad_stream = 0, param_stream = 1, first_state_stream = 2;

// Giving up the GIL and taking it back costs about as much as a step over this many elements.
constexpr index_t release_gil_from_elements = 1 << 12;

struct Streams {
  std::unique_ptr<Layout> layout;    // nullptr: dense
  std::unique_ptr<Storage> storage;  // nullptr: all is of the dtype that is computed in

  Streams() = default;
  // `views` are all but what is prepared; without the scales of 8-bit states. A bfloat16 parameter
  // may be rounded at random where it has no master.
  Streams(const RuleNames& rule, std::vector<View> views, bool has_master, bool at_random);
};

// Of all that is rounded at random in step t of the array of this number.
std::uint64_t key_of(std::uint64_t seed, std::int64_t t, size_t array);

// What rules prepare of arrays of one group, dtype and shape, as one array each.
class Stacks {
 public:
  // The next step, which has a place in one of them.
  void add(int group, const View& param, size_t step);

  // Memory for all that was added.
  void make(std::vector<ArrayStep>& steps);

  // Calls change(group, stack) for each.
  template <class Change>
  void change(Change change) const {
    for (const Stack& stack : stacks_) change(stack.group, stack.memory);
  }

  bool empty() const { return stacks_.empty(); }
  void clear() { stacks_.clear(); }

 private:
  struct Stack {
    int group;
    Dtype dtype;
    Shape shape;
    std::vector<size_t> steps;
    Array memory;
  };
  std::vector<Stack> stacks_;
};

}  // namespace fastopt
