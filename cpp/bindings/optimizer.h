// A bound optimizer: which arrays it steps, by which rule, and where their state lies.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "arrays.h"
#include "coefficients.h"
#include "core/step.h"
#include "streams.h"
#include "tree.h"

namespace fastopt {

class BoundOptimizer {
 public:
  // `caller` begins every message; `grouped` says that `params` is a list with one tree per group.
  BoundOptimizer(const std::string& caller, py::handle params, bool grouped);

  std::vector<std::string> names() const;
  std::vector<int> groups() const;
  std::vector<Array> params() const;
  ArrayOf<std::int64_t> counts() const { return counts_; }
  ArrayOf<bool> started() const { return started_; }

  const char* isa() const { return isa_; }  // that made the last step

  // Between lock and unlock no step begins; a RuntimeError if one is under way: a schedule, or
  // another thread, may ask for it then. Whoever calls what changes the optimizer holds it.
  void lock();
  void unlock() { busy_ = 0; }

  // From now on the array of this index is stepped by this rule, with its state of these arrays.
  // With a master among them, that is stepped, and the array rounded from it; where it is bfloat16
  // without one, it may be rounded at random.
  void bind(size_t index, const std::string& rule, const py::dict& state, const py::dict& numbers,
            bool at_random);

  // The array of this index is the part of a greater one that begins with this element.
  void set_first(size_t index, index_t element) { parameters_.at(index).first = element; }

  // The coefficients of a group's rule that do not change from step to step. What a rule prepares,
  // `between(stack)` changes in place before the update: it gets that of arrays of one shape and
  // dtype as one array. All that is rounded at random depends on the seed.
  void set_constants(int group, const std::string& rule, const py::dict& values,
                     const py::object& between, std::uint64_t seed);

  struct Options {
    double loss_scale;
    std::optional<double> max_norm;
    bool skip_nonfinite, zero_grads;
  };
  Options options(py::handle loss_scale, py::handle max_norm, py::handle skip_nonfinite,
                  py::handle zero_grads) const;

  // Steps all arrays that have a gradient, or none. `fold(group, t, started)` returns the other
  // coefficients of the t-th step of a group's arrays whose state has or has not made a step, as a
  // dict. Where they have numbers, it also gets them, by name, and returns the next ones. Returns
  // the global norm of the gradients where it was needed. With `zero_grads` they are zero
  // afterwards. Where others step the other parts of the arrays, `peers.agree()` is called once all
  // is checked, and `peers.add(sums, count)` returns the sums of all blocks, so many each.
  std::optional<double> step(const Settings& settings, py::handle params, py::handle grads,
                             py::handle fold, const Options& options,
                             py::handle peers = py::none());

  // Checks the arrays as a step does, and returns parameter and gradient of each.
  std::vector<std::pair<py::object, py::object>> look(py::handle params, py::handle grads,
                                                      bool zero_grads);

  std::int64_t steps = 0;
  std::int64_t skipped_steps = 0;

 private:
  struct Parameter {  // what a step looks at comes first
    py::object array, grad;
    py::object other_array;  // during a step: what is to take its place
    const RuleNames* rule = nullptr;
    const CoefficientSet* coefficients = nullptr;  // of the step under way
    Dtype dtype = Dtype::float32;
    int group = 0;
    Seen seen, seen_grad;
    bool layout_known = false;
    ArrayStep step{};  // without rule, coefficients, and the first two streams
    Streams streams;
    std::string name;
    std::vector<Array> state;  // and the master, the last one
    std::vector<std::optional<ArrayOf<float>>> scales;
    bool has_master = false, at_random = false;
    index_t first = 0;  // where it is a part of another array: the number of its first element
    Numbers numbers;
  };

  void collect(py::handle params, py::handle grads);
  void choose_coefficients(py::handle fold);
  const CoefficientSet& new_set(py::handle fold, const Parameter& parameter, std::int64_t t,
                                bool started);
  // Checks what is not as it was at the last step.
  void look_at(Parameter& parameter) {
    if (parameter.other_array || !parameter.seen.is(parameter.array)) check_param(parameter);
    if (parameter.grad && !parameter.seen_grad.is(parameter.grad)) check_grad(parameter);
  }
  void check_memory(bool zero_grads);
  Exchange meet(py::handle peers) const;
  void look_at_arrays(const Settings& settings, bool zero_grads);
  void make_stacks();
  void change_stacks() const;
  void count(bool skipped);
  void let_go();
  struct LetGo {
    BoundOptimizer& optimizer;
    ~LetGo() { optimizer.let_go(); }
  };
  void check_param(Parameter& parameter);
  void check_grad(Parameter& parameter);
  void find_layout(Parameter& parameter);
  void check_overlap();
  void check_zeroed();
  void check_again() const;

  // Streams of all parameters have numbers: `most_streams` for each.
  View view_of_stream(size_t stream) const;
  std::string place(size_t stream) const;
  void check_apart(size_t stream, size_t other);

  std::vector<Parameter> parameters_;
  Tree tree_;
  Rules rules_;
  std::vector<CoefficientSet> constants_;  // by group
  std::vector<py::object> between_;        // by group; None where the rule prepares nothing
  std::vector<std::uint64_t> seeds_;       // by group
  ArrayOf<std::int64_t> counts_;           // completed steps of every array
  ArrayOf<bool> started_;                  // whether its state has made one of them
  Regions written_;                        // parameters and state
  bool written_known_ = false;
  std::vector<size_t> zeroed_;      // whose gradients are known to be fit for that
  std::atomic<unsigned> busy_ = 0;  // the process whose step is under way
  mutable std::mutex arrays_;       // a step replaces some while another thread asks for them

  const char* isa_ = "";

  // Of the step under way:
  std::vector<size_t> stepped_;          // parameters with a gradient
  std::vector<size_t> swapped_;          // parameters that are other arrays
  bool python_ran_ = false;              // since the first look at an array
  std::vector<Parameter*> moved_grads_;  // those not yet checked for overlap
  std::vector<CoefficientSet> sets_;
  std::vector<ArrayStep> array_steps_;
  Stacks stacks_;
};

}  // namespace fastopt
