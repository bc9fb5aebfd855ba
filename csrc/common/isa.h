// The choice among the builds of files that are compiled once per instruction set.
#pragma once

namespace adaptcomp {

enum class Isa { base, avx2, avx512 };

// The widest instruction set of this machine.
inline Isa best_isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return avx512 && avx2 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::base;
#else
  return Isa::base;
#endif
}

// The instruction set in use. The module sets it while it is loaded, and tests do, to run the other builds.
inline Isa& isa() {
  static Isa in_use = best_isa();
  return in_use;
}

}  // namespace adaptcomp

// Macros that declare a function in the namespace of every instruction set, and call the one in use.
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
