// The boundary to Python, which reads arguments, calls kernels and returns results. It includes no torch
// header, and only this file and csrc/bindings, its parts, use Python.
//
// Tensors, sizes and dtype codes arrive as one flat list per call (reading forty integers from a list takes
// less than a microsecond), or separately. adaptcomp_ext/ops has checked the shapes: this module is private
// and trusts its caller. But every address is taken here, by the guard of bindings/torch.h, so that no tensor
// without memory reaches a kernel.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#include "act/act.h"
#include "bernoulli/bernoulli.h"
#include "bindings/arguments.h"
#include "bindings/descent.h"
#include "bindings/energies.h"
#include "bindings/functions.h"
#include "bindings/halt_run.h"
#include "bindings/halting.h"
#include "bindings/known_loop.h"
#include "bindings/known_run.h"
#include "bindings/modules.h"
#include "bindings/ordinary.h"
#include "bindings/recurrence.h"
#include "bindings/route.h"
#include "bindings/rows.h"
#include "bindings/slot_block.h"
#include "bindings/torch.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "compaction/compaction.h"
#include "confidence/confidence.h"
#include "convergence/convergence.h"
#include "halting/halting.h"
#include "halting/schedule.h"
#include "linear/linear.h"
#include "pondernet/pondernet.h"
#include "status.h"

#ifdef ADAPTCOMP_EMULATION  // tests/cuda_host: the CUDA files are compiled for the host
#include "emulator_bindings.h"
#endif

using namespace adaptcomp;

