#include "tensors.h"

#include <algorithm>

#include "core/element.h"

namespace fastopt {
namespace {

struct ExchangeApi {
  struct {
    std::uint32_t major, minor;
  } version;
  const ExchangeApi* older;
  void* allocate;
  void* export_tensor;
  void* import_tensor;
  int (*look)(void* object, DLTensor* tensor);
  void* current_work_stream;
};

constexpr std::int32_t cpu = 1;
constexpr std::uint8_t unsigned_integer = 1, floating = 2, brain_floating = 4;

}  // namespace

std::optional<Dtype> dtype_of(const DLTensor& tensor) {
  const auto& [code, bits, lanes] = tensor.dtype;
  if (lanes != 1) return std::nullopt;
  if (code == floating && bits == 32) return Dtype::float32;
  if (code == floating && bits == 64) return Dtype::float64;
  if (code == floating && bits == 16) return Dtype::float16;
  if (code == brain_floating && bits == 16) return Dtype::bfloat16;
  if (code == unsigned_integer && bits == 8) return Dtype::unsigned_8bit;
  return std::nullopt;
}

Tensors::Tensors(const py::tuple& classes) : owner_(classes) {
  for (const py::handle type : classes) {
    classes_.push_back(reinterpret_cast<PyTypeObject*>(type.ptr()));
  }
  const py::object capsule = classes[0].attr("__dlpack_c_exchange_api__");
  const auto* api =
      static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  while (api != nullptr && api->version.major != 1) api = api->older;
  if (api == nullptr || api->look == nullptr) {
    fail<py::import_error>("this torch has no DLPack exchange API of version 1");
  }
  look_ = api->look;
}

bool Tensors::look(py::handle object, DLTensor& tensor) const {
  if (std::ranges::find(classes_, Py_TYPE(object.ptr())) == classes_.end()) return false;
  if (look_(object.ptr(), &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  const std::optional<Dtype> dtype = dtype_of(tensor);
  return tensor.device.type == cpu && dtype &&
         reinterpret_cast<std::uintptr_t>(tensor.begin()) % size_t(item_size(*dtype)) == 0;
}

bool Geometry::set_shape(const DLTensor& param, size_t streams) {
  const size_t count = size_t(param.ndim) * (1 + streams);
  if (numbers_.size() == count && fits(param)) return false;
  ndim_ = param.ndim;
  numbers_.assign(count, 0);
  std::copy_n(param.shape, ndim_, numbers_.begin());
  size_ = view(0, nullptr).size();
  return true;
}

bool Geometry::fits(const DLTensor& tensor, index_t axis_of_one) const {
  if (tensor.ndim != ndim_) return false;
  bool same = true;
  for (index_t axis = 0; axis < ndim_; ++axis) {
    same &= tensor.shape[axis] == (axis == axis_of_one ? 1 : numbers_[size_t(axis)]);
  }
  return same;
}

bool Geometry::set_stream(size_t stream, const DLTensor& tensor) {
  index_t* const own = numbers_.data() + (1 + index_t(stream)) * ndim_;
  const Dtype dtype = *dtype_of(tensor);
  const index_t item = item_size(dtype);
  bool changed = dtypes_[stream] != dtype;
  dtypes_[stream] = dtype;
  for (index_t axis = 0; axis < ndim_; ++axis) {
    const bool is_shared = tensor.shape[axis] == 1 && numbers_[size_t(axis)] != 1;
    const index_t stride = is_shared ? 0 : tensor.strides[axis] * item;
    changed |= own[axis] != stride;
    own[axis] = stride;
  }
  return changed;
}

std::optional<Scalar> Scalar::of(const DLTensor& tensor) {
  for (std::int32_t axis = 0; axis < tensor.ndim; ++axis) {
    if (tensor.shape[axis] != 1) return std::nullopt;
  }
  if (const Dtype dtype = *dtype_of(tensor); compute_dtype(dtype) != dtype) return std::nullopt;
  Scalar scalar;
  scalar.data_ = tensor.begin();
  scalar.dtype_ = *dtype_of(tensor);
  return scalar;
}

}  // namespace fastopt
