// ACT on the CPU, a few dozen operations per row.
#include "act/act.h"

#include "common/parallel.h"

namespace adaptcomp {
namespace {
constexpr int64_t kRowWork = 256;  // bytes that are copied in about the time of one row's exponentials
}

void act_step_cpu(const ActStep& a) {
  parallel_rows(a.rows, kRowWork, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) a.wide ? act_step_row<double>(a, i) : act_step_row<float>(a, i);
  });
}

void act_step_backward_cpu(const ActStepBackward& a) {
  parallel_rows(a.rows, kRowWork, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      a.wide ? act_step_backward_row<double>(a, i) : act_step_backward_row<float>(a, i);
  });
}

}  // namespace adaptcomp
