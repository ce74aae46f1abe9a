// What a tensor optimizer looks at, at every step: groups, parameters, gradients, states.
#include <pybind11/critical_section.h>

#include "tensor_optimizer.h"

namespace fastopt {
namespace {

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
  py::object find(py::handle wanted) {
    if (py::object value = next(wanted)) return value;
    return fastopt::find(dict_, wanted);
  }

  // Its value if it is the next key. One that is passed over is not waited for.
  py::object next(py::handle wanted) {
    const py::scoped_critical_section held(dict_);
    PyObject *key = nullptr, *value = nullptr;
    py::ssize_t position = position_;
    if (!PyDict_Next(dict_, &position, &key, &value) || key != wanted.ptr()) return {};
    position_ = position;
    return owned(value);
  }

 private:
  PyObject* const dict_;
  py::ssize_t position_ = 0;
};

void TensorOptimizer::look_at_groups(py::handle owner) {
  const py::list groups = owner.attr("param_groups");
  const py::dict states = owner.attr("state");
  Cursor cursor(states);
  for (size_t i = 0; i < groups.size(); ++i) look_at_group(owner, groups[i], i, cursor);
}

void TensorOptimizer::look_at_options(py::handle owner, py::handle options, size_t index) {
  while (groups_.size() <= index) groups_.emplace_back();
  Group& group = groups_[index];
  bool same = group.settled && group.seen.size() == options_.size();
  group.seen.resize(options_.size());
  for (size_t k = 0; k < options_.size(); ++k) {
    py::object value = find(options, options_[k]);
    if (group.seen[k].is(value)) continue;
    group.seen[k] = std::move(value);
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
  const py::scoped_critical_section held(params);
  for (py::ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params.ptr()); ++i, ++params_) {
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
    slot.position = params_;
    slot.param = param;
    slot.grad = grad;
    look_at_param(slot, owner, states);
    held_.push_back(param);
    held_.push_back(grad);
  }
}

void TensorOptimizer::look_at_param(Slot& slot, py::handle owner, Cursor& states) {
  const Group& group = groups_[slot.group];
  slot.state = {};
  const DLTensor own = look(slot, owner, slot.param, param_stream);
  slot.axes = own.ndim;
  // One more than there may be, for a master.
  if (slot.geometry.set_shape(own, first_state_stream + rule(slot).states.size() + 1)) {
    slot.known = false;
    moved_ = true;
  }
  place(slot, param_stream, own);
  look_at_grad(slot, owner);
  if (group.scalar_count + stream_count(slot) == first_state_stream) return;
  slot.state = states.find(slot.param);
  look_at_states(slot, owner);
}

// One that is the negative of what its memory holds is seen by torch alone.
void TensorOptimizer::look_at_grad(Slot& slot, py::handle owner) {
  DLTensor found = look_like_param(slot, owner, slot.grad, grad_stream);
  if (found.begin() != slot.data[grad_stream] && slot.grad.attr("is_neg")().cast<bool>()) {
    held_.push_back(slot.grad.attr("resolve_neg")());
    found = look_like_param(slot, owner, held_.back(), grad_stream);
  }
  place(slot, grad_stream, found);
}

// The states that it has, and what has to begin.
void TensorOptimizer::look_at_states(Slot& slot, py::handle owner) {
  const Group& group = groups_[slot.group];
  const size_t scalars = group.scalar_count,
               count = scalars + stream_count(slot) - first_state_stream;
  const size_t first = held_.size();  // of the tensors
  bool complete = bool(slot.state);
  if (slot.state) {
    Cursor cursor(slot.state);
    for (size_t k = 0; k < count; ++k) {
      held_.push_back(cursor.find(kind(slot).states[k]));
      complete &= held_.back() && !held_.back().is_none();
    }
  } else {
    held_.resize(first + count);
  }
  slot.started = true;
  if (!complete) begin_states(slot, owner, first, count);
  for (size_t k = 0; k < scalars; ++k) {
    slot.scalars[k] = look_at_scalar(slot, owner, first + k);
    slot.number[k] = slot.scalars[k].get();
  }
  if (group.counts_steps) {
    const double done = slot.number[0];
    if (!(done >= 0 && done < 0x1p62)) {
      fail<py::value_error>(where(slot, first_state_stream), " has made ", done,
                            " steps, expected a number from 0 to 2**62");
    }
    slot.t = std::int64_t(done) + 1;
  }
  for (size_t k = scalars; k < count; ++k) {
    look_at_state(slot, owner, first + k, first_state_stream + k - scalars);
  }
}

void TensorOptimizer::look_at_state(Slot& slot, py::handle owner, size_t held, size_t stream) {
  const py::object tensor = held_[held];
  const DLTensor found = look_like_param(slot, owner, tensor, stream);
  const Dtype dtype = *dtype_of(found), computed = compute_dtype(slot.geometry.dtype(param_stream));
  const size_t state = stream - first_state_stream;
  const bool is_master = state == rule(slot).states.size();
  if (dtype != computed && (is_master || rule(slot).states[state].coding == Coding::none)) {
    fail<py::type_error>(where(slot, stream), " has dtype ", dtype_name(dtype), ", expected ",
                         dtype_name(computed));
  }
  place(slot, stream, found);
  slot.scales[stream] = item_size(dtype) == 1 ? look_at_scales(slot, owner, stream) : nullptr;
}

float* TensorOptimizer::look_at_scales(const Slot& slot, py::handle owner, size_t stream) {
  const std::string name = rule(slot).states[stream - first_state_stream].name + "_scale";
  const index_t count = (slot.geometry.size() + scale_block - 1) / scale_block;
  for (const py::object& states : {slot.fresh, slot.state}) {
    if (!states || !states.contains(name)) continue;
    const py::object tensor = states[name.c_str()];
    held_.push_back(tensor);
    const DLTensor found = look(slot, owner, tensor, stream);
    if (found.ndim != 1 || found.shape[0] != count || (count > 1 && found.strides[0] != 1) ||
        dtype_of(found) != Dtype::float32) {
      fail<py::value_error>(where(slot, stream), " has scales that are not ", count, " float32");
    }
    return static_cast<float*>(static_cast<void*>(found.begin()));
  }
  fail<py::value_error>(where(slot, stream), " has no ", name);
}

void TensorOptimizer::begin_states(Slot& slot, py::handle owner, size_t first, size_t count) {
  const Group& group = groups_[slot.group];
  py::list missing;
  for (size_t k = 0; k < count; ++k) {
    py::object& tensor = held_[first + k];
    if (tensor && !tensor.is_none()) continue;
    tensor = {};
    missing.append(kind(slot).states[k]);
    if (k >= group.scalar_count) slot.started = false;
  }
  slot.fresh = owner.attr("_new_states")(slot.param, slot.group, missing);
  for (size_t k = 0; k < count; ++k) {
    if (!held_[first + k]) held_[first + k] = slot.fresh[kind(slot).states[k]];
  }
}

Scalar TensorOptimizer::look_at_scalar(const Slot& slot, py::handle owner, size_t held) {
  const py::object tensor = held_[held];
  const std::optional<Scalar> scalar = Scalar::of(look(slot, owner, tensor, first_state_stream));
  if (!scalar) {
    fail<py::value_error>(where(slot, first_state_stream), " has ", text(tensor.attr("dtype")),
                          " of shape ", text(tensor.attr("shape")),
                          " where one float32 or float64 is expected");
  }
  return *scalar;
}

// The owner has what a tensor of another class keeps, or the words for one that cannot be used.
DLTensor TensorOptimizer::look(const Slot& slot, py::handle owner, py::handle tensor,
                               size_t stream) {
  DLTensor found;
  const auto is_number = [&] {
    return stream >= first_state_stream || item_size(*dtype_of(found)) > 1;
  };
  if (tensors_.look(tensor, found) && is_number()) return found;
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
  const Dtype computed = compute_dtype(slot.geometry.dtype(param_stream));
  // Of a matrix there is a state of the rows, and one of the columns.
  const bool is_factor = rule(slot).factored && stream >= first_state_stream;
  const index_t one = is_factor ? found.ndim - 1 - index_t(stream - first_state_stream) : -1;
  if (!slot.geometry.fits(found, one) || compute_dtype(*dtype_of(found)) != computed) {
    fail<py::value_error>(where(slot, stream), " has not the shape and dtype of ",
                          where(slot, param_stream), ": ", text(tensor.attr("shape")), ", ",
                          text(tensor.attr("dtype")));
  }
  return found;
}

void TensorOptimizer::place(Slot& slot, size_t stream, const DLTensor& tensor) {
  const bool turned = slot.geometry.set_stream(stream, tensor);
  if (turned) slot.known = false;
  if (!turned && slot.data[stream] == tensor.begin()) return;
  slot.data[stream] = tensor.begin();
  if (stream == grad_stream) {
    moved_grads_.push_back(used_ - 1);
  } else {
    moved_ = true;
  }
}

}  // namespace fastopt
