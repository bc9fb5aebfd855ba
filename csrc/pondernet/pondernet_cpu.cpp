// PonderNet on the CPU, a few dozen operations per row.
#include "pondernet/pondernet.h"

#include "common/parallel.h"

namespace adaptcomp {
namespace {
constexpr int64_t kRowWork = 256;  // bytes that are copied in about the time of one row's exponentials
}

void pondernet_step_cpu(const PonderNetStep& a) {
  parallel_rows(a.rows, kRowWork, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      a.wide ? pondernet_step_row<double>(a, i) : pondernet_step_row<float>(a, i);
  });
}

void pondernet_step_backward_cpu(const PonderNetStepBackward& a) {
  parallel_rows(a.rows, kRowWork, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      a.wide ? pondernet_step_backward_row<double>(a, i) : pondernet_step_backward_row<float>(a, i);
  });
}

}  // namespace adaptcomp
