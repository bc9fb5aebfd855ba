// Memory that calls use again. A large block that goes back to the system comes as fresh pages the next time,
// which cost more than the arithmetic of a small call.
#pragma once

#include <cstdint>

namespace adaptcomp {

// Uninitialised memory, aligned for vectors. Throws std::bad_alloc.
void* take_block(int64_t bytes);
// Throws std::bad_alloc, for code that is compiled for several instruction sets.
[[noreturn]] void throw_out_of_memory();
// Gives a block of this size back.
void give_block(void* block, int64_t bytes);

}  // namespace adaptcomp
