#include "memory.h"

namespace fastopt {

py::array new_output(const std::vector<py::ssize_t>& shape, Dtype dtype) {
  return py::array(dtype == Dtype::float32 ? py::dtype::of<float>() : py::dtype::of<double>(),
                   shape);
}

}  // namespace fastopt
