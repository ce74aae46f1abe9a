// Nested containers of arrays: what they hold, in which order, and what they should be instead.
#pragma once

#include <string>
#include <vector>

#include "arrays.h"

namespace fastopt {

// A nesting of mappings and sequences with arrays as leaves.
struct Tree {
  enum class Kind { array, mapping, sequence };
  Kind kind = Kind::array;
  std::string path;              // dotted
  size_t leaf = 0;               // of an array: its index
  std::vector<py::object> keys;  // of a mapping
  std::vector<Tree> children;
};

Tree::Kind kind_of(py::handle object);

// What may be done about an object that is neither an array nor a tree of them.
const char* advice(py::handle object, bool may_be_list);

// Raises where there is advice.
void check_array_type(py::handle object, const std::string& where);

// A mapping as a dict, a sequence as a list or tuple; the object itself where it is one already.
py::dict as_dict(py::handle mapping, const std::string& where);
py::object as_list_or_tuple(py::handle sequence);

// Looks up the keys of a dict. Dicts usually keep their order: then the next key is the one wanted.
class Cursor {
 public:
  explicit Cursor(py::handle dict) : dict_(dict.ptr()) {}

  // Null if the dict has no such key.
  py::handle find(py::handle wanted) {
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

}  // namespace fastopt
