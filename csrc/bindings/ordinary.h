// Whether a tensor is as nearly all are: the checks of the Python side, of which each takes time and some
// explain a lot, are for the others. Plain functions of Python, which take half as long to call as those of
// pybind11.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/torch.h"

namespace adaptcomp {

// Whether a tensor is a plain contiguous one on the CPU, of float32, float64, bfloat16 or float16, with its
// values in memory. A tensor of another layout than torch.strided, of a transform or without elements has no
// address, and is not.
inline bool is_ordinary(PyObject* tensor) {
  if (!is_plain(tensor) || !is_true(tensor, torch->is_cpu) || is_true(tensor, torch->is_nested)) return false;
  if (dtype_of(tensor) == DType::opaque || Like::is_lazy(tensor)) return false;
  void* data = nullptr;
  return find_data(tensor, data) && data && is_contiguous(tensor);
}

// is_ordinary(tensor, shape): of this shape, a tuple.
inline PyObject* is_ordinary(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2) {
    PyErr_SetString(PyExc_TypeError, "is_ordinary: expected a tensor and its shape");
    return nullptr;
  }
  try {
    bool answer = is_ordinary(arguments[0]);
    if (answer) {
      const int equal =
          PyObject_RichCompareBool(attribute(arguments[0], torch->shape).ptr(), arguments[1], Py_EQ);
      if (equal < 0) throw py::error_already_set();
      answer = equal == 1;
    }
    return PyBool_FromLong(answer);
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  }
}

// ordinary_rows(tensor): its rows; -1 where it is not ordinary or has no batch dimension.
inline PyObject* ordinary_rows(PyObject*, PyObject* tensor) {
  try {
    int64_t rows = -1;
    if (is_ordinary(tensor)) {
      const Shape shape(tensor);
      if (shape.dims() > 0) rows = shape[0];
    }
    return PyLong_FromLongLong(rows);
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  }
}

inline void define_ordinary(py::module_& m) {
  static PyMethodDef functions[] = {
      {"is_ordinary",
       reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(
           static_cast<PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t)>(&is_ordinary))),
       METH_FASTCALL, nullptr},
      {"ordinary_rows", &ordinary_rows, METH_O, nullptr},
      {nullptr, nullptr, 0, nullptr},
  };
  if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
}

}  // namespace adaptcomp
