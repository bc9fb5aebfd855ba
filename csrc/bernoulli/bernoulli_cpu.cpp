// Sampled halting on the CPU, a few dozen operations per row.
#include "bernoulli/bernoulli.h"

#include "common/parallel.h"

namespace adaptcomp {
namespace {
constexpr int64_t kRowWork = 256;  // bytes that are copied in about the time of one row's draw
}

void bernoulli_step_cpu(const BernoulliStep& a) {
  parallel_rows(a.rows, kRowWork, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      a.wide ? bernoulli_step_row<double>(a, i) : bernoulli_step_row<float>(a, i);
  });
}

void bernoulli_step_backward_cpu(const BernoulliStepBackward& a) {
  parallel_rows(a.rows, kRowWork, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      a.wide ? bernoulli_step_backward_row<double>(a, i) : bernoulli_step_backward_row<float>(a, i);
  });
}

void uniform_cpu(const UniformDraws& a) {
  parallel_rows(a.rows, kRowWork, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) uniform_row(a, i);
  });
}

}  // namespace adaptcomp
