// The whole run of a recurrent cell at the boundary, on the CPU.
#pragma once

#include "bindings/arguments.h"
#include "bindings/signals.h"
#include "recurrence/recurrence.h"

namespace adaptcomp {

// rows, input, dim, hidden, wide; cell, activation, residual; x, the two tensors of the state, weight_ih,
// weight_hh, bias_ih, bias_hh, weight2, bias2; head, its bias, readout, its bias, width; output, the two
// tensors of the result, cost; policy, min_steps, max_steps, parameter, signal, sample_ids, whether the
// state is read as logits; steps, status. `threshold`: the policy's.
inline void recurrence(const py::list& list, double threshold) {
  Arguments in(list);
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
  a.output = in.pointer<void>();
  for (void*& leaf : a.result) leaf = in.pointer<void>();
  a.cost = in.pointer<void>();
  a.halt.policy = static_cast<Policy>(in.integer());
  a.halt.min_steps = in.integer();
  a.halt.max_steps = in.integer();
  a.halt.parameter = in.integer();
  a.halt.signal = in.pointer<int64_t>("n");
  a.halt.sample = in.pointer<int64_t>("sample_ids");
  a.halt.read_leaf = in.integer() != 0 ? 0 : -1;
  a.halt.steps = in.pointer<int64_t>();
  a.halt.status = in.pointer<int8_t>();
  in.done();
  a.halt.threshold = threshold;
  Signals signals;
  a.interrupt = signals.interrupt();
  {
    py::gil_scoped_release unlocked;
    recurrence_cpu(a);
  }
  signals.raise();
}

}  // namespace adaptcomp
