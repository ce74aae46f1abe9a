// Normalization from Python: looks at the arrays, releases the GIL, calls core/norm.h. Python has
// brought x, and what has its shape, into C order and counts outer, channels and inner.
#include <pybind11/stl.h>

#include "arrays.h"
#include "config.h"
#include "core/memory.h"
#include "core/norm.h"

namespace fastopt {
namespace {

// The arrays of one call; an optional one that is None is a null pointer.
class Arguments {
 public:
  Arguments(const std::string& function, py::handle x) : function_(function), x_(input("x", x)) {}

  const py::array& x() const { return x_; }
  Dtype dtype() const { return dtype_of(x_); }
  std::string where(const char* name) const { return function_ + ": " + name; }

  // x's companion: the same shape, dtype and C order.
  py::array like_x(const char* name, py::handle object) const {
    py::array array = input(name, object);
    check_like(array, x_, where(name), "x has");
    return array;
  }

  // One number per channel, of x's dtype.
  const void* parameter(const char* name, py::handle object, const py::tuple& shape) {
    if (object.is_none()) return nullptr;
    const py::array array = checked_parameter(name, object, shape);
    kept_.push_back(in_c_order(array));
    return kept_.back().data();
  }

  void* changed_parameter(const char* name, py::handle object, const py::tuple& shape) {
    if (object.is_none()) return nullptr;
    const py::array array = checked_parameter(name, object, shape);
    if (!array.writeable()) fail<py::value_error>(where(name), " is read-only");
    if (!(array.flags() & py::array::c_style)) {
      fail<py::value_error>(where(name), " is not contiguous, and is changed in place");
    }
    for (const py::array& other : kept_) check_apart(name, array, "another argument", other);
    kept_.push_back(array);
    return const_cast<void*>(array.data());
  }

  struct Input {
    const char* name;
    const py::array* array;
    bool may_be_output;  // the whole of it
  };

  // Where the result goes: `out`, or else new memory.
  py::array output(py::handle out, std::initializer_list<Input> inputs) const {
    if (out.is_none()) return new_output({x_.shape(), x_.shape() + x_.ndim()}, dtype());
    const py::array array = like_x("out", out);
    if (!array.writeable()) fail<py::value_error>(where("out"), " is read-only");
    for (const py::array& other : kept_) check_apart("out", array, "another argument", other);
    for (const Input& input : inputs) {
      if (input.array == nullptr) continue;
      if (input.may_be_output && array.data() == input.array->data()) continue;
      check_apart("out", array, input.name, *input.array);
    }
    return array;
  }

  void keep(const py::array& array) { kept_.push_back(array); }

  void check_apart(const char* name, const py::array& array, const char* other_name,
                   const py::array& other) const {
    const Extent a(array), b(other);
    if (a.begin < b.end && b.begin < a.end) {
      fail<py::value_error>(where(name), " overlaps ", other_name, " in memory");
    }
  }

 private:
  py::array input(const char* name, py::handle object) const {
    py::array array = typed(name, object);
    if (!(array.flags() & py::array::c_style)) {
      fail<py::value_error>(where(name), " lies in memory in another order than x");
    }
    return array;
  }

  py::array typed(const char* name, py::handle object) const {
    return is_plain(object) ? py::reinterpret_borrow<py::array>(object)
                            : as_array(object, where(name));
  }

  py::array checked_parameter(const char* name, py::handle object, const py::tuple& shape) const {
    py::array array = typed(name, object);
    bool same = array.ndim() == py::ssize_t(shape.size());
    for (size_t axis = 0; same && axis < shape.size(); ++axis) {
      same = array.shape(py::ssize_t(axis)) == shape[axis].cast<py::ssize_t>();
    }
    if (!same) {
      fail<py::value_error>(where(name), " has shape ", shape_text(array), ", expected ",
                            text(shape));
    }
    if (dtype_of(array) != dtype()) {
      fail<py::type_error>(where(name), " has dtype ", text(array.dtype()), ", x has ",
                           text(x_.dtype()));
    }
    return array;
  }

