// A linear layer whose rows do not depend on each other:
//
//   out[r, j] = bias[j] + sum_i x[r, i] weight[i, j]
//
// with the terms in this order for any number of rows.
#pragma once

#include <cstdint>

namespace adaptcomp {

struct Linear {
  int64_t rows, inner, columns;
  bool wide;           // double; else float
  const void* x;       // [rows, inner]
  const void* weight;  // element i, j at i * row + j * column
  int64_t row, column;
  const void* bias;  // [columns], or null: zero
  void* out;         // [rows, columns]
};

void linear_cpu(const Linear& linear);
void linear_cuda(const Linear& linear, int64_t device, void* stream);

}  // namespace adaptcomp
