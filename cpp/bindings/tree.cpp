#include "tree.h"

#include <pybind11/critical_section.h>

#include <algorithm>
#include <unordered_set>

namespace fastopt {
namespace {

// Deeper trees are taken for one that contains itself.
constexpr int max_depth = 100;

bool is_instance(py::handle object, const char* abstract_class) {
  return py::isinstance(object, py::module_::import("collections.abc").attr(abstract_class));
}

std::string join(const std::string& path, const std::string& name) {
  return path.empty() ? name : path + "." + name;
}

bool is_text(py::handle object) {
  return PyUnicode_Check(object.ptr()) || PyBytes_Check(object.ptr()) ||
         PyByteArray_Check(object.ptr());
}

// What may be done about an object that is neither an array nor a tree of them.
const char* advice(py::handle object, bool may_be_list) {
  if (kind_of(object) != Kind::array || py::hasattr(object, "__array__")) return "";
  if (py::hasattr(object, "__dataclass_fields__")) return ": use vars(...)";
  return may_be_list && !is_text(object) && py::hasattr(object, "__iter__") ? ": use list(...)"
                                                                            : "";
}

// The mapping itself where it is a dict.
py::dict as_dict(py::handle mapping, const std::string& where) {
  if (PyDict_CheckExact(mapping.ptr())) return py::reinterpret_borrow<py::dict>(mapping);
  py::dict dict;
  for (py::handle item : mapping.attr("items")()) {
    if (!(PyTuple_Check(item.ptr()) || PyList_Check(item.ptr())) || py::len(item) != 2) {
      fail<py::type_error>(where, " has ", text(py::repr(item)), " among its items, expected ",
                           "pairs of a key and a value");
    }
    const py::tuple pair = checked(PySequence_Tuple(item.ptr()));
    dict[pair[0]] = pair[1];
  }
  return dict;
}

// The sequence itself where it is a list or tuple.
py::object as_list_or_tuple(py::handle sequence) {
  return checked(PySequence_Fast(sequence.ptr(), "expected a sequence"));
}

// Looks up the keys of a dict. Dicts usually keep their order: then the next key is the one wanted.
class Cursor {
 public:
  explicit Cursor(py::handle dict) : dict_(dict.ptr()) {}

  // Null if the dict has no such key.
  py::object find(py::handle wanted) {
    const py::scoped_critical_section held(dict_);
    PyObject *key = nullptr, *value = nullptr;
    if (in_order_ && PyDict_Next(dict_, &position_, &key, &value) && key == wanted.ptr()) {
      return owned(value);
    }
    in_order_ = false;
    return fastopt::find(dict_, wanted);
  }

