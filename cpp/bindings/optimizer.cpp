#include "optimizer.h"

#include <algorithm>
#include <cmath>
#include <mutex>

#include <pthread.h>

#include "core/element.h"
#include "states.h"

namespace fastopt {
namespace {

// The number of this process among its forebears. A child has not got the thread that held
// something when it was forked.
std::atomic<unsigned> process = 1;
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { ++process; });

constexpr std::int64_t most_steps = std::int64_t(1) << 62;  // of an array

}  // namespace

BoundOptimizer::BoundOptimizer(const std::string& caller, py::handle params, bool grouped)
    : tree_(caller, params, grouped, [&](py::handle array, const std::string& name, int group) {
        Parameter& parameter = parameters_.emplace_back();
        parameter.name = name;
        parameter.group = group;
        parameter.other_array = owned(array.ptr());
      }) {
  for (Parameter& parameter : parameters_) check_param(parameter);
  sets_.reserve(parameters_.size());  // steps point into it
  const size_t count = parameters_.size();
  const Array memory = shared_memory(count * sizeof(std::int64_t));
  counts_ = ArrayOf<std::int64_t>(py::ssize_t(count),
                                  static_cast<const std::int64_t*>(memory.data()), memory);
  std::fill_n(counts_.mutable_data(), count, 0);
  started_ = ArrayOf<bool>(py::ssize_t(count));
  std::fill_n(started_.mutable_data(), count, false);
  check_overlap();
  tree_.rename(caller + ".step");
}

void BoundOptimizer::lock() {
  unsigned holder = busy_;
  if (holder == process || !busy_.compare_exchange_strong(holder, process)) {
    fail<std::runtime_error>(tree_.caller(), ": another step of this optimizer is under way");
  }
}

void BoundOptimizer::bind(size_t index, const std::string& rule_name, const py::dict& state,
                          const py::dict& numbers, bool at_random) {
  Parameter& parameter = parameters_.at(index);
  const RuleNames& rule = rules_.find(tree_.caller(), rule_name);
  const auto add = [&](const std::string& name) {
    const auto array = state[name.c_str()].cast<Array>();
    parameter.state.push_back(broadcast(array, parameter.seen.view()));
    parameter.scales.emplace_back();
    if (dtype_of(array) != Dtype::unsigned_8bit) return;
    parameter.scales.back() = state[(name + "_scale").c_str()].cast<ArrayOf<float>>();
  };
  parameter.state.clear();
  parameter.scales.clear();
  for (const StateName& each : rule.states) add(each.name);
  parameter.has_master = state.contains("master_param");
  if (parameter.has_master) add("master_param");
  parameter.rule = &rule;
  parameter.at_random = at_random;
  parameter.numbers = Numbers(numbers);
  parameter.layout_known = written_known_ = false;
}

void BoundOptimizer::set_constants(int group, const std::string& rule, const py::dict& values,
                                   const py::object& between, std::uint64_t seed) {
  constants_.resize(std::max(constants_.size(), size_t(group) + 1));
  between_.resize(constants_.size());
  seeds_.resize(constants_.size());
  between_[size_t(group)] = between;
  seeds_[size_t(group)] = seed;
  CoefficientSet& constants = constants_[size_t(group)] = {};
  constants.group = group;
  constants.rule = &rules_.find(tree_.caller(), rule);
  constants.set(tree_.caller(), values);
}

BoundOptimizer::Options BoundOptimizer::options(py::handle loss_scale, py::handle max_norm,
                                                py::handle skip_nonfinite,
                                                py::handle zero_grads) const {
  // Floats and bools are usual; fastopt._checks knows the others, and has the words.
  const auto checks = [] { return py::module_::import("fastopt._checks"); };
  const auto positive = [&](const char* argument, py::handle value, bool infinite) {
    if (PyFloat_CheckExact(value.ptr())) {
      const double number = PyFloat_AS_DOUBLE(value.ptr());
      if (number > 0 && (infinite || std::isfinite(number))) return number;
    }
    return checks()
        .attr("number")(tree_.where(argument, ""), value, 0.0, py::arg("above") = true,
                        py::arg("infinite") = infinite)
        .cast<double>();
  };
  const auto flag = [&](const char* argument, py::handle value) {
    if (PyBool_Check(value.ptr())) return value.is(py::handle(Py_True));
    return checks().attr("switch")(tree_.where(argument, ""), value).cast<bool>();
  };
  Options options{positive("loss_scale", loss_scale, false), std::nullopt,
                  flag("skip_nonfinite", skip_nonfinite), flag("zero_grads", zero_grads)};
  if (!max_norm.is_none()) options.max_norm = positive("max_norm", max_norm, true);
  return options;
}

