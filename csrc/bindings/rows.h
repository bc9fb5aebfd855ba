// Gathering, scattering, merging and splitting rows of tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "bindings/arguments.h"
#include "bindings/torch.h"
#include "compaction/compaction.h"
#include "route/route.h"

namespace adaptcomp {

// New blocks of `rows` rows, and the moves into them from the tensors they are like.
struct NewBlocks {
  NewBlocks(const py::sequence& tensors, int64_t rows) {
    for (const py::handle tensor : tensors) {
      const py::object block = new_rows(tensor.ptr(), rows);
      moves.push_back({data.plain(tensor), data_of(block.ptr()), row_extent(block.ptr()).bytes});
      blocks.append(block);
    }
  }
  int64_t size() const { return static_cast<int64_t>(moves.size()); }

  Contiguous data;
  std::vector<Move> moves;
  py::list blocks;
};

// The rows of each tensor that `index` names; of zeros where it is negative.
inline py::list gather_rows(const py::sequence& tensors, const py::object& index, int64_t device, int64_t stream) {
  const Place where(device, reinterpret_cast<void*>(static_cast<uintptr_t>(stream)));
  const int64_t rows = rows_of(index.ptr());
  NewBlocks to(tensors, rows);
  const auto* from = static_cast<const int64_t*>(to.data(index));
  AC_RUN(where, gather_rows_cpu(to.moves.data(), to.size(), from, rows),
         gather_rows_cuda(to.moves.data(), to.size(), from, rows, where.device, where.stream));
  return to.blocks;
}

// Its adjoint: blocks of `rows` rows, zero but for those that `index` names.
inline py::list scatter_rows(const py::sequence& tensors, const py::object& index, int64_t rows, int64_t device, int64_t stream) {
  const Place where(device, reinterpret_cast<void*>(static_cast<uintptr_t>(stream)));
  const int64_t count = rows_of(index.ptr());
  NewBlocks into(tensors, rows);
  const auto* to = static_cast<const int64_t*>(into.data(index));
  AC_RUN(where, scatter_rows_cpu(into.moves.data(), into.size(), to, count, rows),
         scatter_rows_cuda(into.moves.data(), into.size(), to, count, rows, where.device, where.stream));
  return into.blocks;
}

// New tensors like those of `base`, row b of each taken from `rows` where `index` names b, from `base` elsewhere.
inline py::list merge_rows(const py::sequence& rows, const py::object& index, const py::sequence& base, int64_t batch,
                           int64_t device, int64_t stream) {
  const Place where(device, reinterpret_cast<void*>(static_cast<uintptr_t>(stream)));
  const int64_t count = rows_of(index.ptr());
  NewBlocks into(base, batch);
  std::vector<MergeMove> moves;
  for (size_t i = 0; i < into.moves.size(); ++i) {
    const Move& move = into.moves[i];
    moves.push_back({into.data(rows[i]), move.src, move.dst, move.row_bytes});
  }
  const auto n = static_cast<int64_t>(moves.size());
  const auto* to = static_cast<const int64_t*>(into.data(index));
  const py::object scratch = where.on_cpu() ? py::object() : new_rows(index.ptr(), batch);
  auto* position = scratch ? static_cast<int64_t*>(data_of(scratch.ptr())) : nullptr;
  static_cast<void>(position);
  AC_RUN(where, merge_rows_cpu(moves.data(), n, to, count, batch),
         merge_rows_cuda(moves.data(), n, to, count, batch, position, where.device, where.stream));
  return into.blocks;
}

// Its adjoint: of each tensor the rows that `index` names, then of each tensor all rows, zero where `index` names them.
inline py::list split_rows(const py::sequence& grads, const py::object& index, int64_t batch, int64_t device, int64_t stream) {
  const Place where(device, reinterpret_cast<void*>(static_cast<uintptr_t>(stream)));
  const int64_t count = rows_of(index.ptr());
  NewBlocks taken(grads, count), rest(grads, batch);
  std::vector<SplitMove> moves;
  for (size_t i = 0; i < rest.moves.size(); ++i) {
    const Move& move = rest.moves[i];
    moves.push_back({move.src, taken.moves[i].dst, move.dst, move.row_bytes});
  }
  const auto n = static_cast<int64_t>(moves.size());
  const auto* from = static_cast<const int64_t*>(rest.data(index));
  const py::object scratch = where.on_cpu() ? py::object() : new_rows(index.ptr(), batch);
  auto* position = scratch ? static_cast<int64_t*>(data_of(scratch.ptr())) : nullptr;
  static_cast<void>(position);
  AC_RUN(where, split_rows_cpu(moves.data(), n, from, count, batch),
         split_rows_cuda(moves.data(), n, from, count, batch, position, where.device, where.stream));
  for (const py::handle block : rest.blocks) taken.blocks.append(block);
  return taken.blocks;
}

}  // namespace adaptcomp