 private:
  PyObject* const dict_;
  py::ssize_t position_ = 0;
  bool in_order_ = true;
};

}  // namespace

Kind kind_of(py::handle object) {
  if (PyDict_Check(object.ptr())) return Kind::mapping;
  if (PyList_Check(object.ptr()) || PyTuple_Check(object.ptr())) return Kind::sequence;
  if (is_array(object) || is_text(object)) return Kind::array;
  if (is_instance(object, "Mapping")) return Kind::mapping;
  if (is_instance(object, "Sequence")) return Kind::sequence;
  return Kind::array;
}

void check_array_type(py::handle object, const std::string& where) {
  const char* const what_to_do = advice(object, true);
  if (*what_to_do != 0) {
    fail<py::type_error>(where, " is of type ", type_name(object),
                         ", expected an array, a mapping or a sequence", what_to_do);
  }
}

Tree::Tree(const std::string& caller, py::handle params, bool grouped, const Add& add)
    : caller_(caller) {
  std::unordered_set<std::string> names;
  const Add add_once = [&](py::handle array, const std::string& name, int group) {
    if (!names.insert(name).second) {
      fail<py::value_error>(caller_, ": params has two arrays with the name '", name, "'");
    }
    add(array, name, group);
  };
  Growth growth{grouped, add_once};
  grow(root_, params, 0, growth);
  if (names.empty()) fail<py::value_error>(caller_, ": params holds no arrays");
}

std::string Tree::where(const char* argument, const std::string& name) const {
  const bool bare = root_.kind == Kind::array || name.empty();
  return caller_ + ": " + argument + (bare ? "" : "['" + name + "']");
}

void Tree::grow(Node& node, py::handle object, int depth, Growth& growth) {
  node.kind = kind_of(object);
  if (depth > max_depth) {
    fail<py::value_error>(where("params", ""), " is nested deeper than ", max_depth, " levels");
  }
  if (node.kind == Kind::array) {
    const bool bare = depth == (growth.grouped ? 1 : 0);
    node.index = growth.arrays++;
    growth.add(object, bare ? join(node.path, "param") : node.path, growth.group);
    return;
  }
  const auto add = [&](py::handle child, const std::string& name) {
    if (growth.grouped && depth == 0) growth.group = int(node.children.size());
    Node& branch = node.children.emplace_back();
    branch.path = join(node.path, name);
    grow(branch, child, depth + 1, growth);
  };
  if (node.kind == Kind::sequence) {
    int position = 0;
    for (py::handle child : as_list_or_tuple(object)) add(child, std::to_string(position++));
    return;
  }
  const std::string place = where("params", node.path);
  const py::list items = checked(PyDict_Items(as_dict(object, place).ptr()));
  for (const py::handle item : items) {
    const py::object key = item[py::int_(0)], child = item[py::int_(1)];
    if (!PyUnicode_Check(key.ptr()) && !PyLong_Check(key.ptr())) {
      fail<py::type_error>(place, " has the key ", text(py::repr(key)), " of type ", type_name(key),
                           ", expected str or int");
    }
    const py::str name(key);
    if (PyUnicode_AsUTF8(name.ptr()) == nullptr) {
      PyErr_Clear();
      fail<py::value_error>(place, " has the key ", text(py::repr(key)), ", which has no UTF-8");
    }
    node.keys.push_back(key);
    add(child, text(name));
  }
}

inline void Tree::walk(const Node& node, py::handle params, py::handle grads,
                       const Visit& visit) const {
  node.kind == Kind::array ? visit(node.index, params, grads)
                           : walk_container(node, params, grads, visit);
}

void Tree::walk(py::handle params, py::handle grads, const Visit& visit) const {
  walk(root_, params, grads, visit);
}

void Tree::walk_container(const Node& node, py::handle params, py::handle grads,
                          const Visit& visit) const {
  const py::object held[] = {owned(params.ptr()), owned(grads.ptr())};
  check_kind(node, params, "params");
  if (!grads.is_none()) check_kind(node, grads, "grads");
  node.kind == Kind::sequence ? walk_sequence(node, params, grads, visit)
                              : walk_mapping(node, params, grads, visit);
}

void Tree::check_kind(const Node& node, py::handle object, const char* argument) const {
  if (kind_of(object) == node.kind) return;
  const bool sequence = node.kind == Kind::sequence;
  fail<py::type_error>(where(argument, node.path), " is of type ", type_name(object),
                       ", expected a ", sequence ? "sequence" : "mapping",
                       advice(object, sequence));
}

void Tree::walk_sequence(const Node& node, py::handle params, py::handle grads,
                         const Visit& visit) const {
  const bool skip = grads.is_none();
  const auto check_size = [&](const py::object& items, const char* argument) {
    const auto size = size_t(PySequence_Fast_GET_SIZE(items.ptr()));
    if (size != node.children.size()) {
      fail<py::value_error>(where(argument, node.path), " has ", size, " items, expected ",
                            node.children.size());
    }
  };
  const py::object param_items = as_list_or_tuple(params);
  const py::object grad_items = skip ? py::none() : as_list_or_tuple(grads);
  check_size(param_items, "params");
  if (!skip) check_size(grad_items, "grads");
  for (size_t i = 0; i < node.children.size(); ++i) {
    const auto item = [&](const py::object& items, const char* argument) {
      const py::scoped_critical_section held(items);
      check_size(items, argument);  // Python that ran for an item before may have changed a list
      return owned(PySequence_Fast_GET_ITEM(items.ptr(), py::ssize_t(i)));
    };
    walk(node.children[i], item(param_items, "params"),
         skip ? py::none() : item(grad_items, "grads"), visit);
  }
}

void Tree::walk_mapping(const Node& node, py::handle params, py::handle grads,
                        const Visit& visit) const {
  const bool skip = grads.is_none();
  const py::dict param_items = as_dict(params, where("params", node.path));
  const py::dict grad_items = skip ? py::dict() : as_dict(grads, where("grads", node.path));
  Cursor param_cursor(param_items), grad_cursor(grad_items);
  for (size_t i = 0; i < node.children.size(); ++i) {
    const auto find = [&](Cursor& cursor, const char* argument) {
      py::object value = cursor.find(node.keys[i]);
      if (!value) {
        fail<py::value_error>(where(argument, node.path), " has no ", text(py::repr(node.keys[i])));
      }
      return value;
    };
    const py::object param = find(param_cursor, "params");
    walk(node.children[i], param, skip ? py::none() : find(grad_cursor, "grads"), visit);
  }
  const auto check_extra = [&](const py::dict& items, const char* argument) {
    if (items.size() == node.children.size()) return;
    for (const py::handle key : py::list(items)) {
      const auto same = [&](const py::object& known) { return known.equal(key); };
      if (std::none_of(node.keys.begin(), node.keys.end(), same)) {
        fail<py::value_error>(where(argument, node.path), " has an unexpected ",
                              text(py::repr(key)));
      }
    }
  };
  check_extra(param_items, "params");
  if (!skip) check_extra(grad_items, "grads");
}

}  // namespace fastopt