std::optional<double> BoundOptimizer::step(const Settings& settings, py::handle params,
                                           py::handle grads, py::handle fold,
                                           const Options& options, py::handle peers) {
  const auto& [loss_scale, max_norm, skip_nonfinite, zero_grads] = options;
  const std::scoped_lock held(*this);
  let_go();  // of what a step has left that a fork cut off
  const LetGo let_go_at_end{*this};
  // First all that runs Python of the user's: containers and schedules. Then the arrays are looked
  // at: usually no Python runs between that and the kernels, so nothing changes what was seen.
  collect(params, grads);
  choose_coefficients(fold);
  look_at_arrays(settings, zero_grads);
  if (!stepped_.empty() && parameters_[stepped_[0]].rule->prepares) make_stacks();
  const Exchange exchange = meet(peers);

  std::optional<GradientNorm> measured;
  GradientScale scale;
  Applied applied;
  bool skip = false;
  {
    index_t elements = 0;
    for (const ArrayStep& step : array_steps_) elements += step.size;
    std::optional<py::gil_scoped_release> release;
    if (elements >= release_gil_from_elements) release.emplace();
    if (max_norm || skip_nonfinite) measured = measure(settings, array_steps_, exchange);
    scale = scale_of(settings, array_steps_, measured, loss_scale, max_norm);
    skip = skip_nonfinite && !scale.finite;
    if (!skip) {
      for (CoefficientSet& set : sets_) set.scale_gradients(scale.factor);
      if (!stacks_.empty()) {
        prepare(settings, array_steps_, scale);
        change_stacks();
      }
      applied = apply(settings, array_steps_, scale, zero_grads, exchange);
    } else if (zero_grads) {
      zero_gradients(settings, array_steps_);
    }
  }
  isa_ = settings.table->isa;
  if (!stepped_.empty() && parameters_[stepped_[0]].rule->over_all) {
    const Numbers& numbers = parameters_[stepped_[0]].numbers;
    for (CoefficientSet& set : sets_) set.take(applied.combined, numbers);
  }
  if (applied.is_step) count(skip);
  return measured ? std::optional(scale.norm) : std::nullopt;
}

// Waits for those who step the other parts of the arrays.
Exchange BoundOptimizer::meet(py::handle peers) const {
  if (peers.is_none()) return nullptr;
  peers.attr("agree")();
  check_again();
  return [peers](const std::vector<double>& sums, int count) {
    const py::gil_scoped_acquire gil;
    const ArrayOf<double> own(py::ssize_t(sums.size()), sums.data());
    const auto all = peers.attr("add")(own, count).cast<ArrayOf<double>>();
    return std::vector<double>(all.data(), all.data() + all.size());
  };
}

// Holds the arrays: whatever Python does to the containers, they stay until the end of the step.
void BoundOptimizer::collect(py::handle params, py::handle grads) {
  if (grads.is_none()) {
    fail<py::type_error>(tree_.where("grads", ""), " is None, expected the tree of params");
  }
  tree_.walk(params, grads, [&](size_t index, py::handle param, py::handle grad) {
    Parameter& parameter = parameters_[index];
    prefetch(param);
    prefetch(grad);
    if (!param.is(parameter.array)) {
      parameter.other_array = owned(param.ptr());
      swapped_.push_back(index);
    }
    if (grad.is_none()) return;
    parameter.grad = owned(grad.ptr());
    stepped_.push_back(index);
  });
}

// Of the arrays of a step. Those not yet checked for overlap, because it failed, are not taken for
// seen.
void BoundOptimizer::let_go() {
  for (Parameter* const parameter : moved_grads_) parameter->seen_grad = Seen();
  for (const size_t index : stepped_) parameters_[index].grad = py::object();
  for (const size_t index : swapped_) parameters_[index].other_array = py::object();
  moved_grads_.clear();
  stepped_.clear();
  swapped_.clear();
  sets_.clear();
  array_steps_.clear();
  stacks_.clear();
}

void BoundOptimizer::choose_coefficients(py::handle fold) {
  const std::int64_t* const counts = counts_.data();
  bool* const started = started_.mutable_data();
  const CoefficientSet* last = nullptr;
  for (const size_t index : stepped_) {
    Parameter& parameter = parameters_[index];
    parameter.seen.prefetch_shape(parameter.array);
    parameter.seen_grad.prefetch_shape(parameter.grad);
    const std::int64_t done = counts[index];
    if (done < 0 || done > most_steps) {  // the user may write it
      fail<py::value_error>(tree_.caller(), ": state['", parameter.name, "']['step'] is ", done,
                            ", expected a number from 0 to 2**62");
    }
    const std::int64_t t = done + 1;
    // A state of an array that has made steps without it, but was written to, is one to go on from.
    if (t > 1 && !started[index]) {
      const auto begin = parameter.state.begin();  // the master is no state of the rule
      const auto end = begin + std::ptrdiff_t(parameter.rule->states.size());
      started[index] = std::any_of(begin, end, has_nonzero);
    }
    const Numbers& numbers = parameter.numbers;
    const auto fits = [&](const CoefficientSet& set) {
      return set.group == parameter.group && set.t == t && set.started == started[index] &&
             std::equal(set.before, set.before + numbers.names.size(), numbers.at,
                        [](double x, const double* y) { return x == *y; });
    };
    if (last == nullptr || !fits(*last)) {
      const auto known = std::find_if(sets_.rbegin(), sets_.rend(), fits);
      last = known != sets_.rend() ? &*known : &new_set(fold, parameter, t, started[index]);
    }
    parameter.coefficients = last;
  }
}

