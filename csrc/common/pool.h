// Memory that calls use again. A large block that goes back to the system comes as fresh pages the next time,
// which cost more than the arithmetic of a small call.
#pragma once

#include <cstdint>

namespace adaptcomp {

// Uninitialised memory, aligned for vectors. Throws std::bad_alloc.
void* take_block(int64_t bytes);
// Gives a block of this size back.
void give_block(void* block, int64_t bytes);

}  // namespace adaptcomp
