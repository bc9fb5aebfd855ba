// The confidence of a block of class logits. It has no gradient.
#pragma once

#include "confidence/rows.h"

namespace adaptcomp {

struct Confidence {
  int64_t rows, classes;
  Measure measure;
  const void* logits;  // [rows, classes]
  DType dtype;
  void* confidence;  // [rows] out, in the compute type of dtype
};

template <class T>
AC_HD void confidence_block_row(const Confidence& a, int64_t i) {
  static_cast<compute_t<T>*>(a.confidence)[i] =
      confidence_row(static_cast<const T*>(a.logits) + i * a.classes, a.classes, a.measure);
}

void confidence_cpu(const Confidence& args);
void confidence_cuda(const Confidence& args, int64_t device, void* stream);

}  // namespace adaptcomp
