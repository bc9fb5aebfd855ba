// A run that was found to be the kernel's, as long as nothing that this followed from has changed.
#pragma once

#include <utility>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/modules.h"

namespace adaptcomp {

// Whether a dictionary still holds the same objects under the same keys. It owns them: the address of one
// that is gone could be that of another.
class Snapshot {
 public:
  explicit Snapshot(PyObject* dict) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) {
      items_.emplace_back(py::reinterpret_borrow<py::object>(key));
      items_.emplace_back(py::reinterpret_borrow<py::object>(value));
    }
  }
  bool holds(PyObject* dict) const {
    if (PyDict_GET_SIZE(dict) * 2 != static_cast<Py_ssize_t>(items_.size())) return false;
    PyObject *key, *value;
    size_t i = 0;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value); i += 2)
      if (items_[i].ptr() != key || items_[i + 1].ptr() != value) return false;
    return true;
  }
  const std::vector<py::object>& items() const { return items_; }

 private:
  std::vector<py::object> items_;
};

class KnownRun {
 public:
  // own: the halt's class. settings: pairs of a name and a value in the halt's __dict__. modules: those whose
  // class and attributes count, of which the first are called as formulas and must stay without hooks.
  // methods: pairs of a class and a name.
  // tables: for each of the modules that has parameters, its names, shapes, and first place in the result.
  // form: number of tensors of the state, their width, that of the input (0: none), the dtype's code, and the
  // length of the result.
  KnownRun(const py::type& own, const py::list& settings, const py::dict& children, const py::list& modules,
           Py_ssize_t formulas, const py::list& methods, const py::list& tables, const py::tuple& form)
      : own_(own), children_(children.ptr()), formulas_(formulas) {
    for (const py::handle item : settings) {
      const auto pair = py::reinterpret_borrow<py::tuple>(item);
      settings_.emplace_back(pair[0], pair[1]);
    }
    for (const py::handle module : modules) {
      const py::object own = module.attr("__dict__");
      modules_.push_back({py::reinterpret_borrow<py::object>(module), py::type::of(module),
                          Snapshot(own.ptr()), Snapshot(py::object(own["_modules"]).ptr())});
    }
    for (const py::handle item : methods) {
      const auto pair = py::reinterpret_borrow<py::tuple>(item);
      PyObject* found = _PyType_Lookup(reinterpret_cast<PyTypeObject*>(pair[0].ptr()), pair[1].ptr());
      methods_.push_back({pair[0], pair[1], py::reinterpret_borrow<py::object>(found)});
    }
    for (const py::handle item : tables) {
      const auto row = py::reinterpret_borrow<py::tuple>(item);
      tables_.push_back({row[0], row[1], row[2], row[3].cast<Py_ssize_t>()});
    }
    leaves_ = form[0].cast<Py_ssize_t>();
    dim_ = form[1].cast<int64_t>();
    input_ = form[2].cast<int64_t>();
    dtype_ = form[3];
    length_ = form[4].cast<Py_ssize_t>();
  }

