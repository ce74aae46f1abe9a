// The optimizer behind torch's: it steps the tensors that groups and states hold at each step, by
// the core that NumPy's arrays are stepped by.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <sys/types.h>

#include "arrays.h"
#include "coefficients.h"
#include "core/element.h"
#include "core/step.h"
#include "streams.h"
#include "tensors.h"

namespace fastopt {

class TensorOptimizer {
 public:
  // `caller` begins every message; groups have these options; tensors of these classes are plain.
  TensorOptimizer(const std::string& caller, const std::vector<py::str>& options,
                  const py::tuple& classes)
      : caller_(caller), options_(options), tensors_(classes) {}

  // What the owner says of a group whose options are not what they were: the rules, of parameters
  // of no axis, of one, and of more, which have the same coefficients, those of the coefficients
  // that do not change from step to step, what changes a stack of what it prepares, or None, its
  // states of one number, "step" first where steps are counted, how parameters of two bytes are
  // rounded, and whether options are other objects when they change.
  struct Rounding {
    bool has_master, at_random;
    std::uint64_t seed;
  };
  void declare(size_t group, const std::vector<std::string>& rules, const py::dict& constants,
               const py::object& between, const std::vector<py::str>& scalars,
               const Rounding& rounding, bool settled);

  struct Request {
    double loss_scale;
    std::optional<double> max_norm;
    bool skip_nonfinite, zero_grads;
    bool measured() const { return max_norm || skip_nonfinite; }
  };
  struct Result {
    std::optional<double> norm;  // of all gradients, where it was asked for
    bool skipped = false;
    Applied applied{false};
    py::list changed;   // tensors
    py::dict combined;  // where a rule over all arrays made a step, its coefficients after that
  };

  // Steps all parameters in the owner's `param_groups` that have a gradient, or none. Their states
  // are in its `state` when a step was made. It also has `_regroup(group index)`,
  // `_plain(tensor, where, group index, measured)`, `_new_states(parameter, group index, names)`
  // and `_fold(group index, t, started, numbers)`.
  Result step(const Settings& settings, py::handle owner, const Request& request);

  void lock();
  void unlock() { busy_ = 0; }

 private:
  struct Group {
    CoefficientSet constants;
    py::object between;
    struct Kind {
      const RuleNames* rule = nullptr;
      std::vector<py::str> states;  // scalars, then the rule's, then the master's
    };
    std::vector<Kind> kinds;  // by the number of axes
    size_t scalar_count = 0;
    std::vector<py::str> numbers;  // the scalars but "step"
    bool counts_steps = false, settled = false;
    Rounding rounding{};
    std::vector<py::object> seen;  // the options
  };
  struct Slot {                                 // what a step looks at, of one parameter
    size_t group = 0, index = 0, position = 0;  // in the group, and of all
    py::handle param, grad;                     // as groups have them; held during a step, as all
    py::object state;                           // null where there was none
    py::object fresh;                           // states that begin with this step, or null
    bool started = false, known = false;
    int axes = 0;
    std::int64_t t = 1;
    Scalar scalars[1 + Numbers::most];
    double number[1 + Numbers::most] = {};
    const CoefficientSet* coefficients = nullptr;
    Geometry geometry;
    void* data[most_streams] = {};
    float* scales[most_streams] = {};  // of states of 8 bits
    Streams streams;
  };
  class Cursor;

  void look_at_groups(py::handle owner);
  void look_at_options(py::handle owner, py::handle options, size_t group);
  void look_at_group(py::handle owner, py::handle options, size_t group, Cursor& states);
  void look_at_param(Slot& slot, py::handle owner, Cursor& states);
  void look_at_states(Slot& slot, py::handle owner);
  void begin_states(Slot& slot, py::handle owner, size_t first, size_t count);
  void look_at_state(Slot& slot, py::handle owner, size_t held, size_t stream);
  float* look_at_scales(const Slot& slot, py::handle owner, size_t stream);
  Scalar look_at_scalar(const Slot& slot, py::handle owner, size_t held);
  DLTensor look(const Slot& slot, py::handle owner, py::handle tensor, size_t stream);
  DLTensor look_like_param(Slot& slot, py::handle owner, py::handle tensor, size_t stream);
  void look_at_grad(Slot& slot, py::handle owner);
  void place(Slot& slot, size_t stream, const DLTensor& tensor);
  void choose_coefficients(py::handle owner);
  const CoefficientSet& new_set(py::handle owner, const Slot& slot);
  void check_overlap(bool zero_grads);
  void lay_out(Slot& slot, const Settings& settings);
  void find_layout(Slot& slot) const;
  void make_stacks();
  void change_stacks() const;
  Result run(const Settings& settings, const Request& request);
  void count(const py::dict& states);
  void let_go();

  const Group::Kind& kind(const Slot& slot) const {
    const std::vector<Group::Kind>& kinds = groups_[slot.group].kinds;
    return kinds[std::min(size_t(slot.axes), kinds.size() - 1)];
  }
  const RuleNames& rule(const Slot& slot) const { return *kind(slot).rule; }
  bool has_master(const Slot& slot) const {
    return groups_[slot.group].rounding.has_master &&
           item_size(slot.geometry.dtype(param_stream)) == 2;
  }
  // All but what is prepared.
  size_t stream_count(const Slot& slot) const {
    return first_state_stream + rule(slot).states.size() + has_master(slot);
  }
  View view_of(size_t stream) const;
  std::string where(const Slot& slot, size_t stream) const;

  std::string caller_;
  std::vector<py::str> options_;
  Tensors tensors_;
  Rules rules_;
  std::deque<Group> groups_;
  std::vector<Slot> slots_;
  Regions written_;  // parameters and states of the slots
  size_t last_used_ = 0;
  std::atomic<pid_t> busy_ = 0;  // the process whose step is under way

  // Of the step under way:
  const Request* request_ = nullptr;
  size_t params_ = 0;                // so far
  size_t used_ = 0;                  // slots, the first ones
  bool moved_ = true;                // a parameter or a state is elsewhere than at the last step
  std::vector<size_t> moved_grads_;  // slots
  std::vector<py::object> held_;     // all that is looked at
  std::deque<CoefficientSet> sets_;
  std::vector<ArrayStep> array_steps_;
  Stacks stacks_;
};

}  // namespace fastopt
