// Chooses the builds of the tiles that this machine runs, and holds the tape's memory.
#include <cstdlib>
#include <new>
#include <stdexcept>

#include "common/isa.h"
#include "recurrence/recurrence.h"

namespace adaptcomp {

AC_DECLARE_ISA(void recurrence(const Recurrence&))
AC_DECLARE_ISA(void recurrence_backward(const RecurrenceBackward&))

void recurrence_cpu(const Recurrence& a) { AC_CALL_ISA(recurrence(a)); }

void recurrence_backward_cpu(const RecurrenceBackward& a) {
  if (a.run.tape->built != isa())
    throw std::runtime_error("the instruction set in use has changed since the forward pass");
  AC_CALL_ISA(recurrence_backward(a));
}

namespace {
constexpr int64_t kAlignment = 64;
}

Tape::Tape(int64_t rows)
    : built(isa()),
      last_(static_cast<const Record**>(
          std::calloc(static_cast<size_t>(rows > 0 ? rows : 1), sizeof(Record*)))),
      bytes_(rows * static_cast<int64_t>(sizeof(Record*))) {
  if (!last_) throw std::bad_alloc();
}

Tape::~Tape() {
  while (chunks_) {
    Chunk* next = chunks_->next;
    std::free(chunks_);
    chunks_ = next;
  }
  std::free(last_);
}

void* Tape::take(int64_t bytes) {
  bytes = (bytes + 2 * kAlignment - 1) / kAlignment * kAlignment;
  auto* chunk = static_cast<Chunk*>(std::aligned_alloc(kAlignment, static_cast<size_t>(bytes)));
  if (!chunk) throw std::bad_alloc();
  chunk->next = __atomic_load_n(&chunks_, __ATOMIC_RELAXED);
  while (
      !__atomic_compare_exchange_n(&chunks_, &chunk->next, chunk, true, __ATOMIC_RELEASE, __ATOMIC_RELAXED)) {
  }
  __atomic_fetch_add(&bytes_, bytes, __ATOMIC_RELAXED);
  return reinterpret_cast<char*>(chunk) + kAlignment;
}

}  // namespace adaptcomp
