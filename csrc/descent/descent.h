// One step of a descent on an energy that PyTorch evaluates: everything between two evaluations, in one call.
//
// The energies and gradients of a block of points have just been computed. For every row: judge its point,
// end it or go on, and make the next point (descent/rows.h). All that a row remembers is kept by its place in
// the batch, and the results are part of it. So nothing but points moves when rows leave the block, and a row
// that has left, or stays behind as padding, is not touched again.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "descent/rule.h"

namespace adaptcomp {

// One number for each row of the batch, in the compute type, or one for all: data[0], or `value` without
// data.
struct PerRow {
  const void* data;
  bool each;
  double value;
};

struct DescentStep {
  DescentRule rule;
  int64_t rows;       // of the block, padding included
  int64_t elements;   // of a row
  int64_t step;       // of the points; 0: the starting points
  DType dtype;        // of points, gradients, y
  int64_t* row;       // [rows] the batch row of each block row, -1 for padding
  const void* point;  // [rows, elements]
  const void* value;  // [rows] their energies
  DType value_dtype;
  const void* gradient;  // [rows, elements]; null after the last step if the rule is on the energy
  void* next;            // [rows, elements] out, the next points; null after the last step
  uint8_t* accepted;     // [rows] out, whether the point was taken; or null
  int8_t* flag;  // [rows] out, CUDA: 0 where the row goes on, the status with which it ends, -1 for padding

  // By place in the batch.
  void* y;         // [batch, elements] the row's point
  void* energy;    // [batch] its energy, in the compute type
  void* kept;      // [batch, elements] its gradient; null where every finite point is accepted
  void* velocity;  // [batch, elements] in the compute type; null without momentum
  uint8_t*
      moving;   // [batch] whether a velocity other than zero takes part in the step; null without momentum
  void* scale;  // [batch] what backtracking has left of the step size, in the compute type; null without
  PerRow step_size, sigma;
  const int64_t* sample;  // [batch] the key of each row's noise; null: its place in the batch
  int64_t* steps;         // [batch] out, for rows that end now
  int8_t* status;         // [batch] out, for rows that end now
};

struct DescentCounts {
  int64_t running;   // rows that go on
  int64_t accepted;  // points that were taken
  int64_t broken;    // rows that were not finite
};

// The next points are packed, in the order of the block: `next` has them first, index[j] is the block row of
// the j-th, and `row` follows. `index` has room for `rows`. No result depends on the number of threads.
DescentCounts descent_step_cpu(const DescentStep& args, int64_t* index);
// `next` has each point in its own place: where a row ends, its last one. `row` becomes -1 there, and
// `*running` on the device is decreased by the rows that end.
void descent_step_cuda(const DescentStep& args, int64_t* running, int64_t device, void* stream);

// The next point alone: velocity' = momentum velocity + clip(gradient), next = clamp(y + noise - step_size
// velocity').
struct DescentUpdate {
  DescentRule rule;  // momentum, clip, low, high
  int64_t rows, elements;
  DType dtype;    // of y, gradient, next
  const void* y;  // [rows, elements], as the others
  const void* gradient;
  const void* velocity;  // in the compute type; null: zero
  const void* noise;     // in the compute type; null: zero
  PerRow step_size;      // [rows]
  void* next;            // out
  void* next_velocity;   // out, in the compute type; may be null
};
void descent_update_cpu(const DescentUpdate& args);
void descent_update_cuda(const DescentUpdate& args, int64_t device, void* stream);

// Standard normal noise of a step.
struct DescentNormals {
  DescentRule rule;  // seed
  int64_t rows, elements, step;
  bool wide;              // out: double, else float
  const int64_t* sample;  // [rows]
  void* out;              // [rows, elements]
};
void descent_normals_cpu(const DescentNormals& args);
void descent_normals_cuda(const DescentNormals& args, int64_t device, void* stream);

}  // namespace adaptcomp
