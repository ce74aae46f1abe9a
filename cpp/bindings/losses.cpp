// The Python side of softmax and the losses: array checks, outputs, the GIL.
#include <pybind11/stl.h>

#include <numeric>
#include <optional>

#include "arrays.h"
#include "config.h"
#include "core/losses.h"

namespace fastopt {
namespace {

// `out` after its checks, else a new array like `model`. The other arrays are in `overlaps`.
Array output(py::handle out, const Array& model, const std::string& caller, Overlaps& overlaps) {
  if (out.is_none()) return new_output(shape_of(model), dtype_of(model));
  const std::string place = caller + ": out";
  Array array = as_array(out, place);
  check_like(array, model, place, "expected");
  if (!array.writeable()) fail<py::value_error>(place, " is read-only");
  if (!is_c_ordered(array)) {
    fail<py::value_error>(place, " is not in C order (strides ", strides_text(array), ")");
  }
  overlaps.add("out", array, Overlaps::written);
  overlaps.check(caller);
  return array;
}

// Counted from the first one.
index_t axis_of(const Array& array, index_t axis, const std::string& caller, const char* name) {
  if (axis < -array.ndim() || axis >= array.ndim()) {
    fail<py::value_error>(caller, ": axis is ", axis, ", ", name, " has shape ", shape_text(array));
  }
  return axis < 0 ? axis + array.ndim() : axis;
}

// The same elements with this axis as the last one.
Array axis_last(const Array& array, index_t axis) {
  Shape axes(size_t(array.ndim()));
  std::iota(axes.begin(), axes.end(), 0);
  std::rotate(axes.begin() + axis, axes.begin() + axis + 1, axes.end());
  return permuted(array, axes);
}

// In C order; a copy where they are not so.
Array as_rows(const Array& array, index_t axis) {
  return in_c_order(axis == array.ndim() - 1 ? array : axis_last(array, axis));
}

// Where rows of `array` are to be written: itself where this axis is the last one.
Array rows_to(const Array& array, const Array& rows, index_t axis) {
  return axis == array.ndim() - 1 ? array : new_output(shape_of(rows), dtype_of(rows));
}

void put_back(const Array& rows, const Array& array, index_t axis) {
  if (rows.is(array)) return;
  copy(rows, axis_last(array, axis));
}

Array softmax_along(const std::string& caller, py::handle x_object, index_t given_axis,
                    bool logarithm, py::handle out) {
  const Array given = as_array(x_object, caller + ": x");
  const index_t axis = axis_of(given, given_axis, caller, "x");
  Overlaps overlaps;
  overlaps.add("x", given, Overlaps::read_first);
  const Array result = output(out, given, caller, overlaps);
  if (given.size() == 0) return result;
  const Array x = as_rows(given, axis);
  Array y = rows_to(result, x, axis);
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
  std::optional<ArrayOf<long long>> classes;
  Array probabilities;
  std::optional<long long> ignored;
};

// The label that `ignore_index` stands for among these, if it is one of their numbers.
std::optional<long long> ignored_label(const Array& labels, py::handle ignore_index) {
  if (ignore_index.is_none()) return {};
  const py::object number = owned(ignore_index.ptr());
  if (!can_hold(labels, number)) return {};
  return static_cast<long long>(PyLong_AsUnsignedLongLongMask(number.ptr()));  // as labels are cast
}

// `rows` is the shape of the logits without the axis of the classes.
Labels check_labels(const std::string& caller, py::handle object, const Array& logits, index_t axis,
                    const Shape& rows, py::handle ignore_index) {
  const std::string place = caller + ": labels";
  const Array array = as_ndarray(object, place);
  const char kind = kind_of_dtype(array);
  const bool one_per_row = shape_of(array) == rows,
             like_logits = shape_of(array) == shape_of(logits);
  if ((kind == 'i' || kind == 'u') && one_per_row) {
    Labels labels{{}, {}, ignored_label(array, ignore_index)};
    labels.classes = as_integers(array);
    const long long* const label = labels.classes->data();
    const auto classes = static_cast<unsigned long long>(logits.shape(axis));
    for (index_t i = 0; i < array.size(); ++i) {
      if (static_cast<unsigned long long>(label[i]) < classes || label[i] == labels.ignored) {
        continue;
      }
      fail<py::value_error>(place, position_text(rows, i), " is ", element_text(array, i),
                            ", expected 0 to ", classes - 1);
    }
    return labels;
  }
  if (kind == 'f' && like_logits) {
    if (!ignore_index.is_none()) {
      fail<py::value_error>(caller,
                            ": ignore_index is for integer labels, labels are probabilities");
    }
    const Array checked = as_array(array, place);
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
  const std::string got = " has dtype " + dtype_text(array) + " and shape " + shape_text(array);
  const std::string expected =
      ", expected integers of the shape " + text(py::tuple(py::cast(rows))) +
      ", or probabilities of the logits' dtype and shape " + shape_text(logits);
  if (one_per_row || like_logits) fail<py::type_error>(place, got, expected, hint);
  fail<py::value_error>(place, got, expected);
}

// Of every class, or none.
std::optional<Array> check_weight(const std::string& caller, py::handle object, const Array& logits,
                                  index_t columns, Overlaps& overlaps) {
  if (object.is_none()) return {};
  const std::string place = caller + ": weight";
  const Array weight = as_array(object, place);
  if (weight.ndim() != 1 || weight.shape(0) != columns) {
    fail<py::value_error>(place, " has shape ", shape_text(weight), ", expected (", columns, ",)");
  }
  if (dtype_of(weight) != dtype_of(logits)) {
    fail<py::type_error>(place, " has dtype ", dtype_text(weight), ", the logits have ",
                         dtype_text(logits));
  }
  overlaps.add("weight", weight, Overlaps::read);
  return in_c_order(weight);
}

py::tuple softmax_cross_entropy(py::handle logits_object, py::handle labels_object,
                                index_t given_axis, double label_smoothing,
                                py::handle weight_object, py::handle ignore_index,
                                const std::string& reduction, py::handle out) {
  const std::string caller = "softmax_cross_entropy";
  const Array given = as_array(logits_object, caller + ": logits");
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
  const std::optional<Array> weight = check_weight(caller, weight_object, given, columns, overlaps);
  const Labels labels = check_labels(caller, labels_object, given, axis, row_shape, ignore_index);
  overlaps.add("labels", py::reinterpret_borrow<Array>(labels_object), Overlaps::read);
  const Array result = output(out, given, caller, overlaps);

  const Array logits = as_rows(given, axis);
  Array gradient = rows_to(result, logits, axis);
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
    Array losses = new_output(row_shape, task.dtype);
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
  const Array prediction = as_array(prediction_object, caller + ": prediction");
  const Array target = as_array(target_object, caller + ": target");
  check_like(target, prediction, caller + ": target", "the prediction has");
  Overlaps overlaps;
  overlaps.add("prediction", prediction, Overlaps::read_first);
  overlaps.add("target", target, Overlaps::read_first);
  Array gradient = output(out, prediction, caller, overlaps);
  const Array x = in_c_order(prediction), from = in_c_order(target);
  const Residual residual{dtype_of(x), x.data(), from.data(), gradient.mutable_data(), x.size()};
  const Reduction kind = reduction_of(reduction);
  py::object loss;
  void* to = nullptr;
  if (kind == Reduction::none) {
    Array errors = new_output(shape_of(x), residual.dtype);
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
  std::vector<Array> inputs;
  std::vector<Residual> residuals;
  py::list gradients;
  for (size_t i = 0; i < places.size(); ++i) {
    const Array& x = inputs.emplace_back(in_c_order(as_array(arrays[i], places[i])));
    Array gradient = new_output(shape_of(x), dtype_of(x));
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
Array apply(py::handle x_object) {
  const Array x = in_c_order(as_array(x_object, "x"));
  Array y = new_output(shape_of(x), dtype_of(x));
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
