// One step of a descent on an energy that PyTorch evaluates: one call does everything between two
// evaluations.
//
// Given the energies and gradients of a block of points, it judges each row's point, ends the row or not, and
// computes the next point (descent/rows.h). The state of a row, which includes its results, is stored at its
// place in the batch. So only points move when the block is compacted, and a row that has left the block, or
// stays as padding, is not written again.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "descent/rule.h"

namespace adaptcomp {

// A number for each row of the batch, in the compute type, or one number for all rows: data[0], or `value` if
// `data` is null.
struct PerRow {
  const void* data;
  bool each;
  double value;
};

struct DescentStep {
  DescentRule rule;
  int64_t rows;       // number of block rows, padding included
  int64_t elements;   // number of elements of a row
  int64_t step;       // number of the step that made the points; 0: the starting points
  DType dtype;        // dtype of points, gradients, y
  int64_t* row;       // [rows] the batch row of each block row, -1 for padding
  const void* point;  // [rows, elements]
  const void* value;  // [rows] their energies
  DType value_dtype;
  const void* gradient;  // [rows, elements]; null after the last step if the rule is on the energy
  void* next;            // [rows, elements] out, the next points; null after the last step
  uint8_t* accepted;     // [rows] out, whether the point was accepted; or null
  int8_t* flag;  // [rows] out, CUDA: 0 where the row goes on, the status with which it ends, -1 for padding

  // The state, at the row's place in the batch.
  void* y;          // [batch, elements] the row's point
  void* energy;     // [batch] its energy, in the compute type
  void* kept;       // [batch, elements] its gradient; null where every finite point is accepted
  void* velocity;   // [batch, elements] in the compute type; null without momentum
  uint8_t* moving;  // [batch] whether the row's velocity is not zero; null without momentum
  void* scale;      // [batch] what backtracking has left of the step size, in the compute type; null without
  PerRow step_size, sigma;
  const int64_t* sample;  // [batch] the sample id of each row's noise; null: its place in the batch
  int64_t* steps;         // [batch] out, for rows that end now
  int8_t* status;         // [batch] out, for rows that end now
};

struct DescentCounts {
  int64_t running;   // rows that go on
  int64_t accepted;  // points that were accepted
  int64_t broken;    // rows that were not finite
};

// The next points of the active rows are compacted to the front of `next`, in the order of the block, and so
// is `row`; index[j] is the block row of the j-th. `index` has room for `rows`. No result depends on the
// number of threads.
DescentCounts descent_step_cpu(const DescentStep& args, int64_t* index);
// `next` has each row's next point at the row's own place, or its last point if it ends. `row` becomes -1
// there, and `*running` on the device is decreased by the number of rows that end.
void descent_step_cuda(const DescentStep& args, int64_t* running, int64_t device, void* stream);

// The next point without a judgement: velocity' = momentum velocity + clip(gradient),
// next = clamp(y + noise - step_size velocity').
struct DescentUpdate {
  DescentRule rule;  // momentum, clip, low, high
  int64_t rows, elements;
  DType dtype;    // dtype of y, gradient, next
  const void* y;  // [rows, elements], like the others
  const void* gradient;
  const void* velocity;  // in the compute type; null: zero
  const void* noise;     // in the compute type; null: zero
  PerRow step_size;      // [rows]
  void* next;            // out
  void* next_velocity;   // out, in the compute type; may be null
};
void descent_update_cpu(const DescentUpdate& args);
void descent_update_cuda(const DescentUpdate& args, int64_t device, void* stream);

// The standard normal noise of a step.
struct DescentNormals {
  DescentRule rule;  // seed
  int64_t rows, elements, step;
  bool wide;              // type of out: double, else float
  const int64_t* sample;  // [rows]
  void* out;              // [rows, elements]
};
void descent_normals_cpu(const DescentNormals& args);
void descent_normals_cuda(const DescentNormals& args, int64_t device, void* stream);

}  // namespace adaptcomp
