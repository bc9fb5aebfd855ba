// CUDA blocks on the host: every thread of a block is a fiber, and all fibers run on the system thread that
// launches the kernel.
//
// A thread runs until it meets others: at a barrier or at an operation of its warp. In which order threads
// run between two meetings is a setting, because on a device it is arbitrary: a missing barrier then shows as
// a result that depends on the order, or as a value that nobody has written yet. The emulator also checks
// what a device leaves undefined: all threads of a block (or all lanes of a warp) have to arrive, with a full
// mask, at the same call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace emulation {

constexpr unsigned kWarpSize = 32;

// The order in which threads run between two meetings, and blocks in relation to each other.
enum class Order {
  up,        // one block after the other, one warp after the other, each as far as it gets
  down,      // the same from the other end
  together,  // the resident blocks, and in each the warps, advance by one meeting in turn
  random,    // any lane of any warp of any resident block
};

struct Settings {
  Order order = Order::up;
  uint64_t seed = 1;                  // of Order::random
  int multiprocessors = 4;            // what the device says of itself
  int resident_blocks = 2;            // of one kernel on one multiprocessor
  int64_t shared_memory = 227 << 10;  // bytes that a block may have
  int64_t launches = 0;               // kernels started, and memory set, so far
};
Settings& settings();

// A call at which threads meet.
struct Call {
  const char* name;
  const char* file;
  int line;
};

// All lanes of the warp bring `bytes` bytes, at most 16; returns what each has brought.
using LaneValues = const unsigned char (*)[16];
LaneValues meet_warp(const Call& call, unsigned mask, const void* value, size_t bytes);
// All threads of the block bring a number; returns the sum.
int64_t meet_block(const Call& call, int64_t value);
unsigned lane();

// Runs `body` as every thread of every block. What went wrong, empty if nothing did.
std::string launch(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& body);

}  // namespace emulation
