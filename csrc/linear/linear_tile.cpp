// The linear layer on tiles of rows; compiled once per instruction set.
//
// The weight is packed once per call, into panels that all threads share; a tile's rows pass over them.
#include "common/slots.h"
#include "linear/linear.h"

namespace adaptcomp {
namespace AC_ISA {
namespace {

template <class C>
void run(const Linear& a) {
  const Panels<C> weight(static_cast<const C*>(a.weight), a.inner, a.columns, a.row, a.column);
  const int64_t width = weight.columns();
  Scratch<C> bias(width);
  zero_row(bias.get(), width);
  if (a.bias) copy_row(bias.get(), static_cast<const C*>(a.bias), a.columns);
  const double work =
      static_cast<double>(a.rows) * static_cast<double>(a.inner) * static_cast<double>(a.columns);
  parallel_team(least(a.rows, threads_for(work)), [&](int64_t t, int64_t of) {
    constexpr int64_t kRows = whole_blocks(kSlots);
    Scratch<C> in(kRows * a.inner), out(kRows * width);
    zero_row(in.get(), kRows * a.inner);
    const int64_t end = a.rows * (t + 1) / of;
    for (int64_t row = a.rows * t / of; row < end; row += kSlots) {
      const int64_t used = least(kSlots, end - row);
      copy_row(in.get(), static_cast<const C*>(a.x) + row * a.inner, used * a.inner);
      product(in.get(), a.inner, used, weight, {bias.get(), 0},
              [&](int64_t r, int64_t j, vec<C> v)
                  __attribute__((always_inline)) { store_vec(out.get() + r * width + j, v); });
      for (int64_t r = 0; r < used; ++r)
        copy_row(static_cast<C*>(a.out) + (row + r) * a.columns, out.get() + r * width, a.columns);
    }
  });
}

}  // namespace

void linear(const Linear& a) { a.wide ? run<double>(a) : run<float>(a); }

}  // namespace AC_ISA
}  // namespace adaptcomp
