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

template <class C>
void fill_trace(const RecurrenceTrace& a) {
  int64_t most = 0, end = 0;
  for (int64_t r = 0; r < a.rows; ++r) {
    most = a.steps[r] > most ? a.steps[r] : most;
    end += a.steps[r];
  }
  // The tape leads from each row's last state to its first: the trace is filled from its end.
  const int64_t bytes = a.rows * static_cast<int64_t>(sizeof(Record*));
  auto** now = static_cast<const Record**>(take_block(bytes));
  std::memcpy(now, a.tape->last(), static_cast<size_t>(bytes));
  for (int64_t n = most; n > 0; --n) {
    int64_t place = end;
    for (int64_t r = 0; r < a.rows; ++r) place -= a.steps[r] >= n;
    end = place;
    for (int64_t r = 0; r < a.rows; ++r) {
      if (a.steps[r] < n) continue;
      const Record* record = now[r];
      now[r] = record->before;
      const_cast<Record*>(record)->at = place;
      std::memcpy(static_cast<C*>(a.states) + place * a.dim, record->state,
                  static_cast<size_t>(a.dim) * sizeof(C));
      static_cast<C*>(a.weights)[place] = static_cast<C>(record->weight);
      a.row[place] = r;
      a.step[place++] = n;
    }
  }
  give_block(now, bytes);
}

int64_t head_bytes(int64_t rows) { return rows * static_cast<int64_t>(sizeof(Record*)); }
}  // namespace

void recurrence_trace_cpu(const RecurrenceTrace& a) { a.wide ? fill_trace<double>(a) : fill_trace<float>(a); }

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
