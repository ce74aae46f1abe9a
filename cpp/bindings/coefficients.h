// The numbers that a rule gets from Python, by name.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "arrays.h"
#include "core/step.h"

namespace fastopt {

// How a state may be stored: with a sign, without, or as it computes.
enum class Coding { with_sign, without_sign, none };

struct StateName {
  std::string name;
  Coding coding;
};

std::vector<StateName> states_of(const Rule& rule);

// A rule of the kernel table, in each dtype.
struct RuleNames {
  std::vector<py::str> coefficients;
  size_t grad_scale = 0;  // the coefficient that the loss scale and clipping change
  std::vector<StateName> states;
  bool prepares = false;  // a stream beside the states
  bool factored = false;
  bool over_all = false;
  size_t row[2] = {};  // of the table, by Dtype
};

// What a rule keeps for an array, a group or all beside its states, one float64 each.
struct Numbers {
  static constexpr size_t most = 3;

  Numbers() = default;
  explicit Numbers(const py::dict& arrays);  // by name, each of one float64

  py::object owner;
  std::vector<py::str> names;
  double* at[most] = {};
};

// The coefficients of the arrays of one group that are at the same step, with the same numbers.
struct CoefficientSet {
  int group = 0;
  std::int64_t t = 0;
  bool started = false;
  double before[Numbers::most] = {}, after[Numbers::most] = {};
  const RuleNames* rule = nullptr;
  double value[most_coefficients] = {};
  unsigned given = 0;  // a bit for each

  // Takes those of this dict, and the numbers after the step.
  void set(const std::string& caller, py::handle values, const Numbers& numbers = {});
  void check_all_given(const std::string& caller) const;
  // The numbers after the step that are coefficients.
  void take(const double* combined, const Numbers& numbers);
  void scale_gradients(double factor) { value[rule->grad_scale] *= factor; }
};

class Rules {
 public:
  const RuleNames& find(const std::string& caller, const std::string& name);

 private:
  std::map<std::string, RuleNames> known_;
};

}  // namespace fastopt
