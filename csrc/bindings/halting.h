// The halting step out of place and its adjoint, for training: they do not write to tensors that autograd may
// have saved.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/rows.h"
#include "bindings/torch.h"
#include "compaction/compaction.h"
#include "halting/halting.h"

namespace adaptcomp {

// Reads the signal of a policy: bools or logits of the block, or the numbers of steps of the batch.
inline void take_signal(HaltStep& a, Contiguous& data, const py::handle& signal, int64_t batch) {
  if (signal.is_none()) return;
  if (a.policy == Policy::given) {
    a.signal = data.typed<const void>(signal, torch->boolean, a.rows, "Decision.halt");
  } else if (a.policy == Policy::fixed_steps) {
    a.signal = data.typed<const void>(signal, torch->int64, batch, "n");
  } else {
    Contiguous::require(signal.ptr(), a.rows, "head");
    a.signal = data.real(signal, "head");
    a.signal_dtype = dtype_of(signal.ptr());
  }
}

inline bool is_double(const py::handle& tensor) {
  return !tensor.is_none() && dtype_of(tensor.ptr()) == DType::f64;
}

// tensors: row, flag, steps, status, running (CUDA), sample_ids, carry, weight, weight_out, tested, signal,
// readout, output, spent; each may be None. If a policy such as Confidence needs a readout and it is None, it
// is the first leaf. integers: step, min_steps, max_steps, policy, parameter, whether the policy has a cost,
// read_leaf, least, place. On the CPU the active rows of all tensors `moving` are compacted, in order, into
// new tensors if at least `least` rows have ended. Returns the number of active rows (-1 on CUDA); and, after
// a compaction, the place of each row in the new block or -1, the batch row of each new row, and the list of
// new tensors.
inline py::tuple halt_rows(const py::tuple& tensors, const py::sequence& leaves, const py::sequence& results,
                           const py::sequence& increments, const py::sequence& totals,
                           const py::sequence& moving, const py::list& integers, double threshold) {
  Contiguous data;
  HaltStep a{};
  const py::handle row = tensors[0], weight = tensors[7], weight_out = tensors[8], tested = tensors[9],
                   signal = tensors[10];
  const py::object readout = tensors[11], output = tensors[12];
  const auto out = [](const py::handle& tensor, const char* name) -> void* {
    return tensor.is_none() ? nullptr : data_of(tensor.ptr(), name);
  };
  a.rows = rows_of(row.ptr());
  const int64_t batch = rows_of(py::object(tensors[2]).ptr());
  a.row = static_cast<int64_t*>(data(row, "row"));
  a.flag = static_cast<int8_t*>(out(tensors[1], "flag"));
  a.steps = static_cast<int64_t*>(out(tensors[2], "steps"));
  a.status = static_cast<int8_t*>(out(tensors[3], "status"));
  [[maybe_unused]] auto* running_on_device = static_cast<int64_t*>(out(tensors[4], "running"));
  a.sample = data.typed<const int64_t>(tensors[5], torch->int64, batch, "sample_ids");
  a.carry = out(tensors[6], "carry");
  a.spent = data(tensors[13], "spent");
  a.weight = data.real(weight, "Decision.weight");
  a.weight_out = out(weight_out, "weight");
  a.tested = data.real(tested, "Decision.logits");
  if (a.tested) a.tested_dtype = dtype_of(tested.ptr());

  Arguments in(integers);
  a.step = in.integer();
  a.min_steps = in.integer();
  a.max_steps = in.integer();
  a.policy = static_cast<Policy>(in.integer());
  take_signal(a, data, signal, batch);
  a.parameter = in.integer();
  const bool has_cost = in.integer() != 0;
  a.read_leaf = in.integer();
  const int64_t least = in.integer();
  const Place where = place(in);
  a.threshold = threshold;
  a.wide = is_double(!weight.is_none()       ? weight
                     : !weight_out.is_none() ? weight_out
                     : increments.size() > 0 ? py::handle(py::object(increments[0]))
                                             : py::handle(py::none()));

  const auto leaf = [&](const py::object& block, const py::object& result, const char* name,
                        bool same_dtype = true) {
    Facts of_block, of_result;
    of_block.require(block.ptr());
    of_result.require(result.ptr());
    const auto size = [&](const Facts& f) { return f.elements() * (same_dtype ? f.element_bytes() : 1); };
    // The user's functions had it since it was checked.
    if (size(of_block) * batch != size(of_result) * a.rows)
      throw py::value_error(
          std::string(name) +
          ": expected the tensor that it returned, got one that was resized or replaced since");
    const Extent row_of_it = row_extent(of_block);
    return Leaf{data.real(block, name), data_of(result.ptr(), "result"), row_of_it.elements, row_of_it.dtype};
  };
  a.n_leaves = static_cast<int64_t>(leaves.size());
  if (a.n_leaves > kMaxLeaves || static_cast<int64_t>(increments.size()) > kMaxSums)
    throw std::runtime_error("adaptcomp_ext._C: too many tensors in the state");
  for (size_t l = 0; l < leaves.size(); ++l) a.leaves[l] = leaf(leaves[l], results[l], "step");
  if (!readout.is_none() && !output.is_none()) {
    const bool shared = leaves.size() > 0 && readout.is(py::object(leaves[0]));
    a.readout = leaf(readout, output, "readout", false);
    if (shared) a.readout.block = a.leaves[0].block;
  } else if (a.policy == Policy::confidence) {
    a.readout = a.leaves[0];
  }
  if (has_cost) {
    a.sums[a.n_sums++] = {nullptr, data_of(py::object(totals[0]).ptr(), "cost")};
  } else {
    for (size_t s = 0; s < increments.size(); ++s)
      a.sums[a.n_sums++] = {data.real(py::object(increments[s]), "Decision.cost or log_prob"),
                            data_of(py::object(totals[s]).ptr(), "total")};
  }
  int64_t running = -1;
  AC_RUN(where, running = halt_step_cpu(a), halt_step_cuda(a, running_on_device, where.device, where.stream));
  if (!where.on_cpu() || running == 0 || a.rows - running < least)
    return py::make_tuple(running, py::none(), py::none(), py::none());

  // One entry more than needed, because the branch-free loop also writes the entry after the last one.
  std::vector<int64_t> index(static_cast<size_t>(running) + 1), next(static_cast<size_t>(running) + 1);
  const py::object places = new_rows(row.ptr(), a.rows), next_row = new_rows(row.ptr(), running);
  plan_packing_cpu(a.flag, a.row, a.rows, index.data(), static_cast<int64_t*>(data_of(places.ptr(), "place")),
                   next.data());
  std::copy_n(next.data(), running, static_cast<int64_t*>(data_of(next_row.ptr(), "row")));
  for (size_t t = 0; t < moving.size(); ++t)
    check_block(py::object(moving[t]).ptr(), a.rows, t < leaves.size() ? "step" : "inputs");
  NewBlocks to(moving, running);
  {
    py::gil_scoped_release unlocked;
    gather_rows_cpu(to.moves.data(), to.size(), index.data(), running);
  }
  return py::make_tuple(running, places, next_row, to.blocks);
}

// tensors: row, flag, where, weight, readout, g_output; for ACT also logits, accumulated, g_next, g_cost.
// `where`: each row's place in the new block, or None. g_results and g_packed, in pairs, and g_totals may
// have None. `shared`: the readout is the first leaf. integers: step, min_steps, max_steps, place; the first
// three are for ACT. Returns g_readout, g_weight, the list of g_increments (for ACT: in its logits and in the
// accumulated probability), and the list of g_leaves; None is a gradient of zeros.
inline py::tuple halt_backward(const py::tuple& tensors, const py::sequence& g_results,
                               const py::sequence& g_packed, const py::sequence& g_totals,
                               const py::object& readout_dtype, bool shared, const py::list& integers,
                               double threshold) {
  Contiguous data;
  HaltBackward a{};
  const py::object row = tensors[0], weight = tensors[3], readout = tensors[4], g_output = tensors[5];
  const bool act = tensors.size() > 6;
  a.rows = rows_of(row.ptr());
  a.row = static_cast<const int64_t*>(data(row, "row"));
  a.flag = static_cast<const int8_t*>(data(tensors[1], "flag"));
  a.place = static_cast<const int64_t*>(data(tensors[2], "place"));
  a.weight = data.real(weight, "Decision.weight");
  a.readout = data.real(readout, "readout");
  a.g_output = data.real(g_output, "the gradient of output");
  Arguments in(integers);
  a.act = {in.integer(), in.integer(), in.integer(), threshold};
  const Place on = place(in);

  a.wide = is_double(weight);
  for (const py::handle g : g_totals) a.wide = a.wide || is_double(g);
  const py::object& scalar = torch->dtypes[a.wide ? 1 : 0];
  py::object g_readout = py::none(), g_weight = py::none();
  if (!g_output.is_none()) {
    if (!shared) {
      g_readout = new_rows(g_output.ptr(), a.rows, readout_dtype);
      a.g_readout = data_of(g_readout.ptr(), "the gradient of readout");
    }
    for (size_t code = 0; code < torch->dtypes.size(); ++code) {
      if (torch->dtypes[code].is(readout_dtype)) a.readout_dtype = static_cast<DType>(code);
    }
    a.readout_elements = row_extent(g_output.ptr()).elements;
    if (!weight.is_none() && !act) {
      g_weight = new_rows(weight.ptr(), a.rows, scalar);
      a.g_weight = data_of(g_weight.ptr(), "the gradient of weight");
    }
  }

  py::list g_leaves;
  std::vector<LeafGrad> table;
  for (size_t l = 0; l < g_results.size(); ++l) {
    const py::object result = g_results[l], packed = g_packed[l];
    const bool read = shared && l == 0 && !g_output.is_none();
    const py::object& like = !result.is_none() ? result : !packed.is_none() ? packed : g_output;
    if (result.is_none() && packed.is_none() && !read) {
      g_leaves.append(py::none());
      continue;
    }
    const py::object g = new_rows(like.ptr(), a.rows, read ? readout_dtype : py::none());
    const Extent extent = row_extent(g.ptr());
    table.push_back({data.real(result, "the gradient of state"), data.real(packed, "the gradient of state"),
                     data_of(g.ptr(), "the gradient of state"), extent.elements, extent.dtype});
    g_leaves.append(g);
  }

  py::list g_increments;
  if (act) {
    const py::object logits = tensors[6], accumulated = tensors[7];
    for (int i = 0; i < 2; ++i) g_increments.append(new_rows(accumulated.ptr(), a.rows));
    a.wide = is_double(accumulated);
    a.logits = data.real(logits, "logits");
    a.logits_dtype = dtype_of(logits.ptr());
    a.accumulated = data(accumulated, "accumulated");
    a.g_next = data.real(tensors[8], "the gradient of accumulated");
    a.g_cost = data.real(tensors[9], "the gradient of cost");
    a.g_logits = data_of(py::object(g_increments[0]).ptr(), "the gradient of logits");
    a.g_accumulated = data_of(py::object(g_increments[1]).ptr(), "the gradient of accumulated");
  } else {
    for (const py::handle g : g_totals) {
      g_increments.append(g.is_none() ? py::object(py::none()) : new_rows(g.ptr(), a.rows));
      if (g.is_none()) continue;
      const py::object back = g_increments[g_increments.size() - 1];
      a.sums[a.n_sums++] = {data.real(g, "the gradient of cost"),
                            data_of(back.ptr(), "the gradient of cost")};
    }
  }

  // More leaves than one call takes go in several calls; all other tensors go with the first.
  size_t begin = 0;
  do {
    a.n_leaves = 0;
    while (begin < table.size() && a.n_leaves < kMaxLeaves) a.leaves[a.n_leaves++] = table[begin++];
    AC_RUN(on, halt_backward_cpu(a), halt_backward_cuda(a, on.device, on.stream));
    a.readout_elements = a.n_sums = 0;
    a.g_weight = nullptr;
    a.logits = nullptr;
  } while (begin < table.size());
  return py::make_tuple(g_readout, g_weight, g_increments, g_leaves);
}

}  // namespace adaptcomp
