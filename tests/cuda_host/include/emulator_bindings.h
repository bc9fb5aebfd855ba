// What Python sees of the emulator: `_C.emulation`, one object with the settings and the count of launches.
#pragma once

#include <pybind11/pybind11.h>

#include <map>
#include <string>

#include "emulator.h"

namespace emulation {

namespace py = pybind11;

inline const std::map<std::string, Order>& orders() {
  static const std::map<std::string, Order> names{
      {"up", Order::up}, {"down", Order::down}, {"together", Order::together}, {"random", Order::random}};
  return names;
}

inline void define(py::module_& m) {
  py::class_<Settings>(m, "Emulation")
      .def_property(
          "order",
          [](const Settings& s) {
            for (const auto& [name, order] : orders())
              if (order == s.order) return name;
            return std::string();
          },
          [](Settings& s, const std::string& name) {
            const auto found = orders().find(name);
            if (found == orders().end())
              throw py::value_error("order: expected up, down, together or random, got " + name);
            s.order = found->second;
          })
      .def_readwrite("seed", &Settings::seed)
      .def_readwrite("multiprocessors", &Settings::multiprocessors)
      .def_readwrite("resident_blocks", &Settings::resident_blocks)
      .def_readwrite("shared_memory", &Settings::shared_memory)
      .def_readwrite("launches", &Settings::launches);
  m.attr("emulation") = py::cast(&settings(), py::return_value_policy::reference);
}

}  // namespace emulation
