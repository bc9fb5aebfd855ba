// The halting step, one call that does all work on a block of rows between two calls of the user's step.
//
// For every row of the block it decides whether the row halts, tests that it is finite, adds its weighted
// readout to the output, and, if the row ends, writes its steps, status and last state to the results. On the
// CPU the same call compacts the active rows. On CUDA compaction follows on the stream, when the host's late
// count shows that a smaller block can hold them.
#pragma once

#include <cstdint>

#include "act/rows.h"
#include "common/dtype.h"
#include "compaction/compaction.h"
#include "status.h"

namespace adaptcomp {

enum class Policy : int64_t {
  given = 0,
  fixed_steps = 1,
  act = 2,
  ponder_sample = 3,
  confidence = 4,
  q_halt = 5,
  // Convergence, by the criteria of convergence/rows.h.
  relative = 6,
  absolute = 7,
  kl = 8,
  argmax = 9
};

// Whether the policy compares the readout with that of the step before.
AC_HD bool remembers(Policy policy) { return policy >= Policy::relative; }

constexpr int64_t kMaxLeaves = 32;  // of the state
constexpr int64_t kMaxSums = 2;     // cost and log-probability

struct Leaf {         // one tensor of the state
  const void* block;  // [rows, row_elements], as the step returned it
  void* result;       // [batch, row_elements]: each row's last state
  int64_t row_elements;
  DType dtype;  // opaque (row_elements then counts bytes): copied, not tested
};

struct Sum {              // a scalar of each row, added up over the steps, in the scalar type
  const void* increment;  // [rows]; null if the kernel computes it
  void* total;            // [batch]
};

struct HaltStep {
  int64_t rows;    // number of block rows, padding included
  int64_t* row;    // [rows] batch row of each block row, -1 for padding
  int8_t* flag;    // [rows] out, a Status
  int64_t* steps;  // [batch] out, for rows that end now
  int8_t* status;  // [batch] out, for rows that end now
  bool wide;       // whether weight, carry and sums are double, else float
  int64_t step, min_steps, max_steps;

  Policy policy;
  const void* signal;  // given: uint8 [rows]; act, ponder_sample: logits [rows]; q_halt: logits [rows,
                       // columns]; fixed_steps: int64 [batch] or null
  DType signal_dtype;  // of the logits
  double threshold;    // act, confidence; of convergence: the tolerance
  int64_t parameter;   // fixed_steps without a signal: the number; ponder_sample: seed; confidence: measure;
                       // of convergence: the patience
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
  // [rows] each row's own step, for blocks of rows that began at different times; null: `step` for all.
  const int64_t* row_step = nullptr;
  int64_t signal_columns = 1;  // q_halt: 2 (halting, going on) or 1
  // Of convergence, for each row of the batch, so that they stay where they are when rows move.
  void* memory = nullptr;    // [batch, memory_row]: the last readout, or what is compared of it
  int64_t memory_row = 0;    // bytes
  int64_t* still = nullptr;  // [batch]: consecutive steps without a change; -1: no step yet
  int64_t classes = 1;       // argmax: the size of the readout's last dimension
};

// Returns the number of active rows. No result depends on the number of threads.
int64_t halt_step_cpu(const HaltStep& args);
// Compacts the active rows: rows from the end of the block take the places of rows that have ended, so that
// as many rows move as have ended. A Move with dst == src works in place; otherwise all `running` rows are
// written to dst. `row` is updated likewise.
void fill_holes_cpu(const int8_t* flag, int64_t running, int64_t* row, const Move* moves, int64_t n_moves);

// `*running` on the device, unless null, is decreased by the number of rows that end.
void halt_step_cuda(const HaltStep& args, int64_t* running, int64_t device, void* stream);

// Makes the index of a compaction in order: `index[j]` is the block row that becomes row j, `place[i]` is the
// new place of row i or -1, and `next` is `row` after the compaction. Returns the number of active rows;
// `index` and `next` have room for one more, `place` for `rows`.
int64_t plan_packing_cpu(const int8_t* flag, const int64_t* row, int64_t rows, int64_t* index, int64_t* place,
                         int64_t* next);

// The index of a compaction into a block of a given size, at least the number of active rows:
//
//   flag  = [0 1 0 -1 0]     row  = [7 2 5 -1 3]     size = 5
//   index = [0 2 4  0 2]     next = [7 5 3 -1 -1]    place = [0 -1 1 -1 2]
//
// The rows from that number on are padding, cyclic copies of the active rows. If no row is active, index is
// -1.
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

// The adjoint of the halting step and its compaction. A row that ended takes its gradient from the results,
// an active row from its place in the new block; padding and rows that are not finite get zero. Every element
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

  // If the kernel decided by ACT, its adjoint follows: g_weight is then not stored, but passed to the logits.
  const void* logits;  // [rows], as in the forward call; null: another policy
  DType logits_dtype;
  const void* accumulated;  // [rows], before the forward call
  ActParams act;
  const void* g_next;   // [packed rows], gradient in the accumulated probability; or null
  const void* g_cost;   // [batch] or null
  void* g_logits;       // [rows] out, in the scalar type
  void* g_accumulated;  // [rows] out
};
void halt_backward_cpu(const HaltBackward& args);
void halt_backward_cuda(const HaltBackward& args, int64_t device, void* stream);

}  // namespace adaptcomp
