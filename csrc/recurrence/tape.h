// The states of all rows after each of their steps, kept from the forward pass for the backward pass.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace adaptcomp {

// A state of a row. The first one of a row, which has none before it, is the initial state.
struct Record {
  const Record* before;
  const void* state;  // the tensors of the state one after the other, each in whole vectors
  double weight;      // of the readout in the output
  int64_t at;         // place in the trace
};

// Threads write to memory of their own, which they take in chunks. The functions are defined in
// recurrence_cpu.cpp: an inline one would be merged over the builds for several instruction sets.
class Tape {
 public:
  explicit Tape(int64_t rows);
  ~Tape();
  Tape(const Tape&) = delete;
  Tape& operator=(const Tape&) = delete;
  // Memory that lives as long as the tape, aligned for vectors.
  void* take(int64_t bytes);
  int64_t bytes() const { return bytes_; }
  const Record** last() const { return last_; }  // [rows]

  const Isa built;  // the build that wrote the states

 private:
  struct Chunk {
    Chunk* next;
    int64_t bytes;
  };
  static constexpr int64_t kHeader = 64;  // of a chunk; what follows is aligned for vectors
  int64_t rows_, bytes_;
  const Record** last_;
  Chunk* chunks_ = nullptr;
};

}  // namespace adaptcomp
