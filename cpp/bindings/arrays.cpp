#include "arrays.h"

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>
#include <numeric>

#include "core/memory.h"

namespace fastopt {
namespace {

constexpr int float16_number = 23;  // NPY_HALF

// What codes are for NumPy: bfloat16 is not one of its own.
py::dtype dtype_object(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return py::dtype::of<float>();
    case Dtype::float64:
      return py::dtype::of<double>();
    case Dtype::bfloat16:
      return py::dtype::of<std::uint16_t>();
    case Dtype::float16:
      return py::dtype(float16_number);
    default:
      return py::dtype::of<std::uint8_t>();
  }
}

// Not imported for that: who has such an array has done it.
bool is_bfloat16(const py::dtype& dtype) {
  if (dtype.kind() != 'V' || dtype.itemsize() != 2) return false;
  const py::object modules = py::module_::import("sys").attr("modules");
  const py::object ml_dtypes = modules.attr("get")("ml_dtypes");
  return !ml_dtypes.is_none() && dtype.attr("type").is(ml_dtypes.attr("bfloat16"));
}

bool is_native(const Array& array) {
  return array.dtype().attr("isnative").cast<bool>();
}

bool computes(const Array& array) {
  const int number = array.dtype().num();
  return is_native(array) &&
         (number == py::dtype::of<float>().num() || number == py::dtype::of<double>().num());
}

Array aligned(const Array& array, const std::string& where) {
  if (!(array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_)) {
    fail<py::value_error>(where, " is not aligned to its element size");
  }
  return array;
}

bool same_elements(const Array& a, const Array& b) {
  if (a.data() != b.data() || a.ndim() != b.ndim() || a.itemsize() != b.itemsize()) return false;
  for (index_t axis = 0; axis < a.ndim(); ++axis) {
    if (a.shape(axis) != b.shape(axis)) return false;
    if (a.shape(axis) > 1 && a.strides(axis) != b.strides(axis)) return false;
  }
  return true;
}

}  // namespace

std::string shape_text(const Array& array) {
  return text(array.attr("shape"));
}

std::string strides_text(const Array& array) {
  return text(array.attr("strides"));
}

std::string dtype_text(const Array& array) {
  return text(array.dtype());
}

py::object without_scalar(const py::object& object) {
  const py::module_ numpy = py::module_::import("numpy");
  if (!py::isinstance(object, numpy.attr("generic"))) return object;
  py::object array = numpy.attr("asarray")(object);
  array.attr("flags").attr("writeable") = false;  // the scalar would not change
  return array;
}

