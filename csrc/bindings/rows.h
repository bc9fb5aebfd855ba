// The gathering and scattering of rows of tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "bindings/arguments.h"
#include "bindings/torch.h"
#include "compaction/compaction.h"

namespace adaptcomp {

// Calls check_block for each tensor.
inline void check_blocks(const py::sequence& tensors, int64_t rows, const char* name) {
  for (const py::handle tensor : tensors) check_block(tensor.ptr(), rows, name);
}

// New blocks of `rows` rows like given tensors, and the moves from these into them.
struct NewBlocks {
  NewBlocks(const py::sequence& tensors, int64_t rows) {
    for (const py::handle tensor : tensors) {
      const py::object block = new_rows(tensor.ptr(), rows);
      moves.push_back(
          {data.any(tensor, "tensors"), data_of(block.ptr(), "the result"), row_extent(block.ptr()).bytes});
      blocks.append(block);
    }
  }
  int64_t size() const { return static_cast<int64_t>(moves.size()); }

  Contiguous data;
  std::vector<Move> moves;
  py::list blocks;
};

// Returns the rows of each tensor at `index`; zeros where the index is negative.
inline py::list gather_rows(const py::sequence& tensors, const py::object& index, int64_t device,
                            int64_t stream) {
  const Place where(device, reinterpret_cast<void*>(static_cast<uintptr_t>(stream)));
  const int64_t rows = rows_of(index.ptr());
  NewBlocks to(tensors, rows);
  const auto* from = to.data.typed<const int64_t>(index, torch->int64, rows, "index");
  AC_RUN(where, gather_rows_cpu(to.moves.data(), to.size(), from, rows),
         gather_rows_cuda(to.moves.data(), to.size(), from, rows, where.device, where.stream));
  return to.blocks;
}

// The adjoint: returns blocks of `rows` rows, which are zero except at `index`.
inline py::list scatter_rows(const py::sequence& tensors, const py::object& index, int64_t rows,
                             int64_t device, int64_t stream) {
  const Place where(device, reinterpret_cast<void*>(static_cast<uintptr_t>(stream)));
  const int64_t count = rows_of(index.ptr());
  NewBlocks into(tensors, rows);
  const auto* to = into.data.typed<const int64_t>(index, torch->int64, count, "index");
  AC_RUN(where, scatter_rows_cpu(into.moves.data(), into.size(), to, count, rows),
         scatter_rows_cuda(into.moves.data(), into.size(), to, count, rows, where.device, where.stream));
  return into.blocks;
}

}  // namespace adaptcomp
