// What a torch tensor is, and only here: tensors are looked at through DLPack's C exchange API, so
// that nothing of torch is included or linked, and nothing is copied.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "arrays.h"
#include "core/step.h"

namespace fastopt {

// As the version 1 of DLPack lays it out.
struct DLTensor {
  void* data;
  struct {
    std::int32_t type, id;
  } device;
  std::int32_t ndim;
  struct {
    std::uint8_t code, bits;
    std::uint16_t lanes;
  } dtype;
  const std::int64_t* shape;
  const std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;

  char* begin() const { return static_cast<char*>(data) + byte_offset; }
};

// Nothing where the library has not this dtype.
std::optional<Dtype> dtype_of(const DLTensor& tensor);

class Tensors {
 public:
  // Those of these classes, torch.Tensor first, keep their elements as it does.
  explicit Tensors(const py::tuple& classes);

  // False where it is of another class, or has not its elements in this memory in a dtype that the
  // library has. Runs no Python.
  bool look(py::handle object, DLTensor& tensor) const;

 private:
  py::tuple owner_;
  std::vector<PyTypeObject*> classes_;
  int (*look_)(void* object, DLTensor* tensor);
};

// How the tensors of one parameter lie, and as what: all have its shape.
class Geometry {
 public:
  // True if the shape was not known, or had not so many streams.
  bool set_shape(const DLTensor& param, size_t streams);
  // The same shape, but for this axis, which is of one element.
  bool fits(const DLTensor& tensor, index_t axis_of_one = -1) const;
  // True if dtype or strides were not known.
  bool set_stream(size_t stream, const DLTensor& tensor);

  Dtype dtype(size_t stream) const { return dtypes_[stream]; }
  index_t size() const { return size_; }
  View view(size_t stream, void* data) const {
    const index_t* const strides = numbers_.data() + (1 + index_t(stream)) * ndim_;
    return {static_cast<char*>(data), dtypes_[stream], true, ndim_, numbers_.data(), strides};
  }
  Shape shape() const { return {numbers_.begin(), numbers_.begin() + ndim_}; }

 private:
  index_t ndim_ = -1, size_ = 0;
  std::vector<index_t> numbers_;  // the shape, then strides in bytes
  Dtype dtypes_[most_streams] = {};
};

// A tensor of one number, float32 or float64.
class Scalar {
 public:
  // Nothing where it is something else.
  static std::optional<Scalar> of(const DLTensor& tensor);

  double get() const {
    return dtype_ == Dtype::float32 ? *static_cast<float*>(data_) : *static_cast<double*>(data_);
  }
  void set(double x) const {
    if (dtype_ == Dtype::float32) {
      *static_cast<float*>(data_) = float(x);
    } else {
      *static_cast<double*>(data_) = x;
    }
  }

 private:
  void* data_ = nullptr;
  Dtype dtype_ = Dtype::float32;
};

}  // namespace fastopt
