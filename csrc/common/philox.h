// Philox 4x32-10 (Salmon et al. 2011): random numbers as a function of (seed, sample, step), so that a
// sample's numbers do not depend on the other rows.
#pragma once

#include "common/dtype.h"

namespace adaptcomp {

AC_HD uint32_t mul_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * static_cast<uint64_t>(b)) >> 32);
}

// Computes four words. The key is `seed`; the counter is `sample`, `step` and `last`.
AC_HD void philox(uint64_t seed, uint64_t sample, uint32_t step, uint32_t last, uint32_t out[4]) {
  uint32_t c0 = static_cast<uint32_t>(sample), c1 = static_cast<uint32_t>(sample >> 32), c2 = step, c3 = last;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint32_t h0 = mul_high(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
    const uint32_t h1 = mul_high(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ k0;
    c1 = l1;
    c2 = h0 ^ c3 ^ k1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

// A uniform number in [0, 1), of 24 bits.
AC_HD float uniform(uint64_t seed, uint64_t sample, uint64_t step) {
  uint32_t word[4];
  philox(seed, sample, static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32), word);
  return static_cast<float>(word[0] >> 8) * (1.0f / 16777216.0f);
}

}  // namespace adaptcomp
