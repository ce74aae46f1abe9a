// A bound optimizer: which arrays it steps, by which rule, and where their state lies.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "arrays.h"
#include "core/step.h"
#include "tree.h"

namespace fastopt {

class Plan {
 public:
  // `caller` begins every message; `grouped` says that `params` is a list with one tree per group.
  Plan(const std::string& caller, py::handle params, bool grouped);

  std::vector<std::string> names() const;
  std::vector<int> groups() const;
  std::vector<py::array> params() const;
  py::array_t<std::int64_t> counts() const { return counts_; }
  py::array_t<bool> started() const { return started_; }

  // State `number` of these arrays: of this value, in the parameter's shape, dtype and order.
  std::vector<py::array> new_states(const std::vector<size_t>& indices, double value,
                                    int number) const;

  const char* isa() const { return isa_; }  // that made the last step

  // Between lock and unlock no step begins; a RuntimeError if one is under way: a schedule, or
  // another thread, may ask for it then. Whoever calls what changes the plan holds it.
  void lock();
  void unlock() { busy_ = 0; }

  // From now on the array of this index is stepped by this rule, with this state.
  void bind(size_t index, const std::string& rule, const std::vector<py::array>& state);

  // The coefficients of a group's rule that do not change from step to step.
  void set_constants(int group, const std::string& rule, const py::dict& values);

  struct Options {
    double loss_scale;
    std::optional<double> max_norm;
    bool skip_nonfinite, zero_grads;
  };
  Options options(py::handle loss_scale, py::handle max_norm, py::handle skip_nonfinite,
                  py::handle zero_grads) const;

  // Steps all arrays that have a gradient, or none. `fold(group, t, started)` returns the other
  // coefficients of the t-th step of a group's arrays whose state has or has not made a step, as a
  // dict. Returns the global norm of the gradients where it was needed. With `zero_grads` they are
  // zero afterwards.
  std::optional<double> step(const Settings& settings, py::handle params, py::handle grads,
                             py::handle fold, const Options& options);

  std::int64_t steps = 0;
  std::int64_t skipped_steps = 0;

 private:
  static constexpr size_t max_coefficients = 16;
  struct Rule {
    std::vector<py::str> names;  // of the coefficients
    size_t grad_scale = 0;       // the one that the loss scale and clipping change
    size_t state_count = 0;
    size_t update[2] = {};  // row of the kernel table, by Dtype
  };
  struct Coefficients {
    double value[max_coefficients] = {};
    unsigned given = 0;  // a bit for each
  };
  struct Batch;
  struct Leaf {  // what a step looks at comes first
    py::array param = py::reinterpret_steal<py::array>(py::handle());
    py::object other_param, grad;  // during a step: what is to take its place, and the gradient
    Seen seen_param, seen_grad;
    const Rule* rule = nullptr;
    const Batch* batch = nullptr;  // of the step under way
    index_t size = 0;
    std::vector<void*> streams;  // gradient, parameter, state...
    Dtype dtype = Dtype::float32;
    int group = 0;
    bool layout_known = false;
    std::unique_ptr<Strided> strided;
    std::string name;
    std::vector<py::array> state;
  };
  struct Batch {  // the arrays of one group that are at the same step
    int group;
    std::int64_t t;
    bool started;
    size_t grad_scale;
    Coefficients coefficients;
  };
  enum class Use { param, state, grad };
  struct Write {
    Extent extent;
    const char* reach;  // the farthest end among this and those before it
    py::array array;
    Use use;
    const Leaf* leaf;
  };

  void grow(Tree& tree, py::handle object, int depth, bool grouped, int group);
  void collect(const Tree& tree, py::handle params, py::handle grads);
  void collect_items(const Tree& tree, py::handle params, py::handle grads);
  void collect_array(size_t index, py::handle param, py::handle grad);
  void let_go();
  void check_param(Leaf& leaf);
  void check_grad(Leaf& leaf);
  bool share(const py::array& a, const py::array& b);
  void sort_apart(std::vector<Write>& writes);
  void check_overlap();
  void check_zeroed();
  void check_again() const;
  static void find_layout(Leaf& leaf);
  const Rule& find_rule(const std::string& name);
  const Batch& new_batch(py::handle fold, const Leaf& leaf, std::int64_t t, bool started);
  void set_coefficients(Coefficients& coefficients, const Rule& rule, py::handle values) const;
  std::string where(const char* argument, const std::string& name) const;
  std::string place(const Write& write) const;

  std::string caller_;
  Tree tree_;
  std::vector<Leaf> leaves_;
  std::map<std::string, Rule> rules_;
  std::vector<Coefficients> constants_;  // by group
  py::array_t<std::int64_t> counts_;     // completed steps of every array
  py::array_t<bool> started_;            // whether its state has made one of them
  std::vector<Write> writes_;            // parameters and state, by address
  bool writes_known_ = false;
  std::vector<size_t> zeroed_;      // leaves whose gradients are known to be fit for that
  std::atomic<unsigned> busy_ = 0;  // the process whose step is under way

  const char* isa_ = "";

  // Of the step under way:
  std::vector<size_t> stepped_;     // leaves with a gradient
  std::vector<size_t> swapped_;     // leaves whose parameter is another array
  bool python_ran_ = false;         // since the first look at an array
  std::vector<Leaf*> moved_grads_;  // those not yet checked for overlap
  std::vector<Batch> batches_;
  std::vector<Task> tasks_;
};

}  // namespace fastopt
