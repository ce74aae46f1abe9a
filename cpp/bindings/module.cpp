// The Python module: settings, bound optimizers, and what the bind_ files add.
#include <pybind11/stl.h>

#include "config.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "optimizer.h"
#include "states.h"

namespace fastopt {

void bind_losses(py::module_& m);
void bind_norm(py::module_& m);
void bind_tensor_optimizer(py::module_& m);

namespace {

Settings make_settings(const std::string& isa, int threads, bool flush_denormals) {
  const Table* table = find_table(isa);
  if (table == nullptr || !runs_here(*table)) {
    fail<py::value_error>("isa '", isa, "' does not run here");
  }
  return {table, threads, flush_denormals};
}

std::vector<std::string> isa_names(bool supported_only) {
  std::vector<std::string> names;
  for (const Table* table : built_tables()) {
    if (!supported_only || runs_here(*table)) names.emplace_back(table->isa);
  }
  return names;
}

// {rule: ({state name: coding}, coefficient names, whether it adds up)}
py::dict rules() {
  constexpr const char* codings[] = {"signed", "unsigned", "none"};
  py::dict result;
  const Table& table = *built_tables().front();
  for (int row = 0; row < table.rule_count; ++row) {
    const Rule& rule = table.rules[row];
    py::dict states;
    for (const auto& [name, coding] : states_of(rule)) {
      states[name.c_str()] = codings[size_t(coding)];
    }
    result[rule.name] =
        py::make_tuple(states, py::str(rule.coefficients).attr("split")(), rule.reduce != nullptr);
  }
  return result;
}

void bind_optimizer(py::module_& m) {
  py::class_<BoundOptimizer>(m, "BoundOptimizer")
      .def(py::init<const std::string&, py::handle, bool>(), py::arg("caller"), py::arg("params"),
           py::arg("grouped"))
      .def_property_readonly("names", &BoundOptimizer::names)
      .def_property_readonly("groups", &BoundOptimizer::groups)
      .def_property_readonly("params", &BoundOptimizer::params)
      .def_property_readonly("counts", &BoundOptimizer::counts)
      .def_property_readonly("started", &BoundOptimizer::started)
      .def_property_readonly("isa", &BoundOptimizer::isa)
      .def_readwrite("steps", &BoundOptimizer::steps)
      .def_readwrite("skipped_steps", &BoundOptimizer::skipped_steps)
      .def("__enter__", &BoundOptimizer::lock)
      .def("__exit__", [](BoundOptimizer& optimizer, const py::args&) { optimizer.unlock(); })
      .def("bind", &BoundOptimizer::bind, py::arg("index"), py::arg("rule"), py::arg("state"),
           py::arg("numbers") = py::dict(), py::arg("at_random") = false)
      .def("set_constants", &BoundOptimizer::set_constants, py::arg("group"), py::arg("rule"),
           py::arg("values"), py::arg("between") = py::none(), py::arg("seed") = 0)
      .def(
          "step",
          [](BoundOptimizer& optimizer, py::handle params, py::handle grads, py::handle fold,
             py::handle loss_scale, py::handle max_norm, py::handle skip_nonfinite,
             py::handle zero_grads) {
            const CurrentSettings settings;
            return optimizer.step(
                settings.get(), params, grads, fold,
                optimizer.options(loss_scale, max_norm, skip_nonfinite, zero_grads));
          },
          py::arg("params"), py::arg("grads"), py::arg("fold"), py::arg("loss_scale") = 1.0,
          py::arg("max_norm") = py::none(), py::arg("skip_nonfinite") = false,
          py::arg("zero_grads") = false)
      .def("step_among",
           [](BoundOptimizer& optimizer, py::handle peers, py::handle params, py::handle grads,
              py::handle fold, py::handle loss_scale, py::handle max_norm,
              py::handle skip_nonfinite) {
             const CurrentSettings settings;
             return optimizer.step(
                 settings.get(), params, grads, fold,
                 optimizer.options(loss_scale, max_norm, skip_nonfinite, py::bool_(false)), peers);
           })
      .def("look", &BoundOptimizer::look, py::arg("params"), py::arg("grads"),
           py::arg("zero_grads"))
      .def("set_first", &BoundOptimizer::set_first, py::arg("index"), py::arg("element"));
}

}  // namespace
}  // namespace fastopt

PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  using namespace fastopt;

  m.attr("compiler") = FASTOPT_COMPILER;
  m.attr("openmp") = load_openmp();
  m.def("built_isas", [] { return isa_names(false); });
  m.def("supported_isas", [] { return isa_names(true); });
  m.def("rules", &rules);
  m.def("new_states", &new_states, py::arg("models"), py::arg("dtype"), py::arg("value"),
        py::arg("number"));
  m.def("new_numbers", &new_numbers, py::arg("count"), py::arg("value"));
  m.def("set_parallel_from_bytes", [](index_t bytes) { parallel_from_bytes = bytes; });

  py::class_<Settings>(m, "Settings")
      .def(py::init(&make_settings), py::arg("isa"), py::arg("num_threads"),
           py::arg("flush_denormals"))
      .def_property_readonly("isa", [](const Settings& s) { return s.table->isa; })
      .def_property_readonly("vector_bytes",
                             [](const Settings& s) { return s.table->vector_bytes; })
      .def_readonly("num_threads", &Settings::threads)
      .def_readonly("flush_denormals", &Settings::flush_denormals);
  PyObject* variable = PyContextVar_New("fastopt_settings", nullptr);
  if (variable == nullptr) throw py::error_already_set();
  CurrentSettings::variable = variable;
  m.attr("context_settings") = CurrentSettings::variable;
  m.def("set_global_settings", [](py::object settings) {
    CurrentSettings::global = settings.cast<const Settings*>();
    settings.release();
  });
  m.def("current_settings", [] { return CurrentSettings().get(); });

  bind_optimizer(m);
  bind_losses(m);
  bind_norm(m);
  bind_tensor_optimizer(m);
}
