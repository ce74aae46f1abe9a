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
constexpr std::uint8_t floating = 2;

}  // namespace

std::optional<Dtype> dtype_of(const DLTensor& tensor) {
  if (tensor.dtype.code != floating || tensor.dtype.lanes != 1) return std::nullopt;
  if (tensor.dtype.bits == 32) return Dtype::float32;
  if (tensor.dtype.bits == 64) return Dtype::float64;
  return std::nullopt;
}

Tensors::Tensors(const py::tuple& classes) : classes_(classes) {
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
  const auto is_type = [&](py::handle type) {
    return type.ptr() == reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  };
  if (std::none_of(classes_.begin(), classes_.end(), is_type)) return false;
  if (look_(object.ptr(), &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  const std::optional<Dtype> dtype = dtype_of(tensor);
  return tensor.device.type == cpu && dtype &&
         reinterpret_cast<std::uintptr_t>(tensor.begin()) % size_t(item_size(*dtype)) == 0;
}

bool Geometry::set_param(const DLTensor& param, size_t streams) {
  const size_t count = size_t(param.ndim) * (1 + streams);
  const bool known = param.ndim == ndim_ && numbers_.size() == count && dtype_of(param) == dtype_ &&
                     std::equal(param.shape, param.shape + param.ndim, numbers_.begin());
  if (!known) {
    dtype_ = *dtype_of(param);
    ndim_ = param.ndim;
    numbers_.assign(count, 0);
    std::copy_n(param.shape, ndim_, numbers_.begin());
  }
  return !known;
}

bool Geometry::fits(const DLTensor& tensor) const {
  return tensor.ndim == ndim_ && dtype_of(tensor) == dtype_ &&
         std::equal(tensor.shape, tensor.shape + ndim_, numbers_.begin());
}

bool Geometry::set_strides(size_t stream, const DLTensor& tensor) {
  index_t* const own = numbers_.data() + (1 + index_t(stream)) * ndim_;
  bool changed = false;
  for (index_t axis = 0; axis < ndim_; ++axis) {
    const index_t stride = tensor.strides[axis] * item_size(dtype_);
    changed |= own[axis] != stride;
    own[axis] = stride;
  }
  return changed;
}

index_t Geometry::size() const {
  return view(0, nullptr).size();
}

std::optional<Scalar> Scalar::of(const DLTensor& tensor) {
  for (std::int32_t axis = 0; axis < tensor.ndim; ++axis) {
    if (tensor.shape[axis] != 1) return std::nullopt;
  }
  Scalar scalar;
  scalar.data_ = tensor.begin();
  scalar.dtype_ = *dtype_of(tensor);
  return scalar;
}

}  // namespace fastopt
