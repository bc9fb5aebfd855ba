// A fast test for ordinary tensors: only the others need the checks in Python, which take time and explain
// what is wrong.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/functions.h"
#include "bindings/torch.h"

namespace adaptcomp {

// Whether a tensor is plain, contiguous and on the CPU, with its values in memory. A tensor of another layout
// than torch.strided, of a transform or without elements has no address, and is not ordinary.
inline bool find_ordinary(PyObject* tensor, Facts& facts) {
  return is_plain(tensor) && facts.read(tensor) && facts.on_cpu() && facts.data() && facts.is_contiguous() &&
         !is_lazy(tensor);
}

// Whether a tensor is also of float32, float64, bfloat16 or float16 and of this shape, a tuple.
inline bool has_shape(PyObject* tensor, PyObject* shape, Facts& facts) {
  const Py_ssize_t dims = PyTuple_GET_SIZE(shape);
  bool answer = find_ordinary(tensor, facts) && facts.dtype() != DType::opaque && facts.dims() == dims;
  for (Py_ssize_t d = 0; answer && d < dims; ++d)
    answer = facts.size(d) == integer_of(PyTuple_GET_ITEM(shape, d));
  return answer;
}

// is_ordinary(tensor, shape): whether it is ordinary, of a floating dtype and of this shape.
inline PyObject* is_ordinary(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2 || !PyTuple_Check(arguments[1])) {
    PyErr_SetString(PyExc_TypeError, "is_ordinary: expected a tensor and its shape");
    return nullptr;
  }
  return guarded([&] {
    Facts facts;
    return PyBool_FromLong(has_shape(arguments[0], arguments[1], facts));
  });
}

// are_ordinary(tensors, shapes): whether this holds for all tensors of a list, and their dtypes are the same.
inline PyObject* are_ordinary(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2 || !PyList_Check(arguments[0]) || !PyList_Check(arguments[1]) ||
      PyList_GET_SIZE(arguments[0]) != PyList_GET_SIZE(arguments[1])) {
    PyErr_SetString(PyExc_TypeError, "are_ordinary: expected a list of tensors and one of their shapes");
    return nullptr;
  }
  return guarded([&] {
    bool answer = true;
    DType dtype = DType::opaque;
    for (Py_ssize_t t = 0; answer && t < PyList_GET_SIZE(arguments[0]); ++t) {
      Facts facts;
      PyObject* shape = PyList_GET_ITEM(arguments[1], t);
      answer = PyTuple_Check(shape) && has_shape(PyList_GET_ITEM(arguments[0], t), shape, facts) &&
               (t == 0 || facts.dtype() == dtype);
      dtype = facts.dtype();
    }
    return PyBool_FromLong(answer);
  });
}

// ordinary_rows(tensor): its number of rows; -1 if it is not ordinary, has another dtype or no batch
// dimension.
inline PyObject* ordinary_rows(PyObject*, PyObject* tensor) {
  return guarded([&] {
    Facts facts;
    const bool answer = find_ordinary(tensor, facts) && facts.dtype() != DType::opaque && facts.dims() > 0;
    return PyLong_FromLongLong(answer ? facts.size(0) : -1);
  });
}

// are_ordinary_rows(state, inputs): whether all tensors in these lists are ordinary, of real numbers,
// integers or bools, and have the same number of rows.
inline PyObject* are_ordinary_rows(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2 || !PyList_Check(arguments[0]) || !PyList_Check(arguments[1])) {
    PyErr_SetString(PyExc_TypeError, "are_ordinary_rows: expected two lists of tensors");
    return nullptr;
  }
  return guarded([&] {
    bool answer = PyList_GET_SIZE(arguments[0]) > 0;
    int64_t rows = -1;
    for (Py_ssize_t i = 0; i < 2; ++i) {
      for (Py_ssize_t t = 0; answer && t < PyList_GET_SIZE(arguments[i]); ++t) {
        Facts facts;
        answer = find_ordinary(PyList_GET_ITEM(arguments[i], t), facts) && facts.is_real() &&
                 facts.dims() > 0 && (rows < 0 || facts.size(0) == rows);
        if (answer) rows = facts.size(0);
      }
    }
    return PyBool_FromLong(answer);
  });
}

}  // namespace adaptcomp
