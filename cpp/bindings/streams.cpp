#include "streams.h"

#include <algorithm>

#include "core/element.h"

namespace fastopt {
namespace {

bool is_8bit(const View& view) {
  return item_size(view.dtype) == 1;
}

std::unique_ptr<Storage> storage_of(const RuleNames& rule, const std::vector<View>& views,
                                    bool has_master, bool at_random) {
  const Dtype computed = compute_dtype(views[param_stream].dtype);
  const auto is_coded = [&](const View& view) { return view.dtype != computed; };
  if (std::none_of(views.begin(), views.end(), is_coded)) return nullptr;
  auto storage = std::make_unique<Storage>();
  for (size_t s = 0; s < views.size(); ++s) storage->dtype[s] = views[s].dtype;
  storage->at_random[param_stream] =
      at_random && !has_master && views[param_stream].dtype == Dtype::bfloat16;
  for (size_t k = 0; k < rule.states.size(); ++k) {
    const size_t s = first_state_stream + k;
    storage->at_random[s] = views[s].dtype == Dtype::bfloat16;
    if (is_8bit(views[s]) && rule.states[k].coding == Coding::with_sign) {
      storage->dtype[s] = Dtype::signed_8bit;
    }
  }
  storage->master = has_master ? int(views.size()) - 1 : 0;
  return storage;
}

}  // namespace

Streams::Streams(const RuleNames& rule, std::vector<View> views, bool has_master, bool at_random) {
  const View param = views[param_stream];
  const Dtype computed = compute_dtype(param.dtype);
  Shape strides(size_t(param.ndim), item_size(computed));
  if (rule.prepares) {  // in C order, somewhere else at every step
    for (size_t axis = strides.size(); axis-- > 1;) {
      strides[axis - 1] = strides[axis] * param.shape[axis];
    }
    const View prepared{nullptr, computed, true, param.ndim, param.shape, strides.data()};
    views.insert(views.end() - has_master, prepared);
  }
  // Blocks of 8-bit states are counted in their order of memory.
  const auto coded = std::find_if(views.begin(), views.end(), is_8bit);
  Layout walked = layout_of(views, coded != views.end() ? *coded : param);
  for (size_t s = 0; s < views.size(); ++s) {
    if (is_8bit(views[s]) && !walked.streams[s].dense) {
      fail<py::value_error>("states of 8 bits lie in different orders of memory");
    }
  }
  if (!walked.dense() || rule.factored) layout = std::make_unique<Layout>(std::move(walked));
  storage = storage_of(rule, views, has_master, at_random);
}

std::uint64_t key_of(std::uint64_t seed, std::int64_t t, size_t array) {
  return mixed(mixed(mixed(0, seed), std::uint64_t(t)), array);
}

void Stacks::add(int group, const View& param, size_t step) {
  const Dtype dtype = compute_dtype(param.dtype);
  const Shape shape(param.shape, param.shape + param.ndim);
  const auto is_alike = [&](const Stack& stack) {
    return stack.group == group && stack.dtype == dtype && stack.shape == shape;
  };
  auto stack = std::find_if(stacks_.begin(), stacks_.end(), is_alike);
  if (stack == stacks_.end()) stack = stacks_.insert(stack, {group, dtype, shape, {}, {}});
  stack->steps.push_back(step);
}

void Stacks::make(std::vector<ArrayStep>& steps) {
  for (Stack& stack : stacks_) {
    Shape shape = stack.shape;
    shape.insert(shape.begin(), py::ssize_t(stack.steps.size()));
    stack.memory = new_output(shape, stack.dtype);
    void* place = const_cast<void*>(stack.memory.data());
    for (const size_t i : stack.steps) {
      steps[i].streams[steps[i].prepared()] = place;
      place = at(place, steps[i].size, item_size(stack.dtype));
    }
  }
}

}  // namespace fastopt
