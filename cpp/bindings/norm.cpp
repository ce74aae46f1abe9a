// Normalization from Python: looks at the arrays, releases the GIL, calls core/norm.h. The checks
// of numbers are Python's; what a forward call leaves for its backward is checked here again.
#include <pybind11/stl.h>

#include <numeric>
#include <optional>

#include "arrays.h"
#include "config.h"
#include "core/memory.h"
#include "core/norm.h"

namespace fastopt {
namespace {

index_t product(Shape::const_iterator begin, Shape::const_iterator end) {
  return std::accumulate(begin, end, index_t(1), std::multiplies());
}

// An int of any size: what no array has stays what no array has.
index_t clipped(py::handle integer) {
  const index_t value = PyNumber_AsSsize_t(integer.ptr(), nullptr);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// The order of axes in which an array lies in memory without gaps; none for C order, nor for an
// array with gaps.
Shape order_in_memory(const py::array& array) {
  if (array.flags() & py::array::c_style) return {};
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

py::array permuted(const py::array& array, const Shape& order) {
  if (order.empty()) return array;
  Shape shape, strides;
  for (const index_t axis : order) {
    shape.push_back(array.shape(axis));
    strides.push_back(array.strides(axis));
  }
  return py::array(array.dtype(), shape, strides, array.data(), array);
}

// What a forward call leaves for its backward call: the user's arrays, referred to. Python cannot
// change it, but those arrays, so the backward call looks at them again.
struct Saved {
  std::string function;
  py::array x;
  py::object gamma = py::none(), beta = py::none();
  py::object y = py::none();  // where the sign of what was rectified does not follow from x
  index_t axis = 0;           // batch norm's channels, or the first of those that are normalized
  index_t groups = 0;
  double eps = 0;
  bool training = true, relu = false, residual = false;
  bool overwritten = false;         // y lies where x was
  std::vector<double> statistics;   // means, variances, units
  std::vector<double> corrections;  // batch renormalization's r, d
  Shape shape, strides;             // x's, and its dtype
  int type = 0;

  // y and this.
  py::tuple with(py::handle result) && {
    remember_geometry();
    return py::make_tuple(result, std::make_unique<Saved>(std::move(*this)));
  }

  void remember_geometry() {
    shape = shape_of(x);
    strides.assign(x.strides(), x.strides() + x.ndim());
    type = x.dtype().num();
  }

  static Saved& of(const std::string& function, py::handle object) {
    if (!py::isinstance<Saved>(object)) {
      fail<py::type_error>(function, "_backward: saved is of type ", type_name(object),
                           ", expected what ", function, " returned beside y");
    }
    Saved& saved = object.cast<Saved&>();
    if (saved.function != function) {
      fail<py::value_error>(function, "_backward: saved comes from ", saved.function, ", use ",
                            saved.function, "_backward");
    }
    const bool same_shape = shape_of(saved.x) == saved.shape;
    if (!same_shape || saved.x.dtype().num() != saved.type ||
        !std::equal(saved.strides.begin(), saved.strides.end(), saved.x.strides())) {
      fail<py::value_error>(
          function, "_backward: x was given another shape, dtype or strides after ", function);
    }
    if (saved.overwritten) {
      fail<py::value_error>(function, "_backward: x is no more, ", function,
                            " wrote y over it (out=x)");
    }
    return saved;
  }
};

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
        order_(order == any ? order_in_memory(given_) : Shape()),
        x_(in_c_order(permuted(given_, order_))) {
    overlaps_.add("x", given_, use);
  }

  const py::array& given() const { return given_; }
  const py::array& x() const { return x_; }
  Shape shape() const { return shape_of(given_); }
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
    const py::array array = checked_like_x(name, object);
    overlaps_.add(name, array, use);
    return keep(in_c_order(permuted(array, order_))).data();
  }

  // Of this shape and x's dtype.
  const void* parameter(const char* name, py::handle object, const Shape& shape) {
    if (object.is_none()) return nullptr;
    const py::array array = checked_parameter(name, object, shape);
    overlaps_.add(name, array, Overlaps::read);
    return keep(in_c_order(array)).data();
  }

  void* changed_parameter(const char* name, py::handle object, const Shape& shape) {
    if (object.is_none()) return nullptr;
    py::array array = checked_parameter(name, object, shape);
    if (!array.writeable()) fail<py::value_error>(where(name), " is read-only");
    if (!(array.flags() & py::array::c_style)) {
      fail<py::value_error>(where(name), " is not contiguous, and is changed in place");
    }
    overlaps_.add(name, array, Overlaps::written);
    return keep(array).mutable_data();
  }

  struct Output {
    py::object array;  // as the user sees it
    void* data;
  };

  // The result, in `out` or else in new memory; the last of the arguments.
  Output output(py::handle out) {
    if (out.is_none()) {
      check_overlaps();
      return new_like_x();
    }
    py::array array = checked_like_x("out", out);
    if (!array.writeable()) fail<py::value_error>(where("out"), " is read-only");
    if (!(permuted(array, order_).flags() & py::array::c_style)) {
      fail<py::value_error>(where("out"), " lies in memory in another order than x");
    }
    overlaps_.add("out", array, Overlaps::written);
    check_overlaps();
    return {array, array.mutable_data()};
  }

  // Not initialised, in x's order of memory.
  Output new_like_x() const {
    py::array array = new_output(shape_of(x_), dtype());
    void* const data = array.mutable_data();
    Shape back(order_.size());
    for (size_t i = 0; i < back.size(); ++i) back[size_t(order_[i])] = index_t(i);
    return {permuted(array, back), data};
  }

  void check_overlaps() const { overlaps_.check(function_); }

 private:
  py::array typed(const char* name, py::handle object) const {
    return is_plain(object) ? py::reinterpret_borrow<py::array>(object)
                            : as_array(object, where(name));
  }

  py::array checked_like_x(const char* name, py::handle object) const {
    py::array array = typed(name, object);
    check_like(array, given_, where(name), relation_);
    return array;
  }

  py::array checked_parameter(const char* name, py::handle object, const Shape& shape) const {
    py::array array = typed(name, object);
    if (shape_of(array) != shape) {
      fail<py::value_error>(where(name), " has shape ", shape_text(array), ", expected ",
                            text(py::tuple(py::cast(shape))));
    }
    if (dtype_of(array) != dtype()) {
      fail<py::type_error>(where(name), " has dtype ", text(array.dtype()), ", x has ",
                           text(given_.dtype()));
    }
    return array;
  }

  py::array& keep(py::array array) { return kept_.emplace_back(std::move(array)); }

  const std::string function_;
  const char* const relation_;
  const py::array given_;
  const Shape order_;
  const py::array x_;
  Overlaps overlaps_;
  std::vector<py::array> kept_;
};

// What a backward call has to look at again.
Arguments arguments_of(const Saved& saved, Arguments::Order order) {
  return {saved.function + "_backward", saved.x, order, Overlaps::read, "x had"};
}

// The gradient of what had no part in an empty output.
void set_to_zero(py::array& gradient) {
  std::fill_n(static_cast<char*>(gradient.mutable_data()), gradient.nbytes(), char(0));
}

py::object if_given(const py::object& parameter, const py::array& gradient) {
  return parameter.is_none() ? py::object(py::none()) : py::object(gradient);
}

// What the normalizations have in common; gamma and beta are of this shape.
template <class N>
N described(Arguments& arguments, const Saved& saved, const Shape& shape) {
  N norm{};
  norm.dtype = arguments.dtype();
  norm.x = arguments.x().data();
  norm.gamma = arguments.parameter("gamma", saved.gamma, shape);
  norm.beta = arguments.parameter("beta", saved.beta, shape);
  return norm;
}

void set_statistics(Normalization& norm, Saved& saved, index_t n) {
  if (saved.statistics.size() != 3 * size_t(n)) {
    fail<py::value_error>(saved.function, "_backward: saved has statistics of another x");
  }
  double* const mean = saved.statistics.data();
  norm.statistics = {mean, mean + n, mean + 2 * n, saved.eps};
}

Saved begin(const Arguments& arguments, py::object gamma, py::object beta, double eps) {
  Saved saved;
  saved.function = arguments.function();
  saved.x = arguments.given();
  saved.gamma = std::move(gamma);
  saved.beta = std::move(beta);
  saved.eps = eps;
  return saved;
}

// --- batch normalization ---

BatchNorm batch_norm_of(Arguments& arguments, const Saved& saved) {
  const index_t axes = arguments.given().ndim();
  if (axes < 2) {
    fail<py::value_error>(arguments.where("x"), " has shape ", shape_text(arguments.given()),
                          ", expected at least 2 axes");
  }
  if (saved.axis < -axes || saved.axis >= axes) {
    fail<py::value_error>(arguments.where("axis"), " is ", saved.axis, ", x has ", axes, " axes");
  }
  const index_t place = arguments.place_of(saved.axis + (saved.axis < 0 ? axes : 0));
  const Shape shape = shape_of(arguments.x());
  auto norm = described<BatchNorm>(arguments, saved, {shape[size_t(place)]});
  norm.outer = product(shape.begin(), shape.begin() + place);
  norm.channels = shape[size_t(place)];
  norm.inner = product(shape.begin() + place + 1, shape.end());
  norm.training = saved.training;
  norm.relu = saved.relu;
  if (saved.training && norm.outer * norm.inner < 2) {
    fail<py::value_error>(arguments.function(),
                          ": training needs more than one value per channel, x has shape ",
                          shape_text(arguments.given()));
  }
  return norm;
}

// The running statistics as those of the call.
void read_running(const BatchNorm& norm, const void* mean, const void* variance) {
  for (index_t c = 0; c < norm.channels; ++c) {
    const auto read = [&](const void* array) {
      return norm.dtype == Dtype::float32 ? double(static_cast<const float*>(array)[c])
                                          : static_cast<const double*>(array)[c];
    };
    norm.statistics.mean[c] = read(mean);
    norm.statistics.variance[c] = read(variance);
  }
}

// Batch normalization, or with its limits batch renormalization: y and Saved.
py::tuple batch_norm_forward(const std::string& function, py::handle x, py::handle axis,
                             py::object gamma, py::object beta, py::handle running_mean,
                             py::handle running_var, bool training, double momentum, double eps,
                             py::handle residual, bool relu, bool unbiased, py::handle out,
                             std::optional<std::pair<double, double>> limits) {
  const CurrentSettings settings;
  // Training needs x for its backward pass.
  Arguments arguments(function, x, Arguments::any,
                      training ? Overlaps::read : Overlaps::read_first);
  Saved saved = begin(arguments, std::move(gamma), std::move(beta), eps);
  saved.axis = clipped(axis);
  saved.training = training;
  saved.relu = relu;
  saved.residual = !residual.is_none();
  BatchNorm norm = batch_norm_of(arguments, saved);
  if (running_mean.is_none() != running_var.is_none()) {
    fail<py::value_error>(function, ": running_mean and running_var come together, one is None");
  }
  if (running_mean.is_none() && (!training || limits)) {
    fail<py::value_error>(function, training ? ": training" : ": evaluation",
                          " needs running_mean and running_var, they are None");
  }
  const Shape channels{norm.channels};
  saved.statistics.assign(3 * size_t(norm.channels), 1.0);
  if (limits && training) saved.corrections.resize(2 * size_t(norm.channels));
  set_statistics(norm, saved, norm.channels);
  Running running{nullptr, nullptr, momentum, unbiased};
  if (training) {
    running.mean = arguments.changed_parameter("running_mean", running_mean, channels);
    running.variance = arguments.changed_parameter("running_var", running_var, channels);
  } else {
    const void* const mean = arguments.parameter("running_mean", running_mean, channels);
    const void* const variance = arguments.parameter("running_var", running_var, channels);
    read_running(norm, mean, variance);
  }
  const void* const added =
      residual.is_none() ? nullptr : arguments.like_x("residual", residual, Overlaps::read_first);
  const Arguments::Output y = arguments.output(out);
  if (arguments.x().size() > 0 || training) {
    const py::gil_scoped_release release;
    if (limits && training) {
      double *const r = saved.corrections.data(), *const d = r + norm.channels;
      batch_renorm(settings.get(), norm, running, {limits->first, limits->second, r, d}, y.data);
    } else {
      batch_norm(settings.get(), norm, running, added, y.data);
    }
  }
  saved.overwritten = y.data == arguments.x().data() && arguments.x().size() > 0;
  saved.y = saved.residual && relu ? y.array : py::none();
  return std::move(saved).with(y.array);
}

// dx, dgamma, dbeta and what flows to the residual.
py::tuple batch_norm_gradient(const std::string& function, py::handle dy_object, py::handle object,
                              py::handle out) {
  const CurrentSettings settings;
  Saved& saved = Saved::of(function, object);
  Arguments arguments = arguments_of(saved, Arguments::any);
  BatchNorm norm = batch_norm_of(arguments, saved);
  const index_t channels = norm.channels;
  set_statistics(norm, saved, channels);
  // Without an activation dy is the gradient of the residual, too.
  const bool passed_on = saved.residual && !saved.relu;
  const void* const dy =
      arguments.like_x("dy", dy_object, passed_on ? Overlaps::read : Overlaps::read_first);
  const void* const y = saved.y.is_none() ? nullptr : arguments.like_x("y", saved.y);
  const Arguments::Output dx = arguments.output(out);
  Arguments::Output dresidual{py::none(), nullptr};
  if (passed_on) {
    dresidual.array = py::reinterpret_borrow<py::object>(dy_object);
  } else if (saved.residual) {
    dresidual = arguments.new_like_x();
  }
  py::array dgamma = new_output({channels}, norm.dtype);
  py::array dbeta = new_output({channels}, norm.dtype);
  if (norm.outer * norm.inner == 0) {
    set_to_zero(dgamma);
    set_to_zero(dbeta);
  } else {
    void *const dgamma_data = dgamma.mutable_data(), *const dbeta_data = dbeta.mutable_data();
    const py::gil_scoped_release release;
    if (saved.corrections.size() == 2 * size_t(channels)) {
      double *const r = saved.corrections.data(), *const d = r + channels;
      batch_renorm_backward(settings.get(), norm, {0, 0, r, d}, dy, dx.data, dgamma_data,
                            dbeta_data);
    } else {
      batch_norm_backward(settings.get(), norm, dy, y, dx.data, dresidual.data, dgamma_data,
                          dbeta_data);
    }
  }
  return py::make_tuple(dx.array, if_given(saved.gamma, dgamma), if_given(saved.beta, dbeta),
                        dresidual.array);
}

// --- statistics of samples ---

// y and Saved, with so many statistics.
template <class N>
py::tuple forward(Arguments& arguments, N norm, Saved saved, index_t statistics, py::handle out,
                  void (*run)(const Settings&, const N&, void* y)) {
  const CurrentSettings settings;
  saved.statistics.assign(3 * size_t(statistics), 1.0);
  set_statistics(norm, saved, statistics);
  const Arguments::Output y = arguments.output(out);
  if (arguments.x().size() > 0) {
    const py::gil_scoped_release release;
    run(settings.get(), norm, y.data);
  }
  return std::move(saved).with(y.array);
}

// dx, dgamma and dbeta of this shape.
template <class N>
py::tuple gradient(Arguments& arguments, N norm, Saved& saved, index_t statistics,
                   const Shape& shape, py::handle dy_object, py::handle out,
                   void (*run)(const Settings&, const N&, const void* dy, void* dx, void* dgamma,
                               void* dbeta)) {
  const CurrentSettings settings;
  set_statistics(norm, saved, statistics);
  const void* const dy = arguments.like_x("dy", dy_object, Overlaps::read_first);
  const Arguments::Output dx = arguments.output(out);
  py::array dgamma = new_output(shape, norm.dtype), dbeta = new_output(shape, norm.dtype);
  if (arguments.x().size() == 0) {
    set_to_zero(dgamma);
    set_to_zero(dbeta);
  } else {
    void *const dgamma_data = dgamma.mutable_data(), *const dbeta_data = dbeta.mutable_data();
    const py::gil_scoped_release release;
    run(settings.get(), norm, dy, dx.data, dgamma_data, dbeta_data);
  }
  return py::make_tuple(dx.array, if_given(saved.gamma, dgamma), if_given(saved.beta, dbeta));
}

// gamma and beta are of the shape {groups * channels}.
GroupNorm group_norm_of(Arguments& arguments, const Saved& saved) {
  const Shape shape = arguments.shape();
  if (shape.size() < 2) {
    fail<py::value_error>(arguments.where("x"), " has shape ", shape_text(arguments.given()),
                          ", expected at least 2 axes");
  }
  const index_t channels = shape[1], groups = saved.groups;
  if (groups < 1 || channels % groups != 0) {
    fail<py::value_error>(arguments.where("num_groups"), " is ", groups, ", x has ", channels,
                          " channels");
  }
  auto norm = described<GroupNorm>(arguments, saved, {channels});
  norm.samples = shape[0];
  norm.groups = groups;
  norm.channels = channels / groups;
  norm.inner = product(shape.begin() + 2, shape.end());
  return norm;
}

// Without num_groups, each channel is a group.
py::tuple group_norm_forward(const std::string& function, py::handle x, py::handle num_groups,
                             py::object gamma, py::object beta, double eps, py::handle out) {
  Arguments arguments(function, x, Arguments::c);
  Saved saved = begin(arguments, std::move(gamma), std::move(beta), eps);
  const Shape shape = arguments.shape();
  if (!num_groups.is_none()) {
    saved.groups = clipped(num_groups);
  } else if (shape.size() < 3 ||
             (arguments.x().size() > 0 && product(shape.begin() + 2, shape.end()) < 2)) {
    fail<py::value_error>(arguments.where("x"), " has shape ", shape_text(arguments.given()),
                          ", expected (N, C, ...) with more than one value per channel");
  } else {
    saved.groups = shape[1];
  }
  const GroupNorm norm = group_norm_of(arguments, saved);
  return forward(arguments, norm, std::move(saved), norm.samples * norm.groups, out, group_norm);
}

py::tuple group_norm_gradient(const std::string& function, py::handle dy, py::handle object,
                              py::handle out) {
  Saved& saved = Saved::of(function, object);
  Arguments arguments = arguments_of(saved, Arguments::c);
  const GroupNorm norm = group_norm_of(arguments, saved);
  return gradient(arguments, norm, saved, norm.samples * norm.groups, {norm.groups * norm.channels},
                  dy, out, group_norm_backward);
}

// gamma and beta are of the shape of x's axes from saved.axis on.
Shape normalized_shape(const Arguments& arguments, const Saved& saved) {
  const Shape shape = arguments.shape();
  if (saved.axis < 0 || saved.axis > arguments.given().ndim()) {
    fail<py::value_error>(arguments.function(), ": saved has the axes of another x");
  }
  return {shape.begin() + saved.axis, shape.end()};
}

LayerNorm layer_norm_of(Arguments& arguments, const Saved& saved) {
  const Shape shape = arguments.shape();
  auto norm = described<LayerNorm>(arguments, saved, normalized_shape(arguments, saved));
  norm.rows = product(shape.begin(), shape.begin() + saved.axis);
  norm.columns = product(shape.begin() + saved.axis, shape.end());
  norm.groups = 1;
  norm.centered = saved.function == "layer_norm";
  return norm;
}

py::tuple layer_norm_forward(const std::string& function, py::handle x, const py::tuple& normalized,
                             py::object gamma, py::object beta, double eps, py::handle out) {
  Arguments arguments(function, x, Arguments::c);
  Saved saved = begin(arguments, std::move(gamma), std::move(beta), eps);
  saved.axis = arguments.given().ndim() - index_t(normalized.size());
  Shape expected;
  for (const py::handle extent : normalized) expected.push_back(clipped(extent));
  if (expected.empty() || saved.axis < 0 || normalized_shape(arguments, saved) != expected) {
    fail<py::value_error>(arguments.where("x"), " has shape ", shape_text(arguments.given()),
                          ", expected its last axes to be ", text(normalized));
  }
  const LayerNorm norm = layer_norm_of(arguments, saved);
  return forward(arguments, norm, std::move(saved), norm.rows, out, layer_norm);
}

py::tuple layer_norm_gradient(const std::string& function, py::handle dy, py::handle object,
                              py::handle out) {
  Saved& saved = Saved::of(function, object);
  Arguments arguments = arguments_of(saved, Arguments::c);
  const LayerNorm norm = layer_norm_of(arguments, saved);
  return gradient(arguments, norm, saved, norm.rows, normalized_shape(arguments, saved), dy, out,
                  layer_norm_backward);
}

py::array_t<double> statistics_of(const Saved& saved) {
  const index_t n = index_t(saved.statistics.size()) / 3;
  py::array_t<double> result({index_t(2), n});
  const double *const mean = saved.statistics.data(), *const variance = mean + n;
  for (index_t i = 0; i < n; ++i) {
    const double unit = variance[n + i];
    result.mutable_at(0, i) = mean[i] / unit;
    result.mutable_at(1, i) = variance[i] / unit / unit;
  }
  return result;
}

py::tuple state_of(const Saved& s) {
  return py::make_tuple(s.function, s.x, s.gamma, s.beta, s.y, s.axis, s.groups, s.eps, s.training,
                        s.relu, s.residual, s.overwritten, s.statistics, s.corrections);
}

std::unique_ptr<Saved> from_state(const py::tuple& state) {
  auto saved = std::make_unique<Saved>();
  size_t next = 0;
  const auto read = [&](auto&... members) {
    ((members = state[next++].cast<std::remove_reference_t<decltype(members)>>()), ...);
  };
  Saved& s = *saved;
  read(s.function, s.x, s.gamma, s.beta, s.y, s.axis, s.groups, s.eps, s.training, s.relu,
       s.residual, s.overwritten, s.statistics, s.corrections);
  s.remember_geometry();
  return saved;
}

// An instance that nobody initialised would be read.
void without_new(PyHeapTypeObject* type) {
  type->ht_type.tp_new = nullptr;
  type->ht_type.tp_flags |= Py_TPFLAGS_DISALLOW_INSTANTIATION;
}

}  // namespace

void bind_norm(py::module_& m) {
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
                    text(saved.x.dtype()) + ")";
           })
      .def("__reduce__", [](const Saved& saved) {
        const py::object make = py::module_::import("fastopt._core").attr("saved_from_state");
        return py::make_tuple(make, py::make_tuple(state_of(saved)));
      });
  m.def("saved_from_state", &from_state);
  m.def("batch_norm", &batch_norm_forward);
  m.def("batch_norm_backward", &batch_norm_gradient);
  m.def("group_norm", &group_norm_forward);
  m.def("group_norm_backward", &group_norm_gradient);
  m.def("layer_norm", &layer_norm_forward);
  m.def("layer_norm_backward", &layer_norm_gradient);
  // For what Python computes.
  m.def("check_array",
        [](py::handle object, const std::string& where) { as_array(object, where); });
  m.def("check_apart", [](const std::string& caller, const char* written, const py::array& output,
                          const char* read, const py::array& input) {
    Overlaps overlaps;
    overlaps.add(written, output, Overlaps::written);
    overlaps.add(read, input, Overlaps::read);
    overlaps.check(caller);
  });
  m.def("empty_cache", &empty_cache,
        "Return the memory kept for coming calls to the system; arrays in use are not touched.");
  py::module_::import("atexit").attr("register")(py::cpp_function(&close_cache));
}

}  // namespace fastopt
