// Normalization from Python: looks at the arrays, releases the GIL, calls core/norm.h. The checks
// of numbers are Python's; what a forward call leaves for its backward is checked here again.
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "config.h"
#include "core/memory.h"
#include "core/norm.h"
#include "norm_arguments.h"
#include "saved.h"

namespace fastopt {
namespace {

// An int of any size: what no array has stays what no array has.
index_t clipped(py::handle integer) {
  const index_t value = PyNumber_AsSsize_t(integer.ptr(), nullptr);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// What a backward call has to look at again.
Arguments arguments_of(const Saved& saved, Arguments::Order order) {
  return {saved.function + "_backward", saved.x, order, Overlaps::read, "x had"};
}

// The gradient of what had no part in an empty output.
void set_to_zero(Array& gradient) {
  std::fill_n(static_cast<char*>(gradient.mutable_data()), gradient.nbytes(), char(0));
}

py::object if_given(const py::object& parameter, const Array& gradient) {
  return parameter.is_none() ? py::object(py::none()) : py::object(gradient);
}

// Other Python threads run while `work` does; not beside so little work that they could not begin.
template <class Work>
void without_gil(const Arguments& arguments, const Work& work) {
  constexpr index_t from_bytes = 1 << 14;
  std::optional<py::gil_scoped_release> release;
  if (arguments.x().nbytes() >= from_bytes) release.emplace();
  work();
}

// What the normalizations have in common; gamma and beta are of this shape.
template <class N>
N described(Arguments& arguments, const Saved& saved, Extents shape) {
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

// --- batch normalization ---

BatchNorm batch_norm_of(Arguments& arguments, const SavedBatch& saved) {
  const index_t axes = arguments.given().ndim(), axis = saved.axis;
  if (axes < 2) {
    fail<py::value_error>(arguments.where("x"), " has shape ", shape_text(arguments.given()),
                          ", expected at least 2 axes");
  }
  if (axis < -axes || axis >= axes) {
    fail<py::value_error>(arguments.where("axis"), " is ", axis, ", x has ", axes, " axes");
  }
  const size_t place = size_t(arguments.place_of(axis + (axis < 0 ? axes : 0)));
  const Extents shape = arguments.ordered_shape();
  auto norm = described<BatchNorm>(arguments, saved, shape.subspan(place, 1));
  norm.outer = product(shape.first(place));
  norm.channels = shape[place];
  norm.inner = product(shape.subspan(place + 1));
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

// As Python groups what belongs together.
using GammaBeta = std::pair<py::object, py::object>;
using RunningStatistics = std::tuple<py::object, py::object, double, bool>;  // as core's Running
using ResidualRelu = std::pair<py::object, bool>;
using Limits = std::pair<double, double>;  // r_max, d_max

// Batch normalization, or with its limits batch renormalization: y and Saved.
py::tuple batch_norm_forward(std::unique_ptr<SavedBatch> saved, py::handle x,
                             const RunningStatistics& running, py::handle residual,
                             std::optional<Limits> limits, py::handle out) {
  const CurrentSettings settings;
  const std::string& function = saved->function;
  const bool training = saved->training;
  const auto& [running_mean, running_var, momentum, unbiased] = running;
  // Training needs x for its backward pass.
  Arguments arguments(function, x, Arguments::any,
                      training ? Overlaps::read : Overlaps::read_first);
  BatchNorm norm = batch_norm_of(arguments, *saved);
  if (running_mean.is_none() != running_var.is_none()) {
    fail<py::value_error>(function, ": running_mean and running_var come together, one is None");
  }
  if (running_mean.is_none() && (!training || limits)) {
    fail<py::value_error>(function, training ? ": training" : ": evaluation",
                          " needs running_mean and running_var, they are None");
  }
  const std::array<index_t, 1> channels{norm.channels};
  saved->statistics.assign(3 * size_t(norm.channels), 1.0);
  if (limits && training) saved->corrections.resize(2 * size_t(norm.channels));
  set_statistics(norm, *saved, norm.channels);
  Running moved{nullptr, nullptr, momentum, unbiased};
  if (training) {
    moved.mean = arguments.changed_parameter("running_mean", running_mean, channels);
    moved.variance = arguments.changed_parameter("running_var", running_var, channels);
  } else {
    const void* const mean = arguments.parameter("running_mean", running_mean, channels);
    const void* const variance = arguments.parameter("running_var", running_var, channels);
    read_running(norm, mean, variance);
  }
  const void* const added =
      residual.is_none() ? nullptr : arguments.like_x("residual", residual, Overlaps::read_first);
  const Arguments::Output y = arguments.output(out);
  if (arguments.x().size() > 0 || training) {
    without_gil(arguments, [&] {
      if (limits && training) {
        double *const r = saved->corrections.data(), *const d = r + norm.channels;
        batch_renorm(settings.get(), norm, moved, {limits->first, limits->second, r, d}, y.data);
      } else {
        batch_norm(settings.get(), norm, moved, added, y.data);
      }
    });
  }
  saved->set_x(arguments.given());
  saved->residual = !residual.is_none();
  saved->overwritten = y.data == arguments.x().data() && arguments.x().size() > 0;
  if (saved->residual && saved->relu) saved->y = y.array;
  return py::make_tuple(y.array, std::move(saved));
}

// Mean and biased variance of each channel.
Array batch_statistics(py::handle x, py::handle axis, double eps) {
  const CurrentSettings settings;
  const auto saved = saved_of_call<SavedBatch>("batch_norm", py::none(), py::none(), eps);
  saved->axis = clipped(axis);
  Arguments arguments(saved->function, x, Arguments::any, Overlaps::read);
  BatchNorm norm = batch_norm_of(arguments, *saved);
  saved->statistics.assign(3 * size_t(norm.channels), 1.0);
  set_statistics(norm, *saved, norm.channels);
  without_gil(arguments, [&] { batch_norm(settings.get(), norm, {}, nullptr, nullptr); });
  return saved->mean_and_variance();
}

// dx, dgamma, dbeta and what flows to the residual.
py::tuple batch_norm_gradient(const char* function, py::handle dy_object, py::handle object,
                              py::handle out) {
  const CurrentSettings settings;
  SavedBatch& saved = saved_from<SavedBatch>(function, object);
  if (saved.overwritten) {
    fail<py::value_error>(function, "_backward: x is no more, ", function,
                          " wrote y over it (out=x)");
  }
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
  Array dgamma = new_output({channels}, norm.dtype);
  Array dbeta = new_output({channels}, norm.dtype);
  if (norm.outer * norm.inner == 0) {
    set_to_zero(dgamma);
    set_to_zero(dbeta);
  } else {
    const Gradients gradients{dx.data, dgamma.mutable_data(), dbeta.mutable_data()};
    without_gil(arguments, [&] {
      if (saved.corrections.size() == 2 * size_t(channels)) {
        double *const r = saved.corrections.data(), *const d = r + channels;
        batch_renorm_backward(settings.get(), norm, {0, 0, r, d}, dy, gradients);
      } else {
        batch_norm_backward(settings.get(), norm, dy, y, gradients, dresidual.data);
      }
    });
  }
  return py::make_tuple(dx.array, if_given(saved.gamma, dgamma), if_given(saved.beta, dbeta),
                        dresidual.array);
}

// --- statistics of samples ---

// y and Saved, with so many statistics.
template <class N, class S>
py::tuple forward(Arguments& arguments, N norm, std::unique_ptr<S> saved, index_t statistics,
                  py::handle out, void (*run)(const Settings&, const N&, void* y)) {
  const CurrentSettings settings;
  saved->statistics.assign(3 * size_t(statistics), 1.0);
  set_statistics(norm, *saved, statistics);
  const Arguments::Output y = arguments.output(out);
  if (arguments.x().size() > 0) {
    without_gil(arguments, [&] { run(settings.get(), norm, y.data); });
  }
  saved->set_x(arguments.given());
  return py::make_tuple(y.array, std::move(saved));
}

// dx, dgamma and dbeta of this shape.
template <class N>
py::tuple gradient(Arguments& arguments, N norm, Saved& saved, index_t statistics,
                   const Shape& shape, py::handle dy_object, py::handle out,
                   void (*run)(const Settings&, const N&, const void* dy, const Gradients&)) {
  const CurrentSettings settings;
  set_statistics(norm, saved, statistics);
  const void* const dy = arguments.like_x("dy", dy_object, Overlaps::read_first);
  const Arguments::Output dx = arguments.output(out);
  Array dgamma = new_output(shape, norm.dtype), dbeta = new_output(shape, norm.dtype);
  if (arguments.x().size() == 0) {
    set_to_zero(dgamma);
    set_to_zero(dbeta);
  } else {
    const Gradients gradients{dx.data, dgamma.mutable_data(), dbeta.mutable_data()};
    without_gil(arguments, [&] { run(settings.get(), norm, dy, gradients); });
  }
  return py::make_tuple(dx.array, if_given(saved.gamma, dgamma), if_given(saved.beta, dbeta));
}

// gamma and beta are of the shape {groups * channels}.
GroupNorm group_norm_of(Arguments& arguments, const SavedGroup& saved) {
  const Extents shape = arguments.shape();
  if (shape.size() < 2) {
    fail<py::value_error>(arguments.where("x"), " has shape ", shape_text(arguments.given()),
                          ", expected at least 2 axes");
  }
  const index_t channels = shape[1], groups = saved.groups;
  if (groups < 1 || channels % groups != 0) {
    fail<py::value_error>(arguments.where("num_groups"), " is ", groups, ", x has ", channels,
                          " channels");
  }
  auto norm = described<GroupNorm>(arguments, saved, shape.subspan(1, 1));
  norm.samples = shape[0];
  norm.groups = groups;
  norm.channels = channels / groups;
  norm.inner = product(shape.subspan(2));
  return norm;
}

// Without num_groups, each channel is a group.
py::tuple group_norm_forward(std::unique_ptr<SavedGroup> saved, py::handle x, py::handle num_groups,
                             py::handle out) {
  Arguments arguments(saved->function, x, Arguments::c);
  const Extents shape = arguments.shape();
  if (!num_groups.is_none()) {
    saved->groups = clipped(num_groups);
  } else if (shape.size() < 3 || (arguments.x().size() > 0 && product(shape.subspan(2)) < 2)) {
    fail<py::value_error>(arguments.where("x"), " has shape ", shape_text(arguments.given()),
                          ", expected (N, C, ...) with more than one value per channel");
  } else {
    saved->groups = shape[1];
  }
  const GroupNorm norm = group_norm_of(arguments, *saved);
  return forward(arguments, norm, std::move(saved), norm.samples * norm.groups, out, group_norm);
}

py::tuple group_norm_gradient(const char* function, py::handle dy, py::handle object,
                              py::handle out) {
  SavedGroup& saved = saved_from<SavedGroup>(function, object);
  Arguments arguments = arguments_of(saved, Arguments::c);
  const GroupNorm norm = group_norm_of(arguments, saved);
  return gradient(arguments, norm, saved, norm.samples * norm.groups, {norm.groups * norm.channels},
                  dy, out, group_norm_backward);
}

// The axes of x that are normalized, and of which gamma and beta are.
Extents normalized_shape(const Arguments& arguments, const SavedLayer& saved) {
  const Extents shape = arguments.shape();
  if (saved.normalized_from < 0 || size_t(saved.normalized_from) > shape.size()) {
    fail<py::value_error>(arguments.function(), ": saved has the axes of another x");
  }
  return shape.subspan(size_t(saved.normalized_from));
}

LayerNorm layer_norm_of(Arguments& arguments, const SavedLayer& saved) {
  const Extents normalized = normalized_shape(arguments, saved);
  auto norm = described<LayerNorm>(arguments, saved, normalized);
  norm.rows = product(arguments.shape().first(size_t(saved.normalized_from)));
  norm.columns = product(normalized);
  norm.groups = 1;
  norm.centered = saved.function == "layer_norm";
  return norm;
}

py::tuple layer_norm_forward(std::unique_ptr<SavedLayer> saved, py::handle x,
                             const py::tuple& normalized, py::handle out) {
  Arguments arguments(saved->function, x, Arguments::c);
  saved->normalized_from = arguments.given().ndim() - index_t(normalized.size());
  const auto is = [](index_t extent, py::handle expected) { return extent == clipped(expected); };
  if (normalized.empty() || saved->normalized_from < 0 ||
      !std::ranges::equal(normalized_shape(arguments, *saved), normalized, is)) {
    fail<py::value_error>(arguments.where("x"), " has shape ", shape_text(arguments.given()),
                          ", expected its last axes to be ", text(normalized));
  }
  const LayerNorm norm = layer_norm_of(arguments, *saved);
  return forward(arguments, norm, std::move(saved), norm.rows, out, layer_norm);
}

py::tuple layer_norm_gradient(const char* function, py::handle dy, py::handle object,
                              py::handle out) {
  SavedLayer& saved = saved_from<SavedLayer>(function, object);
  Arguments arguments = arguments_of(saved, Arguments::c);
  const LayerNorm norm = layer_norm_of(arguments, saved);
  return gradient(arguments, norm, saved, norm.rows, shape_of(normalized_shape(arguments, saved)),
                  dy, out, layer_norm_backward);
}

// --- Python ---

using Gradient = py::tuple (*)(const char* function, py::handle dy, py::handle saved,
                               py::handle out);

template <Gradient gradient>
void bind_backward(py::module_& m, const char* function) {
  m.def((std::string(function) + "_backward").c_str(),
        [function](py::handle dy, py::handle saved, py::handle out) {
          return gradient(function, dy, saved, out);
        });
}

}  // namespace

void bind_norm(py::module_& m) {
  bind_saved(m);
  m.def("batch_norm",
        [](py::handle x, py::handle axis, const GammaBeta& affine, const RunningStatistics& running,
           bool training, double eps, const ResidualRelu& after, py::handle out) {
          auto saved = saved_of_call<SavedBatch>("batch_norm", affine.first, affine.second, eps);
          saved->axis = clipped(axis);
          saved->training = training;
          saved->relu = after.second;
          return batch_norm_forward(std::move(saved), x, running, after.first, {}, out);
        });
  m.def("batch_statistics", &batch_statistics);
  m.def("batch_renorm",
        [](py::handle x, py::handle axis, const GammaBeta& affine, const RunningStatistics& running,
           bool training, double eps, const Limits& limits, py::handle out) {
          auto saved = saved_of_call<SavedBatch>("batch_renorm", affine.first, affine.second, eps);
          saved->axis = clipped(axis);
          saved->training = training;
          return batch_norm_forward(std::move(saved), x, running, py::none(), limits, out);
        });
  m.def("layer_norm", [](py::handle x, const py::tuple& normalized, py::handle gamma,
                         py::handle beta, double eps, py::handle out) {
    return layer_norm_forward(saved_of_call<SavedLayer>("layer_norm", gamma, beta, eps), x,
                              normalized, out);
  });
  m.def("rms_norm", [](py::handle x, const py::tuple& normalized, py::handle gamma, double eps,
                       py::handle out) {
    return layer_norm_forward(saved_of_call<SavedLayer>("rms_norm", gamma, py::none(), eps), x,
                              normalized, out);
  });
  m.def("group_norm", [](py::handle x, py::handle num_groups, py::handle gamma, py::handle beta,
                         double eps, py::handle out) {
    return group_norm_forward(saved_of_call<SavedGroup>("group_norm", gamma, beta, eps), x,
                              num_groups, out);
  });
  m.def("instance_norm",
        [](py::handle x, py::handle gamma, py::handle beta, double eps, py::handle out) {
          return group_norm_forward(saved_of_call<SavedGroup>("instance_norm", gamma, beta, eps), x,
                                    py::none(), out);
        });
  bind_backward<batch_norm_gradient>(m, "batch_norm");
  bind_backward<batch_norm_gradient>(m, "batch_renorm");
  bind_backward<layer_norm_gradient>(m, "layer_norm");
  bind_backward<layer_norm_gradient>(m, "rms_norm");
  bind_backward<group_norm_gradient>(m, "group_norm");
  bind_backward<group_norm_gradient>(m, "instance_norm");
  // For what Python computes.
  m.def("check_array",
        [](py::handle object, const std::string& where) { as_array(object, where); });
  m.def("check_apart", [](const std::string& caller, const char* written, const Array& output,
                          const char* read, const Array& input) {
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
