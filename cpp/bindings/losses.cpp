// The Python side of softmax and the losses: array checks, outputs, the GIL.
#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "arrays.h"
#include "config.h"
#include "core/losses.h"

namespace fastopt {
namespace {

std::vector<py::ssize_t> shape_of(const py::array& array) {
  return {array.shape(), array.shape() + array.ndim()};
}

// `out` after its checks, else a new array like `model`. The kernels read an element before they
// write it: `out` may be one of `same` as a whole, and must be apart from the rest of the inputs.
py::array output(py::handle out, const py::array& model, const std::string& caller,
                 const std::vector<py::array>& same, const std::vector<py::array>& apart) {
  if (out.is_none()) return new_output(shape_of(model), dtype_of(model));
  const std::string place = caller + ": out";
  py::array array = as_array(out, place);
  check_like(array, model, place, "expected");
  if (!array.writeable()) fail<py::value_error>(place, " is read-only");
  if (!(array.flags() & py::array::c_style)) {
    fail<py::value_error>(place, " is not in C order (strides ", text(array.attr("strides")), ")");
  }
  const auto check = [&](const py::array& input) {
    const Extent a(array), b(input);
    if (a.begin < b.end && b.begin < a.end &&
        py::module_::import("numpy").attr("shares_memory")(array, input).cast<bool>()) {
      fail<py::value_error>(place, " shares memory with an input in a way that it may not");
    }
  };
  for (const py::array& input : same) {
    if (input.data() != array.data() || !(input.flags() & py::array::c_style)) check(input);
  }
  for (const py::array& input : apart) check(input);
  return array;
}

py::array softmax_along(const std::string& caller, py::handle x_object, index_t axis,
                        bool logarithm, py::handle out) {
  const py::array given = as_array(x_object, caller + ": x");
  const index_t last = given.ndim() - 1;
  if (axis < -given.ndim() || axis > last) {
    fail<py::value_error>(caller, ": axis is ", axis, ", x has shape ", shape_text(given));
  }
  py::array y = output(out, given, caller, {given}, {});
  if (given.size() == 0) return y;
  const bool moved = axis != -1 && axis != last;
  const py::module_ numpy = py::module_::import("numpy");
  const py::array x =
      in_c_order(moved ? py::array(numpy.attr("moveaxis")(given, axis, -1)) : given);
  py::array rows = moved ? new_output(shape_of(x), dtype_of(x)) : y;
  void* const to = rows.mutable_data();
  const index_t columns = x.shape(last);
  const Dtype dtype = dtype_of(x);
  const CurrentSettings settings;
  {
    const py::gil_scoped_release release;
    softmax(settings.get(), dtype, logarithm, x.data(), to, x.size() / columns, columns);
  }
  if (moved) numpy.attr("copyto")(y, numpy.attr("moveaxis")(rows, -1, axis));
  return y;
}

struct Labels {  // one of the two
  std::optional<py::array_t<long long, py::array::c_style>> indices;
  py::array probabilities;
};

Labels check_labels(const std::string& caller, py::handle object, const py::array& logits) {
  const std::string place = caller + ": labels";
  if (!py::isinstance<py::array>(object)) {
    fail<py::type_error>(place, " is of type ", type_name(object), ", expected numpy.ndarray");
  }
  const auto array = py::reinterpret_borrow<py::array>(object);
  const char kind = array.dtype().kind();
  if (kind == 'i' || kind == 'u') {
    const bool one_per_row =
        array.ndim() == logits.ndim() - 1 &&
        std::equal(array.shape(), array.shape() + array.ndim(), logits.shape());
    if (!one_per_row) {
      fail<py::value_error>(place, " has shape ", shape_text(array),
                            ", expected that of the logits ", shape_text(logits),
                            " without the last axis");
    }
    return {py::array_t < long long, py::array::c_style | py::array::forcecast > (array), {}};
  }
  if (kind != 'f') {
    fail<py::type_error>(place, " has dtype ", text(array.dtype()),
                         ", expected integers, or probabilities of the logits' dtype");
  }
  const py::array checked = as_array(array, place);
  check_like(checked, logits, place, "the logits have");
  return {std::nullopt, in_c_order(checked)};
}

// The index of an array's element in C order: [i, j].
std::string position_text(const py::array& array, index_t element) {
  std::string position;
  for (index_t axis = array.ndim(); axis-- > 0; element /= array.shape(axis)) {
    position =
        std::to_string(element % array.shape(axis)) + (position.empty() ? "" : ", ") + position;
  }
  return "[" + position + "]";
}

// Labels must be columns or `ignored`. Returns how many rows are not ignored, or the sum of their
// labels' weights.
template <class T>
double weigh_labels(const std::string& caller, const long long* labels, index_t rows,
                    index_t columns, std::optional<long long> ignored, const T* weight,
                    const py::array& given) {
  const auto is_label = [=](long long label) {
    return static_cast<unsigned long long>(label) < static_cast<unsigned long long>(columns);
  };
  index_t count = 0;
  double sum = 0;
  for (index_t i = 0; i < rows; ++i) {
    if (ignored && labels[i] == *ignored) continue;
    if (!is_label(labels[i])) {
      fail<py::value_error>(caller, ": labels", position_text(given, i), " is ",
                            text(given.attr("flat")[py::int_(i)]), ", expected 0 to ", columns - 1);
    }
    ++count;
    if (weight != nullptr) sum += double(weight[labels[i]]);
  }
  return weight != nullptr ? sum : double(count);
}

template <class T>
py::tuple cross_entropy_of(const std::string& caller, const py::array& given_logits,
                           py::handle labels_object, double label_smoothing,
                           py::handle weight_object, std::optional<long long> ignore_index,
                           const std::string& reduction, py::handle out) {
  const index_t columns = given_logits.shape(given_logits.ndim() - 1);
  const index_t rows = given_logits.size() / columns;
  const Labels labels = check_labels(caller, labels_object, given_logits);
  const bool has_labels = labels.indices.has_value();
  if (!has_labels && ignore_index) {
    fail<py::value_error>(caller, ": ignore_index is for integer labels, labels are probabilities");
  }
  std::vector<py::array> apart;
  py::array weight;
  if (!weight_object.is_none()) {
    const std::string place = caller + ": weight";
    weight = as_array(weight_object, place);
    if (weight.ndim() != 1 || weight.shape(0) != columns) {
      fail<py::value_error>(place, " has shape ", shape_text(weight), ", expected (", columns,
                            ",)");
    }
    if (dtype_of(weight) != dtype_of(given_logits)) {
      fail<py::type_error>(place, " has dtype ", text(weight.dtype()), ", the logits have ",
                           text(given_logits.dtype()));
    }
    apart.push_back(weight);
    weight = in_c_order(weight);
  }
  apart.push_back(py::reinterpret_borrow<py::array>(labels_object));
  const T* const weights = weight_object.is_none() ? nullptr : static_cast<const T*>(weight.data());
  const double weight_sum = has_labels ? weigh_labels(caller, labels.indices->data(), rows, columns,
                                                      ignore_index, weights, apart.back())
                                       : double(rows);
  const bool mean = reduction == "mean", none = reduction == "none";
  py::array gradient = output(out, given_logits, caller, {given_logits}, apart);
  const py::array logits = in_c_order(given_logits);

  const bool has_base = !has_labels || label_smoothing != 0;
  std::vector<T> class_weight(static_cast<size_t>(columns)),
      base(has_base ? class_weight.size() : 0);
  double all_weights = 0;
  for (size_t c = 0; c < class_weight.size(); ++c) {
    const double w = weights == nullptr ? 1.0 : double(weights[c]);
    class_weight[c] = T((1 - label_smoothing) * w);
    if (has_base) base[c] = T(label_smoothing / double(columns) * w);
    all_weights += w;
  }
  std::vector<py::ssize_t> row_shape = shape_of(given_logits);
  row_shape.pop_back();
  py::array losses;
  std::unique_ptr<T[]> scratch;
  if (none) {
    losses = new_output(row_shape, dtype_of(given_logits));
  } else {
    scratch.reset(new T[size_t(rows)]);
  }
  const CrossEntropy task{
      columns,
      logits.data(),
      has_labels ? labels.indices->data() : nullptr,
      has_labels ? nullptr : labels.probabilities.data(),
      class_weight.data(),
      has_base ? base.data() : nullptr,
      label_smoothing * (all_weights / double(columns)),
      ignore_index.value_or(-1),
      mean ? 1 / weight_sum : 1,
      none ? losses.mutable_data() : scratch.get(),
      gradient.mutable_data(),
  };
  double total = 0;
  {
    const CurrentSettings settings;
    const Dtype dtype = dtype_of(given_logits);
    const py::gil_scoped_release release;
    total = cross_entropy(settings.get(), dtype, task, rows);
  }
  if (none) return py::make_tuple(losses, gradient);
  return py::make_tuple(mean ? total / weight_sum : total, gradient);
}

py::tuple softmax_cross_entropy(const std::string& caller, py::handle logits_object,
                                py::handle labels, double label_smoothing, py::handle weight,
                                std::optional<long long> ignore_index, const std::string& reduction,
                                py::handle out) {
  const py::array logits = as_array(logits_object, caller + ": logits");
  if (logits.ndim() == 0 || logits.shape(logits.ndim() - 1) == 0) {
    fail<py::value_error>(caller, ": logits has shape ", shape_text(logits),
                          ", expected (..., classes) with at least one class");
  }
  const auto run =
      dtype_of(logits) == Dtype::float32 ? cross_entropy_of<float> : cross_entropy_of<double>;
  return run(caller, logits, labels, label_smoothing, weight, ignore_index, reduction, out);
}

// (sum of (x - target)^2, factor * (x - target)); no target is zero.
py::tuple residual_of(double factor, const py::array& given, const std::optional<py::array>& target,
                      py::array y) {
  const py::array x = in_c_order(given), from = target ? in_c_order(*target) : x;
  const Dtype dtype = dtype_of(x);
  void* const to = y.mutable_data();
  double sum = 0;
  {
    const CurrentSettings settings;
    const py::gil_scoped_release release;
    sum = residual(settings.get(), dtype, factor, x.data(), target ? from.data() : nullptr, to,
                   x.size());
  }
  return py::make_tuple(sum, y);
}

py::tuple squared_error(const std::string& caller, double factor, py::handle prediction_object,
                        py::handle target_object, py::handle out) {
  const py::array prediction = as_array(prediction_object, caller + ": prediction");
  const py::array target = as_array(target_object, caller + ": target");
  check_like(target, prediction, caller + ": target", "the prediction has");
  return residual_of(factor, prediction, target,
                     output(out, prediction, caller, {prediction, target}, {}));
}

py::tuple squares(const std::string& where, double factor, py::handle x_object) {
  const py::array x = as_array(x_object, where);
  return residual_of(factor, x, std::nullopt, new_output(shape_of(x), dtype_of(x)));
}

template <bool logarithm>
py::array apply(py::handle x_object) {
  const py::array x = in_c_order(as_array(x_object, "x"));
  py::array y = new_output(shape_of(x), dtype_of(x));
  const CurrentSettings settings;
  elementwise(settings.get(), dtype_of(x), logarithm, x.data(), y.mutable_data(), x.size());
  return y;
}

}  // namespace

void bind_losses(py::module_& m) {
  m.def("softmax", &softmax_along, py::arg("caller"), py::arg("x"), py::arg("axis"),
        py::arg("logarithm"), py::arg("out"));
  m.def("softmax_cross_entropy", &softmax_cross_entropy, py::arg("caller"), py::arg("logits"),
        py::arg("labels"), py::arg("label_smoothing"), py::arg("weight"), py::arg("ignore_index"),
        py::arg("reduction"), py::arg("out"));
  m.def("squared_error", &squared_error, py::arg("caller"), py::arg("factor"),
        py::arg("prediction"), py::arg("target"), py::arg("out"));
  m.def("squares", &squares, py::arg("where"), py::arg("factor"), py::arg("x"));
  // The kernels' exp and log, for the tests of their error.
  m.def("exp", &apply<false>, py::arg("x"));
  m.def("log", &apply<true>, py::arg("x"));
}

}  // namespace fastopt
