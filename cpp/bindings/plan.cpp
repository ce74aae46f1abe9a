#include "plan.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <mutex>
#include <sstream>

#include "core/dispatch.h"

namespace fastopt {
namespace {

bool is_instance(py::handle object, const char* abstract_class) {
  return py::isinstance(object, py::module_::import("collections.abc").attr(abstract_class));
}

Tree::Kind kind_of(py::handle object) {
  if (PyDict_Check(object.ptr())) return Tree::Kind::mapping;
  if (PyList_Check(object.ptr()) || PyTuple_Check(object.ptr())) return Tree::Kind::sequence;
  if (py::isinstance<py::array>(object) || PyUnicode_Check(object.ptr()) ||
      PyBytes_Check(object.ptr()) || PyByteArray_Check(object.ptr())) {
    return Tree::Kind::array;
  }
  if (is_instance(object, "Mapping")) return Tree::Kind::mapping;
  if (is_instance(object, "Sequence")) return Tree::Kind::sequence;
  return Tree::Kind::array;
}

// A mapping as a dict, a sequence as a list or tuple; the object itself where it is one already.
py::dict as_dict(py::handle mapping) {
  if (PyDict_CheckExact(mapping.ptr())) return py::reinterpret_borrow<py::dict>(mapping);
  py::dict dict;
  for (py::handle item : mapping.attr("items")()) {
    const auto pair = py::reinterpret_borrow<py::tuple>(item);
    dict[pair[0]] = pair[1];
  }
  return dict;
}

py::object as_list_or_tuple(py::handle sequence) {
  PyObject* fast = PySequence_Fast(sequence.ptr(), "expected a sequence");
  if (fast == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(fast);
}

std::string join(const std::string& path, const std::string& name) {
  return path.empty() ? name : path + "." + name;
}

std::vector<std::string> words(const char* text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

// Looks up the keys of a dict. Dicts usually keep their order: then the next key is the one wanted.
class Cursor {
 public:
  explicit Cursor(py::handle dict) : dict_(dict.ptr()) {}

  // nullptr if the dict has no such key.
  PyObject* find(py::handle wanted) {
    PyObject *key = nullptr, *value = nullptr;
    if (in_order_ && PyDict_Next(dict_, &position_, &key, &value) && key == wanted.ptr()) {
      return value;
    }
    in_order_ = false;
    value = PyDict_GetItemWithError(dict_, wanted.ptr());
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

 private:
  PyObject* const dict_;
  py::ssize_t position_ = 0;
  bool in_order_ = true;
};

// Giving up the GIL and taking it back costs about as much as a step over this many elements.
constexpr index_t release_gil_from_elements = 1 << 12;

// Deeper trees are taken for one that contains itself.
constexpr int max_depth = 100;

}  // namespace

Plan::Plan(const std::string& caller, py::handle params, bool grouped)
    : caller_(caller), numpy_(py::module_::import("numpy")), ndarray_type_(numpy_.attr("ndarray")) {
  grow(tree_, params, 0, grouped, 0);
  if (leaves_.empty()) fail<py::value_error>(caller_, ": params holds no arrays");
  std::map<std::string, int> seen;
  for (const Leaf& leaf : leaves_) {
    if (seen[leaf.name]++ > 0) {
      fail<py::value_error>(caller_, ": params has two arrays with the name '", leaf.name, "'");
    }
  }
  batches_.reserve(leaves_.size());  // tasks point into it
  counts_ = py::array_t<std::int64_t>(py::ssize_t(leaves_.size()));
  std::fill_n(counts_.mutable_data(), leaves_.size(), 0);
  started_ = py::array_t<bool>(py::ssize_t(leaves_.size()));
  std::fill_n(started_.mutable_data(), leaves_.size(), false);
  check_overlap();
  caller_ += ".step";
}

void Plan::grow(Tree& tree, py::handle object, int depth, bool grouped, int group) {
  tree.kind = kind_of(object);
  if (depth > max_depth) {
    fail<py::value_error>(where("params", ""), " is nested deeper than ", max_depth, " levels");
  }
  if (tree.kind == Tree::Kind::array) {
    const bool bare = depth == (grouped ? 1 : 0);
    tree.leaf = leaves_.size();
    leaves_.emplace_back();
    leaves_.back().name = bare ? join(tree.path, "param") : tree.path;
    leaves_.back().group = group;
    collect_array(tree.leaf, object, py::none());
    return;
  }
  const auto add = [&](py::handle child, const std::string& name) {
    if (grouped && depth == 0) group = int(tree.children.size());
    Tree& branch = tree.children.emplace_back();
    branch.path = join(tree.path, name);
    grow(branch, child, depth + 1, grouped, group);
  };
  if (tree.kind == Tree::Kind::mapping) {
    for (const auto& [key, child] : as_dict(object)) {
      if (!PyUnicode_Check(key.ptr()) && !PyLong_Check(key.ptr())) {
        fail<py::type_error>(where("params", tree.path), " has the key ", text(py::repr(key)),
                             " of type ", type_name(key), ", expected str or int");
      }
      tree.keys.push_back(py::reinterpret_borrow<py::object>(key));
      add(child, text(key));
    }
  } else {
    int position = 0;
    for (py::handle child : as_list_or_tuple(object)) add(child, std::to_string(position++));
  }
}

std::string Plan::where(const char* argument, const std::string& name) const {
  const bool bare = tree_.kind == Tree::Kind::array || name.empty();
  return caller_ + ": " + argument + (bare ? "" : "['" + name + "']");
}

// Walks params and grads side by side along the bound tree, and checks every array.
void Plan::collect(const Tree& tree, py::handle params, py::handle grads) {
  if (tree.kind == Tree::Kind::array) return collect_array(tree.leaf, params, grads);
  const bool skip = grads.is_none();
  const auto check_kind = [&](py::handle object, const char* argument) {
    if (kind_of(object) != tree.kind) {
      fail<py::type_error>(where(argument, tree.path), " is of type ", type_name(object),
                           ", expected a ",
                           tree.kind == Tree::Kind::mapping ? "mapping" : "sequence");
    }
  };
  check_kind(params, "params");
  if (!skip) check_kind(grads, "grads");

  if (tree.kind == Tree::Kind::sequence) {
    const auto open = [&](py::handle object, const char* argument) {
      py::object items = as_list_or_tuple(object);
      const auto size = size_t(PySequence_Fast_GET_SIZE(items.ptr()));
      if (size != tree.children.size()) {
        fail<py::value_error>(where(argument, tree.path), " has ", size, " items, expected ",
                              tree.children.size());
      }
      return items;
    };
    const py::object param_items = open(params, "params");
    const py::object grad_items = skip ? py::none() : open(grads, "grads");
    for (size_t i = 0; i < tree.children.size(); ++i) {
      const auto at = py::ssize_t(i);
      collect(tree.children[i], PySequence_Fast_GET_ITEM(param_items.ptr(), at),
              skip ? grads : py::handle(PySequence_Fast_GET_ITEM(grad_items.ptr(), at)));
    }
    return;
  }

  const py::dict param_items = as_dict(params);
  const py::dict grad_items = skip ? py::dict() : as_dict(grads);
  Cursor param_cursor(param_items), grad_cursor(grad_items);
  for (size_t i = 0; i < tree.children.size(); ++i) {
    const auto find = [&](Cursor& cursor, const char* argument) {
      PyObject* value = cursor.find(tree.keys[i]);
      if (value == nullptr) {
        fail<py::value_error>(where(argument, tree.path), " has no ", text(py::repr(tree.keys[i])));
      }
      return py::handle(value);
    };
    const py::handle param = find(param_cursor, "params");
    collect(tree.children[i], param, skip ? grads : find(grad_cursor, "grads"));
  }
  const auto check_extra = [&](const py::dict& items, const char* argument) {
    if (items.size() == tree.children.size()) return;
    for (const auto& [key, value] : items) {
      const auto same = [&](const py::object& known) { return known.equal(key); };
      if (std::none_of(tree.keys.begin(), tree.keys.end(), same)) {
        fail<py::value_error>(where(argument, tree.path), " has an unexpected ",
                              text(py::repr(key)));
      }
    }
  };
  check_extra(param_items, "params");
  if (!skip) check_extra(grad_items, "grads");
}

void Plan::collect_array(size_t index, py::handle param, py::handle grad) {
  Leaf& leaf = leaves_[index];
  if (!leaf.seen_param.matches(param, ndarray_type_)) {
    const std::string place = where("params", leaf.name);
    const py::array array = as_array(param, place);
    if (!array.writeable()) fail<py::value_error>(place, " is read-only");
    if (overlaps_itself(array)) {
      fail<py::value_error>(place, " has elements that share memory (strides ",
                            text(array.attr("strides")), ")");
    }
    if (leaf.seen_param) {
      check_like(array, leaf.model, place, "was bound with");
    } else {
      const py::object zero = numpy_.attr("zeros")(py::tuple(), array.dtype());
      leaf.model = numpy_.attr("broadcast_to")(zero, array.attr("shape"));
    }
    leaf.seen_param = Seen(array);
    leaf.param = array;
    leaf.layout_known = writes_known_ = false;
  } else {
    const void* data = py::detail::array_proxy(param.ptr())->data;
    if (!leaf.seen_param.is_at(data)) {
      leaf.seen_param.move_to(data);
      writes_known_ = false;
    }
    if (param.ptr() != leaf.param.ptr()) leaf.param = py::reinterpret_borrow<py::array>(param);
  }

  if (grad.is_none()) return;
  if (!leaf.seen_grad.matches(grad, ndarray_type_)) {
    const std::string place = where("grads", leaf.name);
    // Arithmetic on an array without axes makes NumPy scalars.
    py::object object = py::reinterpret_borrow<py::object>(grad);
    if (py::isinstance(grad, numpy_.attr("generic"))) {
      object = numpy_.attr("asarray")(grad);
      object.attr("flags").attr("writeable") = false;  // the scalar would not change
    }
    const py::array array = as_array(object, place);
    check_like(array, leaf.param, place, "its parameter has");
    leaf.seen_grad = Seen(array);
    leaf.layout_known = false;
    leaf.grad = array;
    moved_grads_.push_back(index);
  } else {
    const void* data = py::detail::array_proxy(grad.ptr())->data;
    if (!leaf.seen_grad.is_at(data)) {
      leaf.seen_grad.move_to(data);
      moved_grads_.push_back(index);
    }
    leaf.grad = py::reinterpret_borrow<py::object>(grad);
  }
  stepped_.push_back(index);
}

bool Plan::share(const py::array& a, const py::array& b) const {
  return numpy_.attr("shares_memory")(a, b).cast<bool>();
}

// By address; none may share memory with another.
void Plan::sort_apart(std::vector<Write>& writes) const {
  std::sort(writes.begin(), writes.end(),
            [](const Write& a, const Write& b) { return a.extent.begin < b.extent.begin; });
  const char* reach = nullptr;
  for (size_t i = 0; i < writes.size(); ++i) {
    for (size_t j = i + 1; j < writes.size() && writes[j].extent.begin < writes[i].extent.end;
         ++j) {
      if (share(writes[i].array, writes[j].array)) {
        fail<py::value_error>(writes[j].place, " shares memory with ", writes[i].place);
      }
    }
    reach = writes[i].reach = std::max(reach, writes[i].extent.end);
  }
}

// Parameters and state may not share memory with each other, nor a gradient with any of them.
void Plan::check_overlap() {
  if (!writes_known_) {
    writes_.clear();
    for (const Leaf& leaf : leaves_) {
      const auto add = [&](const py::array& array, const std::string& place) {
        if (array.size() > 0) writes_.push_back({Extent(array), nullptr, array, place});
      };
      add(leaf.param, where("params", leaf.name));
      for (size_t i = 0; i < leaf.state.size(); ++i) {
        add(leaf.state[i], "the state of " + where("params", leaf.name));
      }
    }
    sort_apart(writes_);
  }
  for (const size_t index : writes_known_ ? moved_grads_ : stepped_) {
    const Leaf& leaf = leaves_[index];
    const auto grad = py::reinterpret_borrow<py::array>(leaf.grad);
    const Extent extent(grad);
    if (extent.begin == extent.end) continue;
    auto write =
        std::lower_bound(writes_.begin(), writes_.end(), extent.end,
                         [](const Write& w, const char* end) { return w.extent.begin < end; });
    while (write != writes_.begin() && (--write)->reach > extent.begin) {
      if (write->extent.end > extent.begin && share(grad, write->array)) {
        fail<py::value_error>(where("grads", leaf.name), " shares memory with ", write->place);
      }
    }
  }
  if (!writes_known_) {
    for (Leaf& leaf : leaves_) {
      if (!leaf.grad)
        leaf.seen_grad = Seen();  // not stepped now: its next gradient is checked anew
    }
  }
  writes_known_ = true;
  moved_grads_.clear();
}

// Gradients that are set to zero must be writable, and may not share memory with each other.
void Plan::check_zeroed() {
  if (zeroed_ == stepped_) return;
  std::vector<Write> writes;
  for (const size_t index : stepped_) {
    const Leaf& leaf = leaves_[index];
    const std::string place = where("grads", leaf.name);
    const auto grad = py::reinterpret_borrow<py::array>(leaf.grad);
    if (!grad.writeable()) {
      fail<py::value_error>(place, " is read-only, and zero_grads=True writes to it");
    }
    if (overlaps_itself(grad)) {
      fail<py::value_error>(place, " has elements that share memory (strides ",
                            text(grad.attr("strides")), "), and zero_grads=True writes to it");
    }
    if (grad.size() > 0) writes.push_back({Extent(grad), nullptr, grad, place});
  }
  sort_apart(writes);
  zeroed_ = stepped_;
}

// Puts the axes in the parameter's memory order and joins those that all streams walk as one.
void Plan::find_layout(Leaf& leaf) {
  std::vector<py::array> streams{py::reinterpret_borrow<py::array>(leaf.grad), leaf.param};
  streams.insert(streams.end(), leaf.state.begin(), leaf.state.end());
  std::vector<index_t> axes;
  for (index_t axis = 0; axis < leaf.param.ndim(); ++axis) {
    if (leaf.param.shape(axis) != 1) axes.push_back(axis);
  }
  std::sort(axes.begin(), axes.end(), [&](index_t a, index_t b) {
    const index_t outer = std::abs(leaf.param.strides(a)), inner = std::abs(leaf.param.strides(b));
    return outer != inner ? outer > inner : a < b;
  });
  Strided strided;
  strided.strides.resize(streams.size());
  for (const index_t axis : axes) {
    const index_t extent = leaf.param.shape(axis);
    const bool joins = !strided.shape.empty() &&
                       std::equal(streams.begin(), streams.end(), strided.strides.begin(),
                                  [&](const py::array& a, const auto& strides) {
                                    return strides.back() == a.strides(axis) * extent;
                                  });
    if (joins) {
      strided.shape.back() *= extent;
    } else {
      strided.shape.push_back(extent);
    }
    for (size_t s = 0; s < streams.size(); ++s) {
      if (joins) strided.strides[s].pop_back();
      strided.strides[s].push_back(streams[s].strides(axis));
    }
  }
  const bool dense =
      strided.shape.empty() ||
      (strided.shape.size() == 1 &&
       std::all_of(strided.strides.begin(), strided.strides.end(),
                   [&](const auto& strides) { return strides[0] == leaf.param.itemsize(); }));
  leaf.strided = dense ? nullptr : std::make_unique<Strided>(std::move(strided));
  leaf.size = leaf.param.size();
  leaf.layout_known = true;
}

const Plan::Rule& Plan::find_rule(const std::string& name) {
  Rule& rule = rules_[name];
  if (!rule.names.empty()) return rule;
  const Table& table = *built_tables().front();  // every table has the same rows
  for (int row = 0; row < table.update_count; ++row) {
    const Update& update = table.updates[row];
    if (update.name != name) continue;
    rule.update[size_t(update.dtype)] = size_t(row);
    if (!rule.names.empty()) continue;  // float32 and float64 have the same names
    for (const std::string& word : words(update.coefficients)) {
      if (word == "grad_scale") rule.grad_scale = rule.names.size();
      PyObject* text = PyUnicode_InternFromString(word.c_str());
      rule.names.push_back(py::reinterpret_steal<py::str>(text));
    }
    if (rule.names.size() > max_coefficients)
      fail<std::length_error>("max_coefficients is too small");
    rule.state_count = words(update.state).size();
  }
  if (rule.names.empty()) fail<std::invalid_argument>(caller_, ": there is no rule '", name, "'");
  return rule;
}

void Plan::lock() {
  if (busy_.test_and_set()) {
    fail<std::runtime_error>(caller_, ": another step of this optimizer is under way");
  }
}

void Plan::bind(size_t index, const std::string& rule_name, const std::vector<py::array>& state) {
  Leaf& leaf = leaves_.at(index);
  const Rule& rule = find_rule(rule_name);
  if (state.size() != rule.state_count) {
    fail<std::invalid_argument>(caller_, ": ", rule_name, " has ", rule.state_count, " states");
  }
  for (const py::array& array : state) {
    check_like(as_array(array, leaf.name), leaf.param, leaf.name, "its parameter has");
  }
  leaf.rule = &rule;
  leaf.state = state;
  leaf.dtype = dtype_of(leaf.param);
  leaf.streams.resize(2 + state.size());
  for (size_t s = 0; s < state.size(); ++s) leaf.streams[2 + s] = leaf.state[s].mutable_data();
  leaf.layout_known = writes_known_ = false;
}

const Plan::Batch& Plan::find_batch(py::handle fold, const Leaf& leaf, std::int64_t t,
                                    bool started) {
  for (size_t i = batches_.size(); i-- > 0;) {
    const Batch& known = batches_[i];
    if (known.group == leaf.group && known.t == t && known.started == started) return known;
  }
  const auto number = [](long long value) {
    return py::reinterpret_steal<py::object>(PyLong_FromLongLong(value));
  };
  const py::object group = number(leaf.group), count = number(t);
  PyObject* arguments[] = {group.ptr(), count.ptr(), started ? Py_True : Py_False};
  PyObject* result = PyObject_Vectorcall(fold.ptr(), arguments, 3, nullptr);
  if (result == nullptr) throw py::error_already_set();
  const py::object values = py::reinterpret_steal<py::object>(result);
  Batch& batch = batches_.emplace_back();
  batch.group = leaf.group;
  batch.t = t;
  batch.started = started;
  batch.grad_scale = leaf.rule->grad_scale;
  batch.coefficients = constants_[size_t(leaf.group)];
  set_coefficients(batch.coefficients, *leaf.rule, values);
  if (batch.coefficients.given != (1u << leaf.rule->names.size()) - 1) {
    fail<std::invalid_argument>(caller_, ": a coefficient of the rule was not given");
  }
  return batch;
}

void Plan::set_coefficients(Coefficients& coefficients, const Rule& rule, py::handle values) const {
  PyObject *key = nullptr, *value = nullptr;
  for (py::ssize_t position = 0; PyDict_Next(values.ptr(), &position, &key, &value);) {
    // Names are interned: the same name is nearly always the same object.
    size_t i = 0;
    while (i < rule.names.size() && rule.names[i].ptr() != key) ++i;
    if (i == rule.names.size()) {
      for (i = 0; i < rule.names.size() && !rule.names[i].equal(py::handle(key)); ++i) continue;
    }
    if (i == rule.names.size()) {
      fail<std::invalid_argument>(caller_, ": the rule has no coefficient ", text(py::repr(key)));
    }
    coefficients.value[i] = PyFloat_AsDouble(value);
    coefficients.given |= 1u << i;
  }
  if (PyErr_Occurred()) throw py::error_already_set();
}

void Plan::set_constants(int group, const std::string& rule, const py::dict& values) {
  constants_.resize(std::max(constants_.size(), size_t(group) + 1));
  constants_[size_t(group)] = {};
  set_coefficients(constants_[size_t(group)], find_rule(rule), values);
}

std::optional<double> Plan::step(const Settings& settings, py::handle params, py::handle grads,
                                 py::handle fold, double loss_scale, std::optional<double> max_norm,
                                 bool skip_nonfinite, bool zero_grads) {
  const std::scoped_lock held(*this);
  // Lets go of the gradients; those not yet checked for overlap, because the step failed, are not
  // taken for seen.
  struct Release {
    Plan& plan;
    ~Release() {
      for (const size_t index : plan.moved_grads_) plan.leaves_[index].seen_grad = Seen();
      plan.moved_grads_.clear();
      for (const size_t index : plan.stepped_) plan.leaves_[index].grad = py::object();
      plan.stepped_.clear();
    }
  } const release_at_end{*this};
  batches_.clear();
  tasks_.clear();

  if (grads.is_none()) {
    fail<py::type_error>(where("grads", ""), " is None, expected the tree of params");
  }
  collect(tree_, params, grads);
  if (!writes_known_ || !moved_grads_.empty()) {
    check_overlap();
    zeroed_.clear();
  }
  if (zero_grads) check_zeroed();

  index_t elements = 0;
  std::int64_t* const counts = counts_.mutable_data();
  bool* const started = started_.mutable_data();
  for (const size_t index : stepped_) {
    Leaf& leaf = leaves_[index];
    if (!leaf.layout_known) find_layout(leaf);
    leaf.streams[0] = py::detail::array_proxy(leaf.grad.ptr())->data;
    leaf.streams[1] = py::detail::array_proxy(leaf.param.ptr())->data;
    const Update& update = settings.table->updates[leaf.rule->update[size_t(leaf.dtype)]];
    const Batch& batch = find_batch(fold, leaf, counts[index] + 1, started[index]);
    tasks_.push_back({&update, batch.coefficients.value, leaf.streams.data(), leaf.strided.get(),
                      int(leaf.streams.size()), leaf.size});
    elements += leaf.size;
  }

  std::optional<double> norm;
  bool skip = false;
  {
    std::optional<py::gil_scoped_release> release;
    if (elements >= release_gil_from_elements) release.emplace();
    double scale = 1 / loss_scale;
    if (max_norm || skip_nonfinite) {
      const GradientSum gradient = gradient_norm(settings, tasks_);
      norm = gradient.norm * scale;
      skip = skip_nonfinite && !gradient.finite;
      if (max_norm) scale *= std::min(*max_norm / (*norm + 1e-6), 1.0);  // as torch: NaN stays NaN
    }
    if (!skip) {
      for (Batch& batch : batches_) {
        batch.coefficients.value[batch.grad_scale] *= scale;
      }
      update(settings, tasks_, zero_grads);
    } else if (zero_grads) {
      zero_gradients(settings, tasks_);
    }
  }
  isa_ = settings.table->isa;
  if (skip) {
    ++skipped_steps;
  } else {
    ++steps;
    for (const size_t index : stepped_) {
      ++counts[index];
      if (leaves_[index].rule->state_count > 0) started[index] = true;
    }
  }
  return norm;
}

std::vector<std::string> Plan::names() const {
  std::vector<std::string> names;
  for (const Leaf& leaf : leaves_) names.push_back(leaf.name);
  return names;
}

std::vector<int> Plan::groups() const {
  std::vector<int> groups;
  for (const Leaf& leaf : leaves_) groups.push_back(leaf.group);
  return groups;
}

std::vector<py::array> Plan::params() const {
  std::vector<py::array> params;
  for (const Leaf& leaf : leaves_) params.push_back(leaf.param);
  return params;
}

}  // namespace fastopt
