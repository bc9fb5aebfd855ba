// The merging and splitting of rows of tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "bindings/arguments.h"
#include "bindings/torch.h"
#include "route/route.h"

namespace adaptcomp {

// index, count, size
inline bool in_order(const py::list& list) {
  Arguments in(list);
  const auto* index = in.integers("index");
  const int64_t count = in.integer(), size = in.integer();
  in.done();
  return in_order_cpu(index, count, size);
}

// Returns the tensors of `otherwise` with row j of `rows` in place of row index[j].
inline py::list merge_rows(const py::sequence& rows, const py::sequence& otherwise, const py::object& index,
                           int64_t size, int64_t device, int64_t stream) {
  const Place where(device, reinterpret_cast<void*>(static_cast<uintptr_t>(stream)));
  Contiguous data;
  std::vector<Merge> merges;
  py::list out;
  for (size_t i = 0; i < rows.size(); ++i) {
    const py::object some = rows[i], others = otherwise[i], block = new_rows(others.ptr(), size);
    const int64_t bytes = row_extent(block.ptr()).bytes;
    merges.push_back(
        {data.any(some, "rows"), data.any(others, "otherwise"), data_of(block.ptr(), "the result"), bytes});
    out.append(block);
  }
  const auto n = static_cast<int64_t>(merges.size());
  const int64_t count = rows_of(index.ptr());
  const auto* at = data.typed<const int64_t>(index, torch->int64, count, "index");
  AC_RUN(where, merge_rows_cpu(merges.data(), n, at, count, size),
         merge_rows_cuda(merges.data(), n, at, count, size, where.device, where.stream));
  return out;
}

// The adjoint: returns the gradients of `rows`, if `with_rows`, followed by those of `otherwise`.
inline py::list split_rows(const py::sequence& grads, const py::object& index, int64_t size, bool with_rows,
                           int64_t device, int64_t stream) {
  const Place where(device, reinterpret_cast<void*>(static_cast<uintptr_t>(stream)));
  const int64_t count = rows_of(index.ptr());
  Contiguous data;
  std::vector<Split> splits;
  py::list some, others;
  for (const py::handle grad : grads) {
    const py::object apart = new_rows(grad.ptr(), size);
    others.append(apart);
    void* rows = nullptr;
    if (with_rows) {
      some.append(new_rows(grad.ptr(), count));
      rows = data_of(PyList_GET_ITEM(some.ptr(), PyList_GET_SIZE(some.ptr()) - 1), "the gradient");
    }
    splits.push_back({data.any(grad, "a gradient"), rows, data_of(apart.ptr(), "the gradient"),
                      row_extent(apart.ptr()).bytes});
  }
  const auto n = static_cast<int64_t>(splits.size());
  const auto* at = data.typed<const int64_t>(index, torch->int64, count, "index");
  AC_RUN(where, split_rows_cpu(splits.data(), n, at, count, size),
         split_rows_cuda(splits.data(), n, at, count, size, where.device, where.stream));
  for (const py::handle other : others) some.append(other);
  return some;
}

}  // namespace adaptcomp