  const std::string& function_;
  const py::array x_;
  std::vector<py::array> kept_;
};

py::array_t<double> new_statistics(index_t n) {
  return py::array_t<double>({index_t(2), n});
}

py::array new_parameter(const py::tuple& shape, Dtype dtype) {
  return new_output(shape.cast<std::vector<py::ssize_t>>(), dtype);
}

// The gradient of what had no part in an empty output.
void set_to_zero(const py::array& gradient, void* data) {
  std::fill_n(static_cast<char*>(data), gradient.nbytes(), char(0));
}

py::object if_given(const void* parameter, const py::array& gradient) {
  return parameter == nullptr ? py::object(py::none()) : py::object(gradient);
}

// What the normalizations have in common; gamma and beta are of this shape.
template <class N>
N normalization(Arguments& arguments, double eps, py::handle gamma, py::handle beta,
                const py::tuple& shape) {
  N norm{};
  norm.dtype = arguments.dtype();
  norm.eps = eps;
  norm.x = arguments.x().data();
  norm.gamma = arguments.parameter("gamma", gamma, shape);
  norm.beta = arguments.parameter("beta", beta, shape);
  return norm;
}

void set_statistics(Normalization& norm, py::array_t<double>& statistics) {
  norm.mean = statistics.mutable_data();
  norm.variance = norm.mean + statistics.shape(1);
}

BatchNorm batch_normalization(Arguments& arguments, index_t outer, index_t channels, index_t inner,
                              py::handle gamma, py::handle beta, double eps, bool training,
                              bool relu) {
  const py::tuple shape = py::make_tuple(channels);
  auto norm = normalization<BatchNorm>(arguments, eps, gamma, beta, shape);
  norm.outer = outer;
  norm.channels = channels;
  norm.inner = inner;
  norm.training = training;
  norm.relu = relu;
  return norm;
}

// y (or None without `normalize`), and the mean and biased variance of each channel: those of x
// in training, else the running ones, else `statistics`.
py::tuple batch_norm_forward(const std::string& function, py::handle x_object, index_t outer,
                             index_t channels, index_t inner, py::handle gamma, py::handle beta,
                             py::handle running_mean, py::handle running_var, py::handle residual,
                             py::handle out, py::handle statistics, bool training, double momentum,
                             double eps, bool relu, bool unbiased, bool normalize) {
  const CurrentSettings settings;
  Arguments arguments(function, x_object);
  const py::tuple shape = py::make_tuple(channels);
  BatchNorm norm =
      batch_normalization(arguments, outer, channels, inner, gamma, beta, eps, training, relu);
  Running running{nullptr, nullptr, momentum, unbiased};
  py::array_t<double> stats;
  if (training) {
    running.mean = arguments.changed_parameter("running_mean", running_mean, shape);
    running.variance = arguments.changed_parameter("running_var", running_var, shape);
    stats = new_statistics(channels);
  } else if (!statistics.is_none()) {
    stats = py::reinterpret_borrow<py::array_t<double>>(statistics);
  } else {
    const void* const given[] = {arguments.parameter("running_mean", running_mean, shape),
                                 arguments.parameter("running_var", running_var, shape)};
    stats = new_statistics(channels);
    double* value = stats.mutable_data();
    for (const void* array : given) {
      for (index_t c = 0; c < channels; ++c, ++value) {
        *value = norm.dtype == Dtype::float32 ? double(static_cast<const float*>(array)[c])
                                              : static_cast<const double*>(array)[c];
      }
    }
  }
  set_statistics(norm, stats);

  py::array added;
  if (!residual.is_none()) added = arguments.like_x("residual", residual);
  py::object y = py::none();
  void* result = nullptr;
  if (normalize) {
    // Training needs x for its backward pass.
    py::array array =
        arguments.output(out, {{"x", &arguments.x(), !training},
                               {"residual", residual.is_none() ? nullptr : &added, true}});
    result = array.mutable_data();
    y = array;
  }
  if (arguments.x().size() > 0 || training) {
    const void* const residual_data = residual.is_none() ? nullptr : added.data();
    const py::gil_scoped_release release;
    batch_norm(settings.get(), norm, running, residual_data, result);
  }
  return py::make_tuple(y, stats);
}

// dx, dgamma, dbeta and what flows to the residual.
py::tuple batch_norm_gradient(const std::string& function, py::handle dy_object,
                              py::handle x_object, index_t outer, index_t channels, index_t inner,
                              py::handle gamma, py::handle beta, py::array_t<double> statistics,
                              py::handle y, py::handle out, bool training, double eps, bool relu,
                              bool residual) {
  const CurrentSettings settings;
  Arguments arguments(function, x_object);
  const py::tuple shape = py::make_tuple(channels);
  BatchNorm norm =
      batch_normalization(arguments, outer, channels, inner, gamma, beta, eps, training, relu);
  set_statistics(norm, statistics);
  const py::array dy = arguments.like_x("dy", dy_object);
  const void* rectified = nullptr;
  if (!y.is_none()) {
    const py::array array = arguments.like_x("y", y);
    arguments.keep(array);
    rectified = array.data();
  }
  py::array dx = arguments.output(out, {{"x", &arguments.x(), false}, {"dy", &dy, true}});
  py::object dresidual = py::none();
  void* dresidual_data = nullptr;
  if (residual && relu) {
    py::array array = arguments.output(py::none(), {});
    dresidual_data = array.mutable_data();
    dresidual = array;
  } else if (residual) {
    if (dx.data() == dy.data() && dx.size() > 0) {
      fail<py::value_error>(arguments.where("out"),
                            " is dy, which is the gradient of the residual");
    }
    dresidual = dy;
  }
  py::array dgamma = new_parameter(shape, norm.dtype), dbeta = new_parameter(shape, norm.dtype);
  {
    void* const dx_data = dx.mutable_data();
    void* const dgamma_data = dgamma.mutable_data();
    void* const dbeta_data = dbeta.mutable_data();
    const py::gil_scoped_release release;
    if (outer * inner > 0) {
      batch_norm_backward(settings.get(), norm, dy.data(), rectified, dx_data, dresidual_data,
                          dgamma_data, dbeta_data);
    } else {
      set_to_zero(dgamma, dgamma_data);
      set_to_zero(dbeta, dbeta_data);
    }
  }
  return py::make_tuple(dx, if_given(norm.gamma, dgamma), if_given(norm.beta, dbeta), dresidual);
}

// y and the statistics, of which there are so many.
template <class N>
py::tuple forward(Arguments& arguments, N norm, index_t statistics_count, py::handle out,
                  void (*run)(const Settings&, const N&, void* y)) {
  const CurrentSettings settings;
  py::array_t<double> statistics = new_statistics(statistics_count);
  set_statistics(norm, statistics);
  py::array y = arguments.output(out, {{"x", &arguments.x(), false}});
  if (y.size() > 0) {
    void* const y_data = y.mutable_data();
    const py::gil_scoped_release release;
    run(settings.get(), norm, y_data);
  }
  return py::make_tuple(y, statistics);
}

// dx, dgamma and dbeta.
template <class N>
py::tuple gradient(Arguments& arguments, N norm, py::array_t<double>& statistics,
                   const py::tuple& shape, py::handle dy_object, py::handle out,
                   void (*run)(const Settings&, const N&, const void* dy, void* dx, void* dgamma,
                               void* dbeta)) {
  const CurrentSettings settings;
  set_statistics(norm, statistics);
  const py::array dy = arguments.like_x("dy", dy_object);
  py::array dx = arguments.output(out, {{"x", &arguments.x(), false}, {"dy", &dy, true}});
  py::array dgamma = new_parameter(shape, norm.dtype), dbeta = new_parameter(shape, norm.dtype);
  {
    void* const dx_data = dx.mutable_data();
    void* const dgamma_data = dgamma.mutable_data();
    void* const dbeta_data = dbeta.mutable_data();
    const py::gil_scoped_release release;
    if (dx.size() > 0) {
      run(settings.get(), norm, dy.data(), dx_data, dgamma_data, dbeta_data);
    } else {
      set_to_zero(dgamma, dgamma_data);
      set_to_zero(dbeta, dbeta_data);
    }
  }
  return py::make_tuple(dx, if_given(norm.gamma, dgamma), if_given(norm.beta, dbeta));
}

GroupNorm group_normalization(Arguments& arguments, index_t samples, index_t groups,
                              index_t channels, index_t inner, py::handle gamma, py::handle beta,
                              double eps) {
  const py::tuple shape = py::make_tuple(groups * channels);
  auto norm = normalization<GroupNorm>(arguments, eps, gamma, beta, shape);
  norm.samples = samples;
  norm.groups = groups;
  norm.channels = channels;
  norm.inner = inner;
  return norm;
}

LayerNorm layer_normalization(Arguments& arguments, index_t rows, index_t columns,
                              const py::tuple& shape, py::handle gamma, py::handle beta, double eps,
                              bool centered) {
  auto norm = normalization<LayerNorm>(arguments, eps, gamma, beta, shape);
  norm.rows = rows;
  norm.columns = columns;
  norm.groups = 1;
  norm.centered = centered;
  return norm;
}

py::tuple group_norm_forward(const std::string& function, py::handle x, index_t samples,
                             index_t groups, index_t channels, index_t inner, py::handle gamma,
                             py::handle beta, py::handle out, double eps) {
  Arguments arguments(function, x);
  const GroupNorm norm =
      group_normalization(arguments, samples, groups, channels, inner, gamma, beta, eps);
  return forward(arguments, norm, samples * groups, out, group_norm);
}

py::tuple group_norm_gradient(const std::string& function, py::handle dy, py::handle x,
                              index_t samples, index_t groups, index_t channels, index_t inner,
                              py::handle gamma, py::handle beta, py::array_t<double> statistics,
                              py::handle out, double eps) {
  Arguments arguments(function, x);
  const GroupNorm norm =
      group_normalization(arguments, samples, groups, channels, inner, gamma, beta, eps);
  const py::tuple shape = py::make_tuple(groups * channels);
  return gradient(arguments, norm, statistics, shape, dy, out, group_norm_backward);
}

py::tuple layer_norm_forward(const std::string& function, py::handle x, index_t rows,
                             index_t columns, const py::tuple& shape, py::handle gamma,
                             py::handle beta, py::handle out, double eps, bool centered) {
  Arguments arguments(function, x);
  const LayerNorm norm =
      layer_normalization(arguments, rows, columns, shape, gamma, beta, eps, centered);
  return forward(arguments, norm, rows, out, layer_norm);
}

py::tuple layer_norm_gradient(const std::string& function, py::handle dy, py::handle x,
                              index_t rows, index_t columns, const py::tuple& shape,
                              py::handle gamma, py::handle beta, py::array_t<double> statistics,
                              py::handle out, double eps, bool centered) {
  Arguments arguments(function, x);
  const LayerNorm norm =
      layer_normalization(arguments, rows, columns, shape, gamma, beta, eps, centered);
  return gradient(arguments, norm, statistics, shape, dy, out, layer_norm_backward);
}

}  // namespace

void bind_norm(py::module_& m) {
  m.def("batch_norm", &batch_norm_forward);
  m.def("batch_norm_backward", &batch_norm_gradient);
  m.def("group_norm", &group_norm_forward);
  m.def("group_norm_backward", &group_norm_gradient);
  m.def("layer_norm", &layer_norm_forward);
  m.def("layer_norm_backward", &layer_norm_gradient);
  m.def("empty_cache", &empty_cache,
        "Return the memory kept for coming calls to the system; arrays in use are not touched.");
  py::module_::import("atexit").attr("register")(py::cpp_function(&close_cache));
}

}  // namespace fastopt
