// What the kernels that run all steps of a descent share, whatever the energy: arguments forward and
// backward.
#pragma once

#include "descent/rule.h"

namespace adaptcomp {

// Lets the caller stop a long computation on the CPU. What it is asked with stands in
// csrc/bindings/energies.h.
struct Interrupt {
  bool (*asked)(void* self);  // on the thread of the caller alone: whether to stop
  void* self;
  int stopped;  // read and written atomically by every thread
};

// What a descent starts from. Rows [rows, dim], all in one of two types: float, or double where `wide`. A
// setting that is the same for every row has stride 0.
struct DescentStart {
  int64_t rows, dim;
  bool wide;
  DescentRule rule;
  const void* y0;
  const void* step_size;
  int64_t step_size_stride;
  const void* noise;  // sigma; read where rule.noisy
  int64_t noise_stride;
  const int64_t* sample_ids;  // [rows], or null: the row's position
  Interrupt* interrupt;       // of the host; null: runs to the end
};

struct Descent : DescentStart {
  void* y;         // out [rows, dim]
  void* energy;    // out [rows]
  int64_t* steps;  // out [rows]
  int8_t* status;  // out [rows]
  // What the trace and the gradient are made of; each may be null.
  void* path;      // out [rows, max_steps, dim]: y after every step the row took
  void* scale;     // out [rows, max_steps]: what backtracking had left of the step size, 0 where the step was
                   // rejected
  void* velocity;  // out [rows, max_steps, dim]: m of every step; with momentum only
};

struct DescentBackward : DescentStart {
  const int64_t* steps;  // [rows]
  const void* path;      // [rows, max_steps, dim]
  const void* scale;     // [rows, max_steps]
  const void* velocity;  // [rows, max_steps, dim]; read where there is momentum
  // How many of a row's last steps the gradient passes through; to y0 where the row took fewer. 0: through
  // each step by itself.
  int64_t last_steps;
  const void* g_y;     // [rows, dim]; null: zero
  const void* g_path;  // [rows, max_steps, dim]; null: zero
  void* g_y0;          // out [rows, dim]
  void* g_step_size;   // out [rows]
  void* g_noise;       // out [rows]; null: not wanted
};

// Device memory of a call on CUDA, aligned to 16 bytes and uninitialised: as many bytes as the energy's
// ..._scratch_cuda says.
struct DescentScratch {
  void* data;
  int64_t bytes;
};

}  // namespace adaptcomp
