#include "coefficients.h"

#include <iterator>
#include <sstream>

#include "core/dispatch.h"

namespace fastopt {
namespace {

std::vector<std::string> words(const char* text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

}  // namespace

std::vector<StateName> states_of(const Rule& rule) {
  std::vector<StateName> states;
  for (std::string& word : words(rule.state)) {
    const char mark = word.back();
    if (mark == '+' || mark == '!') word.pop_back();
    states.push_back({std::move(word), mark == '+'   ? Coding::without_sign
                                       : mark == '!' ? Coding::none
                                                     : Coding::with_sign});
  }
  return states;
}

Numbers::Numbers(const py::dict& arrays) : owner(arrays) {
  if (arrays.size() > most) fail<std::length_error>("more numbers than there is room for");
  for (const auto& [name, array] : arrays) {
    at[names.size()] = array.cast<ArrayOf<double>>().mutable_data();
    names.push_back(py::reinterpret_borrow<py::str>(name));
  }
}

const RuleNames& Rules::find(const std::string& caller, const std::string& name) {
  RuleNames& rule = known_[name];
  if (!rule.coefficients.empty()) return rule;
  const Table& table = *built_tables().front();  // every table has the same rows
  for (int row = 0; row < table.rule_count; ++row) {
    const Rule& entry = table.rules[row];
    if (entry.name != name) continue;
    rule.row[size_t(entry.dtype)] = size_t(row);
    if (!rule.coefficients.empty()) continue;  // float32 and float64 have the same names
    for (const std::string& word : words(entry.coefficients)) {
      if (word == "grad_scale") rule.grad_scale = rule.coefficients.size();
      PyObject* text = PyUnicode_InternFromString(word.c_str());
      rule.coefficients.push_back(py::reinterpret_steal<py::str>(text));
    }
    rule.states = states_of(entry);
    rule.prepares = entry.prepare != nullptr;
    rule.factored = entry.factor != nullptr;
    rule.over_all = entry.over_all;
    if (rule.coefficients.size() > size_t(most_coefficients) ||
        3 + rule.states.size() + rule.prepares > size_t(most_streams)) {
      fail<std::length_error>(name, " has more coefficients or states than there is room for");
    }
  }
  if (rule.coefficients.empty()) {
    fail<std::invalid_argument>(caller, ": there is no rule '", name, "'");
  }
  return rule;
}

void CoefficientSet::set(const std::string& caller, py::handle values, const Numbers& numbers) {
  const auto find = [](const std::vector<py::str>& names, const py::object& key) {
    // Names are interned: the same name is nearly always the same object.
    size_t i = 0;
    while (i < names.size() && !names[i].is(key)) ++i;
    if (i == names.size()) {
      for (i = 0; i < names.size() && !names[i].equal(key); ++i) continue;
    }
    return i;
  };
  PyObject *next_key = nullptr, *next_value = nullptr;
  for (py::ssize_t position = 0; PyDict_Next(values.ptr(), &position, &next_key, &next_value);) {
    const py::object key = owned(next_key), number = owned(next_value);
    const double x = PyFloat_AsDouble(number.ptr());
    if (x == -1 && PyErr_Occurred()) throw py::error_already_set();
    const size_t i = find(rule->coefficients, key);
    if (i == rule->coefficients.size()) {
      const size_t k = find(numbers.names, key);
      if (k == numbers.names.size()) {
        fail<std::invalid_argument>(caller, ": the rule has no coefficient ", text(py::repr(key)));
      }
      after[k] = x;
      continue;
    }
    value[i] = x;
    given |= 1u << i;
  }
}

void CoefficientSet::take(const double* combined, const Numbers& numbers) {
  for (size_t k = 0; k < numbers.names.size(); ++k) {
    for (size_t i = 0; i < rule->coefficients.size(); ++i) {
      if (rule->coefficients[i].equal(numbers.names[k])) after[k] = combined[i];
    }
  }
}

void CoefficientSet::check_all_given(const std::string& caller) const {
  if (given != (1u << rule->coefficients.size()) - 1) {
    fail<std::invalid_argument>(caller, ": a coefficient of the rule was not given");
  }
}

}  // namespace fastopt
