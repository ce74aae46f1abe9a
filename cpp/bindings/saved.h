// What a normalization's forward call keeps, and Python sees as `saved`.
#pragma once

#include <memory>

#include "arrays.h"

namespace fastopt {

// What a forward call leaves for its backward call: the user's arrays, referred to. Python cannot
// change it, but those arrays, so the backward call looks at them again.
struct Saved {
  std::string function;
  py::object gamma = py::none(), beta = py::none();
  double eps = 0;
  index_t channel_axis = 0;     // of batch normalization
  index_t groups = 0;           // of group normalization
  index_t normalized_from = 0;  // the first axis that layer normalization normalizes
  bool training = true, relu = false, residual = false;
  Array x = py::reinterpret_steal<Array>(py::handle());  // none before set_x
  bool overwritten = false;                              // y lies where x was
  py::object y = py::none();        // where the sign of what was rectified does not follow from x
  std::vector<double> statistics;   // means, variances, units
  std::vector<double> corrections;  // batch renormalization's r, d
  std::vector<index_t> geometry;    // x's shape and strides
  int type = 0;                     // x's dtype

  static std::unique_ptr<Saved> of_call(const char* function, py::handle gamma, py::handle beta,
                                        double eps);

  // What the function's forward call has returned beside y, and x as it was then.
  static Saved& of(const char* function, py::handle object);

  void set_x(const Array& array);
};

void bind_saved(py::module_& m);

}  // namespace fastopt
