// What the library asks of a NumPy array, how it says that an array is not so, and new arrays.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <new>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "core/memory.h"
#include "kernels/table.h"

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

// The addresses of the first byte and past the last one.
struct Extent {
  const char* begin;
  const char* end;

  explicit Extent(const py::array& array) {
    begin = end = static_cast<const char*>(array.data());
    if (array.size() == 0) return;
    end += array.itemsize();
    for (index_t axis = 0; axis < array.ndim(); ++axis) {
      const index_t reach = (array.shape(axis) - 1) * array.strides(axis);
      (reach < 0 ? begin : end) += reach;
    }
  }
};

// True if two elements may lie at one address: the axes must nest, as those of every slice do.
inline bool overlaps_itself(const py::array& array) {
  std::vector<std::pair<index_t, index_t>> axes;  // |stride|, extent
  for (index_t axis = 0; axis < array.ndim(); ++axis) {
    if (array.shape(axis) == 0) return false;
    if (array.shape(axis) > 1) axes.emplace_back(std::abs(array.strides(axis)), array.shape(axis));
  }
  std::sort(axes.begin(), axes.end());
  index_t bytes = array.itemsize();
  for (const auto& [stride, extent] : axes) {
    if (stride < bytes) return true;
    bytes += stride * (extent - 1);
  }
  return false;
}

// What arrays that are alike have in common.
struct Form {
  const index_t* shape;
  index_t ndim;
  Dtype dtype;

  Form(const index_t* extents, index_t axes, Dtype type)
      : shape(extents), ndim(axes), dtype(type) {}
  Form(const py::array& array) : Form(array.shape(), array.ndim(), dtype_of(array)) {}
};

inline void check_like(const py::array& array, const Form& model, const std::string& where,
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

// True if an element of one is an element of the other; slices of one array may interleave.
inline bool share_memory(const py::array& a, const py::array& b) {
  if (a.size() == 0 || b.size() == 0) return false;
  const Extent p(a), q(b);
  if (p.begin >= q.end || q.begin >= p.end) return false;
  constexpr int dense = py::array::c_style | py::array::f_style;
  if ((a.flags() & dense) && (b.flags() & dense)) return true;
  // Of plain arrays: a subclass could take the call over.
  const auto plain = [](const py::array& array) {
    return py::array(array.dtype(), {array.shape(), array.shape() + array.ndim()},
                     {array.strides(), array.strides() + array.ndim()}, array.data(), array);
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
      if (overlaps_itself(output.array)) {
        fail<py::value_error>(caller, ": ", output.name,
                              " has elements that share memory (strides ",
                              text(output.array.attr("strides")), ")");
      }
      for (const Argument& other : arguments_) {
        if (&other == &output || (other.use == read_first && same(output.array, other.array))) {
          continue;
        }
        if (share_memory(output.array, other.array)) {
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
        flags_(array.flags() & relevant_flags),
        dtype_(dtype_of(array)),
        data_(array.data()) {
    geometry_.assign(array.shape(), array.shape() + array.ndim());
    geometry_.insert(geometry_.end(), array.strides(), array.strides() + array.ndim());
  }

  explicit operator bool() const { return bool(descriptor_); }

  // Everything but the address is as it was. Runs no Python.
  bool matches(py::handle object) const {
    if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) != type_.ptr()) return false;
    const auto* array = py::detail::array_proxy(object.ptr());
    if (array->descr != descriptor_.ptr() || (array->flags & relevant_flags) != flags_ ||
        2 * size_t(array->nd) != geometry_.size()) {
      return false;
    }
    const index_t* known = geometry_.data();
    for (int axis = 0; axis < array->nd; ++axis, ++known) {
      if (array->dimensions[axis] != known[0] || array->strides[axis] != known[array->nd]) {
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

  Form form() const { return {geometry_.data(), index_t(geometry_.size() / 2), dtype_}; }

 private:
  static constexpr int relevant_flags =
      py::detail::npy_api::NPY_ARRAY_ALIGNED_ | py::detail::npy_api::NPY_ARRAY_WRITEABLE_;

  py::object type_, descriptor_;
  int flags_ = 0;
  Dtype dtype_ = Dtype::float32;
  const void* data_ = nullptr;
  std::vector<index_t> geometry_;  // shape, then strides
};

}  // namespace fastopt