  // The tensors of the run (input, first and second tensor of the state, parameters), or null.
  py::object tensors(PyObject* halt, PyObject* state, PyObject* inputs) const {
    static PyObject* const kDict = PyUnicode_InternFromString("__dict__");
    static PyObject* const kModules = PyUnicode_InternFromString("_modules");
    if (reinterpret_cast<PyObject*>(Py_TYPE(halt)) != own_.ptr()) return {};
    const py::object own = owned(PyObject_GetAttr(halt, kDict));
    for (const auto& [name, value] : settings_)
      if (PyDict_GetItem(own.ptr(), name.ptr()) != value.ptr()) return {};
    PyObject* children = PyDict_GetItem(own.ptr(), kModules);
    if (!children || !children_.holds(children)) return {};
    for (size_t i = 0; i < modules_.size(); ++i) {
      const Module& module = modules_[i];
      if (reinterpret_cast<PyObject*>(Py_TYPE(module.object.ptr())) != module.of.ptr()) return {};
      const py::object attributes = owned(PyObject_GetAttr(module.object.ptr(), kDict));
      if (!module.attributes.holds(attributes.ptr())) return {};
      if (static_cast<Py_ssize_t>(i) >= formulas_ &&
          !module.children.holds(PyDict_GetItem(attributes.ptr(), kModules)))
        return {};
    }
    for (const Method& m : methods_)
      if (_PyType_Lookup(reinterpret_cast<PyTypeObject*>(m.of.ptr()), m.name.ptr()) != m.found.ptr())
        return {};

    py::tuple found(length_);
    const auto put = [&](Py_ssize_t at, PyObject* value) {
      Py_INCREF(value);
      PyTuple_SET_ITEM(found.ptr(), at, value);
    };
    for (Py_ssize_t i = 0; i < length_; ++i) put(i, Py_None);
    const auto replace = [&](Py_ssize_t at, PyObject* value) {
      Py_DECREF(PyTuple_GET_ITEM(found.ptr(), at));
      put(at, value);
    };
    const auto dtype = static_cast<DType>(integer_of(dtype_));
    int64_t rows = -1;
    const auto fits = [&](PyObject* tensor, int64_t width) {
      Facts facts;
      if (!is_tensor(tensor) || !find_ordinary(tensor, facts) || facts.dtype() != dtype ||
          facts.dims() != 2 || facts.size(1) != width || (rows >= 0 && facts.size(0) != rows))
        return false;
      rows = facts.size(0);
      return true;
    };
    const bool pair = leaves_ == 2;
    if (pair && (!PyTuple_CheckExact(state) || PyTuple_GET_SIZE(state) != 2)) return {};
    for (Py_ssize_t l = 0; l < leaves_; ++l) {
      PyObject* leaf = pair ? PyTuple_GET_ITEM(state, l) : state;
      if (!fits(leaf, dim_)) return {};
      replace(1 + l, leaf);
    }
    if (PyTuple_GET_SIZE(inputs) != (input_ > 0 ? 1 : 0)) return {};
    if (input_ > 0) {
      PyObject* x = PyTuple_GET_ITEM(inputs, 0);
      if (!fits(x, input_)) return {};
      replace(0, x);
    }
    for (const Table& table : tables_) {
      PyObject* const arguments[] = {table.module.ptr(), table.names.ptr(), table.shapes.ptr(), dtype_.ptr()};
      const py::object parameters = owned(own_parameters(nullptr, arguments, 4));
      if (parameters.is_none()) return {};
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(parameters.ptr()); ++i) {
        PyObject* parameter = PyTuple_GET_ITEM(parameters.ptr(), i);
        if (parameter == Py_None && PyTuple_GET_ITEM(table.shapes.ptr(), i) != Py_None) return {};
        replace(table.place + i, parameter);
      }
    }
    return found;
  }

  // For the cycle collector: an attribute of a module may lead back to the halt.
  int traverse(visitproc visit, void* arg) const {
    const auto all = [&](const std::vector<py::object>& objects) {
      for (const py::object& object : objects) Py_VISIT(object.ptr());
      return 0;
    };
    Py_VISIT(own_.ptr());
    Py_VISIT(dtype_.ptr());
    for (const auto& [name, value] : settings_) {
      Py_VISIT(name.ptr());
      Py_VISIT(value.ptr());
    }
    if (const int stop = all(children_.items())) return stop;
    for (const Module& module : modules_) {
      Py_VISIT(module.object.ptr());
      Py_VISIT(module.of.ptr());
      if (const int stop = all(module.attributes.items())) return stop;
      if (const int stop = all(module.children.items())) return stop;
    }
    for (const Method& method : methods_) {
      Py_VISIT(method.of.ptr());
      Py_VISIT(method.name.ptr());
      Py_VISIT(method.found.ptr());
    }
    for (const Table& table : tables_) {
      Py_VISIT(table.module.ptr());
      Py_VISIT(table.names.ptr());
      Py_VISIT(table.shapes.ptr());
    }
    return 0;
  }
  // Drops what it owns, and knows no halt any more.
  void clear() {
    // The members are empty before the first object goes, whose finalizer may ask.
    const auto settings = std::move(settings_);
    const auto modules = std::move(modules_);
    const auto methods = std::move(methods_);
    const auto tables = std::move(tables_);
    const Snapshot children = std::move(children_);
    const py::object own = std::move(own_);
  }

 private:
  struct Module {
    py::object object, of;
    Snapshot attributes, children;
  };
  struct Method {
    py::object of, name, found;
  };
  struct Table {
    py::object module, names, shapes;
    Py_ssize_t place;
  };
  py::object own_;
  std::vector<std::pair<py::object, py::object>> settings_;
  Snapshot children_;  // of the halt
  std::vector<Module> modules_;
  Py_ssize_t formulas_;
  std::vector<Method> methods_;
  std::vector<Table> tables_;
  Py_ssize_t leaves_, length_;
  int64_t dim_, input_;
  py::object dtype_;
};

// Makes the class one that the cycle collector looks into.
inline void collect_known_runs(PyHeapTypeObject* heap) {
  // Null while the object is being made.
  static constexpr auto held = [](PyObject* self) -> KnownRun* {
    py::detail::value_and_holder in = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
    return in.holder_constructed() ? in.value_ptr<KnownRun>() : nullptr;
  };
  PyTypeObject& type = heap->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) -> int {
    Py_VISIT(Py_TYPE(self));
    const KnownRun* known = held(self);
    return known ? known->traverse(visit, arg) : 0;
  };
  type.tp_clear = [](PyObject* self) -> int {
    if (KnownRun* known = held(self)) known->clear();
    return 0;
  };
}

// known_tensors(known, halt, state, inputs): the tuple of tensors, or None if something has changed.
inline PyObject* known_tensors(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4 || !PyTuple_Check(arguments[3])) {
    PyErr_SetString(PyExc_TypeError,
                    "known_tensors: expected a known run, a module, its state and its inputs");
    return nullptr;
  }
  return guarded([&] {
    const auto* known = py::handle(arguments[0]).cast<const KnownRun*>();
    py::object found = known->tensors(arguments[1], arguments[2], arguments[3]);
    return (found ? found : py::object(py::none())).release().ptr();
  });
}

}  // namespace adaptcomp
