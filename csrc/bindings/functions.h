// Plain functions of Python, which take a fraction of the time to call that those of pybind11 do.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <initializer_list>
#include <memory>
#include <new>
#include <string>

namespace adaptcomp {

namespace py = pybind11;

// Runs `body`, which returns a new reference, and hands an exception to Python.
template <class Body>
PyObject* guarded(const Body& body) {
  try {
    return body();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (py::builtin_exception& error) {
    error.set_error();
  } catch (std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// The values of a call's named arguments. The names have to be these, in this order.
inline py::list named_values(PyObject* const* values, Py_ssize_t unnamed, PyObject* names,
                             std::initializer_list<const char*> expected) {
  const auto wanted = static_cast<Py_ssize_t>(expected.size());
  if (unnamed > 0 || !names || PyTuple_GET_SIZE(names) != wanted)
    throw py::type_error("adaptcomp_ext._C: expected " + std::to_string(wanted) + " named arguments");
  py::list list(expected.size());
  for (Py_ssize_t i = 0; i < wanted; ++i) {
    const char* name = expected.begin()[i];
    if (PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(names, i), name) != 0)
      throw py::type_error("adaptcomp_ext._C: expected the argument " + std::string(name) + " at place " +
                           std::to_string(i));
    Py_INCREF(values[i]);
    PyList_SET_ITEM(list.ptr(), i, values[i]);
  }
  return list;
}

// A new object from the arguments that T::kNames lists.
template <class T>
PyObject* make(PyObject*, PyObject* const* values, Py_ssize_t unnamed, PyObject* names) {
  return guarded([&] {
    const py::list arguments = named_values(values, unnamed, names, T::kNames);
    return py::cast(std::make_unique<T>(arguments)).release().ptr();
  });
}

using FastFunction = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
using NamedFunction = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*);

// Entries of the module's table of functions.
inline PyMethodDef fast(const char* name, FastFunction f) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f)), METH_FASTCALL, nullptr};
}
inline PyMethodDef named(const char* name, NamedFunction f) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f)), METH_FASTCALL | METH_KEYWORDS,
          nullptr};
}

}  // namespace adaptcomp
