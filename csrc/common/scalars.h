// Reads a row's scalar whose dtype is only known at run time.
#pragma once

#include "common/dtype.h"

namespace adaptcomp {

template <class S>
AC_HD S load_scalar(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32: return S(load(static_cast<const float*>(data)[i]));
    case DType::f64: return S(load(static_cast<const double*>(data)[i]));
    case DType::bf16: return S(load(static_cast<const bfloat16*>(data)[i]));
    case DType::f16: return S(load(static_cast<const float16*>(data)[i]));
    case DType::opaque: break;
  }
  return S(0);
}

AC_HD bool is_logit_scalar(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f32: return is_logit(static_cast<const float*>(data)[i]);
    case DType::f64: return is_logit(static_cast<const double*>(data)[i]);
    case DType::bf16: return is_logit(static_cast<const bfloat16*>(data)[i]);
    case DType::f16: return is_logit(static_cast<const float16*>(data)[i]);
    case DType::opaque: break;
  }
  return true;
}

// data[i], or zero if `data` is null.
template <class S>
AC_HD S load_or_zero(const void* data, int64_t i) {
  return data ? static_cast<const S*>(data)[i] : S(0);
}

}  // namespace adaptcomp
