#include "tensor_optimizer.h"

#include <algorithm>
#include <cmath>
#include <mutex>

#include <pybind11/stl.h>
#include <unistd.h>

#include "config.h"
#include "core/element.h"

namespace fastopt {

// A child has not got the thread that stepped when it was forked.
void TensorOptimizer::lock() {
  const pid_t self = getpid();
  pid_t holder = busy_;
  if (holder == self || !busy_.compare_exchange_strong(holder, self)) {
    fail<std::runtime_error>(caller_, ".step: another step of this optimizer is under way");
  }
}

void TensorOptimizer::declare(size_t index, const std::vector<std::string>& rules,
                              const py::dict& constants, const py::object& between,
                              const std::vector<py::str>& scalars, const Rounding& rounding,
                              bool settled) {
  Group& group = groups_.at(index);
  group.constants = {};
  group.constants.group = int(index);
  group.constants.rule = &rules_.find(caller_, rules.at(0));
  group.constants.set(caller_, constants);
  group.between = between;
  group.rounding = rounding;
  group.settled = settled;
  group.counts_steps = !scalars.empty() && text(scalars[0]) == "step";
  group.scalar_count = scalars.size();
  group.numbers = {scalars.begin() + group.counts_steps, scalars.end()};
  group.kinds.clear();
  for (const std::string& name : rules) {
    auto& [rule, states] = group.kinds.emplace_back();
    rule = &rules_.find(caller_, name);
    states = scalars;
    for (const StateName& state : rule->states) states.push_back(state.name);
    states.push_back(py::str("master_param"));
    for (py::str& state : states) PyUnicode_InternInPlace(&state.ptr());  // as keys of a dict are
  }
  for (Slot& slot : slots_) slot.known = false;
  if (group.numbers.size() > Numbers::most) {
    fail<std::invalid_argument>(caller_, ": ", rules[0],
                                " has more numbers than there is room for");
  }
}

TensorOptimizer::Result TensorOptimizer::step(const Settings& settings, py::handle owner,
                                              const Request& request) {
  const std::scoped_lock held(*this);
  let_go();  // of what a step has left that a fork cut off
  struct LetGo {
    TensorOptimizer& optimizer;
    ~LetGo() { optimizer.let_go(); }
  } const let_go_at_end{*this};
  request_ = &request;
  // What may run Python comes first. Then nothing does until the kernels are through.
  look_at_groups(owner);
  choose_coefficients(owner);
  check_overlap(request.zero_grads);
  for (size_t i = 0; i < used_; ++i) lay_out(slots_[i], settings);
  if (used_ > 0 && rule(slots_[0]).prepares) make_stacks();
  Result result = run(settings, request);
  const auto& [is_step, combined] = result.applied;
  if (is_step) count(owner.attr("state"));
  for (size_t i = 0; i < used_; ++i) {
    if (is_step) result.changed.append(slots_[i].param);
    if (request.zero_grads) result.changed.append(slots_[i].grad);
  }
  if (is_step && used_ > 0 && rule(slots_[0]).over_all) {
    const std::vector<py::str>& names = rule(slots_[0]).coefficients;
    for (size_t k = 0; k < names.size(); ++k) result.combined[names[k]] = combined[k];
  }
  return result;
}

void TensorOptimizer::choose_coefficients(py::handle owner) {
  const CoefficientSet* last = nullptr;
  for (size_t i = 0; i < used_; ++i) {
    Slot& slot = slots_[i];
    const Group& group = groups_[slot.group];
    const double* const numbers = slot.number + group.counts_steps;
    const auto fits = [&](const CoefficientSet& set) {
      return size_t(set.group) == slot.group && set.t == slot.t && set.started == slot.started &&
             std::equal(set.before, set.before + group.numbers.size(), numbers);
    };
    if (last == nullptr || !fits(*last)) {
      const auto known = std::find_if(sets_.rbegin(), sets_.rend(), fits);
      last = known != sets_.rend() ? &*known : &new_set(owner, slot);
    }
    slot.coefficients = last;
  }
}

const CoefficientSet& TensorOptimizer::new_set(py::handle owner, const Slot& slot) {
  const Group& group = groups_[slot.group];
  CoefficientSet& set = sets_.emplace_back(group.constants);
  set.t = slot.t;
  set.started = slot.started;
  Numbers numbers;
  numbers.names = group.numbers;
  py::dict given;
  for (size_t k = 0; k < group.numbers.size(); ++k) {
    set.before[k] = set.after[k] = slot.number[group.counts_steps + k];
    given[group.numbers[k]] = set.before[k];
  }
  set.set(caller_, owner.attr("_fold")(slot.group, slot.t, slot.started, given), numbers);
  set.check_all_given(caller_);
  return set;
}

View TensorOptimizer::view_of(size_t stream) const {
  const Slot& slot = slots_[stream / most_streams];
  return slot.geometry.view(stream % most_streams, slot.data[stream % most_streams]);
}

std::string TensorOptimizer::where(const Slot& slot, size_t stream) const {
  const std::string param = "param_groups[" + std::to_string(slot.group) + "]['params'][" +
                            std::to_string(slot.index) + "]";
  if (stream == grad_stream) return caller_ + ".step: " + param + ".grad";
  if (stream == param_stream) return caller_ + ".step: " + param;
  return caller_ + ".step: the state of " + param;
}

// No two parameters or states may share memory, nor a gradient with any of them.
void TensorOptimizer::check_overlap(bool zero_grads) {
  const auto apart = [&](size_t stream, size_t other) {
    if (share_memory(view_of(stream), view_of(other))) {
      fail<py::value_error>(where(slots_[stream / most_streams], stream % most_streams),
                            " shares memory with ",
                            where(slots_[other / most_streams], other % most_streams));
    }
  };
  const auto check_itself = [&](size_t stream) {
    if (overlaps_itself(view_of(stream))) {
      fail<py::value_error>(where(slots_[stream / most_streams], stream % most_streams),
                            " has elements that share memory, as after expand()");
    }
  };
  std::vector<size_t> grads = moved_grads_;
  if (moved_ || used_ != last_used_) {
    written_.clear();
    grads.clear();
    for (size_t i = 0; i < used_; ++i) {
      const size_t count = stream_count(slots_[i]);
      for (size_t s = i * most_streams + param_stream; s < i * most_streams + count; ++s) {
        const bool is_factor = rule(slots_[i]).factored && s % most_streams >= first_state_stream;
        if (!is_factor) check_itself(s);  // else several elements of the matrix have one
        written_.add(Extent(view_of(s)), s);
      }
      grads.push_back(i);
    }
    written_.sort([&](size_t stream, size_t other) { apart(other, stream); });
  }
  for (const size_t i : grads) {
    const size_t grad = i * most_streams + grad_stream;
    written_.meet(Extent(view_of(grad)), [&](size_t other) { apart(grad, other); });
  }
  if (zero_grads) {
    Regions zeroed;
    for (size_t i = 0; i < used_; ++i) {
      check_itself(i * most_streams + grad_stream);
      zeroed.add(Extent(view_of(i * most_streams + grad_stream)), i * most_streams + grad_stream);
    }
    zeroed.sort([&](size_t stream, size_t other) { apart(other, stream); });
  }
  moved_ = false;
  last_used_ = used_;
  moved_grads_.clear();
}

void TensorOptimizer::lay_out(Slot& slot, const Settings& settings) {
  if (!slot.known) find_layout(slot);
  const RuleNames& rule = this->rule(slot);
  const Dtype computed = compute_dtype(slot.geometry.dtype(param_stream));
  ArrayStep& step = array_steps_.emplace_back();
  step.rule = &settings.table->rules[rule.row[size_t(computed)]];
  step.coefficients = slot.coefficients->value;
  step.layout = slot.streams.layout.get();
  step.size = slot.geometry.size();
  step.stream_count = int(stream_count(slot)) + rule.prepares;
  std::copy_n(slot.data, stream_count(slot), step.streams);
  if (has_master(slot)) step.streams[step.stream_count - 1] = slot.data[stream_count(slot) - 1];
  Storage* const storage = slot.streams.storage.get();
  step.storage = storage;
  if (storage == nullptr) return;
  std::copy_n(slot.scales, most_streams, storage->scales);
  storage->key = key_of(groups_[slot.group].rounding.seed, slot.t, slot.position);
}

// How its streams are walked, and as what.
void TensorOptimizer::find_layout(Slot& slot) const {
  std::vector<View> views;
  for (size_t s = 0; s < stream_count(slot); ++s) {
    views.push_back(slot.geometry.view(s, slot.data[s]));
  }
  try {
    slot.streams = {rule(slot), std::move(views), has_master(slot),
                    groups_[slot.group].rounding.at_random};
  } catch (const py::value_error& error) {
    fail<py::value_error>(where(slot, first_state_stream), ": ", error.what());
  }
  slot.known = true;
}

// Memory for what the rules prepare.
void TensorOptimizer::make_stacks() {
  for (size_t i = 0; i < used_; ++i) {
    stacks_.add(int(slots_[i].group), slots_[i].geometry.view(param_stream, nullptr), i);
  }
  stacks_.make(array_steps_);
}

void TensorOptimizer::change_stacks() const {
  const py::gil_scoped_acquire gil;
  stacks_.change([&](int group, const Array& stack) { groups_[size_t(group)].between(stack); });
}

TensorOptimizer::Result TensorOptimizer::run(const Settings& settings, const Request& request) {
  Result result;
  index_t elements = 0;
  for (const ArrayStep& step : array_steps_) elements += step.size;
  std::optional<py::gil_scoped_release> release;
  if (elements >= release_gil_from_elements) release.emplace();
  std::optional<GradientNorm> measured;
  if (request.measured()) measured = measure(settings, array_steps_);
  const GradientScale scale =
      scale_of(settings, array_steps_, measured, request.loss_scale, request.max_norm);
  if (measured) result.norm = scale.norm;
  result.skipped = request.skip_nonfinite && !scale.finite;
  if (!result.skipped) {
    for (CoefficientSet& set : sets_) set.scale_gradients(scale.factor);
    if (!stacks_.empty()) {
      prepare(settings, array_steps_, scale);
      change_stacks();
    }
    result.applied = apply(settings, array_steps_, scale, request.zero_grads);
  } else if (request.zero_grads) {
    zero_gradients(settings, array_steps_);
  }
  return result;
}

void TensorOptimizer::count(const py::dict& states) {
  for (size_t i = 0; i < used_; ++i) {
    Slot& slot = slots_[i];
    const Group& group = groups_[slot.group];
    if (group.counts_steps) slot.scalars[0].set(double(slot.t));
    for (size_t k = 0; k < group.numbers.size(); ++k) {
      slot.scalars[group.counts_steps + k].set(slot.coefficients->after[k]);
    }
    if (!slot.fresh) continue;
    if (!slot.state) {
      states[slot.param] = slot.fresh;
    } else {
      slot.state.attr("update")(slot.fresh);
    }
  }
}

// Of the tensors of a step. What was not yet checked for overlap is not known.
void TensorOptimizer::let_go() {
  moved_ |= !moved_grads_.empty();
  for (size_t i = 0; i < used_; ++i) {
    slots_[i].state = {};
    slots_[i].fresh = {};
  }
  moved_grads_.clear();
  held_.clear();
  sets_.clear();
  array_steps_.clear();
  stacks_.clear();
  used_ = params_ = 0;
  request_ = nullptr;
}

void bind_tensor_optimizer(py::module_& m) {
  py::class_<TensorOptimizer>(m, "TensorOptimizer")
      .def(py::init<const std::string&, const std::vector<py::str>&, const py::tuple&>(),
           py::arg("caller"), py::arg("options"), py::arg("classes"))
      .def("declare",
           [](TensorOptimizer& optimizer, size_t group, const std::vector<std::string>& rules,
              const py::dict& constants, const py::object& between,
              const std::vector<py::str>& scalars,
              const std::tuple<bool, bool, std::uint64_t>& rounding, bool settled) {
             const auto [has_master, at_random, seed] = rounding;
             optimizer.declare(group, rules, constants, between, scalars,
                               {has_master, at_random, seed}, settled);
           })
      .def(
          "step",
          [](TensorOptimizer& optimizer, py::handle owner, int threads, double loss_scale,
             std::optional<double> max_norm, bool skip_nonfinite, bool zero_grads) {
            const CurrentSettings current;
            Settings settings = current.get();
            if (threads > 0 && settings.threads == CurrentSettings::global.load()->threads) {
              settings.threads = threads;
            }
            const TensorOptimizer::Result result =
                optimizer.step(settings, owner, {loss_scale, max_norm, skip_nonfinite, zero_grads});
            return py::make_tuple(result.norm, result.skipped, result.changed, result.combined);
          },
          py::arg("owner"), py::arg("threads"), py::arg("loss_scale"), py::arg("max_norm"),
          py::arg("skip_nonfinite"), py::arg("zero_grads"));
}

}  // namespace fastopt
