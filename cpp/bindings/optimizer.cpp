#include "optimizer.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <tuple>

#include <pthread.h>

#include "core/element.h"
#include "states.h"

namespace fastopt {
namespace {

// The number of this process among its forebears. A child has not got the thread that held
// something when it was forked.
std::atomic<unsigned> process = 1;
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { ++process; });

// Giving up the GIL and taking it back costs about as much as a step over this many elements.
constexpr index_t release_gil_from_elements = 1 << 12;

constexpr std::int64_t most_steps = std::int64_t(1) << 62;  // of an array

// Which array of a parameter: the gradient, itself, or a state.
constexpr size_t grad_stream = 0, param_stream = 1, first_state_stream = 2;

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

void BoundOptimizer::bind(size_t index, const std::string& rule_name,
                          const std::vector<Array>& state, const py::dict& numbers) {
  Parameter& parameter = parameters_.at(index);
  const RuleNames& rule = rules_.find(tree_.caller(), rule_name);
  if (state.size() != rule.state_count) {
    fail<std::invalid_argument>(tree_.caller(), ": ", rule_name, " has ", rule.state_count,
                                " states");
  }
  const View view = parameter.seen.view();
  for (const Array& array : state) {
    check_like(as_array(array, parameter.name), view, parameter.name, "its parameter has");
  }
  parameter.rule = &rule;
  parameter.state = state;
  parameter.numbers = Numbers(numbers);
  parameter.layout_known = written_known_ = false;
}

void BoundOptimizer::set_constants(int group, const std::string& rule, const py::dict& values,
                                   const py::object& between) {
  constants_.resize(std::max(constants_.size(), size_t(group) + 1));
  between_.resize(constants_.size());
  between_[size_t(group)] = between;
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
                                           const Options& options) {
  const auto& [loss_scale, max_norm, skip_nonfinite, zero_grads] = options;
  const std::scoped_lock held(*this);
  let_go();  // of what a step has left that a fork cut off
  struct LetGo {
    BoundOptimizer& optimizer;
    ~LetGo() { optimizer.let_go(); }
  } const let_go_at_end{*this};
  // First all that runs Python of the user's: containers and schedules. Then the arrays are looked
  // at: usually no Python runs between that and the kernels, so nothing changes what was seen.
  collect(params, grads);
  choose_coefficients(fold);
  look_at_arrays(settings, zero_grads);
  if (!stepped_.empty() && parameters_[stepped_[0]].rule->prepares) make_stacks();

  std::optional<GradientNorm> measured;
  GradientScale scale;
  bool skip = false;
  {
    index_t elements = 0;
    for (const ArrayStep& step : array_steps_) elements += step.size;
    std::optional<py::gil_scoped_release> release;
    if (elements >= release_gil_from_elements) release.emplace();
    if (max_norm || skip_nonfinite) measured = measure(settings, array_steps_);
    scale = scale_of(settings, array_steps_, measured, loss_scale, max_norm);
    skip = skip_nonfinite && !scale.finite;
    if (!skip) {
      for (CoefficientSet& set : sets_) set.scale_gradients(scale.factor);
      if (!stacks_.empty()) {
        prepare(settings, array_steps_, scale);
        change_stacks();
      }
      apply(settings, array_steps_, scale, zero_grads);
    } else if (zero_grads) {
      zero_gradients(settings, array_steps_);
    }
  }
  isa_ = settings.table->isa;
  count(skip);
  return measured ? std::optional(scale.norm) : std::nullopt;
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
      started[index] = std::ranges::any_of(parameter.state, has_nonzero);
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

// Checks what is not as it was at the last step, and fills the list of steps.
void BoundOptimizer::look_at_arrays(const Settings& settings, bool zero_grads) {
  python_ran_ = false;
  for (Parameter& parameter : parameters_) {
    if (parameter.other_array || !parameter.seen.is(parameter.array)) check_param(parameter);
    if (!parameter.grad) continue;
    if (!parameter.seen_grad.is(parameter.grad)) check_grad(parameter);
    if (!parameter.layout_known) find_layout(parameter);
    ArrayStep& step = array_steps_.emplace_back(parameter.step);
    step.rule = &settings.table->rules[parameter.rule->row[size_t(parameter.dtype)]];
    step.coefficients = parameter.coefficients->value;
    step.streams[grad_stream] = parameter.seen_grad.data();
    step.streams[param_stream] = parameter.seen.data();
  }
  if (!written_known_ || !moved_grads_.empty()) {
    check_overlap();
    zeroed_.clear();
  }
  if (zero_grads) check_zeroed();
  if (python_ran_) check_again();
}

// Memory for what the rules prepare.
void BoundOptimizer::make_stacks() {
  std::map<std::tuple<int, Dtype, Shape>, std::vector<size_t>> alike;
  size_t steps = 0;
  for (const Parameter& parameter : parameters_) {
    if (!parameter.grad) continue;
    const View view = parameter.seen.view();
    const Shape shape(view.shape, view.shape + view.ndim);
    alike[{parameter.group, parameter.dtype, shape}].push_back(steps++);
  }
  for (const auto& [kind, members] : alike) {
    auto [group, dtype, shape] = kind;
    shape.insert(shape.begin(), py::ssize_t(members.size()));
    const Stack& stack = stacks_.emplace_back(Stack{group, new_output(shape, dtype)});
    void* place = const_cast<void*>(stack.memory.data());
    for (const size_t member : members) {
      ArrayStep& step = array_steps_[member];
      step.streams[step.stream_count - 1] = place;
      place = at(place, step.size, item_size(dtype));
    }
  }
}

// Nothing was changed before, nor may the Python that runs here change the arrays.
void BoundOptimizer::change_stacks() const {
  const py::gil_scoped_acquire gil;
  for (const auto& [group, memory] : stacks_) between_[size_t(group)](memory);
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
    if (parameters_[index].rule->state_count > 0) started[index] = true;
  }
}

void BoundOptimizer::check_param(Parameter& parameter) {
  const py::handle param = parameter.other_array ? parameter.other_array : parameter.array;
  if (parameter.seen.matches(param)) {
    if (parameter.seen.move_to(param)) written_known_ = false;
  } else {
    python_ran_ = true;
    const std::string place = tree_.where("params", parameter.name);
    check_array_type(param, place);
    const Array array = as_array(param, place);
    const View view = view_of(array);
    if (!view.writable) fail<py::value_error>(place, " is read-only");
    if (overlaps_itself(view)) {
      fail<py::value_error>(place, " has elements that share memory (strides ", strides_text(array),
                            ")");
    }
    if (parameter.seen) check_like(array, parameter.seen.view(), place, "was bound with");
    parameter.seen = Seen(array);
    parameter.dtype = view.dtype;
    written_known_ = parameter.layout_known = false;
  }
  if (parameter.other_array) std::swap(parameter.array, parameter.other_array);
}

void BoundOptimizer::check_grad(Parameter& parameter) {
  if (parameter.seen_grad.matches(parameter.grad)) {
    parameter.seen_grad.move_to(parameter.grad);
  } else {
    python_ran_ = true;
    const std::string place = tree_.where("grads", parameter.name);
    parameter.grad = without_scalar(parameter.grad);
    check_array_type(parameter.grad, place);
    const Array array = as_array(parameter.grad, place);
    check_like(array, parameter.seen.view(), place, "its parameter has");
    parameter.seen_grad = Seen(array);
    parameter.layout_known = false;
  }
  moved_grads_.push_back(&parameter);
}

// Python that ran after a look at an array may have changed it.
void BoundOptimizer::check_again() const {
  for (const Parameter& parameter : parameters_) {
    if (!parameter.seen.is(parameter.array) ||
        (parameter.grad && !parameter.seen_grad.is(parameter.grad))) {
      fail<std::runtime_error>(tree_.where("params", parameter.name),
                               " or its gradient was changed during the step");
    }
  }
}

View BoundOptimizer::view_of_stream(size_t stream) const {
  const Parameter& parameter = parameters_[stream / most_streams];
  switch (stream % most_streams) {
    case grad_stream:
      return parameter.seen_grad.view();
    case param_stream:
      return parameter.seen.view();
    default:
      return view_of(parameter.state[stream % most_streams - first_state_stream]);
  }
}

std::string BoundOptimizer::place(size_t stream) const {
  const bool is_grad = stream % most_streams == grad_stream;
  return (stream % most_streams >= first_state_stream ? "the state of " : "") +
         tree_.where(is_grad ? "grads" : "params", parameters_[stream / most_streams].name);
}

void BoundOptimizer::check_apart(size_t stream, size_t other) {
  python_ran_ = true;
  if (share_memory(view_of_stream(stream), view_of_stream(other))) {
    fail<py::value_error>(place(stream), " shares memory with ", place(other));
  }
}

// Parameters and state may not share memory with each other, nor a gradient with any of them.
void BoundOptimizer::check_overlap() {
  const auto stream_of = [&](const Parameter& parameter, size_t stream) {
    return size_t(&parameter - parameters_.data()) * most_streams + stream;
  };
  const auto check = [&](const Parameter& parameter) {
    const size_t grad = stream_of(parameter, grad_stream);
    written_.meet(Extent(view_of_stream(grad)), [&](size_t other) { check_apart(grad, other); });
  };
  if (written_known_) {
    for (const Parameter* const parameter : moved_grads_) check(*parameter);
  } else {
    written_.clear();
    for (const Parameter& parameter : parameters_) {
      for (size_t s = param_stream; s < first_state_stream + parameter.state.size(); ++s) {
        const size_t stream = stream_of(parameter, s);
        written_.add(Extent(view_of_stream(stream)), stream);
      }
    }
    written_.sort([&](size_t stream, size_t other) { check_apart(other, stream); });
    for (Parameter& parameter : parameters_) {
      if (parameter.grad) {
        check(parameter);
      } else {
        parameter.seen_grad = Seen();  // not stepped now: its next gradient is checked anew
      }
    }
  }
  written_known_ = true;
  moved_grads_.clear();
}

// Gradients that are set to zero must be writable, and may not share memory with each other.
void BoundOptimizer::check_zeroed() {
  if (zeroed_ == stepped_) return;
  Regions regions;
  for (const size_t index : stepped_) {
    const Parameter& parameter = parameters_[index];
    const std::string place = tree_.where("grads", parameter.name);
    const View view = parameter.seen_grad.view();
    if (!view.writable) {
      fail<py::value_error>(place, " is read-only, and zero_grads=True writes to it");
    }
    if (overlaps_itself(view)) {
      fail<py::value_error>(place, " has elements that share memory (strides ",
                            strides_text(parameter.grad), "), and zero_grads=True writes to it");
    }
    regions.add(Extent(view), index * most_streams + grad_stream);
  }
  regions.sort([&](size_t stream, size_t other) { check_apart(other, stream); });
  zeroed_ = stepped_;
}

// How its streams are walked, and where they lie.
void BoundOptimizer::find_layout(Parameter& parameter) {
  const size_t first = size_t(&parameter - parameters_.data()) * most_streams;
  std::vector<View> views;
  for (size_t s = 0; s < first_state_stream + parameter.state.size(); ++s) {
    views.push_back(view_of_stream(first + s));
    parameter.step.streams[s] = views.back().data;
  }
  const View param = views[param_stream];
  Shape strides(size_t(param.ndim), item_size(param.dtype));
  if (parameter.rule->prepares) {  // in C order, somewhere else at every step
    for (size_t axis = strides.size(); axis-- > 1;) {
      strides[axis - 1] = strides[axis] * param.shape[axis];
    }
    views.push_back({nullptr, param.dtype, true, param.ndim, param.shape, strides.data()});
  }
  Layout layout = layout_of(views, param);
  parameter.layout = layout.dense() ? nullptr : std::make_unique<Layout>(std::move(layout));
  parameter.step.layout = parameter.layout.get();
  parameter.step.size = param.size();
  parameter.step.stream_count = int(views.size());
  parameter.layout_known = true;
}

std::vector<Array> BoundOptimizer::new_states(const std::vector<size_t>& indices, double value,
                                              int number) const {
  std::vector<Array> params;
  for (const size_t index : indices) params.push_back(parameters_.at(index).array);
  return fastopt::new_states(params, value, number);
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
  std::vector<Array> params;
  for (const Parameter& parameter : parameters_) params.push_back(parameter.array);
  return params;
}

}  // namespace fastopt
