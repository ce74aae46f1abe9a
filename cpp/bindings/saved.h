// What a normalization's forward call keeps, and Python sees as `saved`.
#pragma once

#include <memory>
#include <tuple>

#include "arrays.h"

namespace fastopt {

// What a forward call leaves for its backward call: the user's arrays, referred to. Python cannot
// change it, but those arrays, so the backward call looks at them again. This is what every
// normalization needs; `fields` is what a pickle holds.
struct Saved {
  std::string function;
  py::object gamma, beta;
  double eps = 0;
  Array x = py::reinterpret_steal<Array>(py::handle());  // none before set_x
  std::vector<double> statistics;                        // means, variances, units
  std::vector<index_t> geometry;                         // x's shape and strides
  int type = 0;                                          // x's dtype

  void set_x(const Array& array);
  void check_x() const;  // x is as it was
  Array mean_and_variance() const;

  auto fields() { return std::tie(function, gamma, beta, eps, x, statistics); }
};

struct SavedBatch : Saved {
  index_t axis = 0;  // of the channels
  bool training = true, relu = false, residual = false;
  bool overwritten = false;         // y lies where x was
  py::object y = py::none();        // where the sign of what was rectified does not follow from x
  std::vector<double> corrections;  // batch renormalization's r, d

  auto fields() {
    return std::tuple_cat(Saved::fields(),
                          std::tie(axis, training, relu, residual, overwritten, y, corrections));
  }
};

struct SavedGroup : Saved {
  index_t groups = 0;

  auto fields() { return std::tuple_cat(Saved::fields(), std::tie(groups)); }
};

struct SavedLayer : Saved {
  index_t normalized_from = 0;  // the first axis that is normalized

  auto fields() { return std::tuple_cat(Saved::fields(), std::tie(normalized_from)); }
};

template <class S>
std::unique_ptr<S> saved_of_call(const char* function, py::handle gamma, py::handle beta,
                                 double eps) {
  auto saved = std::make_unique<S>();
  saved->function = function;
  saved->gamma = py::reinterpret_borrow<py::object>(gamma);
  saved->beta = py::reinterpret_borrow<py::object>(beta);
  saved->eps = eps;
  return saved;
}

[[noreturn]] void fail_saved(const char* function, py::handle object);

// What the function's forward call has returned beside y, and x as it was then.
template <class S>
S& saved_from(const char* function, py::handle object) {
  S* const saved = py::isinstance<S>(object) ? object.cast<S*>() : nullptr;
  if (saved == nullptr || saved->function != function) fail_saved(function, object);
  saved->check_x();
  return *saved;
}

void bind_saved(py::module_& m);

}  // namespace fastopt
