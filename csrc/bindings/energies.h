// The fused descents at the boundary. Each takes a list with the arguments of a descent (or of its gradient),
// of its energy, the place and, on CUDA, the scratch; and a list of real numbers.
#pragma once

#include "bindings/arguments.h"
#include "bindings/descent.h"
#include "bindings/signals.h"
#include "hopfield_energy/hopfield_energy.h"
#include "mlp_energy/mlp_energy.h"
#include "quadratic_energy/quadratic_energy.h"

namespace adaptcomp {

// rows, dim, wide, the rule, y0, step_size and its stride, noise and its stride, sample_ids
inline void read_start(Arguments& in, const py::list& reals, DescentStart& d) {
  d.rows = in.integer();
  d.dim = in.integer();
  d.wide = in.integer() != 0;
  d.rule = descent_rule(in, reals);
  d.y0 = in.pointer<void>("y0");
  d.step_size = in.pointer<void>("step_size");
  d.step_size_stride = in.integer();
  d.noise = in.pointer<void>("noise");
  d.noise_stride = in.integer();
  d.sample_ids = in.pointer<int64_t>("sample_ids");
}

// ... y, energy, steps, status, path, scale, velocity
inline Descent read_descent(Arguments& in, const py::list& reals) {
  Descent d{};
  read_start(in, reals, d);
  d.y = in.pointer<void>();
  d.energy = in.pointer<void>();
  d.steps = in.pointer<int64_t>();
  d.status = in.pointer<int8_t>();
  d.path = in.pointer<void>();
  d.scale = in.pointer<void>();
  d.velocity = in.pointer<void>();
  return d;
}

// ... steps, path, scale, velocity, last_steps, g_y, g_path; g_y0, g_step_size, g_noise
inline DescentBackward read_descent_backward(Arguments& in, const py::list& reals) {
  DescentBackward d{};
  read_start(in, reals, d);
  d.steps = in.pointer<int64_t>();
  d.path = in.pointer<void>();
  d.scale = in.pointer<void>();
  d.velocity = in.pointer<void>();
  d.last_steps = in.integer();
  d.g_y = in.values("the gradient of y");
  d.g_path = in.values("the gradient of trace.outputs");
  d.g_y0 = in.pointer<void>();
  d.g_step_size = in.pointer<void>();
  d.g_noise = in.pointer<void>();
  return d;
}

// hidden1, hidden2, activation, weight1, context and its stride, weight2, bias2, out, out_bias; a real number
// more: ridge
inline MlpEnergy read_mlp(Arguments& in, const py::list& reals) {
  MlpEnergy e{};
  e.hidden1 = in.integer();
  e.hidden2 = in.integer();
  e.activation = static_cast<Activation>(in.integer());
  e.ridge = reals[6].cast<double>();
  e.weight1 = in.pointer<void>("weight_y");
  e.context = in.pointer<void>("context");
  e.context_stride = in.integer();
  e.weight2 = in.pointer<void>("weight2");
  e.bias2 = in.pointer<void>("bias2");
  e.out = in.pointer<void>("out");
  e.out_bias = in.pointer<void>("out_bias");
  return e;
}

inline void mlp_descent(const py::list& list, const py::list& reals) {
  Arguments in(list);
  Descent d = read_descent(in, reals);
  Signals signals;
  d.interrupt = signals.interrupt();
  const MlpEnergy e = read_mlp(in, reals);
  const CallPlace where(in);
  AC_RUN(where, mlp_descent_cpu(d, e), mlp_descent_cuda(d, e, where.scratch, where.device, where.stream));
  signals.raise();
}

// ... weight1, context, weight2, bias2, out of the gradient
inline void mlp_descent_backward(const py::list& list, const py::list& reals) {
  Arguments in(list);
  DescentBackward d = read_descent_backward(in, reals);
  Signals signals;
  d.interrupt = signals.interrupt();
  const MlpEnergy e = read_mlp(in, reals);
  const MlpEnergyGrad g{in.pointer<void>(), in.pointer<void>(), in.pointer<void>(), in.pointer<void>(),
                        in.pointer<void>()};
  const CallPlace where(in);
  AC_RUN(where, mlp_descent_backward_cpu(d, e, g),
         mlp_descent_backward_cuda(d, e, g, where.scratch, where.device, where.stream));
  signals.raise();
}

// patterns, pattern, beta
inline HopfieldEnergy read_hopfield(Arguments& in) {
  return {in.integer(), in.pointer<void>("patterns"), in.pointer<void>("beta")};
}

inline void hopfield_descent(const py::list& list, const py::list& reals) {
  Arguments in(list);
  Descent d = read_descent(in, reals);
  Signals signals;
  d.interrupt = signals.interrupt();
  const HopfieldEnergy e = read_hopfield(in);
  const CallPlace where(in);
  AC_RUN(where, hopfield_descent_cpu(d, e),
         hopfield_descent_cuda(d, e, where.scratch, where.device, where.stream));
  signals.raise();
}

// ... pattern, beta of the gradient
inline void hopfield_descent_backward(const py::list& list, const py::list& reals) {
  Arguments in(list);
  DescentBackward d = read_descent_backward(in, reals);
  Signals signals;
  d.interrupt = signals.interrupt();
  const HopfieldEnergy e = read_hopfield(in);
  const HopfieldEnergyGrad g{in.pointer<void>(), in.pointer<void>()};
  const CallPlace where(in);
  AC_RUN(where, hopfield_descent_backward_cpu(d, e, g),
         hopfield_descent_backward_cuda(d, e, g, where.scratch, where.device, where.stream));
  signals.raise();
}

// matrix, linear and its stride
inline QuadraticEnergy read_quadratic(Arguments& in) {
  return {in.pointer<void>("A"), in.pointer<void>("b"), in.integer()};
}

inline void quadratic_descent(const py::list& list, const py::list& reals) {
  Arguments in(list);
  Descent d = read_descent(in, reals);
  Signals signals;
  d.interrupt = signals.interrupt();
  const QuadraticEnergy e = read_quadratic(in);
  const CallPlace where(in);
  AC_RUN(where, quadratic_descent_cpu(d, e),
         quadratic_descent_cuda(d, e, where.scratch, where.device, where.stream));
  signals.raise();
}

// ... matrix, linear of the gradient
inline void quadratic_descent_backward(const py::list& list, const py::list& reals) {
  Arguments in(list);
  DescentBackward d = read_descent_backward(in, reals);
  Signals signals;
  d.interrupt = signals.interrupt();
  const QuadraticEnergy e = read_quadratic(in);
  const QuadraticEnergyGrad g{in.pointer<void>(), in.pointer<void>()};
  const CallPlace where(in);
  AC_RUN(where, quadratic_descent_backward_cpu(d, e, g),
         quadratic_descent_backward_cuda(d, e, g, where.scratch, where.device, where.stream));
  signals.raise();
}

// The size of the scratch of a call: 0 on the host, -1 if a row is too long for the device's kernels. Its
// list: rows, dim, wide, backward, device; the sizes of the energy
struct ScratchQuery {
  explicit ScratchQuery(Arguments& in)
      : rows(in.integer()),
        dim(in.integer()),
        wide(in.integer() != 0),
        backward(in.integer() != 0),
        where(in.integer(), nullptr) {}
  int64_t rows, dim;
  bool wide, backward;
  Place where;
};
#if ADAPTCOMP_WITH_CUDA
#define AC_SCRATCH(query, energy, function) \
  ((query).where.on_cpu()                   \
       ? 0                                  \
       : function((query).rows, (query).dim, (query).wide, energy, (query).backward, (query).where.device))
#else
#define AC_SCRATCH(query, energy, function) (static_cast<void>(query), static_cast<void>(energy), int64_t{0})
#endif

// ... hidden1, hidden2
inline int64_t mlp_descent_scratch(const py::list& list) {
  Arguments in(list);
  const ScratchQuery query(in);
  MlpEnergy e{};
  e.hidden1 = in.integer();
  e.hidden2 = in.integer();
  in.done();
  return AC_SCRATCH(query, e, mlp_descent_scratch_cuda);
}

// ... patterns
inline int64_t hopfield_descent_scratch(const py::list& list) {
  Arguments in(list);
  const ScratchQuery query(in);
  const HopfieldEnergy e{in.integer(), nullptr, nullptr};
  in.done();
  return AC_SCRATCH(query, e, hopfield_descent_scratch_cuda);
}

inline int64_t quadratic_descent_scratch(const py::list& list) {
  Arguments in(list);
  const ScratchQuery query(in);
  const QuadraticEnergy e{};
  in.done();
  return AC_SCRATCH(query, e, quadratic_descent_scratch_cuda);
}

}  // namespace adaptcomp
