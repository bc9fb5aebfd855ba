// The halting step: everything that happens to a block of rows between two calls of the user's step, in one
// call.
//
// For every row of the block: decide whether it halts, test that it is finite, add its weighted readout to
// the output, and where it ends write its steps, status and last state to the results. On the CPU the
// survivors are then packed in the same call; on CUDA packing follows on the stream when the host's stale
// count says that a smaller block will do.
#pragma once

#include <cstdint>

#include "act/rows.h"
#include "common/dtype.h"
#include "compaction/compaction.h"
#include "status.h"

namespace adaptcomp {

enum class Policy : int64_t { given = 0, fixed_steps = 1, act = 2, ponder_sample = 3, confidence = 4 };

constexpr int64_t kMaxLeaves = 32;  // of the state; the binding refuses more
constexpr int64_t kMaxSums = 2;     // cost and log-probability

struct Leaf {         // one tensor of the state
  const void* block;  // [rows, row_elements], as the step returned it
  void* result;       // [batch, row_elements]: each row's last state
  int64_t row_elements;
  DType dtype;  // opaque (row_elements then counts bytes): copied, not tested
};

struct Sum {              // a per-row scalar added up over the steps, in the scalar type
  const void* increment;  // [rows]; null where the policy computes it here
  void* total;            // [batch]
};

struct HaltStep {
  int64_t rows;    // of the block, padding included
  int64_t* row;    // [rows] batch row of each block row, -1 for padding
  int8_t* flag;    // [rows] out, a Status
  int64_t* steps;  // [batch] out, for rows that end now
  int8_t* status;  // [batch] out, for rows that end now
  bool wide;       // scalar type (weight, carry, sums): double, else float
  int64_t step, min_steps, max_steps;

  Policy policy;
  const void*
      signal;  // given: uint8 [rows]; act, ponder_sample: logits [rows]; fixed_steps: int64 [batch] or null
  DType signal_dtype;  // of the logits
  double threshold;    // act, confidence
  int64_t parameter;   // fixed_steps without a signal: the number; ponder_sample: seed; confidence: measure
  const int64_t*
      sample;         // ponder_sample: int64 [batch], the key of each row's noise; null: the batch row itself
  void* carry;        // act: accumulated h, [rows], updated in place
  const void* spent;  // act: [rows], accumulated before the step where carry is for after it alone; or null
  const void*
      weight;  // given: [rows] or null; null means that a row's output is its readout at its last step

  Leaf readout;  // block null: the output is the first leaf's result. result: the output, [batch,
                 // row_elements], in the readout's dtype if unweighted and in its compute type if weighted
  Sum sums[kMaxSums];
  int64_t n_sums;
  Leaf leaves[kMaxLeaves];
  int64_t n_leaves;
  bool retire;         // write -1 to `row` where a row ends: it is padding from now on
  void* weight_out;    // act: [rows] out, the weight, for the backward pass; or null
  const void* tested;  // given: [rows] logits the decision was made of, tested as such; or null
  DType tested_dtype;
  // In a readout apart from the state, and in the leaf that is the readout, minus infinity masks a class and
  // is an ordinary value. Which leaf that is; -1: none.
  int64_t read_leaf = -1;
};

// The rows still running. No result depends on the number of threads.
int64_t halt_step_cpu(const HaltStep& args);
// Packs the running rows of the block in place of the finished ones: the rows from the tail fill the holes,
// so as many rows move as have ended. A Move with dst == src is filled in place; otherwise all `running` rows
// are written to dst. `row` is updated likewise.
void fill_holes_cpu(const int8_t* flag, int64_t running, int64_t* row, const Move* moves, int64_t n_moves);

// `*running` on the device, unless null, is decreased by the rows that end.
void halt_step_cuda(const HaltStep& args, int64_t* running, int64_t device, void* stream);

// Where the rows go that go on, in order: `index[j]` is the block row that becomes row j, `place[i]` where
// row i goes or -1, and `next` is `row` after the move. Returns how many go on. `index` and `next` have room
// for one more than that, `place` for `rows`.
int64_t plan_packing_cpu(const int8_t* flag, const int64_t* row, int64_t rows, int64_t* index, int64_t* place,
                         int64_t* next);

// The same for a block of a given size, at least as large as the number of rows that go on:
//
//   flag  = [0 1 0 -1 0]     row  = [7 2 5 -1 3]     size = 5
//   index = [0 2 4  0 2]     next = [7 5 3 -1 -1]    place = [0 -1 1 -1 2]
//
// The rows behind are copies of those that go on, one after the other, and padding. Where none goes on, index
// is -1.
struct PackingPlan {
  const int8_t* flag;  // [rows], as the halting step left it
  const int64_t* row;  // [rows]
  int64_t rows, size;
  int64_t* index;  // [size] out
  int64_t* place;  // [rows] out
  int64_t* next;   // [size] out
};
void plan_packing_cpu(const PackingPlan& args);
void plan_packing_cuda(const PackingPlan& args, int64_t device, void* stream);

// The rows that go on, of which there are `running`, and the others: first the places of the ones and of the
// others in the block, then, in the same order, their batch rows. `out` has room for twice `rows`.
void split_rows_cpu(const int8_t* flag, const int64_t* row, int64_t rows, int64_t running, int64_t* out);

struct LeafGrad {
  const void* g_result;  // [batch, row_elements] or null (zero)
  const void* g_packed;  // [packed rows, row_elements] or null (zero)
  void* g_block;         // [rows, row_elements] out
  int64_t row_elements;
  DType dtype;
};

struct SumGrad {
  const void* g_total;  // [batch]
  void* g_increment;    // [rows] out
};

// The adjoint of the halting step followed by packing. A row that ended takes its gradient from the results,
// a row that goes on from its place in the packed block, padding and non-finite rows are zero. Every element
// of every output is written.
struct HaltBackward {
  int64_t rows;
  const int64_t* row;    // as in the forward call
  const int8_t* flag;    // as the forward call left it
  const int64_t* place;  // [rows] each row's place in the packed block, -1 where it has none; null: its own
  bool wide;
  const void* g_output;  // [batch, readout_elements] or null
  const void* weight;    // [rows] or null (unweighted)
  const void* readout;   // [rows, readout_elements], for g_weight
  void* g_readout;       // [rows, readout_elements] out; null: added to the first leaf's gradient
  void* g_weight;        // [rows] out, null where weight is
  int64_t readout_elements;
  DType readout_dtype;
  SumGrad sums[kMaxSums];
  int64_t n_sums;
  LeafGrad leaves[kMaxLeaves];
  int64_t n_leaves;

  // Where ACT decided in the kernel, its own adjoint follows: g_weight is then not stored but goes on to the
  // logits.
  const void* logits;  // [rows], as in the forward call; null: another policy
  DType logits_dtype;
  const void* accumulated;  // [rows], before the forward call
  ActParams act;
  const void* g_next;   // [packed rows], of the accumulated probability; or null
  const void* g_cost;   // [batch] or null
  void* g_logits;       // [rows] out, in the scalar type
  void* g_accumulated;  // [rows] out
};
void halt_backward_cpu(const HaltBackward& args);
void halt_backward_cuda(const HaltBackward& args, int64_t device, void* stream);

}  // namespace adaptcomp
