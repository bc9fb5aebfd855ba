// Chooses the builds of the tiles that this machine runs, and holds the tape's memory.
#include <cstring>
#include <stdexcept>

#include "common/isa.h"
#include "common/pool.h"
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
int64_t head_bytes(int64_t rows) { return rows * static_cast<int64_t>(sizeof(Record*)); }
}  // namespace

Tape::Tape(int64_t rows) : built(isa()), rows_(rows), bytes_(head_bytes(rows)) {
  last_ = static_cast<const Record**>(take_block(bytes_));
  std::memset(last_, 0, static_cast<size_t>(bytes_));
}

Tape::~Tape() {
  while (chunks_) {
    const Chunk chunk = *chunks_;
    give_block(chunks_, chunk.bytes);
    chunks_ = chunk.next;
  }
  give_block(last_, head_bytes(rows_));
}

void* Tape::take(int64_t bytes) {
  bytes += kHeader;
  auto* chunk = static_cast<Chunk*>(take_block(bytes));
  *chunk = {__atomic_load_n(&chunks_, __ATOMIC_RELAXED), bytes};
  while (
      !__atomic_compare_exchange_n(&chunks_, &chunk->next, chunk, true, __ATOMIC_RELEASE, __ATOMIC_RELAXED)) {
  }
  __atomic_fetch_add(&bytes_, bytes, __ATOMIC_RELAXED);
  return reinterpret_cast<char*>(chunk) + kHeader;
}

}  // namespace adaptcomp
