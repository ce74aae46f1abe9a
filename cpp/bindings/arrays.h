// What the library asks of a NumPy array, how it says that an array is not so, and new arrays.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "core/layout.h"
#include "core/memory.h"

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

using Shape = std::vector<py::ssize_t>;

inline Shape shape_of(const py::array& array) {
  return {array.shape(), array.shape() + array.ndim()};
}

inline std::string shape_text(const py::array& array) {
  return text(array.attr("shape"));
}

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

inline bool is_array(py::handle object) {
  return py::isinstance<py::array>(object);
}

// Arithmetic on an array without axes makes NumPy scalars: a read-only array instead of one.
inline py::object without_scalar(const py::object& object) {
  const py::module_ numpy = py::module_::import("numpy");
  if (!py::isinstance(object, numpy.attr("generic"))) return object;
  py::object array = numpy.attr("asarray")(object);
  array.attr("flags").attr("writeable") = false;  // the scalar would not change
  return array;
}

// An array of any dtype. One of a subclass (numpy.memmap, numpy.matrix) is taken for what its
// memory holds; that is wrong for those that bring an arithmetic of their own, as masked arrays and
// quantities with units do.
inline py::array as_ndarray(py::handle object, const std::string& where) {
  if (!py::isinstance<py::array>(object)) {
    fail<py::type_error>(where, " is of type ", type_name(object), ", expected numpy.ndarray",
                         py::hasattr(object, "detach") ? ": use tensor.detach().numpy()" : "");
  }
  const py::handle ndarray(reinterpret_cast<PyObject*>(py::detail::npy_api::get().PyArray_Type_));
  const py::handle type = py::type::handle_of(object);
  for (const char* arithmetic : {"__add__", "__array_ufunc__"}) {
    if (!type.is(ndarray) && !type.attr(arithmetic).is(ndarray.attr(arithmetic))) {
      fail<py::type_error>(where, " is of type ", type_name(object),
                           ", which has an arithmetic of its own, expected numpy.ndarray");
    }
  }
  return py::reinterpret_borrow<py::array>(object);
}

// An array of native float32 or float64 whose elements are aligned.
inline py::array as_array(py::handle object, const std::string& where) {
  if (is_plain(object)) return py::reinterpret_borrow<py::array>(object);
  py::array array = as_ndarray(object, where);
  const bool native = array.dtype().attr("isnative").cast<bool>();
  if (!native || !(array.dtype().num() == py::dtype::of<float>().num() ||
                   array.dtype().num() == py::dtype::of<double>().num())) {
    fail<py::type_error>(where, " has dtype ", text(array.dtype().attr("str")), " (",
                         text(array.dtype()), "), expected native float32 or float64");
  }
  if (!(array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_)) {
    fail<py::value_error>(where, " is not aligned to its element size");
  }
  return array;
}

// The array in C order; a copy of one that is not.
inline py::array in_c_order(const py::array& array) {
  using Numpy = py::detail::npy_api;
  PyObject* const ordered = Numpy::get().PyArray_FromAny_(
      array.ptr(), nullptr, 0, 0, Numpy::NPY_ARRAY_ENSUREARRAY_ | Numpy::NPY_ARRAY_C_CONTIGUOUS_,
      nullptr);
  if (ordered == nullptr) throw py::error_already_set();  // out of memory
  return py::reinterpret_steal<py::array>(ordered);
}

inline Dtype dtype_of(const py::array& array) {
  return array.itemsize() == 4 ? Dtype::float32 : Dtype::float64;
}

// Valid as long as the array is there and has its shape.
inline View view_of(const py::array& array) {
  char* const data = static_cast<char*>(const_cast<void*>(array.data()));
  return {data, dtype_of(array), array.writeable(), array.ndim(), array.shape(), array.strides()};
}

