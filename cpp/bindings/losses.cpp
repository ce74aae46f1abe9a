// The Python side of softmax and the losses: array checks, outputs, the GIL.
#include <pybind11/stl.h>

#include <optional>

#include "arrays.h"
#include "config.h"
#include "core/losses.h"

namespace fastopt {
namespace {

// `out` after its checks, else a new array like `model`. The other arrays are in `overlaps`.
py::array output(py::handle out, const py::array& model, const std::string& caller,
                 Overlaps& overlaps) {
  if (out.is_none()) return new_output(shape_of(model), dtype_of(model));
  const std::string place = caller + ": out";
  py::array array = as_array(out, place);
  check_like(array, model, place, "expected");
  if (!array.writeable()) fail<py::value_error>(place, " is read-only");
  if (!(array.flags() & py::array::c_style)) {
    fail<py::value_error>(place, " is not in C order (strides ", text(array.attr("strides")), ")");
  }
  overlaps.add("out", array, Overlaps::written);
  overlaps.check(caller);
  return array;
}

// Counted from the first one.
index_t axis_of(const py::array& array, index_t axis, const std::string& caller, const char* name) {
  if (axis < -array.ndim() || axis >= array.ndim()) {
    fail<py::value_error>(caller, ": axis is ", axis, ", ", name, " has shape ", shape_text(array));
  }
  return axis < 0 ? axis + array.ndim() : axis;
}

// The same elements with this axis as the last one. A plain array: nothing of a subclass is called.
py::array axis_last(const py::array& array, index_t axis) {
  Shape shape = shape_of(array), strides(array.strides(), array.strides() + array.ndim());
  std::rotate(shape.begin() + axis, shape.begin() + axis + 1, shape.end());
  std::rotate(strides.begin() + axis, strides.begin() + axis + 1, strides.end());
  return py::array(array.dtype(), shape, strides, array.data(), array);
}

// In C order; a copy where they are not so.
py::array as_rows(const py::array& array, index_t axis) {
  return in_c_order(axis == array.ndim() - 1 ? array : axis_last(array, axis));
}

// Where rows of `array` are to be written: itself where this axis is the last one.
py::array rows_to(const py::array& array, const py::array& rows, index_t axis) {
  return axis == array.ndim() - 1 ? array : new_output(shape_of(rows), dtype_of(rows));
}

void put_back(const py::array& rows, const py::array& array, index_t axis) {
  if (rows.is(array)) return;
  py::module_::import("numpy").attr("copyto")(axis_last(array, axis), rows);
}

py::array softmax_along(const std::string& caller, py::handle x_object, index_t given_axis,
                        bool logarithm, py::handle out) {
  const py::array given = as_array(x_object, caller + ": x");
  const index_t axis = axis_of(given, given_axis, caller, "x");
  Overlaps overlaps;
  overlaps.add("x", given, Overlaps::read_first);
  const py::array result = output(out, given, caller, overlaps);
  if (given.size() == 0) return result;
  const py::array x = as_rows(given, axis);
  py::array y = rows_to(result, x, axis);
  void* const to = y.mutable_data();
  const index_t columns = given.shape(axis);
  const Dtype dtype = dtype_of(x);
  const CurrentSettings settings;
  {
    const py::gil_scoped_release release;
    softmax(settings.get(), dtype, logarithm, x.data(), to, x.size() / columns, columns);
  }
  put_back(y, result, axis);
  return result;
}

Reduction reduction_of(const std::string& name) {
  return name == "mean" ? Reduction::mean : name == "sum" ? Reduction::sum : Reduction::none;
}

// The index of a row in an array of this shape: [i, j]. With an axis, of the row along it: [i, :].
std::string position_text(const Shape& shape, index_t row, std::optional<index_t> along = {}) {
  std::vector<std::string> index;
  for (size_t axis = shape.size(); axis-- > 0; row /= shape[axis]) {
    index.insert(index.begin(), std::to_string(row % shape[axis]));
  }
  if (along) index.insert(index.begin() + *along, ":");
  std::string text;
  for (const std::string& part : index) text += (text.empty() ? "" : ", ") + part;
  return "[" + text + "]";
}

struct Labels {  // one of the two
  std::optional<py::array_t<long long, py::array::c_style>> classes;
  py::array probabilities;
  std::optional<long long> ignored;
};

// The label that `ignore_index` stands for among these, if it is one of their numbers.
std::optional<long long> ignored_label(const py::array& labels, py::handle ignore_index) {
  if (ignore_index.is_none()) return {};
  const py::object range = py::module_::import("numpy").attr("iinfo")(labels.dtype());
  const auto number = py::reinterpret_borrow<py::object>(ignore_index);
  if (number < range.attr("min") || number > range.attr("max")) return {};
  return static_cast<long long>(PyLong_AsUnsignedLongLongMask(number.ptr()));  // as labels are cast
}

// `rows` is the shape of the logits without the axis of the classes.
Labels check_labels(const std::string& caller, py::handle object, const py::array& logits,
                    index_t axis, const Shape& rows, py::handle ignore_index) {
  const std::string place = caller + ": labels";
  const py::array array = as_ndarray(object, place);
  const char kind = array.dtype().kind();
  const bool one_per_row = shape_of(array) == rows,
             like_logits = shape_of(array) == shape_of(logits);
  if ((kind == 'i' || kind == 'u') && one_per_row) {
    Labels labels{{}, {}, ignored_label(array, ignore_index)};
    labels.classes.emplace(py::array_t < long long,
                           py::array::c_style | py::array::forcecast > (array));
    const long long* const label = labels.classes->data();
    const auto classes = static_cast<unsigned long long>(logits.shape(axis));
    for (index_t i = 0; i < array.size(); ++i) {
      if (static_cast<unsigned long long>(label[i]) < classes || label[i] == labels.ignored) {
        continue;
      }
      fail<py::value_error>(place, position_text(rows, i), " is ",
                            text(array.attr("flat")[py::int_(i)]), ", expected 0 to ", classes - 1);
    }
    return labels;
  }
  if (kind == 'f' && like_logits) {
    if (!ignore_index.is_none()) {
      fail<py::value_error>(caller,
                            ": ignore_index is for integer labels, labels are probabilities");
    }
    const py::array checked = as_array(array, place);
    check_like(checked, logits, place, "use labels.astype(logits.dtype): the logits have");
    Labels labels{{}, as_rows(checked, axis), {}};
    const index_t columns = logits.shape(axis);
    const std::optional<BadRow> bad = [&] {
      const CurrentSettings settings;
      const py::gil_scoped_release release;
      return find_bad_row(settings.get(), dtype_of(checked), labels.probabilities.data(),
                          checked.size() / columns, columns);
    }();
    if (bad) {
      fail<py::value_error>(place, position_text(rows, bad->row, axis), " has the sum ", bad->sum,
                            " and the minimum ", bad->least,
                            ", expected probabilities: at least 0, with the sum 1; ",
                            "classes are integers, one a row");
    }
    return labels;
  }
  const char* hint = "";
  if (one_per_row && (kind == 'f' || kind == 'b')) {
    hint = ": use labels.astype(int)";
  } else if (like_logits && kind != 'f') {
    hint = ": of one-hot labels, use labels.argmax(axis) or labels.astype(logits.dtype)";
  }
  const std::string got = " has dtype " + text(array.dtype()) + " and shape " + shape_text(array);
  const std::string expected =
      ", expected integers of the shape " + text(py::tuple(py::cast(rows))) +
      ", or probabilities of the logits' dtype and shape " + shape_text(logits);
  if (one_per_row || like_logits) fail<py::type_error>(place, got, expected, hint);
  fail<py::value_error>(place, got, expected);
}

// Of every class, or none.
std::optional<py::array> check_weight(const std::string& caller, py::handle object,
                                      const py::array& logits, index_t columns,
                                      Overlaps& overlaps) {
  if (object.is_none()) return {};
  const std::string place = caller + ": weight";
  const py::array weight = as_array(object, place);
  if (weight.ndim() != 1 || weight.shape(0) != columns) {
    fail<py::value_error>(place, " has shape ", shape_text(weight), ", expected (", columns, ",)");
  }
  if (dtype_of(weight) != dtype_of(logits)) {
    fail<py::type_error>(place, " has dtype ", text(weight.dtype()), ", the logits have ",
                         text(logits.dtype()));
  }
  overlaps.add("weight", weight, Overlaps::read);
  return in_c_order(weight);
}

py::tuple softmax_cross_entropy(py::handle logits_object, py::handle labels_object,
                                index_t given_axis, double label_smoothing,
                                py::handle weight_object, py::handle ignore_index,
                                const std::string& reduction, py::handle out) {
  const std::string caller = "softmax_cross_entropy";
  const py::array given = as_array(logits_object, caller + ": logits");
  const index_t axis = axis_of(given, given_axis, caller, "logits");
  const index_t columns = given.shape(axis);
  if (columns == 0) {
    fail<py::value_error>(caller, ": logits has shape ", shape_text(given),
                          ", expected at least one class");
  }
  Shape row_shape = shape_of(given);
  row_shape.erase(row_shape.begin() + axis);
  Overlaps overlaps;
  overlaps.add("logits", given, Overlaps::read_first);
  const std::optional<py::array> weight =
      check_weight(caller, weight_object, given, columns, overlaps);
  const Labels labels = check_labels(caller, labels_object, given, axis, row_shape, ignore_index);
  overlaps.add("labels", py::reinterpret_borrow<py::array>(labels_object), Overlaps::read);
  const py::array result = output(out, given, caller, overlaps);

  const py::array logits = as_rows(given, axis);
  py::array gradient = rows_to(result, logits, axis);
  CrossEntropy task{
      dtype_of(given),
      given.size() / columns,
      columns,
      logits.data(),
      labels.classes ? labels.classes->data() : nullptr,
      labels.ignored.value_or(-1),
      labels.classes ? nullptr : labels.probabilities.data(),
      weight ? weight->data() : nullptr,
      label_smoothing,
      reduction_of(reduction),
      nullptr,
      gradient.mutable_data(),
  };
  py::object loss;
  if (task.reduction == Reduction::none) {
    py::array losses = new_output(row_shape, task.dtype);
    task.losses = losses.mutable_data();
    loss = losses;
  }
  double total = 0;
  {
    const CurrentSettings settings;
    const py::gil_scoped_release release;
    total = cross_entropy(settings.get(), task);
  }
  put_back(gradient, result, axis);
  if (!loss) loss = py::float_(total);
  return py::make_tuple(loss, result);
}

py::tuple squared_error_of(const std::string& caller, py::handle prediction_object,
                           py::handle target_object, const std::string& reduction, py::handle out) {
  const py::array prediction = as_array(prediction_object, caller + ": prediction");
  const py::array target = as_array(target_object, caller + ": target");
  check_like(target, prediction, caller + ": target", "the prediction has");
  Overlaps overlaps;
  overlaps.add("prediction", prediction, Overlaps::read_first);
  overlaps.add("target", target, Overlaps::read_first);
  py::array gradient = output(out, prediction, caller, overlaps);
  const py::array x = in_c_order(prediction), from = in_c_order(target);
  const Residual residual{dtype_of(x), x.data(), from.data(), gradient.mutable_data(), x.size()};
  const Reduction kind = reduction_of(reduction);
  py::object loss;
  void* to = nullptr;
  if (kind == Reduction::none) {
    py::array errors = new_output(shape_of(x), residual.dtype);
    to = errors.mutable_data();
    loss = errors;
  }
  double total = 0;
  {
    const CurrentSettings settings;
    const py::gil_scoped_release release;
    total = squared_error(settings.get(), residual, kind, to);
  }
  if (!loss) loss = py::float_(total);
  return py::make_tuple(loss, gradient);
}

// (the penalty of all arrays, the gradient of each)
py::tuple l2_penalty_of(const std::vector<std::string>& places, const py::list& arrays,
                        double weight_decay) {
  std::vector<py::array> inputs;
  std::vector<Residual> residuals;
  py::list gradients;
  for (size_t i = 0; i < places.size(); ++i) {
    const py::array& x = inputs.emplace_back(in_c_order(as_array(arrays[i], places[i])));
    py::array gradient = new_output(shape_of(x), dtype_of(x));
    residuals.push_back({dtype_of(x), x.data(), nullptr, gradient.mutable_data(), x.size()});
    gradients.append(gradient);
  }
  double penalty = 0;
  {
    const CurrentSettings settings;
    const py::gil_scoped_release release;
    penalty = l2_penalty(settings.get(), residuals, weight_decay);
  }
  return py::make_tuple(penalty, gradients);
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
  m.def("softmax_cross_entropy", &softmax_cross_entropy, py::arg("logits"), py::arg("labels"),
        py::arg("axis"), py::arg("label_smoothing"), py::arg("weight"), py::arg("ignore_index"),
        py::arg("reduction"), py::arg("out"));
  m.def("squared_error", &squared_error_of, py::arg("caller"), py::arg("prediction"),
        py::arg("target"), py::arg("reduction"), py::arg("out"));
  m.def("l2_penalty", &l2_penalty_of, py::arg("places"), py::arg("arrays"),
        py::arg("weight_decay"));
  // The kernels' exp and log, for the tests of their error.
  m.def("exp", &apply<false>, py::arg("x"));
  m.def("log", &apply<true>, py::arg("x"));
}

}  // namespace fastopt
