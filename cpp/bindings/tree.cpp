#include "tree.h"

namespace fastopt {
namespace {

bool is_instance(py::handle object, const char* abstract_class) {
  return py::isinstance(object, py::module_::import("collections.abc").attr(abstract_class));
}

}  // namespace

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

const char* advice(py::handle object, bool may_be_list) {
  if (kind_of(object) != Tree::Kind::array || py::hasattr(object, "__array__")) return "";
  if (py::hasattr(object, "__dataclass_fields__")) return ": use vars(...)";
  const bool text = PyUnicode_Check(object.ptr()) || PyBytes_Check(object.ptr()) ||
                    PyByteArray_Check(object.ptr());
  return may_be_list && !text && py::hasattr(object, "__iter__") ? ": use list(...)" : "";
}

void check_array_type(py::handle object, const std::string& where) {
  const char* const what_to_do = advice(object, true);
  if (*what_to_do != 0) {
    fail<py::type_error>(where, " is of type ", type_name(object),
                         ", expected an array, a mapping or a sequence", what_to_do);
  }
}

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

py::object as_list_or_tuple(py::handle sequence) {
  return checked(PySequence_Fast(sequence.ptr(), "expected a sequence"));
}

}  // namespace fastopt
