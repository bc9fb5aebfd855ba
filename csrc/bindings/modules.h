// The parameters of a module whose call is known to be its formula.
#pragma once

#include "bindings/ordinary.h"

namespace adaptcomp {

// own_parameters(module, names, shapes, dtype): a tuple with these parameters, None for one that is
// registered as None. It returns None if the module has hooks or a `forward` of its own, or if a parameter is
// missing or not a plain contiguous tensor of this dtype and shape on the CPU: Python then finds out what it
// is.
inline PyObject* own_parameters(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  static PyObject* const kDict = PyUnicode_InternFromString("__dict__");
  static PyObject* const kParameters = PyUnicode_InternFromString("_parameters");
  static PyObject* const kForward = PyUnicode_InternFromString("forward");
  static PyObject* const kHooks[] = {
      PyUnicode_InternFromString("_forward_hooks"), PyUnicode_InternFromString("_forward_pre_hooks"),
      PyUnicode_InternFromString("_backward_hooks"), PyUnicode_InternFromString("_backward_pre_hooks")};
  if (count != 4 || !PyTuple_Check(arguments[1]) || !PyTuple_Check(arguments[2])) {
    PyErr_SetString(PyExc_TypeError, "own_parameters: expected a module, names, shapes and a dtype's code");
    return nullptr;
  }
  return guarded([&] {
    const py::object own = owned(PyObject_GetAttr(arguments[0], kDict));
    const auto nothing = [] { return py::none().release().ptr(); };
    if (PyDict_GetItem(own.ptr(), kForward)) return nothing();
    for (PyObject* name : kHooks) {
      PyObject* hooks = PyDict_GetItem(own.ptr(), name);
      if (!hooks || !PyDict_Check(hooks) || PyDict_GET_SIZE(hooks) > 0) return nothing();
    }
    PyObject* parameters = PyDict_GetItem(own.ptr(), kParameters);
    if (!parameters || !PyDict_Check(parameters)) return nothing();
    PyObject *names = arguments[1], *shapes = arguments[2];
    const auto dtype = static_cast<DType>(integer_of(arguments[3]));
    py::tuple found(PyTuple_GET_SIZE(names));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(names); ++i) {
      PyObject *value = PyDict_GetItem(parameters, PyTuple_GET_ITEM(names, i)),
               *shape = PyTuple_GET_ITEM(shapes, i);
      if (!value) return nothing();
      if (shape == Py_None && value != Py_None) return nothing();
      if (value != Py_None) {
        Facts facts;
        if (!find_ordinary(value, facts) || facts.dtype() != dtype || facts.dims() != PyTuple_GET_SIZE(shape))
          return nothing();
        for (Py_ssize_t d = 0; d < facts.dims(); ++d)
          if (facts.size(d) != integer_of(PyTuple_GET_ITEM(shape, d))) return nothing();
      }
      Py_INCREF(value);
      PyTuple_SET_ITEM(found.ptr(), i, value);
    }
    return found.release().ptr();
  });
}

}  // namespace adaptcomp
