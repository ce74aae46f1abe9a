// The arrays of one call of a normalization, looked at and brought into one order.
#pragma once

#include <numeric>
#include <span>

#include "arrays.h"

namespace fastopt {

using Extents = std::span<const index_t>;

inline Extents extents_of(const Array& array) {
  return {array.shape(), size_t(array.ndim())};
}

inline index_t product(Extents extents) {
  return std::accumulate(extents.begin(), extents.end(), index_t(1), std::multiplies());
}

inline Shape shape_of(Extents extents) {
  return {extents.begin(), extents.end()};
}

// The order of axes in which an array lies in memory without gaps; none for C order, nor for an
// array with gaps.
inline Shape order_in_memory(const Array& array) {
  if (is_c_ordered(array)) return {};
  Shape order(size_t(array.ndim()));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](index_t a, index_t b) {
    return std::abs(array.strides(a)) > std::abs(array.strides(b));
  });
  index_t bytes = array.itemsize();
  for (size_t i = order.size(); i-- > 0;) {
    const index_t axis = order[i];
    if (array.shape(axis) == 1) continue;
    if (array.strides(axis) != bytes) return {};
    bytes *= array.shape(axis);
  }
  return order;
}

// The arrays of one call. Each is looked at before any is written; an optional one that is None is
// a null pointer. Those with x's shape are brought into x's order of memory, or into C order.
class Arguments {
 public:
  enum Order { any, c };

  Arguments(std::string function, py::handle x, Order order, Overlaps::Use use = Overlaps::read,
            const char* relation = "x has")
      : function_(std::move(function)),
        relation_(relation),
        given_(typed("x", x)),
        shape_(shape_of(given_)),
        order_(order == any ? order_in_memory(given_) : Shape()),
        x_(in_c_order(permuted(given_, order_))) {
    overlaps_.add("x", given_, use);
  }

  const Array& given() const { return given_; }
  const Array& x() const { return x_; }
  Extents shape() const { return shape_; }
  Extents ordered_shape() const { return order_.empty() ? shape() : extents_of(x_); }
  Dtype dtype() const { return dtype_of(given_); }
  std::string where(const char* name) const { return function_ + ": " + name; }
  const std::string& function() const { return function_; }

  // x's axis in its order of memory.
  index_t place_of(index_t axis) const {
    const auto found = std::find(order_.begin(), order_.end(), axis);
    return order_.empty() ? axis : found - order_.begin();
  }

  // x's companion, of the same shape and dtype.
  const void* like_x(const char* name, py::handle object, Overlaps::Use use = Overlaps::read) {
    const Array array = checked_like_x(name, object);
    overlaps_.add(name, array, use);
    return data_of(permuted(array, order_));
  }

  // Of this shape and x's dtype.
  const void* parameter(const char* name, py::handle object, Extents shape) {
    if (object.is_none()) return nullptr;
    const Array array = checked_parameter(name, object, shape);
    overlaps_.add(name, array, Overlaps::read);
    return data_of(array);
  }

  void* changed_parameter(const char* name, py::handle object, Extents shape) {
    if (object.is_none()) return nullptr;
    Array array = checked_parameter(name, object, shape);
    if (!array.writeable()) fail<py::value_error>(where(name), " is read-only");
    if (!is_c_ordered(array)) {
      fail<py::value_error>(where(name), " is not contiguous, and is changed in place");
    }
    overlaps_.add(name, array, Overlaps::written);
    return array.mutable_data();
  }

  struct Output {
    py::object array;  // as the user sees it
    void* data;
  };

  // The result, in `out` or else in new memory; the last of the arguments.
  Output output(py::handle out) {
    if (out.is_none()) {
      overlaps_.check(function_);
      return new_like_x();
    }
    Array array = checked_like_x("out", out);
    if (!array.writeable()) fail<py::value_error>(where("out"), " is read-only");
    if (!is_c_ordered(permuted(array, order_))) {
      fail<py::value_error>(where("out"), " lies in memory in another order than x");
    }
    overlaps_.add("out", array, Overlaps::written);
    overlaps_.check(function_);
    return {array, array.mutable_data()};
  }

  // Not initialised, in x's order of memory.
  Output new_like_x() const {
    Array array = new_output(shape_of(ordered_shape()), dtype());
    void* const data = array.mutable_data();
    Shape back(order_.size());
    for (size_t i = 0; i < back.size(); ++i) back[size_t(order_[i])] = index_t(i);
    return {permuted(array, back), data};
  }

 private:
  Array typed(const char* name, py::handle object) const {
    return is_plain(object) ? py::reinterpret_borrow<Array>(object) : as_array(object, where(name));
  }

  Array checked_like_x(const char* name, py::handle object) const {
    Array array = typed(name, object);
    check_like(array, given_, where(name), relation_);
    return array;
  }

  Array checked_parameter(const char* name, py::handle object, Extents shape) const {
    Array array = typed(name, object);
    if (!std::ranges::equal(extents_of(array), shape)) {
      fail<py::value_error>(where(name), " has shape ", shape_text(array), ", expected ",
                            text(py::tuple(py::cast(shape_of(shape)))));
    }
    if (dtype_of(array) != dtype()) {
      fail<py::type_error>(where(name), " has dtype ", dtype_text(array), ", x has ",
                           dtype_text(given_));
    }
    return array;
  }

  // In C order. The arrays themselves are among the overlaps, copies of them are kept here.
  const void* data_of(const Array& array) {
    if (is_c_ordered(array)) return array.data();
    return copies_.emplace_back(in_c_order(array)).data();
  }

  const std::string function_;
  const char* const relation_;
  const Array given_;
  const Shape shape_;  // apart: checks of other arrays may run Python, which may reshape x
  const Shape order_;
  const Array x_;
  Overlaps overlaps_;
  std::vector<Array> copies_;
};

}  // namespace fastopt