// A new C-ordered array, not initialised.
inline py::array new_output(const Shape& shape, Dtype dtype) {
  const py::dtype type = dtype == Dtype::float32 ? py::dtype::of<float>() : py::dtype::of<double>();
  size_t bytes = size_t(type.itemsize());
  for (const py::ssize_t extent : shape) {
    if (extent != 0 &&
        bytes > size_t(std::numeric_limits<py::ssize_t>::max()) / 2 / size_t(extent)) {
      throw std::bad_alloc();
    }
    bytes *= size_t(extent);
  }
  if (bytes < kept_from_bytes) return py::array(type, shape);
  void* const data = take(bytes);
  // The array's memory comes back when the last array that looks at it is gone. A capsule carries
  // one pointer; its context carries the size.
  PyObject* const owner = PyCapsule_New(data, nullptr, [](PyObject* capsule) {
    give(PyCapsule_GetPointer(capsule, nullptr), size_t(PyCapsule_GetContext(capsule)));
  });
  if (owner == nullptr) {
    give(data, bytes);
    throw py::error_already_set();
  }
  PyCapsule_SetContext(owner, reinterpret_cast<void*>(bytes));
  return py::array(type, shape, data, py::reinterpret_steal<py::object>(owner));
}

inline void check_like(const py::array& array, const View& model, const std::string& where,
                       const char* relation) {
  if (array.ndim() != model.ndim ||
      !std::equal(model.shape, model.shape + model.ndim, array.shape())) {
    const py::tuple expected(model.ndim);
    for (index_t axis = 0; axis < model.ndim; ++axis) expected[size_t(axis)] = model.shape[axis];
    fail<py::value_error>(where, " has shape ", shape_text(array), ", ", relation, " ",
                          text(expected));
  }
  if (dtype_of(array) != model.dtype) {
    fail<py::type_error>(where, " has dtype ", text(array.dtype()), ", ", relation, " ",
                         model.dtype == Dtype::float32 ? "float32" : "float64");
  }
}
inline void check_like(const py::array& array, const py::array& model, const std::string& where,
                       const char* relation) {
  check_like(array, view_of(model), where, relation);
}

// True if an element of one is an element of the other; slices of one array may interleave.
inline bool share_memory(const View& a, const View& b) {
  const Extent p(a), q(b);
  if (p.begin == p.end || q.begin == q.end || p.begin >= q.end || q.begin >= p.end) return false;
  if (is_packed(a) && is_packed(b)) return true;
  // Of plain arrays: a subclass could take the call over.
  const auto plain = [](const View& view) {
    const py::dtype dtype =
        view.dtype == Dtype::float32 ? py::dtype::of<float>() : py::dtype::of<double>();
    return py::array(dtype, Shape(view.shape, view.shape + view.ndim),
                     Shape(view.strides, view.strides + view.ndim), view.data, py::none());
  };
  return py::module_::import("numpy").attr("shares_memory")(plain(a), plain(b)).cast<bool>();
}

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

  void add(const char* name, const py::array& array, Use use) {
    arguments_.push_back({name, array, use});
  }

  // After all were added, and before anything is written.
  void check(const std::string& caller) const {
    for (const Argument& output : arguments_) {
      if (output.use != written) continue;
      if (overlaps_itself(view_of(output.array))) {
        fail<py::value_error>(caller, ": ", output.name,
                              " has elements that share memory (strides ",
                              text(output.array.attr("strides")), ")");
      }
      for (const Argument& other : arguments_) {
        if (&other == &output || (other.use == read_first && same(output.array, other.array))) {
          continue;
        }
        if (share_memory(view_of(output.array), view_of(other.array))) {
          fail<py::value_error>(caller, ": ", output.name, " overlaps ", other.name, " in memory");
        }
      }
    }
  }

 private:
  struct Argument {
    const char* name;
    py::array array;
    Use use;
  };

  static bool same(const py::array& a, const py::array& b) {
    if (a.data() != b.data() || a.ndim() != b.ndim() || a.itemsize() != b.itemsize()) return false;
    for (index_t axis = 0; axis < a.ndim(); ++axis) {
      if (a.shape(axis) != b.shape(axis)) return false;
      if (a.shape(axis) > 1 && a.strides(axis) != b.strides(axis)) return false;
    }
    return true;
  }

  std::vector<Argument> arguments_;
};

// What decides how an array is read: an array that looks as it did last time needs no new check.
class Seen {
 public:
  Seen() = default;
  explicit Seen(const py::array& array)
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