namespace {

// keep, n, index, count (CUDA), temp (CUDA), temp_bytes (CUDA), place -> the count on the CPU, -1 on CUDA
int64_t compact_index(const py::list& list) {
  Arguments in(list);
  const auto* keep = in.bools("keep");
  const int64_t n = in.integer();
  auto* index = in.pointer<int64_t>();
  [[maybe_unused]] auto* count = in.pointer<int64_t>();
  [[maybe_unused]] auto* temp = in.pointer<void>();
  [[maybe_unused]] const int64_t temp_bytes = in.integer();
  const Place where = place(in);
  int64_t kept = -1;
  AC_RUN(where, kept = compact_index_cpu(keep, n, index),
         compact_index_cuda(keep, n, index, count, temp, temp_bytes, where.device, where.stream));
  return kept;
}

// rows, step, min_steps, max_steps, wide, logits, dtype, accumulated, weight, next, cost, halt, place
void act_step(const py::list& list, double threshold) {
  Arguments in(list);
  ActStep a{};
  a.rows = in.integer();
  a.params = {in.integer(), in.integer(), in.integer(), threshold};
  a.wide = in.integer() != 0;
  a.logits = in.reals("logits");
  a.logits_dtype = in.dtype();
  a.accumulated = in.scalars(a.wide, a.rows, "accumulated");
  a.weight = in.pointer<void>();
  a.next = in.pointer<void>();
  a.cost = in.pointer<void>();
  a.halt = in.pointer<uint8_t>();
  const Place where = place(in);
  AC_RUN(where, act_step_cpu(a), act_step_cuda(a, where.device, where.stream));
}

// rows, step, min_steps, max_steps, wide, logits, dtype, accumulated, g_weight, g_next, g_cost, g_logits,
// g_accumulated, place
void act_step_backward(const py::list& list, double threshold) {
  Arguments in(list);
  ActStepBackward a{};
  a.rows = in.integer();
  a.params = {in.integer(), in.integer(), in.integer(), threshold};
  a.wide = in.integer() != 0;
  a.logits = in.reals("logits");
  a.logits_dtype = in.dtype();
  a.accumulated = in.scalars(a.wide, a.rows, "accumulated");
  a.g_weight = in.reals("the gradient of weight");
  a.g_next = in.reals("the gradient of accumulated");
  a.g_cost = in.reals("the gradient of cost");
  a.g_logits = in.pointer<void>();
  a.g_accumulated = in.pointer<void>();
  const Place where = place(in);
  AC_RUN(where, act_step_backward_cpu(a), act_step_backward_cuda(a, where.device, where.stream));
}

// The lists of ACT, with log_survival in place of accumulated.
void pondernet_step(const py::list& list, double log_prior, double log_epsilon) {
  Arguments in(list);
  PonderNetStep a{};
  a.rows = in.integer();
  a.params = {in.integer(), in.integer(), in.integer(), log_prior, log_epsilon};
  a.wide = in.integer() != 0;
  a.logits = in.reals("logits");
  a.logits_dtype = in.dtype();
  a.log_survival = in.scalars(a.wide, a.rows, "log_survival");
  a.weight = in.pointer<void>();
  a.next = in.pointer<void>();
  a.cost = in.pointer<void>();
  a.halt = in.pointer<uint8_t>();
  const Place where = place(in);
  AC_RUN(where, pondernet_step_cpu(a), pondernet_step_cuda(a, where.device, where.stream));
}

void pondernet_step_backward(const py::list& list, double log_prior, double log_epsilon) {
  Arguments in(list);
  PonderNetStepBackward a{};
  a.rows = in.integer();
  a.params = {in.integer(), in.integer(), in.integer(), log_prior, log_epsilon};
  a.wide = in.integer() != 0;
  a.logits = in.reals("logits");
  a.logits_dtype = in.dtype();
  a.log_survival = in.scalars(a.wide, a.rows, "log_survival");
  a.g_weight = in.reals("the gradient of weight");
  a.g_next = in.reals("the gradient of log_survival");
  a.g_cost = in.reals("the gradient of cost");
  a.g_logits = in.pointer<void>();
  a.g_log_survival = in.pointer<void>();
  const Place where = place(in);
  AC_RUN(where, pondernet_step_backward_cpu(a), pondernet_step_backward_cuda(a, where.device, where.stream));
}

// The keys of random numbers: samples, seeds, steps (tensors or None), seed, step
DrawKeys draw_keys(Arguments& in) {
  DrawKeys keys{};
  keys.samples = in.integers("sample");
  keys.seeds = in.integers("seed");
  keys.steps = in.integers("step");
  keys.seed = in.integer();
  keys.step = in.integer();
  return keys;
}

// rows, keys, wide, logits, dtype, log_prob, halt, place
void bernoulli_step(const py::list& list) {
  Arguments in(list);
  BernoulliStep a{};
  a.rows = in.integer();
  a.keys = draw_keys(in);
  a.wide = in.integer() != 0;
  a.logits = in.reals("logits");
  a.logits_dtype = in.dtype();
  a.log_prob = in.pointer<void>();
  a.halt = in.pointer<uint8_t>();
  const Place where = place(in);
  AC_RUN(where, bernoulli_step_cpu(a), bernoulli_step_cuda(a, where.device, where.stream));
}

// rows, wide, logits, dtype, halt, g_log_prob, g_logits, place
void bernoulli_step_backward(const py::list& list) {
  Arguments in(list);
  BernoulliStepBackward a{};
  a.rows = in.integer();
  a.wide = in.integer() != 0;
  a.logits = in.reals("logits");
  a.logits_dtype = in.dtype();
  a.halt = in.bools("halt");
  a.g_log_prob = in.scalars(a.wide, a.rows, "the gradient of log_prob");
  a.g_logits = in.pointer<void>();
  const Place where = place(in);
  AC_RUN(where, bernoulli_step_backward_cpu(a), bernoulli_step_backward_cuda(a, where.device, where.stream));
}

// rows, keys, out, place
void uniform_draws(const py::list& list) {
  Arguments in(list);
  UniformDraws a{};
  a.rows = in.integer();
  a.keys = draw_keys(in);
  a.out = in.pointer<float>();
  const Place where = place(in);
  AC_RUN(where, uniform_cpu(a), uniform_cuda(a, where.device, where.stream));
}

// rows, inner, columns, wide, x, weight and its two strides, bias, out, place
void linear(const py::list& list) {
  Arguments in(list);
  Linear a{};
  a.rows = in.integer();
  a.inner = in.integer();
  a.columns = in.integer();
  a.wide = in.integer() != 0;
  a.x = in.pointer<void>("x");
  a.weight = in.pointer<void>("weight");
  a.row = in.integer();
  a.column = in.integer();
  a.bias = in.pointer<void>("bias");
  a.out = in.pointer<void>();
  const Place where = place(in);
  AC_RUN(where, linear_cpu(a), linear_cuda(a, where.device, where.stream));
}

// rows, classes, measure, logits, dtype, confidence, place
void confidence(const py::list& list) {
  Arguments in(list);
  const Confidence a{in.integer(),       in.integer(), static_cast<Measure>(in.integer()),
                     in.reals("logits"), in.dtype(),   in.pointer<void>()};
  const Place where = place(in);
  AC_RUN(where, confidence_cpu(a), confidence_cuda(a, where.device, where.stream));
}

// rows, elements, criterion, now, last, dtype, still, next, place
void convergence_step(const py::list& list, double tolerance) {
  Arguments in(list);
  ConvergenceStep a{};
  a.rows = in.integer();
  a.elements = in.integer();
  a.criterion = static_cast<Criterion>(in.integer());
  a.tolerance = tolerance;
  a.now = in.reals("readout");
  a.last = in.reals("carry");
  a.dtype = in.dtype();
  a.still = in.integers("carry");
  a.next = in.pointer<int64_t>();
  const Place where = place(in);
  AC_RUN(where, convergence_step_cpu(a), convergence_step_cuda(a, where.device, where.stream));
}

// flag, row, rows, size, whole, place. `whole`, int64, has room for index [size], place [rows] and next
// [size].
void plan_packing(const py::list& list) {
  Arguments in(list);
  PackingPlan a{};
  a.flag = in.pointer<const int8_t>();
  a.row = in.pointer<const int64_t>();
  a.rows = in.integer();
  a.size = in.integer();
  a.index = in.pointer<int64_t>();
  a.place = a.index + a.size;
  a.next = a.place + a.rows;
  const Place where = place(in);
  AC_RUN(where, plan_packing_cpu(a), plan_packing_cuda(a, where.device, where.stream));
}

// n, rows -> whether every row has a number of at least 1. CPU only.
bool all_positive(const py::list& list) {
  Arguments in(list);
  const int64_t* n = in.integers("n");
  const int64_t rows = in.integer();
  in.done();
  return std::all_of(n, n + rows, [](int64_t steps) { return steps > 0; });
}

int64_t compact_temp(int64_t n) {
#if ADAPTCOMP_WITH_CUDA
  return compact_temp_bytes(n);
#else
  static_cast<void>(n);
  return 0;
#endif
}

constexpr const char* kIsaNames[] = {"base", "avx2", "avx512"};

// Selects an instruction set of the machine; `who` asked for it.
void select_isa(const char* who, const std::string& name) {
  std::string has;
  for (int i = 0; i <= static_cast<int>(best_isa()); ++i) {
    if (name == kIsaNames[i]) {
      isa() = static_cast<Isa>(i);
      return;
    }
    has += (i ? ", " : "") + std::string(kIsaNames[i]);
  }
  throw std::invalid_argument(std::string(who) +
                              ": expected an instruction set that the kernels are compiled for and this "
                              "machine has (" +
                              has + "), got '" + name + "'");
}

// Selects another instruction set, for tests.
void use_isa(const std::string& name) { select_isa("adaptcomp_ext._C.use_isa", name); }

py::dict build_info() {
  py::dict info;
  info["version"] = ADAPTCOMP_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["cuda"] = static_cast<bool>(ADAPTCOMP_WITH_CUDA);
  info["cuda_compiler"] = ADAPTCOMP_CUDA_COMPILER;
  info["cuda_architectures"] = ADAPTCOMP_CUDA_ARCHITECTURES;
  info["instruction_set"] = kIsaNames[static_cast<int>(isa())];
  info["openmp"] = openmp_version();
  info["openmp_threads"] = most_threads();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  if (const char* name = std::getenv("ADAPTCOMP_INSTRUCTION_SET"); name && *name)
    select_isa("ADAPTCOMP_INSTRUCTION_SET", name);  // Python makes an ImportError of the exception
  m.doc() = "Compiled kernels of adaptcomp_ext. Private: use adaptcomp_ext.ops.";
  m.attr("CPU") = kCpu;
#ifdef ADAPTCOMP_EMULATION
  m.attr("EMULATED") = true;
  emulation::define(m);
#else
  m.attr("EMULATED") = false;
#endif
  py::dict status;
  status["PADDING"] = static_cast<int>(kPadding);
  status["RUNNING"] = static_cast<int>(kRunning);
  status["HALTED"] = static_cast<int>(kHalted);
  status["MAX_STEPS"] = static_cast<int>(kMaxSteps);
  status["NONFINITE"] = static_cast<int>(kNonFinite);
  status["REJECTED"] = static_cast<int>(kRejected);
  m.attr("STATUS") = status;
  m.attr("MAX_LEAVES") = kMaxLeaves;
  m.attr("MAX_SUMS") = kMaxSums;
  m.def("compact_index", &compact_index);
  m.def("compact_temp_bytes", &compact_temp);
  m.def("check_blocks", &check_blocks);
  m.def("gather_rows", &gather_rows);
  m.def("scatter_rows", &scatter_rows);
  m.def("all_positive", &all_positive);
  m.def("in_order", &in_order);
  m.def("merge_rows", &merge_rows);
  m.def("split_rows", &split_rows);
  m.def("act_step", &act_step);
  m.def("act_step_backward", &act_step_backward);
  m.def("pondernet_step", &pondernet_step);
  m.def("pondernet_step_backward", &pondernet_step_backward);
  m.def("bernoulli_step", &bernoulli_step);
  m.def("bernoulli_step_backward", &bernoulli_step_backward);
  m.def("uniform_draws", &uniform_draws);
  m.def("confidence", &confidence);
  m.def("convergence_step", &convergence_step);
  m.def("linear", &linear);
  py::class_<KnownRun>(m, "KnownRun", py::custom_type_setup(collect_known_runs))
      .def(py::init<const py::type&, const py::list&, const py::dict&, const py::list&, Py_ssize_t,
                    const py::list&, const py::list&, const py::tuple&>());
  py::class_<Tape>(m, "RecurrenceTape").def(py::init<int64_t>()).def_property_readonly("bytes", &Tape::bytes);
  m.def("halt_rows", &halt_rows);
  m.def("plan_packing", &plan_packing);
  m.def("halt_backward", &halt_backward);
  m.def("descent_update", &descent_update);
  m.def("descent_normals", &descent_normals);
  m.def("mlp_descent", &mlp_descent);
  m.def("mlp_descent_backward", &mlp_descent_backward);
  m.def("mlp_descent_scratch", &mlp_descent_scratch);
  m.def("hopfield_descent", &hopfield_descent);
  m.def("hopfield_descent_backward", &hopfield_descent_backward);
  m.def("hopfield_descent_scratch", &hopfield_descent_scratch);
  m.def("quadratic_descent", &quadratic_descent);
  m.def("quadratic_descent_backward", &quadratic_descent_backward);
  m.def("quadratic_descent_scratch", &quadratic_descent_scratch);
  m.def("recurrence_scratch", &recurrence_scratch);
  m.def("build_info", &build_info);
  m.def("use_isa", &use_isa);
  m.def("use_torch", &use_torch);
  static PyMethodDef functions[] = {
      fast("is_ordinary", &is_ordinary),
      fast("are_ordinary", &are_ordinary),
      {"ordinary_rows", &ordinary_rows, METH_O, nullptr},
      fast("are_ordinary_rows", &are_ordinary_rows),
      fast("own_parameters", &own_parameters),
      fast("known_tensors", &known_tensors),
      fast("recurrence", &recurrence),
      fast("recurrence_trace", &recurrence_trace),
      fast("recurrence_backward", &recurrence_backward),
      named("halt_run", &make<HaltRun>),
      named("known_loop", &make<KnownLoop>),
      named("slot_block", &make<SlotBlock>),
      fast("halt_node_forward", &halt_node_forward),
      fast("halt_node_backward", &halt_node_backward),
      named("descent_run", &make<DescentRun>),
      {nullptr, nullptr, 0, nullptr},
  };
  if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
  m.def("flops_per_row", &state_flops_per_row);
  m.def("make_schedule", &make_schedule);
  py::class_<Schedule, std::shared_ptr<Schedule>>(m, "Schedule")
      .def(py::init([](double fixed, double move, double row) { return Schedule{fixed, move, row}; }))
      .def("least", &Schedule::least)
      .def("kept", &Schedule::kept)
      .def("packed", &Schedule::packed)
      .def_readonly("fixed", &Schedule::fixed)
      .def_readonly("move", &Schedule::move)
      .def_readonly("row", &Schedule::row);
  py::class_<StateLike, std::shared_ptr<StateLike>>(m, "StateLike")
      .def(py::init<const py::list&, int64_t>())
      .def("take", &StateLike::take);
  py::class_<HaltRun>(m, "HaltRun")
      .def("use_first", &HaltRun::use_first)
      .def("change_shapes", &HaltRun::change_shapes)
      .def("set_rows", &HaltRun::set_rows)
      .def("advance", &HaltRun::advance)
      .def("go_on", &HaltRun::go_on)
      .def_readonly("running", &HaltRun::running)
      .def_readonly("inputs_replaced", &HaltRun::inputs_replaced)
      .def_readonly("has_broken", &HaltRun::has_broken);
  py::class_<SlotBlock>(m, "SlotBlock")
      .def("configure", &SlotBlock::configure)
      .def("use_totals", &SlotBlock::use_totals)
      .def("use_first", &SlotBlock::use_first)
      .def("put", &SlotBlock::put)
      .def("put_leaves", &SlotBlock::put_leaves)
      .def("settle", &SlotBlock::settle)
      .def("blocks", &SlotBlock::blocks)
      .def("carried", &SlotBlock::carried)
      .def("clear", &SlotBlock::clear)
      .def("advance", &SlotBlock::advance)
      .def_property_readonly("room", &SlotBlock::room);
  py::class_<KnownLoop>(m, "KnownLoop").def("run", &KnownLoop::run);
  py::class_<HaltNode>(m, "HaltNode")
      .def_property_readonly("row", [](const HaltNode& node) { return list_of(node.row); })
      .def_property_readonly("place", [](const HaltNode& node) { return list_of(node.place); })
      .def_property_readonly("flag", [](const HaltNode& node) { return list_of(node.flag); })
      .def_readonly("act", &HaltNode::act)
      .def_property_readonly("bounds",
                             [](const HaltNode& node) {
                               return py::make_tuple(node.params.step, node.params.min_steps,
                                                     node.params.max_steps);
                             })
      .def_property_readonly("threshold", [](const HaltNode& node) { return node.params.threshold; })
      .def_readonly("has_readout", &HaltNode::has_readout)
      .def_readonly("shared", &HaltNode::shared)
      .def_readonly("readout_dtype", &HaltNode::readout_dtype)
      .def_readonly("totals", &HaltNode::totals)
      .def_readonly("leaves", &HaltNode::leaves)
      .def_readonly("inputs", &HaltNode::inputs)
      .def_readonly("has_results", &HaltNode::has_results)
      .def_readonly("has_next", &HaltNode::has_next);
  py::class_<DescentRun>(m, "DescentRun")
      .def("advance", &DescentRun::advance)
      .def("set_rows", &DescentRun::set_rows)
      .def("index", &DescentRun::index)
      .def_property_readonly("accepted", &DescentRun::accepted)
      .def_property_readonly("broken", &DescentRun::broken);
}
