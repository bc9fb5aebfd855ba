// Stops a long computation on the CPU.
#pragma once

namespace adaptcomp {

// Lets the caller stop a long computation on the CPU. csrc/bindings/signals.h implements it.
struct Interrupt {
  bool (*asked)(void* self);  // returns whether to stop; called on the caller's thread only
  void* self;
  int stopped;  // read and written atomically by every thread
};

}  // namespace adaptcomp
