#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <mutex>
#include <numeric>
#include <sstream>
#include <string_view>
#include <unordered_set>

#include <pthread.h>

#include "core/dispatch.h"
#include "states.h"

namespace fastopt {
namespace {

std::string join(const std::string& path, const std::string& name) {
  return path.empty() ? name : path + "." + name;
}

std::vector<std::string> words(const char* text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

// The number of this process among its forebears. A child has not got the thread that held
// something when it was forked.
std::atomic<unsigned> process = 1;
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { ++process; });

// Giving up the GIL and taking it back costs about as much as a step over this many elements.
constexpr index_t release_gil_from_elements = 1 << 12;

constexpr std::int64_t most_steps = std::int64_t(1) << 62;  // of an array

// Deeper trees are taken for one that contains itself.
constexpr int max_depth = 100;

}  // namespace

Plan::Plan(const std::string& caller, py::handle params, bool grouped) : caller_(caller) {
  grow(tree_, params, 0, grouped, 0);
  if (leaves_.empty()) fail<py::value_error>(caller_, ": params holds no arrays");
  std::unordered_set<std::string_view> names;
  for (const Leaf& leaf : leaves_) {
    if (!names.insert(leaf.name).second) {
      fail<py::value_error>(caller_, ": params has two arrays with the name '", leaf.name, "'");
    }
  }
  batches_.reserve(leaves_.size());  // tasks point into it
  const py::array memory = shared_memory(leaves_.size() * sizeof(std::int64_t));
  counts_ = py::array_t<std::int64_t>(py::ssize_t(leaves_.size()),
                                      static_cast<const std::int64_t*>(memory.data()), memory);
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
    leaves_.back().other_param = py::reinterpret_borrow<py::object>(object);
    check_param(leaves_.back());
    return;
  }
  const auto add = [&](py::handle child, const std::string& name) {
    if (grouped && depth == 0) group = int(tree.children.size());
    Tree& branch = tree.children.emplace_back();
    branch.path = join(tree.path, name);
    grow(branch, child, depth + 1, grouped, group);
  };
  if (tree.kind == Tree::Kind::mapping) {
    const py::list items = checked(PyDict_Items(as_dict(object, where("params", tree.path)).ptr()));
    for (const py::handle item : items) {
      const py::object key = item[py::int_(0)], child = item[py::int_(1)];
      if (!PyUnicode_Check(key.ptr()) && !PyLong_Check(key.ptr())) {
        fail<py::type_error>(where("params", tree.path), " has the key ", text(py::repr(key)),
                             " of type ", type_name(key), ", expected str or int");
      }
      const py::str name(key);
      if (PyUnicode_AsUTF8(name.ptr()) == nullptr) {
        PyErr_Clear();
        fail<py::value_error>(where("params", tree.path), " has the key ", text(py::repr(key)),
                              ", which has no UTF-8");
      }
      tree.keys.push_back(key);
      add(child, text(name));
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

// Walks params and grads side by side along the bound tree, and collects every array.
void Plan::collect(const Tree& tree, py::handle params, py::handle grads) {
  tree.kind == Tree::Kind::array ? collect_array(tree.leaf, params, grads)
                                 : collect_items(tree, params, grads);
}

void Plan::collect_items(const Tree& tree, py::handle params, py::handle grads) {
  const py::object held[] = {owned(params.ptr()), owned(grads.ptr())};
  const bool skip = grads.is_none();
  const auto check_kind = [&](py::handle object, const char* argument) {
    if (kind_of(object) != tree.kind) {
      fail<py::type_error>(where(argument, tree.path), " is of type ", type_name(object),
                           ", expected a ",
                           tree.kind == Tree::Kind::mapping ? "mapping" : "sequence",
                           advice(object, tree.kind == Tree::Kind::sequence));
    }
  };
  check_kind(params, "params");
  if (!skip) check_kind(grads, "grads");

  if (tree.kind == Tree::Kind::sequence) {
    const auto check_size = [&](const py::object& items, const char* argument) {
      const auto size = size_t(PySequence_Fast_GET_SIZE(items.ptr()));
      if (size != tree.children.size()) {
        fail<py::value_error>(where(argument, tree.path), " has ", size, " items, expected ",
                              tree.children.size());
      }
    };
    const py::object param_items = as_list_or_tuple(params);
    const py::object grad_items = skip ? py::none() : as_list_or_tuple(grads);
    check_size(param_items, "params");
    if (!skip) check_size(grad_items, "grads");
    for (size_t i = 0; i < tree.children.size(); ++i) {
      const auto item = [&](const py::object& items, const char* argument) {
        check_size(items, argument);  // Python that ran for an item before may have changed a list
        return py::handle(PySequence_Fast_GET_ITEM(items.ptr(), py::ssize_t(i)));
      };
      collect(tree.children[i], item(param_items, "params"),
              skip ? grads : item(grad_items, "grads"));
    }
    return;
  }

  const py::dict param_items = as_dict(params, where("params", tree.path));
  const py::dict grad_items = skip ? py::dict() : as_dict(grads, where("grads", tree.path));
  Cursor param_cursor(param_items), grad_cursor(grad_items);
  for (size_t i = 0; i < tree.children.size(); ++i) {
    const auto find = [&](Cursor& cursor, const char* argument) {
      const py::handle value = cursor.find(tree.keys[i]);
      if (!value) {
        fail<py::value_error>(where(argument, tree.path), " has no ", text(py::repr(tree.keys[i])));
      }
      return value;
    };
    const py::object param = owned(find(param_cursor, "params").ptr());
    collect(tree.children[i], param, skip ? grads : find(grad_cursor, "grads"));
  }
  const auto check_extra = [&](const py::dict& items, const char* argument) {
    if (items.size() == tree.children.size()) return;
    for (const py::handle key : py::list(items)) {
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

// Holds the arrays: whatever Python does to the containers, they stay until the end of the step.
void Plan::collect_array(size_t index, py::handle param, py::handle grad) {
  Leaf& leaf = leaves_[index];
  if (param.ptr() != leaf.param.ptr()) {
    leaf.other_param = py::reinterpret_borrow<py::object>(param);
    swapped_.push_back(index);
  }
  if (grad.is_none()) return;
  leaf.grad = py::reinterpret_borrow<py::object>(grad);
  stepped_.push_back(index);
}

// Of the arrays of a step. Those not yet checked for overlap, because it failed, are not taken for
// seen.
void Plan::let_go() {
  for (Leaf* const leaf : moved_grads_) leaf->seen_grad = Seen();
  for (const size_t index : stepped_) leaves_[index].grad = py::object();
  for (const size_t index : swapped_) leaves_[index].other_param = py::object();
  moved_grads_.clear();
  stepped_.clear();
  swapped_.clear();
}

void Plan::check_param(Leaf& leaf) {
  const py::handle param = leaf.other_param ? leaf.other_param.ptr() : leaf.param.ptr();
  if (leaf.seen_param.matches(param)) {
    if (leaf.seen_param.move_to(param)) writes_known_ = false;
  } else {
    python_ran_ = true;
    const std::string place = where("params", leaf.name);
    check_array_type(param, place);
    const py::array array = as_array(param, place);
    if (!array.writeable()) fail<py::value_error>(place, " is read-only");
    if (overlaps_itself(array)) {
      fail<py::value_error>(place, " has elements that share memory (strides ",
                            text(array.attr("strides")), ")");
    }
    if (leaf.seen_param) check_like(array, leaf.seen_param.form(), place, "was bound with");
    leaf.seen_param = Seen(array);
    leaf.layout_known = writes_known_ = false;
  }
  // The old one stays until the end of the step: what its end sets going is Python.
  if (leaf.other_param) std::swap(static_cast<py::object&>(leaf.param), leaf.other_param);
}

void Plan::check_grad(Leaf& leaf) {
  if (leaf.seen_grad.matches(leaf.grad)) {
    leaf.seen_grad.move_to(leaf.grad);
  } else {
    python_ran_ = true;
    const std::string place = where("grads", leaf.name);
    // Arithmetic on an array without axes makes NumPy scalars.
    const py::module_ numpy = py::module_::import("numpy");
    if (py::isinstance(leaf.grad, numpy.attr("generic"))) {
      leaf.grad = numpy.attr("asarray")(leaf.grad);
      leaf.grad.attr("flags").attr("writeable") = false;  // the scalar would not change
    }
    check_array_type(leaf.grad, place);
    const py::array array = as_array(leaf.grad, place);
    check_like(array, leaf.param, place, "its parameter has");
    leaf.seen_grad = Seen(array);
    leaf.layout_known = false;
  }
  moved_grads_.push_back(&leaf);
}

// Python that ran after a look at an array may have changed it.
void Plan::check_again() const {
  for (const Leaf& leaf : leaves_) {
    if (!leaf.seen_param.is(leaf.param) || (leaf.grad && !leaf.seen_grad.is(leaf.grad))) {
      fail<std::runtime_error>(where("params", leaf.name),
                               " or its gradient was changed during the step");
    }
  }
}

bool Plan::share(const py::array& a, const py::array& b) {
  python_ran_ = true;
  return share_memory(a, b);
}

std::string Plan::place(const Write& write) const {
  return (write.use == Use::state ? "the state of " : "") +
         where(write.use == Use::grad ? "grads" : "params", write.leaf->name);
}

// By address; none may share memory with another.
void Plan::sort_apart(std::vector<Write>& writes) {
  std::sort(writes.begin(), writes.end(),
            [](const Write& a, const Write& b) { return a.extent.begin < b.extent.begin; });
  const char* reach = nullptr;
  for (size_t i = 0; i < writes.size(); ++i) {
    for (size_t j = i + 1; j < writes.size() && writes[j].extent.begin < writes[i].extent.end;
         ++j) {
      if (share(writes[i].array, writes[j].array)) {
        fail<py::value_error>(place(writes[j]), " shares memory with ", place(writes[i]));
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
      const auto add = [&](const py::array& array, Use use) {
        if (array.size() > 0) writes_.push_back({Extent(array), nullptr, array, use, &leaf});
      };
      add(leaf.param, Use::param);
      for (const py::array& state : leaf.state) add(state, Use::state);
    }
    sort_apart(writes_);
  }
  const auto check = [&](const Leaf& leaf) {
    const auto grad = py::reinterpret_borrow<py::array>(leaf.grad);
    const Extent extent(grad);
    if (extent.begin == extent.end) return;
    auto write =
        std::lower_bound(writes_.begin(), writes_.end(), extent.end,
                         [](const Write& w, const char* end) { return w.extent.begin < end; });
    while (write != writes_.begin() && (--write)->reach > extent.begin) {
      if (write->extent.end > extent.begin && share(grad, write->array)) {
        fail<py::value_error>(where("grads", leaf.name), " shares memory with ", place(*write));
      }
    }
  };
  if (writes_known_) {
    for (const Leaf* const leaf : moved_grads_) check(*leaf);
  } else {
    for (Leaf& leaf : leaves_) {
      if (leaf.grad) {
        check(leaf);
      } else {
        leaf.seen_grad = Seen();  // not stepped now: its next gradient is checked anew
      }
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
    const auto grad = py::reinterpret_borrow<py::array>(leaf.grad);
    if (!grad.writeable()) {
      fail<py::value_error>(where("grads", leaf.name),
                            " is read-only, and zero_grads=True writes to it");
    }
    if (overlaps_itself(grad)) {
      fail<py::value_error>(where("grads", leaf.name), " has elements that share memory (strides ",
                            text(grad.attr("strides")), "), and zero_grads=True writes to it");
    }
    if (grad.size() > 0) writes.push_back({Extent(grad), nullptr, grad, Use::grad, &leaf});
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
    if (2 + rule.state_count > most_streams) fail<std::length_error>("most_streams is too small");
  }
  if (rule.names.empty()) fail<std::invalid_argument>(caller_, ": there is no rule '", name, "'");
  return rule;
}

void Plan::lock() {
  unsigned holder = busy_;
  if (holder == process || !busy_.compare_exchange_strong(holder, process)) {
    fail<std::runtime_error>(caller_, ": another step of this optimizer is under way");
  }
}

void Plan::bind(size_t index, const std::string& rule_name, const std::vector<py::array>& state) {
  Leaf& leaf = leaves_.at(index);
  const Rule& rule = find_rule(rule_name);
  if (state.size() != rule.state_count) {
    fail<std::invalid_argument>(caller_, ": ", rule_name, " has ", rule.state_count, " states");
  }
  const Form form = leaf.seen_param.form();
  for (const py::array& array : state) {
    check_like(as_array(array, leaf.name), form, leaf.name, "its parameter has");
  }
  leaf.rule = &rule;
  leaf.state = state;
  leaf.dtype = form.dtype;
  leaf.streams.resize(2 + state.size());
  for (size_t s = 0; s < state.size(); ++s) leaf.streams[2 + s] = leaf.state[s].mutable_data();
  leaf.layout_known = writes_known_ = false;
}

const Plan::Batch& Plan::new_batch(py::handle fold, const Leaf& leaf, std::int64_t t,
                                   bool started) {
  const auto number = [](long long value) { return checked(PyLong_FromLongLong(value)); };
  const py::object group = number(leaf.group), count = number(t);
  PyObject* arguments[] = {group.ptr(), count.ptr(), started ? Py_True : Py_False};
  const py::object values = checked(PyObject_Vectorcall(fold.ptr(), arguments, 3, nullptr));
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
  PyObject *next_key = nullptr, *next_value = nullptr;
  for (py::ssize_t position = 0; PyDict_Next(values.ptr(), &position, &next_key, &next_value);) {
    const py::object key = owned(next_key), value = owned(next_value);
    // Names are interned: the same name is nearly always the same object.
    size_t i = 0;
    while (i < rule.names.size() && !rule.names[i].is(key)) ++i;
    if (i == rule.names.size()) {
      for (i = 0; i < rule.names.size() && !rule.names[i].equal(key); ++i) continue;
    }
    if (i == rule.names.size()) {
      fail<std::invalid_argument>(caller_, ": the rule has no coefficient ", text(py::repr(key)));
    }
    coefficients.value[i] = PyFloat_AsDouble(value.ptr());
    if (coefficients.value[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
    coefficients.given |= 1u << i;
  }
}

void Plan::set_constants(int group, const std::string& rule, const py::dict& values) {
  constants_.resize(std::max(constants_.size(), size_t(group) + 1));
  constants_[size_t(group)] = {};
  set_coefficients(constants_[size_t(group)], find_rule(rule), values);
}

Plan::Options Plan::options(py::handle loss_scale, py::handle max_norm, py::handle skip_nonfinite,
                            py::handle zero_grads) const {
  // Floats and bools are usual; fastopt._checks knows the others, and has the words.
  const auto checks = [] { return py::module_::import("fastopt._checks"); };
  const auto positive = [&](const char* argument, py::handle value, bool infinite) {
    if (PyFloat_CheckExact(value.ptr())) {
      const double number = PyFloat_AS_DOUBLE(value.ptr());
      if (number > 0 && (infinite || std::isfinite(number))) return number;
    }
    return checks()
        .attr("number")(where(argument, ""), value, 0.0, py::arg("above") = true,
                        py::arg("infinite") = infinite)
        .cast<double>();
  };
  const auto flag = [&](const char* argument, py::handle value) {
    if (PyBool_Check(value.ptr())) return value.is(py::handle(Py_True));
    return checks().attr("switch")(where(argument, ""), value).cast<bool>();
  };
  Options options{positive("loss_scale", loss_scale, false), std::nullopt,
                  flag("skip_nonfinite", skip_nonfinite), flag("zero_grads", zero_grads)};
  if (!max_norm.is_none()) options.max_norm = positive("max_norm", max_norm, true);
  return options;
}

std::optional<double> Plan::step(const Settings& settings, py::handle params, py::handle grads,
                                 py::handle fold, const Options& options) {
  const auto& [loss_scale, max_norm, skip_nonfinite, zero_grads] = options;
  const std::scoped_lock held(*this);
  let_go();  // of what a step has left that a fork cut off
  struct LetGo {
    Plan& plan;
    ~LetGo() { plan.let_go(); }
  } const let_go_at_end{*this};
  batches_.clear();
  tasks_.clear();
  if (grads.is_none()) {
    fail<py::type_error>(where("grads", ""), " is None, expected the tree of params");
  }

  // First all that runs Python of the user's: containers and schedules. Then the arrays are looked
  // at: usually no Python runs between that and the kernels, so nothing changes what was seen.
  collect(tree_, params, grads);
  std::int64_t* const counts = counts_.mutable_data();
  bool* const started = started_.mutable_data();
  const Batch* last = nullptr;
  for (const size_t index : stepped_) {
    Leaf& leaf = leaves_[index];
    const std::int64_t done = counts[index];
    if (done < 0 || done > most_steps) {  // the user may write it
      fail<py::value_error>(caller_, ": state['", leaf.name, "']['step'] is ", done,
                            ", expected a number from 0 to 2**62");
    }
    const std::int64_t t = done + 1;
    // A state of an array that has made steps without it, but was written to, is one to go on from.
    if (t > 1 && !started[index]) {
      started[index] = std::ranges::any_of(
          leaf.state, [](const py::array& a) { return a.attr("any")().cast<bool>(); });
    }
    const auto fits = [&](const Batch& batch) {
      return batch.group == leaf.group && batch.t == t && batch.started == started[index];
    };
    if (last == nullptr || !fits(*last)) {
      const auto known = std::find_if(batches_.rbegin(), batches_.rend(), fits);
      last = known != batches_.rend() ? &*known : &new_batch(fold, leaf, t, started[index]);
    }
    leaf.batch = last;
  }
  python_ran_ = false;
  index_t elements = 0;
  for (Leaf& leaf : leaves_) {
    if (leaf.other_param || !leaf.seen_param.is(leaf.param)) check_param(leaf);
    if (!leaf.grad) continue;
    if (!leaf.seen_grad.is(leaf.grad)) check_grad(leaf);
    if (!leaf.layout_known) find_layout(leaf);
    leaf.streams[0] = py::detail::array_proxy(leaf.grad.ptr())->data;
    leaf.streams[1] = py::detail::array_proxy(leaf.param.ptr())->data;
    const Update& update = settings.table->updates[leaf.rule->update[size_t(leaf.dtype)]];
    tasks_.push_back({&update, leaf.batch->coefficients.value, leaf.streams.data(),
                      leaf.strided.get(), int(leaf.streams.size()), leaf.size});
    elements += leaf.size;
  }
  if (!writes_known_ || !moved_grads_.empty()) {
    check_overlap();
    zeroed_.clear();
  }
  if (zero_grads) check_zeroed();
  if (python_ran_) check_again();

  std::optional<double> norm;
  bool skip = false;
  {
    std::optional<py::gil_scoped_release> release;
    if (elements >= release_gil_from_elements) release.emplace();
    const GradientScale scale =
        scale_gradients(settings, tasks_, loss_scale, max_norm, skip_nonfinite);
    if (max_norm || skip_nonfinite) norm = scale.norm;
    skip = skip_nonfinite && !scale.finite;
    if (!skip) {
      for (Batch& batch : batches_) {
        batch.coefficients.value[batch.grad_scale] *= scale.factor;
      }
      update(settings, tasks_, scale, zero_grads);
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

std::vector<py::array> Plan::new_states(const std::vector<size_t>& indices, double value,
                                        int number) const {
  std::vector<py::array> params;
  for (const size_t index : indices) params.push_back(leaves_.at(index).param);
  return fastopt::new_states(params, value, number);
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