const CoefficientSet& BoundOptimizer::new_set(py::handle fold, const Parameter& parameter,
                                              std::int64_t t, bool started) {
  CoefficientSet& set = sets_.emplace_back(constants_[size_t(parameter.group)]);
  set.t = t;
  set.started = started;
  const auto integer = [](long long value) { return checked(PyLong_FromLongLong(value)); };
  const py::object group = integer(set.group), step = integer(t);
  const Numbers& numbers = parameter.numbers;
  py::object given;
  if (!numbers.names.empty()) {
    py::dict values;
    for (size_t k = 0; k < numbers.names.size(); ++k) {
      set.before[k] = set.after[k] = *numbers.at[k];
      values[numbers.names[k]] = set.before[k];
    }
    given = values;
  }
  PyObject* arguments[] = {group.ptr(), step.ptr(), started ? Py_True : Py_False, given.ptr()};
  const size_t count = given ? 4 : 3;
  set.set(tree_.caller(), checked(PyObject_Vectorcall(fold.ptr(), arguments, count, nullptr)),
          numbers);
  set.check_all_given(tree_.caller());
  return set;
}

void BoundOptimizer::check_memory(bool zero_grads) {
  if (!written_known_ || !moved_grads_.empty()) {
    check_overlap();
    zeroed_.clear();
  }
  if (zero_grads) check_zeroed();
  if (python_ran_) check_again();
}

std::vector<std::pair<py::object, py::object>> BoundOptimizer::look(py::handle params,
                                                                    py::handle grads,
                                                                    bool zero_grads) {
  const std::scoped_lock held(*this);
  let_go();
  const LetGo let_go_at_end{*this};
  collect(params, grads);
  python_ran_ = false;
  for (Parameter& parameter : parameters_) look_at(parameter);
  check_memory(zero_grads);
  std::vector<std::pair<py::object, py::object>> arrays;
  for (const Parameter& parameter : parameters_) {
    arrays.emplace_back(parameter.array, parameter.grad ? parameter.grad : py::none());
  }
  return arrays;
}

// Fills the list of steps.
void BoundOptimizer::look_at_arrays(const Settings& settings, bool zero_grads) {
  python_ran_ = false;
  for (Parameter& parameter : parameters_) {
    look_at(parameter);
    if (!parameter.grad) continue;
    if (!parameter.layout_known) find_layout(parameter);
    ArrayStep& step = array_steps_.emplace_back(parameter.step);
    step.rule = &settings.table->rules[parameter.rule->row[size_t(compute_dtype(parameter.dtype))]];
    step.coefficients = parameter.coefficients->value;
    if (Storage* const storage = parameter.streams.storage.get()) {
      const std::int64_t t = parameter.coefficients->t;
      const auto index = size_t(&parameter - parameters_.data());
      storage->is_first = t == 1;
      storage->first = parameter.first;
      storage->key = key_of(seeds_[size_t(parameter.group)], t, index);
    }
    step.streams[grad_stream] = parameter.seen_grad.data();
    step.streams[param_stream] = parameter.seen.data();
  }
  check_memory(zero_grads);
}

// Memory for what the rules prepare.
void BoundOptimizer::make_stacks() {
  size_t step = 0;
  for (const Parameter& parameter : parameters_) {
    if (parameter.grad) stacks_.add(parameter.group, parameter.seen.view(), step++);
  }
  stacks_.make(array_steps_);
}

// Nothing was changed before, nor may the Python that runs here change the arrays.
void BoundOptimizer::change_stacks() const {
  const py::gil_scoped_acquire gil;
  stacks_.change([&](int group, const Array& stack) { between_[size_t(group)](stack); });
  check_again();
}

void BoundOptimizer::count(bool skipped) {
  if (skipped) {
    ++skipped_steps;
    return;
  }
  ++steps;
  std::int64_t* const counts = counts_.mutable_data();
  bool* const started = started_.mutable_data();
  for (const size_t index : stepped_) {
    ++counts[index];
    const Numbers& numbers = parameters_[index].numbers;
    for (size_t k = 0; k < numbers.names.size(); ++k) {
      *numbers.at[k] = parameters_[index].coefficients->after[k];
    }
    if (!parameters_[index].rule->states.empty()) started[index] = true;
  }
}

std::vector<std::string> BoundOptimizer::names() const {
  std::vector<std::string> names;
  for (const Parameter& parameter : parameters_) names.push_back(parameter.name);
  return names;
}

std::vector<int> BoundOptimizer::groups() const {
  std::vector<int> groups;
  for (const Parameter& parameter : parameters_) groups.push_back(parameter.group);
  return groups;
}

std::vector<Array> BoundOptimizer::params() const {
  std::vector<py::object> params;
  {
    const std::lock_guard held(arrays_);
    for (const Parameter& parameter : parameters_) params.push_back(parameter.array);
  }
  return {params.begin(), params.end()};
}

}  // namespace fastopt
