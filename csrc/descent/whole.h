// The arguments of fused descents, which run all steps in one call, and of their gradients, for any energy.
#pragma once

#include "common/interrupt.h"
#include "common/scratch.h"
#include "descent/rule.h"

namespace adaptcomp {

// The inputs of a descent. Rows are [rows, dim]; all numbers are double if `wide`, else float. A setting that
// is the same for every row has stride 0.
struct DescentStart {
  int64_t rows, dim;
  bool wide;
  DescentRule rule;
  const void* y0;
  const void* step_size;
  int64_t step_size_stride;
  const void* noise;  // sigma; read if rule.noisy
  int64_t noise_stride;
  const int64_t* sample_ids;  // [rows]; null: the row's place
  Interrupt* interrupt;       // on the host; null: runs to the end
};

struct Descent : DescentStart {
  void* y;         // out [rows, dim]
  void* energy;    // out [rows]
  int64_t* steps;  // out [rows]
  int8_t* status;  // out [rows]
  // For the trace and the gradient; each may be null.
  void* path;      // out [rows, max_steps, dim]: y after each step of the row
  void* scale;     // out [rows, max_steps]: backtracking's factor of the step size; 0 for a rejected step
  void* velocity;  // out [rows, max_steps, dim]: m of every step; with momentum only
};

struct DescentBackward : DescentStart {
  const int64_t* steps;  // [rows]
  const void* path;      // [rows, max_steps, dim]
  const void* scale;     // [rows, max_steps]
  const void* velocity;  // [rows, max_steps, dim]; read with momentum only
  // Number of a row's last steps through which the gradient passes; it reaches y0 if the row took fewer. 0:
  // it passes through each step by itself.
  int64_t last_steps;
  const void* g_y;     // [rows, dim]; null: zero
  const void* g_path;  // [rows, max_steps, dim]; null: zero
  void* g_y0;          // out [rows, dim]
  void* g_step_size;   // out [rows]
  void* g_noise;       // out [rows]; null: not needed
};

}  // namespace adaptcomp
