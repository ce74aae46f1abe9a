// What the library asks of an array, how it says that an array is not so, and new arrays. Only this
// file and arrays.cpp know NumPy.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "core/layout.h"

namespace fastopt {

namespace py = pybind11;

// Raises Error with all the parts as one text.
template <class Error, class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

// A new reference: the Python that runs for one item may drop the others.
inline py::object owned(PyObject* borrowed) {
  return py::reinterpret_borrow<py::object>(borrowed);
}

inline py::object checked(PyObject* created) {
  if (created == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(created);
}

// Null if the dict has no such key.
inline py::object find(py::handle dict, py::handle key) {
#if PY_VERSION_HEX >= 0x030d0000
  PyObject* value = nullptr;
  if (PyDict_GetItemRef(dict.ptr(), key.ptr(), &value) < 0) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
#else
  PyObject* const value = PyDict_GetItemWithError(dict.ptr(), key.ptr());
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return owned(value);
#endif
}

inline std::string type_name(py::handle object) {
  return Py_TYPE(object.ptr())->tp_name;
}

// What has no UTF-8, a lone surrogate, is escaped.
inline std::string text(py::handle object) {
  PyObject* const bytes =
      PyUnicode_AsEncodedString(py::str(object).ptr(), "utf-8", "backslashreplace");
  if (bytes == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::bytes>(bytes);
}

using Array = py::array;  // of any dtype
template <class T>
using ArrayOf = py::array_t<T>;
using Shape = std::vector<py::ssize_t>;

inline Shape shape_of(const Array& array) {
  return {array.shape(), array.shape() + array.ndim()};
}

std::string shape_text(const Array& array);
std::string strides_text(const Array& array);
std::string dtype_text(const Array& array);

// An ndarray itself, of native float32 or float64, whose elements are aligned: what as_array takes
// without another look.
inline bool is_plain(py::handle object) {
  const auto& numpy = py::detail::npy_api::get();
  if (Py_TYPE(object.ptr()) != numpy.PyArray_Type_) return false;
  const auto* array = py::detail::array_proxy(object.ptr());
  const auto is = [&](const py::dtype& dtype) { return array->descr == dtype.ptr(); };
  return (is(py::dtype::of<float>()) || is(py::dtype::of<double>())) &&
         (array->flags & py::detail::npy_api::NPY_ARRAY_ALIGNED_);
}

// Brings an array's object into the cache, which has two lines at most.
inline void prefetch(py::handle object) {
  const char* const data = reinterpret_cast<const char*>(object.ptr());
  __builtin_prefetch(data);
  __builtin_prefetch(data + 64);
}

inline bool is_array(py::handle object) {
  return py::isinstance<Array>(object);
}

// Arithmetic on an array without axes makes NumPy scalars: a read-only array instead of one.
py::object without_scalar(const py::object& object);

// An array of any dtype.
Array as_ndarray(py::handle object, const std::string& where);

// An array of native float32 or float64 whose elements are aligned.
Array as_array(py::handle object, const std::string& where);

// The same, or of float16 or ml_dtypes.bfloat16.
Array as_stored_array(py::handle object, const std::string& where);

inline bool is_c_ordered(const Array& array) {
  return array.flags() & Array::c_style;
}

// The array in C order; a copy of one that is not.
Array in_c_order(const Array& array);

// Integers in C order; those of an unsigned dtype may be negative then.
ArrayOf<long long> as_integers(const Array& array);
// Whether an integer is a number of the array's integer dtype.
bool can_hold(const Array& array, const py::object& integer);
// 'i', 'u', 'f', 'b'..., as NumPy has them.
char kind_of_dtype(const Array& array);
// Tells dtypes apart that take as many bytes.
int dtype_number(const Array& array);
bool has_nonzero(const Array& array);
// The element of this index in C order.
std::string element_text(const Array& array, index_t index);

const char* dtype_name(Dtype dtype);

// Where it is not plain: of two bytes it is bfloat16 but for float16, and of one it has no sign.
Dtype dtype_of_coded(const Array& array);
inline Dtype dtype_of(const Array& array) {
  switch (array.itemsize()) {
    case 4:
      return Dtype::float32;
    case 8:
      return Dtype::float64;
    default:
      return dtype_of_coded(array);
  }
}

// Valid as long as the array is there and has its shape.
inline View view_of(const Array& array) {
  char* const data = static_cast<char*>(const_cast<void*>(array.data()));
  return {data, dtype_of(array), array.writeable(), array.ndim(), array.shape(), array.strides()};
}

// The memory of the view, which the owner keeps.
Array array_of(const View& view, py::handle owner);

// A new C-ordered array, not initialised.
Array new_output(const Shape& shape, Dtype dtype);

// The array's elements, with its axes in this order: a plain array, nothing of a subclass is
// called.
Array permuted(const Array& array, const Shape& axes);

void copy(const Array& from, const Array& to);

// Bytes that the arrays over them share, and that none of those can resize or free.
Array shared_memory(size_t bytes);

// The strides of new memory in an array's own order, as numpy.empty_like has them.
Shape dense_strides(const Array& array);

// The array as one of the model's shape: where it has one element for several, its stride is 0.
Array broadcast(const Array& array, const View& model);

void check_shape(const Array& array, const View& model, const std::string& where,
                 const char* relation);
void check_like(const Array& array, const View& model, const std::string& where,
                const char* relation);
inline void check_like(const Array& array, const Array& model, const std::string& where,
                       const char* relation) {
  check_like(array, view_of(model), where, relation);
}

// True if an element of one is an element of the other; slices of one array may interleave.
bool share_memory(const View& a, const View& b);

// The arrays of one call as the user gave them, not copies in another order: one that is written
// shares no memory with another.
class Overlaps {
 public:
  enum Use {
    read,
    read_first,  // each element before it is written: an output may be the array as a whole
    written,
  };

  Overlaps() { arguments_.reserve(8); }

  void add(const char* name, const Array& array, Use use) {
    arguments_.push_back({name, array, use});
  }

  // After all were added, and before anything is written.
  void check(const std::string& caller) const;

 private:
  struct Argument {
    const char* name;
    Array array;
    Use use;
  };

  std::vector<Argument> arguments_;
};

// What decides how an array is read: an array that looks as it did last time needs no new check.
class Seen {
 public:
  Seen() = default;
  explicit Seen(const Array& array)
      : type_(py::type::of(array)),
        descriptor_(array.dtype()),
        data_(array.data()),
        flags_(array.flags() & relevant_flags),
        ndim_(array.ndim()),
        dtype_(dtype_of(array)) {
    if (ndim_ > near_axes) far_ = std::make_unique<index_t[]>(2 * size_t(ndim_));
    index_t* const geometry = far_ ? far_.get() : near_;
    std::copy_n(array.shape(), ndim_, geometry);
    std::copy_n(array.strides(), ndim_, geometry + ndim_);
  }

  explicit operator bool() const { return bool(descriptor_); }

  // Brings the shape into the cache: with many arrays, matches() would wait for each.
  void prefetch_shape(py::handle object) const {
    if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == type_.ptr()) {
      __builtin_prefetch(py::detail::array_proxy(object.ptr())->dimensions);
    }
  }

  // Everything but the address is as it was. Runs no Python.
  bool matches(py::handle object) const {
    if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) != type_.ptr()) return false;
    const auto* array = py::detail::array_proxy(object.ptr());
    if (array->descr != descriptor_.ptr() || (array->flags & relevant_flags) != flags_ ||
        array->nd != ndim_) {
      return false;
    }
    const index_t* const known = geometry();
    for (index_t axis = 0; axis < ndim_; ++axis) {
      if (array->dimensions[axis] != known[axis] || array->strides[axis] != known[ndim_ + axis]) {
        return false;
      }
    }
    return true;
  }

  // The address, too.
  bool is(py::handle object) const {
    return matches(object) && py::detail::array_proxy(object.ptr())->data == data_;
  }

  // Takes over the address of an array that matches; false if it was known.
  bool move_to(py::handle array) {
    const void* const before = std::exchange(data_, py::detail::array_proxy(array.ptr())->data);
    return before != data_;
  }

  void* data() const { return const_cast<void*>(data_); }

  View view() const {
    const bool writable = flags_ & py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
    return {static_cast<char*>(data()), dtype_, writable, ndim_, geometry(), geometry() + ndim_};
  }

 private:
  static constexpr int relevant_flags =
      py::detail::npy_api::NPY_ARRAY_ALIGNED_ | py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  static constexpr index_t near_axes = 4;

  const index_t* geometry() const { return far_ ? far_.get() : near_; }

  py::object type_, descriptor_;
  const void* data_ = nullptr;
  int flags_ = 0;
  index_t ndim_ = 0;
  Dtype dtype_ = Dtype::float32;
  index_t near_[2 * near_axes];  // shape, then strides
  std::unique_ptr<index_t[]> far_;
};

}  // namespace fastopt
