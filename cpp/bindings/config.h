// The settings under which a call from Python runs: those of its context, else the global ones.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>

#include "core/parallel.h"

namespace fastopt {

namespace py = pybind11;

class CurrentSettings {
 public:
  CurrentSettings() {
    PyObject* value = nullptr;
    if (PyContextVar_Get(variable.ptr(), nullptr, &value) < 0) throw py::error_already_set();
    if (value == nullptr) return;
    context_ = py::reinterpret_steal<py::object>(value);
  }

  const Settings& get() const { return context_ ? py::cast<const Settings&>(context_) : *global; }

  // Neither changed nor freed: calls under way in other threads read what was global before.
  static inline std::atomic<const Settings*> global = nullptr;
  static inline py::handle variable;  // never released: the module lives as long as the process

 private:
  py::object context_;
};

}  // namespace fastopt
