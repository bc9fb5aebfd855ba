// Convergence on the CPU: one pass over two readouts, two where they are class logits.
#include "convergence/convergence.h"

#include <type_traits>

#include "common/parallel.h"

namespace adaptcomp {

void convergence_step_cpu(const ConvergenceStep& a) {
  constexpr int64_t kClassWork = 64;  // bytes that are copied in about the time of one exponential
  dispatch(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t work = a.criterion == Criterion::kl ? 2 * kClassWork : 2 * static_cast<int64_t>(sizeof(T));
    parallel_rows(a.rows, 16 + a.elements * work, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) convergence_step_row<T>(a, i);
    });
  });
}

}  // namespace adaptcomp
