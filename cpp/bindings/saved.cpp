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

template <class... Fields>
void assign(std::tuple<Fields&...> fields, const py::tuple& state) {
  fields = state.cast<std::tuple<Fields...>>();
}

template <class S>
std::unique_ptr<S> from_state(const py::tuple& state) {
  auto saved = std::make_unique<S>();
  assign(saved->fields(), state);
  saved->set_x(saved->x);
  return saved;
}

// An instance that nobody initialised would be read.
void without_new(PyHeapTypeObject* type) {
  type->ht_type.tp_new = nullptr;
  type->ht_type.tp_flags |= Py_TPFLAGS_DISALLOW_INSTANTIATION;
}

template <class S>
void bind_saved_of(py::module_& m, const char* name) {
  const std::string make = std::string(name) + "_from_state";
  m.def(make.c_str(), &from_state<S>);
  py::class_<S, Saved>(m, name, py::is_final(), py::custom_type_setup(&without_new))
      .def("__reduce__", [make](S& saved) {
        const py::object function = py::module_::import("fastopt._core").attr(make.c_str());
        return py::make_tuple(function, py::make_tuple(py::cast(saved.fields())));
      });
}

}  // namespace

void Saved::set_x(const Array& array) {
  x = array;
  geometry = geometry_of(x);
  type = dtype_number(x);
}

Array Saved::mean_and_variance() const {
  const index_t n = index_t(statistics.size()) / 3;
  Array result = new_output({2, n}, Dtype::float64);
  double* const to = static_cast<double*>(result.mutable_data());
  const double *const mean = statistics.data(), *const variance = mean + n;
  for (index_t i = 0; i < n; ++i) {
    const double unit = variance[n + i];
    to[i] = mean[i] / unit;
    to[n + i] = variance[i] / unit / unit;
  }
  return result;
}

void Saved::check_x() const {
  if (geometry_of(x) != geometry || dtype_number(x) != type) {
    fail<py::value_error>(function, "_backward: x was given another shape, dtype or strides after ",
                          function);
  }
}

void fail_saved(const char* function, py::handle object) {
  if (!py::isinstance<Saved>(object)) {
    fail<py::type_error>(function, "_backward: saved is of type ", type_name(object),
                         ", expected what ", function, " returned beside y");
  }
  const std::string& other = object.cast<Saved&>().function;
  fail<py::value_error>(function, "_backward: saved comes from ", other, ", use ", other,
                        "_backward");
}

void bind_saved(py::module_& m) {
  py::class_<Saved>(m, "Saved",
                    "What a forward call leaves for its backward; the arrays are referred to, not "
                    "copied.",
                    py::custom_type_setup(&without_new))
      .def_readonly("function", &Saved::function)
      .def_readonly("x", &Saved::x)
      .def_property_readonly("statistics", &Saved::mean_and_variance,
                             "Mean and biased variance that were used, float64, of shape "
                             "(2, number of statistics).")
      .def("__repr__", [](const Saved& saved) {
        return "Saved(" + saved.function + ", x of shape " + shape_text(saved.x) + ", " +
               dtype_text(saved.x) + ")";
      });
  bind_saved_of<SavedBatch>(m, "SavedBatch");
  bind_saved_of<SavedGroup>(m, "SavedGroup");
  bind_saved_of<SavedLayer>(m, "SavedLayer");
}

}  // namespace fastopt