// One of a subclass (numpy.memmap, numpy.matrix) is taken for what its memory holds; that is wrong
// for those that bring an arithmetic of their own, as masked arrays and quantities with units do.
Array as_ndarray(py::handle object, const std::string& where) {
  if (!py::isinstance<Array>(object)) {
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
  return py::reinterpret_borrow<Array>(object);
}

Array as_array(py::handle object, const std::string& where) {
  if (is_plain(object)) return py::reinterpret_borrow<Array>(object);
  const Array array = as_ndarray(object, where);
  if (!computes(array)) {
    fail<py::type_error>(where, " has dtype ", text(array.dtype().attr("str")), " (",
                         dtype_text(array), "), expected native float32 or float64");
  }
  return aligned(array, where);
}

Array as_stored_array(py::handle object, const std::string& where) {
  if (is_plain(object)) return py::reinterpret_borrow<Array>(object);
  const Array array = as_ndarray(object, where);
  const bool is_float16 = array.dtype().num() == float16_number && is_native(array);
  if (!is_float16 && !computes(array) && !is_bfloat16(array.dtype())) {
    fail<py::type_error>(where, " has dtype ", text(array.dtype().attr("str")), " (",
                         dtype_text(array),
                         "), expected native float32, float64, float16 or ml_dtypes.bfloat16");
  }
  return aligned(array, where);
}

const char* dtype_name(Dtype dtype) {
  constexpr const char* names[dtype_count] = {"float32", "float64", "bfloat16",
                                              "float16", "uint8",   "uint8"};
  return names[size_t(dtype)];
}

Dtype dtype_of_coded(const Array& array) {
  if (array.itemsize() == 1) return Dtype::unsigned_8bit;
  return array.dtype().kind() == 'f' ? Dtype::float16 : Dtype::bfloat16;
}

Array in_c_order(const Array& array) {
  if (is_c_ordered(array)) return array;
  using Numpy = py::detail::npy_api;
  PyObject* const ordered = Numpy::get().PyArray_FromAny_(
      array.ptr(), nullptr, 0, 0, Numpy::NPY_ARRAY_ENSUREARRAY_ | Numpy::NPY_ARRAY_C_CONTIGUOUS_,
      nullptr);
  if (ordered == nullptr) throw py::error_already_set();  // out of memory
  return py::reinterpret_steal<Array>(ordered);
}

ArrayOf<long long> as_integers(const Array& array) {
  return py::array_t < long long, Array::c_style | Array::forcecast > (array);
}

bool can_hold(const Array& array, const py::object& integer) {
  const py::object range = py::module_::import("numpy").attr("iinfo")(array.dtype());
  return integer >= range.attr("min") && integer <= range.attr("max");
}

char kind_of_dtype(const Array& array) {
  return array.dtype().kind();
}

int dtype_number(const Array& array) {
  return array.dtype().num();
}

bool has_nonzero(const Array& array) {
  return array.attr("any")().cast<bool>();
}

std::string element_text(const Array& array, index_t index) {
  return text(array.attr("flat")[py::int_(index)]);
}

Array array_of(const View& view, py::handle owner) {
  return Array(dtype_object(view.dtype), Shape(view.shape, view.shape + view.ndim),
               Shape(view.strides, view.strides + view.ndim), view.data, owner);
}

Array new_output(const Shape& shape, Dtype dtype) {
  const py::dtype type = dtype_object(dtype);
  size_t bytes = size_t(type.itemsize());
  for (const py::ssize_t extent : shape) {
    if (extent != 0 &&
        bytes > size_t(std::numeric_limits<py::ssize_t>::max()) / 2 / size_t(extent)) {
      throw std::bad_alloc();
    }
    bytes *= size_t(extent);
  }
  if (bytes < kept_from_bytes) return Array(type, shape);
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
  return Array(type, shape, data, py::reinterpret_steal<py::object>(owner));
}

Array permuted(const Array& array, const Shape& axes) {
  if (axes.empty()) return array;
  Shape shape, strides;
  for (const index_t axis : axes) {
    shape.push_back(array.shape(axis));
    strides.push_back(array.strides(axis));
  }
  return Array(array.dtype(), shape, strides, array.data(), array);
}

void copy(const Array& from, const Array& to) {
  py::module_::import("numpy").attr("copyto")(to, from);
}

Array shared_memory(size_t bytes) {
  py::object memory = py::array_t<std::uint8_t>(py::ssize_t(bytes));
  const void* const data = Array(memory).data();
  const py::object owner = checked(PyCapsule_New(memory.ptr(), nullptr, [](PyObject* capsule) {
    Py_DECREF(static_cast<PyObject*>(PyCapsule_GetPointer(capsule, nullptr)));
  }));
  memory.release();  // the capsule's
  return Array(py::dtype::of<std::uint8_t>(), py::ssize_t(bytes), data, owner);
}

Shape dense_strides(const Array& array) {
  std::vector<index_t> axes(size_t(array.ndim()));  // outer to inner
  std::iota(axes.begin(), axes.end(), 0);
  if (array.flags() & Array::f_style) {
    std::reverse(axes.begin(), axes.end());
  } else if (!is_c_ordered(array)) {
    std::stable_sort(axes.begin(), axes.end(), [&](index_t a, index_t b) {
      return std::abs(array.strides(a)) > std::abs(array.strides(b));
    });
  }
  Shape strides(axes.size());
  index_t stride = array.itemsize();
  for (size_t i = axes.size(); i-- > 0;) {
    strides[size_t(axes[i])] = stride;
    stride *= std::max<index_t>(1, array.shape(axes[i]));
  }
  return strides;
}

namespace {

bool has_shape(const Array& array, const View& model) {
  return array.ndim() == model.ndim &&
         std::equal(model.shape, model.shape + model.ndim, array.shape());
}

py::tuple shape_of(const View& view) {
  py::tuple shape(view.ndim);
  for (index_t axis = 0; axis < view.ndim; ++axis) shape[size_t(axis)] = view.shape[axis];
  return shape;
}

}  // namespace

Array broadcast(const Array& array, const View& model) {
  if (has_shape(array, model)) return array;
  return py::module_::import("numpy").attr("broadcast_to")(array, shape_of(model));
}

void check_shape(const Array& array, const View& model, const std::string& where,
                 const char* relation) {
  if (has_shape(array, model)) return;
  fail<py::value_error>(where, " has shape ", shape_text(array), ", ", relation, " ",
                        text(shape_of(model)));
}

void check_like(const Array& array, const View& model, const std::string& where,
                const char* relation) {
  check_shape(array, model, where, relation);
  if (dtype_of(array) != model.dtype) {
    fail<py::type_error>(where, " has dtype ", dtype_text(array), ", ", relation, " ",
                         dtype_name(model.dtype));
  }
}

bool share_memory(const View& a, const View& b) {
  const Extent p(a), q(b);
  if (p.begin == p.end || q.begin == q.end || p.begin >= q.end || q.begin >= p.end) return false;
  if (is_packed(a) && is_packed(b)) return true;
  // Of plain arrays: a subclass could take the call over.
  const auto plain = [](const View& view) { return array_of(view, py::none()); };
  return py::module_::import("numpy").attr("shares_memory")(plain(a), plain(b)).cast<bool>();
}

void Overlaps::check(const std::string& caller) const {
  for (const Argument& output : arguments_) {
    if (output.use != written) continue;
    if (overlaps_itself(view_of(output.array))) {
      fail<py::value_error>(caller, ": ", output.name, " has elements that share memory (strides ",
                            strides_text(output.array), ")");
    }
    for (const Argument& other : arguments_) {
      if (&other == &output ||
          (other.use == read_first && same_elements(output.array, other.array))) {
        continue;
      }
      if (share_memory(view_of(output.array), view_of(other.array))) {
        fail<py::value_error>(caller, ": ", output.name, " overlaps ", other.name, " in memory");
      }
    }
  }
}

}  // namespace fastopt
