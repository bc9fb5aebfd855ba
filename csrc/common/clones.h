#pragma once

// One build serves every x86-64 machine: loops over complete rows are compiled for several instruction sets,
// one of which is chosen when the module is loaded. Contraction is off, so that all give the same bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define AC_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define AC_CLONES
#endif
