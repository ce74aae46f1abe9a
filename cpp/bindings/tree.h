// Nested containers of arrays: what they hold, in which order, and what they should be instead.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "arrays.h"

namespace fastopt {

enum class Kind { array, mapping, sequence };

Kind kind_of(py::handle object);

// Raises where the object is neither an array nor a tree of them, and something may be done about
// it.
void check_array_type(py::handle object, const std::string& where);

// A nesting of mappings and sequences with arrays as leaves: the parameters of an optimizer, or
// with `grouped` a list of such trees. Its arrays are counted in order.
class Tree {
 public:
  // `caller` begins every message. Calls add(array, dotted name, group) for every array.
  using Add = std::function<void(py::handle, const std::string&, int)>;
  Tree(const std::string& caller, py::handle params, bool grouped, const Add& add);

  // Walks both side by side, and calls visit(index, parameter, gradient) for every array. Whatever
  // the user's Python does to the containers meanwhile, what is visited is alive.
  using Visit = std::function<void(size_t, py::handle, py::handle)>;
  void walk(py::handle params, py::handle grads, const Visit& visit) const;

  // "SGD.step: params['W']", and without the name where there is but one array.
  std::string where(const char* argument, const std::string& name) const;

  // What begins every message from now on.
  void rename(const std::string& caller) { caller_ = caller; }
  const std::string& caller() const { return caller_; }

 private:
  struct Node {
    Kind kind = Kind::array;
    std::string path;              // dotted
    size_t index = 0;              // of an array
    std::vector<py::object> keys;  // of a mapping
    std::vector<Node> children;
  };
  struct Growth {
    bool grouped;
    const Add& add;
    int group = 0;
    size_t arrays = 0;
  };

  void grow(Node& node, py::handle object, int depth, Growth& growth);
  void walk(const Node& node, py::handle params, py::handle grads, const Visit& visit) const;
  void walk_container(const Node& node, py::handle params, py::handle grads,
                      const Visit& visit) const;
  void walk_sequence(const Node& node, py::handle params, py::handle grads,
                     const Visit& visit) const;
  void walk_mapping(const Node& node, py::handle params, py::handle grads,
                    const Visit& visit) const;
  void check_kind(const Node& node, py::handle object, const char* argument) const;

  std::string caller_;
  Node root_;
};

}  // namespace fastopt
