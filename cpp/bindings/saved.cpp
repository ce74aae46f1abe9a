#include "saved.h"

#include <pybind11/stl.h>

namespace fastopt {
namespace {

std::vector<index_t> geometry_of(const Array& array) {
  std::vector<index_t> geometry(2 * size_t(array.ndim()));
  std::copy_n(array.shape(), array.ndim(), geometry.begin());
  std::copy_n(array.strides(), array.ndim(), geometry.begin() + array.ndim());
  return geometry;
}

Array statistics_of(const Saved& saved) {
  const index_t n = index_t(saved.statistics.size()) / 3;
  Array result = new_output({2, n}, Dtype::float64);
  double* const to = static_cast<double*>(result.mutable_data());
  const double *const mean = saved.statistics.data(), *const variance = mean + n;
  for (index_t i = 0; i < n; ++i) {
    const double unit = variance[n + i];
    to[i] = mean[i] / unit;
    to[n + i] = variance[i] / unit / unit;
  }
  return result;
}

py::tuple state_of(const Saved& s) {
  return py::make_tuple(s.function, s.gamma, s.beta, s.eps, s.channel_axis, s.groups,
                        s.normalized_from, s.training, s.relu, s.residual, s.x, s.overwritten, s.y,
                        s.statistics, s.corrections);
}

std::unique_ptr<Saved> from_state(const py::tuple& state) {
  auto saved = std::make_unique<Saved>();
  size_t next = 0;
  const auto read = [&](auto&... members) {
    ((members = state[next++].cast<std::remove_reference_t<decltype(members)>>()), ...);
  };
  Saved& s = *saved;
  read(s.function, s.gamma, s.beta, s.eps, s.channel_axis, s.groups, s.normalized_from, s.training,
       s.relu, s.residual, s.x, s.overwritten, s.y, s.statistics, s.corrections);
  s.set_x(s.x);
  return saved;
}

// An instance that nobody initialised would be read.
void without_new(PyHeapTypeObject* type) {
  type->ht_type.tp_new = nullptr;
  type->ht_type.tp_flags |= Py_TPFLAGS_DISALLOW_INSTANTIATION;
}

}  // namespace

std::unique_ptr<Saved> Saved::of_call(const char* function, py::handle gamma, py::handle beta,
                                      double eps) {
  auto saved = std::make_unique<Saved>();
  saved->function = function;
  saved->gamma = py::reinterpret_borrow<py::object>(gamma);
  saved->beta = py::reinterpret_borrow<py::object>(beta);
  saved->eps = eps;
  return saved;
}

Saved& Saved::of(const char* function, py::handle object) {
  if (!py::isinstance<Saved>(object)) {
    fail<py::type_error>(function, "_backward: saved is of type ", type_name(object),
                         ", expected what ", function, " returned beside y");
  }
  Saved& saved = object.cast<Saved&>();
  if (saved.function != function) {
    fail<py::value_error>(function, "_backward: saved comes from ", saved.function, ", use ",
                          saved.function, "_backward");
  }
  if (geometry_of(saved.x) != saved.geometry || dtype_number(saved.x) != saved.type) {
    fail<py::value_error>(function, "_backward: x was given another shape, dtype or strides after ",
                          function);
  }
  if (saved.overwritten) {
    fail<py::value_error>(function, "_backward: x is no more, ", function,
                          " wrote y over it (out=x)");
  }
  return saved;
}

void Saved::set_x(const Array& array) {
  x = array;
  geometry = geometry_of(x);
  type = dtype_number(x);
}

void bind_saved(py::module_& m) {
  py::class_<Saved>(m, "Saved",
                    "What a forward call leaves for its backward; the arrays are referred to, not "
                    "copied.",
                    py::is_final(), py::custom_type_setup(&without_new))
      .def_readonly("function", &Saved::function)
      .def_readonly("x", &Saved::x)
      .def_property_readonly("statistics", &statistics_of,
                             "Mean and biased variance that were used, float64, of shape "
                             "(2, number of statistics).")
      .def("__repr__",
           [](const Saved& saved) {
             return "Saved(" + saved.function + ", x of shape " + shape_text(saved.x) + ", " +
                    dtype_text(saved.x) + ")";
           })
      .def("__reduce__", [](const Saved& saved) {
        const py::object make = py::module_::import("fastopt._core").attr("saved_from_state");
        return py::make_tuple(make, py::make_tuple(state_of(saved)));
      });
  m.def("saved_from_state", &from_state);
}

}  // namespace fastopt
