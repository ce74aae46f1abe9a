#include "states.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <numeric>

namespace fastopt {
namespace {

// The strides of new memory in an array's own order, as numpy.empty_like has them.
std::vector<py::ssize_t> dense_strides(const py::array& array) {
  std::vector<index_t> axes(size_t(array.ndim()));  // outer to inner
  std::iota(axes.begin(), axes.end(), 0);
  if (array.flags() & py::array::f_style) {
    std::reverse(axes.begin(), axes.end());
  } else if (!(array.flags() & py::array::c_style)) {
    std::stable_sort(axes.begin(), axes.end(), [&](index_t a, index_t b) {
      return std::abs(array.strides(a)) > std::abs(array.strides(b));
    });
  }
  std::vector<py::ssize_t> strides(axes.size());
  index_t stride = array.itemsize();
  for (size_t i = axes.size(); i-- > 0;) {
    strides[size_t(axes[i])] = stride;
    stride *= std::max<index_t>(1, array.shape(axes[i]));
  }
  return strides;
}

// A processor takes a load for the reload of a store before it that is a multiple of a page away,
// and waits: a step over 64 K elements whose arrays began at the same place of a page took up to
// 2.7 times as long. So states begin elsewhere than their parameters: each so many lines further
// on.
constexpr size_t line_bytes = 64, page_bytes = 4096;
constexpr size_t lines_apart = 17;
constexpr size_t placed_from_bytes = 4 * page_bytes;  // smaller ones would leave too much room

// Memory of a power of two in size would lie a power of two apart, and then share the banks of the
// memory: a step over 16 M elements took 1.25 times as long. Room behind large ones keeps them off.
constexpr size_t padded_from_bytes = 1 << 24, padding_bytes = 1 << 22;

size_t place_unit(const py::array& array) {
  return size_t(array.nbytes()) >= placed_from_bytes ? page_bytes : line_bytes;
}

}  // namespace

py::array shared_memory(size_t bytes) {
  py::object memory = py::array_t<std::uint8_t>(py::ssize_t(bytes));
  const void* const data = py::array(memory).data();
  const py::object owner = checked(PyCapsule_New(memory.ptr(), nullptr, [](PyObject* capsule) {
    Py_DECREF(static_cast<PyObject*>(PyCapsule_GetPointer(capsule, nullptr)));
  }));
  memory.release();  // the capsule's
  return py::array(py::dtype::of<std::uint8_t>(), py::ssize_t(bytes), data, owner);
}

// They lie one after the other: a step finds them in few large pages, and walks on from one to the
// next without a break. With 1000 arrays of 4096 elements that saves an eighth of its time.
std::vector<py::array> new_states(const std::vector<py::array>& params, double value, int number) {
  size_t size = 0;
  for (const py::array& param : params) {
    size += size_t(param.nbytes()) + place_unit(param);
  }
  const py::array memory = shared_memory(size + (size >= padded_from_bytes ? padding_bytes : 0));
  std::vector<py::array> states;
  states.reserve(params.size());
  auto end = reinterpret_cast<std::uintptr_t>(memory.data());
  for (const py::array& param : params) {
    // In whole lines from the parameter's place, so that no store straddles two of them.
    const size_t offset = size_t(number + 1) * lines_apart * line_bytes;
    const auto wanted = reinterpret_cast<std::uintptr_t>(param.data()) + offset;
    const auto begin = end + (wanted - end) % place_unit(param);
    states.push_back(py::array(param.dtype(), {param.shape(), param.shape() + param.ndim()},
                               dense_strides(param), reinterpret_cast<const void*>(begin), memory));
    if (dtype_of(param) == Dtype::float32) {
      std::fill_n(reinterpret_cast<float*>(begin), param.size(), float(value));
    } else {
      std::fill_n(reinterpret_cast<double*>(begin), param.size(), value);
    }
    end = begin + size_t(param.nbytes());
  }
  return states;
}

}  // namespace fastopt
