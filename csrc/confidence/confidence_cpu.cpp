// Confidence on the CPU, with one exponential per class.
#include "confidence/confidence.h"

#include <type_traits>

#include "common/parallel.h"

namespace adaptcomp {

void confidence_cpu(const Confidence& a) {
  constexpr int64_t kClassWork = 64;  // bytes that are copied in about the time of one exponential
  dispatch(a.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_rows(a.rows, a.classes * kClassWork, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) confidence_block_row<T>(a, i);
    });
  });
}

}  // namespace adaptcomp
