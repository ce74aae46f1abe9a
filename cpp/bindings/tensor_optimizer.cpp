#include "tensor_optimizer.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <tuple>

#include <pybind11/stl.h>

#include "config.h"
#include "core/element.h"

namespace fastopt {
namespace {

// Giving up the GIL and taking it back costs about as much as a step over this many elements.
constexpr index_t release_gil_from_elements = 1 << 12;

constexpr size_t grad_stream = 0, param_stream = 1, first_state_stream = 2;

py::str interned(const char* name) {
  return checked(PyUnicode_InternFromString(name));
}

}  // namespace

// Looks up the keys of a dict that usually come in its order. One without a hash of its own, as
// that of a tensor in Python is, costs most of a look.
class TensorOptimizer::Cursor {
 public:
  explicit Cursor(py::handle dict) : dict_(dict.ptr()) {}

  // Null if the dict has no such key.
  py::handle find(py::handle wanted) {
    if (const py::handle value = next(wanted)) return value;
    PyObject* const value = PyDict_GetItemWithError(dict_, wanted.ptr());
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

  // Its value if it is the next key. One that is passed over is not waited for.
  py::handle next(py::handle wanted) {
    PyObject *key = nullptr, *value = nullptr;
    py::ssize_t position = position_;
    if (!PyDict_Next(dict_, &position, &key, &value) || key != wanted.ptr()) return {};
    position_ = position;
    return value;
  }

 private:
  PyObject* const dict_;
  py::ssize_t position_ = 0;
};

void TensorOptimizer::lock() {
  if (busy_.exchange(true)) {
    fail<std::runtime_error>(caller_, ".step: another step of this optimizer is under way");
  }
}

void TensorOptimizer::declare(size_t index, const std::string& rule, const py::dict& constants,
                              const py::object& between, const std::vector<py::str>& scalars,
                              const std::vector<py::str>& states, bool settled) {
  Group& group = groups_.at(index);
  group.constants = {};
  group.constants.group = int(index);
  group.constants.rule = &rules_.find(caller_, rule);
  group.constants.set(caller_, constants);
  group.between = between;
  group.scalars = scalars;
  group.states = states;
  group.settled = settled;
  group.counts_steps = !scalars.empty() && text(scalars[0]) == "step";
  if (states.size() != group.constants.rule->state_count ||
      scalars.size() - group.counts_steps > Numbers::most) {
    fail<std::invalid_argument>(caller_, ": ", rule, " has other states");
  }
}

TensorOptimizer::Result TensorOptimizer::step(const Settings& settings, py::handle owner,
                                              const Request& request) {
  const std::scoped_lock held(*this);
  struct LetGo {
    TensorOptimizer& optimizer;
    ~LetGo() { optimizer.let_go(); }
  } const let_go_at_end{*this};
  request_ = &request;
  // What may run Python comes first. Then nothing does until the kernels are through.
  const py::list groups = owner.attr("param_groups");
  const py::dict states = owner.attr("state");
  Cursor cursor(states);
  for (size_t i = 0; i < groups.size(); ++i) look_at_group(owner, groups[i], i, cursor);
  choose_coefficients(owner);
  check_overlap(request.zero_grads);
  for (size_t i = 0; i < used_; ++i) lay_out(slots_[i], settings);
  if (used_ > 0 && rule(slots_[0]).prepares) make_stacks();
  Result result = run(settings, request);
  if (!result.skipped) count(states);
  for (size_t i = 0; i < used_; ++i) {
    if (!result.skipped) result.changed.append(slots_[i].param);
    if (request.zero_grads) result.changed.append(slots_[i].grad);
  }
  return result;
}

void TensorOptimizer::look_at_options(py::handle owner, py::handle options, size_t index) {
  while (groups_.size() <= index) groups_.emplace_back();
  Group& group = groups_[index];
  bool same = group.settled && group.seen.size() == options_.size();
  group.seen.resize(options_.size());
  for (size_t k = 0; k < options_.size(); ++k) {
    PyObject* const value = PyDict_GetItemWithError(options.ptr(), options_[k].ptr());
    if (value == nullptr) {
      if (PyErr_Occurred()) throw py::error_already_set();
      fail<py::key_error>(caller_, ": param_groups[", index, "] has no ", text(options_[k]));
    }
    if (group.seen[k].ptr() == value) continue;
    group.seen[k] = owned(value);
    same = false;
  }
  if (same) return;
  group.settled = false;  // until it is declared anew
  owner.attr("_regroup")(index);
}

void TensorOptimizer::look_at_group(py::handle owner, py::handle options, size_t group,
                                    Cursor& states) {
  static const py::handle params_name = interned("params").release();
  static const py::handle grad_name = interned("grad").release();
  look_at_options(owner, options, group);
  const py::object list = options[params_name];
  const py::object params = checked(PySequence_Fast(list.ptr(), "params is not a list"));
  for (py::ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params.ptr()); ++i) {
    const py::object param = owned(PySequence_Fast_GET_ITEM(params.ptr(), i));
    const py::object grad = checked(PyObject_GetAttr(param.ptr(), grad_name.ptr()));
    if (grad.is_none()) {
      states.next(param);
      continue;
    }
    if (slots_.size() == used_) slots_.emplace_back();
    Slot& slot = slots_[used_++];
    slot.group = group;
    slot.index = size_t(i);
    slot.param = param;
    slot.grad = grad;
    look_at_param(slot, owner, param, grad, states);
    held_.push_back(param);
    held_.push_back(grad);
  }
}

void TensorOptimizer::look_at_param(Slot& slot, py::handle owner, py::handle param, py::handle grad,
                                    Cursor& states) {
  const Group& group = groups_[slot.group];
  slot.state = {};
  const DLTensor own = look(slot, owner, param, param_stream);
  const size_t streams = first_state_stream + group.states.size();
  if (slot.geometry.set_param(own, streams)) {
    slot.known = false;
    moved_ = true;
  }
  place(slot, param_stream, own);
  place(slot, grad_stream, look_like_param(slot, owner, grad, grad_stream));
  if (group.scalars.empty() && group.states.empty()) return;
  if (const py::handle state = states.find(param)) slot.state = owned(state.ptr());
  look_at_states(slot, owner, param);
}

// The states that it has, and what has to begin.
void TensorOptimizer::look_at_states(Slot& slot, py::handle owner, py::handle param) {
  const Group& group = groups_[slot.group];
  py::list missing;
  const py::dict known = slot.state ? py::dict(slot.state) : py::dict();
  Cursor cursor(known);
  std::vector<py::object> tensors;  // of scalars, then states
  for (const auto* names : {&group.scalars, &group.states}) {
    for (const py::str& name : *names) {
      const py::handle tensor = cursor.find(name);
      tensors.push_back(tensor && !tensor.is_none() ? owned(tensor.ptr()) : py::object());
      if (!tensors.back()) missing.append(name);
    }
  }
  slot.started = true;
  if (!missing.empty()) {
    slot.fresh = owner.attr("_new_states")(param, slot.group, missing);
    size_t k = 0;
    for (const auto* names : {&group.scalars, &group.states}) {
      for (const py::str& name : *names) {
        py::object& tensor = tensors[k++];
        if (tensor) continue;
        tensor = slot.fresh[name];
        if (names == &group.states) slot.started = false;
      }
    }
  }
  const auto scalar = [&](size_t k) {
    const std::optional<Scalar> scalar =
        Scalar::of(look(slot, owner, tensors[k], first_state_stream));
    if (!scalar) {
      fail<py::value_error>(caller_, ".step: the state '", text(group.scalars[k]), "' of ",
                            where(slot, param_stream), " is not one number");
    }
    return *scalar;
  };
  size_t k = 0;
  if (group.counts_steps) {
    slot.step_count = scalar(k++);
    const double done = slot.step_count.get();
    if (!(done >= 0 && done < 0x1p62)) {
      fail<py::value_error>(caller_, ".step: the state 'step' of ", where(slot, param_stream),
                            " is ", done, ", expected a number from 0 to 2**62");
    }
    slot.t = std::int64_t(done) + 1;
  }
  slot.numbers.names.assign(group.scalars.begin() + py::ssize_t(k), group.scalars.end());
  for (size_t n = 0; k < group.scalars.size(); ++k, ++n) {
    slot.scalars[n] = scalar(k);
    slot.number[n] = slot.scalars[n].get();
    slot.numbers.at[n] = &slot.number[n];
  }
  for (size_t s = first_state_stream; k < tensors.size(); ++k, ++s) {
    place(slot, s, look_like_param(slot, owner, tensors[k], s));
  }
  held_.insert(held_.end(), tensors.begin(), tensors.end());
}

// The owner has what a tensor of another class keeps, or the words for one that cannot be used.
DLTensor TensorOptimizer::look(const Slot& slot, py::handle owner, py::handle tensor,
                               size_t stream) {
  DLTensor found;
  if (tensors_.look(tensor, found)) return found;
  const py::object plain =
      owner.attr("_plain")(tensor, where(slot, stream), slot.group, request_->measured());
  if (!tensors_.look(plain, found)) {
    fail<py::value_error>(where(slot, stream), " is not aligned to its element size");
  }
  held_.push_back(plain);
  return found;
}

DLTensor TensorOptimizer::look_like_param(Slot& slot, py::handle owner, py::handle tensor,
                                          size_t stream) {
  const DLTensor found = look(slot, owner, tensor, stream);
  if (!slot.geometry.fits(found)) {
    fail<py::value_error>(where(slot, stream), " has not the shape and dtype of ",
                          where(slot, param_stream), ": ", text(tensor.attr("shape")), ", ",
                          text(tensor.attr("dtype")));
  }
  return found;
}

void TensorOptimizer::place(Slot& slot, size_t stream, const DLTensor& tensor) {
  const bool turned = slot.geometry.set_strides(stream, tensor);
  if (turned) slot.known = false;
  if (!turned && slot.data[stream] == tensor.begin()) return;
  slot.data[stream] = tensor.begin();
  if (stream == grad_stream) {
    moved_grads_.push_back(used_ - 1);
  } else {
    moved_ = true;
  }
}

void TensorOptimizer::choose_coefficients(py::handle owner) {
  const CoefficientSet* last = nullptr;
  for (size_t i = 0; i < used_; ++i) {
    Slot& slot = slots_[i];
    const auto fits = [&](const CoefficientSet& set) {
      return size_t(set.group) == slot.group && set.t == slot.t && set.started == slot.started &&
             std::equal(set.before, set.before + slot.numbers.names.size(), slot.number);
    };
    if (last == nullptr || !fits(*last)) {
      const auto known = std::find_if(sets_.rbegin(), sets_.rend(), fits);
      last = known != sets_.rend() ? &*known : &new_set(owner, slot);
    }
    slot.coefficients = last;
  }
}

const CoefficientSet& TensorOptimizer::new_set(py::handle owner, Slot& slot) {
  CoefficientSet& set = sets_.emplace_back(groups_[slot.group].constants);
  set.t = slot.t;
  set.started = slot.started;
  const py::object fold = owner.attr("_fold");
  py::object values;
  if (slot.numbers.names.empty()) {
    values = fold(slot.group, slot.t, slot.started);
  } else {
    py::dict numbers;
    for (size_t k = 0; k < slot.numbers.names.size(); ++k) {
      set.before[k] = set.after[k] = slot.number[k];
      numbers[slot.numbers.names[k]] = slot.number[k];
    }
    values = fold(slot.group, slot.t, slot.started, numbers);
  }
  set.set(caller_, values, slot.numbers);
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
      const size_t count = first_state_stream + groups_[slots_[i].group].states.size();
      for (size_t s = i * most_streams + param_stream; s < i * most_streams + count; ++s) {
        check_itself(s);
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

// How its streams are walked, and by what.
void TensorOptimizer::lay_out(Slot& slot, const Settings& settings) {
  const RuleNames& rule = this->rule(slot);
  const size_t count = first_state_stream + rule.state_count;
  if (!slot.known) {
    std::vector<View> views;
    for (size_t s = 0; s < count; ++s) views.push_back(slot.geometry.view(s, slot.data[s]));
    const View param = views[param_stream];
    Shape strides(size_t(param.ndim), item_size(param.dtype));
    if (rule.prepares) {  // in C order, somewhere else at every step
      for (size_t axis = strides.size(); axis-- > 1;) {
        strides[axis - 1] = strides[axis] * param.shape[axis];
      }
      views.push_back({nullptr, param.dtype, true, param.ndim, param.shape, strides.data()});
    }
    Layout layout = layout_of(views, param);
    slot.layout = layout.dense() ? nullptr : std::make_unique<Layout>(std::move(layout));
    slot.known = true;
  }
  ArrayStep& step = array_steps_.emplace_back();
  step.rule = &settings.table->rules[rule.row[size_t(slot.geometry.dtype())]];
  step.coefficients = slot.coefficients->value;
  step.layout = slot.layout.get();
  step.size = slot.geometry.size();
  step.stream_count = int(count) + rule.prepares;
  std::copy_n(slot.data, count, step.streams);
}

// Memory for what the rules prepare.
void TensorOptimizer::make_stacks() {
  std::map<std::tuple<size_t, Dtype, Shape>, std::vector<size_t>> alike;
  for (size_t i = 0; i < used_; ++i) {
    const Geometry& geometry = slots_[i].geometry;
    alike[{slots_[i].group, geometry.dtype(), geometry.shape()}].push_back(i);
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

void TensorOptimizer::change_stacks() const {
  const py::gil_scoped_acquire gil;
  for (const auto& [group, memory] : stacks_) groups_[group].between(memory);
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
    apply(settings, array_steps_, scale, request.zero_grads);
  } else if (request.zero_grads) {
    zero_gradients(settings, array_steps_);
  }
  return result;
}

void TensorOptimizer::count(const py::dict& states) {
  for (size_t i = 0; i < used_; ++i) {
    Slot& slot = slots_[i];
    const Group& group = groups_[slot.group];
    if (group.counts_steps) slot.step_count.set(double(slot.t));
    for (size_t k = 0; k < slot.numbers.names.size(); ++k) {
      slot.scalars[k].set(slot.coefficients->after[k]);
    }
    if (slot.fresh.empty()) continue;
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
    if (!slots_[i].fresh.empty()) slots_[i].fresh = {};
  }
  moved_grads_.clear();
  held_.clear();
  sets_.clear();
  array_steps_.clear();
  stacks_.clear();
  used_ = 0;
  request_ = nullptr;
}

void bind_tensor_optimizer(py::module_& m) {
  py::class_<TensorOptimizer>(m, "TensorOptimizer")
      .def(py::init<const std::string&, const std::vector<py::str>&, const py::tuple&>(),
           py::arg("caller"), py::arg("options"), py::arg("classes"))
      .def("declare", &TensorOptimizer::declare, py::arg("group"), py::arg("rule"),
           py::arg("constants"), py::arg("between"), py::arg("scalars"), py::arg("states"),
           py::arg("settled"))
      .def(
          "step",
          [](TensorOptimizer& optimizer, py::handle owner, int threads, double loss_scale,
             std::optional<double> max_norm, bool skip_nonfinite, bool zero_grads) {
            const CurrentSettings current;
            Settings settings = current.get();
            if (threads > 0 && settings.threads == CurrentSettings::global.threads) {
              settings.threads = threads;
            }
            auto [norm, skipped, changed] =
                optimizer.step(settings, owner, {loss_scale, max_norm, skip_nonfinite, zero_grads});
            return py::make_tuple(norm, skipped, changed);
          },
          py::arg("owner"), py::arg("threads"), py::arg("loss_scale"), py::arg("max_norm"),
          py::arg("skip_nonfinite"), py::arg("zero_grads"));
}

}  // namespace fastopt
