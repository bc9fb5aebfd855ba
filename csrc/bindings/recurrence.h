// The whole run of a recurrent cell at the boundary.
#pragma once

#include "bindings/arguments.h"
#include "bindings/functions.h"
#include "bindings/signals.h"
#include "recurrence/recurrence.h"

namespace adaptcomp {

// rows, input, dim, hidden, wide; cell, activation, residual; x, the two tensors of the state, weight_ih,
// weight_hh, bias_ih, bias_hh, weight2, bias2; head, its bias, readout, its bias, width; policy, min_steps,
// max_steps, threshold; log_decay and log_total of PonderNet's prior in training, else None twice; steps,
// status; the tape or None.
inline Recurrence recurrence_of(Arguments& in) {
  Recurrence a{};
  a.rows = in.integer();
  a.input = in.integer();
  a.dim = in.integer();
  a.hidden = in.integer();
  a.halt.wide = in.integer() != 0;
  a.cell = static_cast<CellKind>(in.integer());
  a.activation = static_cast<Activation>(in.integer());
  a.residual = in.integer() != 0;
  a.x = in.pointer<void>("inputs");
  for (const void*& leaf : a.state) leaf = in.pointer<void>("state");
  a.weight_ih = in.pointer<void>("step");
  a.weight_hh = in.pointer<void>("step");
  a.bias_ih = in.pointer<void>("step");
  a.bias_hh = in.pointer<void>("step");
  a.weight2 = in.pointer<void>("step");
  a.bias2 = in.pointer<void>("step");
  a.head = in.pointer<void>("head");
  a.head_bias = in.pointer<void>("head");
  a.readout = in.pointer<void>("readout");
  a.readout_bias = in.pointer<void>("readout");
  a.width = in.integer();
  a.halt.policy = static_cast<Policy>(in.integer());
  a.halt.min_steps = in.integer();
  a.halt.max_steps = in.integer();
  a.halt.threshold = in.number();
  const py::object decay = in.object(), total = in.object();
  a.expects = !decay.is_none();
  if (a.expects) {
    a.log_decay = decay.cast<double>();
    a.log_total = total.cast<double>();
  }
  a.halt.steps = in.pointer<int64_t>();
  a.halt.status = in.pointer<int8_t>();
  const py::object tape = in.object();  // the caller's list keeps it
  a.tape = tape.is_none() ? nullptr : tape.cast<Tape*>();
  return a;
}

// What recurrence_of() reads; then output, the two tensors of the result, cost; parameter, signal,
// sample_ids, whether the state is read as logits, whether the threshold is relative; the place and, on CUDA,
// the scratch.
inline PyObject* recurrence(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 1 || !PyList_Check(arguments[0])) {
    PyErr_SetString(PyExc_TypeError, "recurrence: expected a list");
    return nullptr;
  }
  return guarded([&] {
    Arguments in(py::reinterpret_borrow<py::list>(arguments[0]));
    Recurrence a = recurrence_of(in);
    a.output = in.pointer<void>();
    for (void*& leaf : a.result) leaf = in.pointer<void>();
    a.cost = in.pointer<void>();
    a.halt.parameter = in.integer();
    a.halt.signal = in.pointer<int64_t>("n");
    a.halt.sample = in.pointer<int64_t>("sample_ids");
    a.halt.read_leaf = in.integer() != 0 ? 0 : -1;
    a.relative = in.integer() != 0;
    const CallPlace where(in);
    Signals signals;
    a.interrupt = signals.interrupt();
    AC_RUN(where, recurrence_cpu(a), recurrence_cuda(a, where.scratch, where.device, where.stream));
    signals.raise();
    return py::none().release().ptr();
  });
}

// rows, input, dim, hidden, wide, cell, width of a readout or 0, policy, max_steps, whether it is the
// backward pass, device -> the size of the scratch of a call: -1 if a row does not fit on the device.
inline int64_t recurrence_scratch(const py::list& list) {
  Arguments in(list);
  RecurrenceBackward a{};
  Recurrence& run = a.run;
  run.rows = in.integer();
  run.input = in.integer();
  run.dim = in.integer();
  run.hidden = in.integer();
  run.halt.wide = in.integer() != 0;
  run.cell = static_cast<CellKind>(in.integer());
  const int64_t width = in.integer();
  run.readout = width > 0 ? &width : nullptr;  // nobody reads what it points to
  run.width = width > 0 ? width : run.dim;
  run.halt.policy = static_cast<Policy>(in.integer());
  run.halt.max_steps = in.integer();
  [[maybe_unused]] const bool backward = in.integer() != 0;
  [[maybe_unused]] const Place where(in.integer(), nullptr);
  in.done();
#if ADAPTCOMP_WITH_CUDA
  return backward ? recurrence_backward_scratch_cuda(a, where.device)
                  : recurrence_scratch_cuda(run, where.device);
#else
  return 0;
#endif
}

// The tape; steps; rows, dim, wide; out: states, weights, row, step.
inline PyObject* recurrence_trace(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 1 || !PyList_Check(arguments[0])) {
    PyErr_SetString(PyExc_TypeError, "recurrence_trace: expected a list");
    return nullptr;
  }
  return guarded([&] {
    Arguments in(py::reinterpret_borrow<py::list>(arguments[0]));
    RecurrenceTrace a{};
    a.tape = in.object().cast<const Tape*>();
    a.steps = in.pointer<int64_t>();
    a.rows = in.integer();
    a.dim = in.integer();
    a.wide = in.integer() != 0;
    a.states = in.pointer<void>();
    a.weights = in.pointer<void>();
    a.row = in.pointer<int64_t>();
    a.step = in.pointer<int64_t>();
    in.done();
    {
      py::gil_scoped_release unlocked;
      recurrence_trace_cpu(a);
    }
    return py::none().release().ptr();
  });
}

// What recurrence_of() reads; then the gradients in output, the two tensors of the result, cost, states and
// weights of the trace, or None; those to be written, or None: in x, the two tensors of the state, weight_ih,
// weight_hh, bias_ih, bias_hh, weight2, bias2, head, its bias, readout, its bias; the place and, on CUDA, the
// scratch.
inline PyObject* recurrence_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 1 || !PyList_Check(arguments[0])) {
    PyErr_SetString(PyExc_TypeError, "recurrence_backward: expected a list");
    return nullptr;
  }
  return guarded([&] {
    Arguments in(py::reinterpret_borrow<py::list>(arguments[0]));
    RecurrenceBackward a{};
    a.run = recurrence_of(in);
    a.g_output = in.pointer<void>("gradient");
    for (const void*& leaf : a.g_result) leaf = in.pointer<void>("gradient");
    a.g_cost = in.pointer<void>("gradient");
    a.g_trace = in.pointer<void>("gradient");
    a.g_weight = in.pointer<void>("gradient");
    void** const written[] = {&a.g_x,         &a.g_state[0], &a.g_state[1],    &a.g_weight_ih, &a.g_weight_hh,
                              &a.g_bias_ih,   &a.g_bias_hh,  &a.g_weight2,     &a.g_bias2,     &a.g_head,
                              &a.g_head_bias, &a.g_readout,  &a.g_readout_bias};
    for (void** to : written) *to = in.pointer<void>();
    const CallPlace where(in);
    Signals signals;
    a.run.interrupt = signals.interrupt();
    AC_RUN(where, recurrence_backward_cpu(a),
           recurrence_backward_cuda(a, where.scratch, where.device, where.stream));
    signals.raise();
    return py::none().release().ptr();
  });
}

}  // namespace adaptcomp
