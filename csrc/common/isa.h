// Which build of the files that are compiled once per instruction set runs on this machine.
#pragma once

namespace adaptcomp {

enum class Isa { base, avx2, avx512 };

inline Isa isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const Isa found = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
                               ? Isa::avx512
                           : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::avx2
                                                                                             : Isa::base;
  return found;
#else
  return Isa::base;
#endif
}

}  // namespace adaptcomp

// Declares `call` in every instruction set's namespace, and runs the best.
#if defined(__x86_64__) && defined(__GNUC__)
#define AC_DECLARE_ISA(declaration) \
  namespace isa_base {              \
  declaration;                      \
  }                                 \
  namespace isa_avx2 {              \
  declaration;                      \
  }                                 \
  namespace isa_avx512 {            \
  declaration;                      \
  }
#define AC_CALL_ISA(call)                        \
  do {                                           \
    switch (isa()) {                             \
      case Isa::avx512: isa_avx512::call; break; \
      case Isa::avx2: isa_avx2::call; break;     \
      case Isa::base: isa_base::call; break;     \
    }                                            \
  } while (false)
#else
#define AC_DECLARE_ISA(declaration) \
  namespace isa_base {              \
  declaration;                      \
  }
#define AC_CALL_ISA(call) isa_base::call
#endif
