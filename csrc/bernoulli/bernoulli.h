// The draws of sampled halting on a block of rows, with their log-probabilities, and plain uniform draws.
#pragma once

#include "bernoulli/rows.h"
#include "common/scalars.h"

namespace adaptcomp {

// The keys of a block's random numbers. A null pointer stands for one number for all rows; of the samples,
// for the row's place in the block.
struct DrawKeys {
  const int64_t* samples;  // [rows]
  const int64_t* seeds;    // [rows]
  const int64_t* steps;    // [rows]
  int64_t seed, step;

  AC_HD uint64_t sample_of(int64_t i) const { return static_cast<uint64_t>(samples ? samples[i] : i); }
  AC_HD uint64_t seed_of(int64_t i) const { return static_cast<uint64_t>(seeds ? seeds[i] : seed); }
  AC_HD int64_t step_of(int64_t i) const { return steps ? steps[i] : step; }
};

struct BernoulliStep {
  int64_t rows;
  DrawKeys keys;
  bool wide;           // scalar type: double, else float
  const void* logits;  // [rows]
  DType logits_dtype;
  void* log_prob;  // [rows] out
  uint8_t* halt;   // [rows] out
};

struct BernoulliStepBackward {
  int64_t rows;
  bool wide;
  const void* logits;
  DType logits_dtype;
  const uint8_t* halt;     // [rows], as the forward call left it
  const void* g_log_prob;  // [rows], in the scalar type
  void* g_logits;          // [rows] out, in the scalar type
};

struct UniformDraws {
  int64_t rows;
  DrawKeys keys;
  float* out;  // [rows], in [0, 1)
};

// Computes row i of a block, in the CPU loop and in the CUDA grid.
template <class S>
AC_HD void bernoulli_step_row(const BernoulliStep& a, int64_t i) {
  const BernoulliRow<S> row = bernoulli_row(load_scalar<S>(a.logits, a.logits_dtype, i), a.keys.seed_of(i),
                                            a.keys.sample_of(i), a.keys.step_of(i));
  static_cast<S*>(a.log_prob)[i] = row.log_prob;
  a.halt[i] = row.halt;
}

template <class S>
AC_HD void bernoulli_step_backward_row(const BernoulliStepBackward& a, int64_t i) {
  static_cast<S*>(a.g_logits)[i] =
      static_cast<const S*>(a.g_log_prob)[i] *
      bernoulli_slope(load_scalar<S>(a.logits, a.logits_dtype, i), a.halt[i] != 0);
}

AC_HD void uniform_row(const UniformDraws& a, int64_t i) {
  a.out[i] = uniform(a.keys.seed_of(i), a.keys.sample_of(i), static_cast<uint64_t>(a.keys.step_of(i)));
}

void bernoulli_step_cpu(const BernoulliStep& args);
void bernoulli_step_backward_cpu(const BernoulliStepBackward& args);
void uniform_cpu(const UniformDraws& args);
void bernoulli_step_cuda(const BernoulliStep& args, int64_t device, void* stream);
void bernoulli_step_backward_cuda(const BernoulliStepBackward& args, int64_t device, void* stream);
void uniform_cuda(const UniformDraws& args, int64_t device, void* stream);

}  // namespace adaptcomp
