// What a bound optimizer asks of its arrays, and how a step walks them.
#include <algorithm>

#include "core/element.h"
#include "optimizer.h"

namespace fastopt {

void BoundOptimizer::check_param(Parameter& parameter) {
  const py::handle param = parameter.other_array ? parameter.other_array : parameter.array;
  if (parameter.seen.matches(param)) {
    if (parameter.seen.move_to(param)) written_known_ = false;
  } else {
    python_ran_ = true;
    const std::string place = tree_.where("params", parameter.name);
    check_array_type(param, place);
    const Array array = as_stored_array(param, place);
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
  if (parameter.other_array) {
    const std::lock_guard held(arrays_);
    std::swap(parameter.array, parameter.other_array);
  }
}

void BoundOptimizer::check_grad(Parameter& parameter) {
  if (parameter.seen_grad.matches(parameter.grad)) {
    parameter.seen_grad.move_to(parameter.grad);
  } else {
    python_ran_ = true;
    const std::string place = tree_.where("grads", parameter.name);
    parameter.grad = without_scalar(parameter.grad);
    check_array_type(parameter.grad, place);
    const Array array = as_stored_array(parameter.grad, place);
    const View param = parameter.seen.view();
    check_shape(array, param, place, "its parameter has");
    const Dtype dtype = dtype_of(array);
    if (compute_dtype(dtype) != compute_dtype(param.dtype)) {
      fail<py::type_error>(place, " has dtype ", dtype_text(array), ", its parameter has ",
                           dtype_name(param.dtype));
    }
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

// How its streams are walked, where they lie, and as what.
void BoundOptimizer::find_layout(Parameter& parameter) {
  const size_t first = size_t(&parameter - parameters_.data()) * most_streams;
  const RuleNames& rule = *parameter.rule;
  ArrayStep& step = parameter.step;
  std::vector<View> views;
  for (size_t s = 0; s < first_state_stream + parameter.state.size(); ++s) {
    views.push_back(view_of_stream(first + s));
    step.streams[s] = views.back().data;
  }
  step.size = views[param_stream].size();
  step.stream_count = int(views.size()) + rule.prepares;
  if (parameter.has_master) step.streams[step.stream_count - 1] = views.back().data;
  parameter.streams = {rule, std::move(views), parameter.has_master, parameter.at_random};
  const auto& [layout, storage] = parameter.streams;
  step.layout = layout.get();
  step.storage = storage.get();
  for (size_t k = 0; storage && k < rule.states.size(); ++k) {
    if (!parameter.scales[k]) continue;
    storage->scales[first_state_stream + k] = parameter.scales[k]->mutable_data();
  }
  parameter.layout_known = true;
}

}  // namespace fastopt
