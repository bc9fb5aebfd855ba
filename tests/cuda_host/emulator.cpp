// See include/emulator.h. Here: fibers, the meetings of threads, and the order in which they run.
#include "emulator.h"

#include <cuda_runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) || !defined(__linux__)
#error "the switch between fibers is written for x86-64 Linux"
#endif

// The dynamic shared memory of the block that runs: what `extern __shared__` in a kernel names.
namespace adaptcomp {
constexpr size_t kMostShared = 256 << 10;
alignas(1024) thread_local unsigned char shared_memory[kMostShared];
}  // namespace adaptcomp

dim3 threadIdx, blockIdx, gridDim;

namespace emulation {

// The variables that kernels declare __shared__, between two markers: shared_begin.cpp and shared_end.cpp are
// linked before and behind the CUDA files.
extern thread_local unsigned char shared_begin[64];
extern thread_local unsigned char shared_end[64];

Settings& settings() {
  static Settings all;
  return all;
}

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 512 << 10;  // its frames are larger
#else
constexpr size_t kStack = 64 << 10;
#endif
constexpr int kPoison = 0xff;  // a NaN in every floating-point type, -1 as an integer
constexpr size_t kWatched =
    4 << 10;  // bytes behind a block's dynamic shared memory that have to stay poisoned

// --- the switch: saves what a function has to preserve on the stack that is left, and takes it from the one
// that goes on.

extern "C" void emulation_switch(void** left, void* next);
extern "C" void emulation_start();
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
.globl emulation_start
.hidden emulation_start
.type emulation_start, @function
emulation_start:
  xorl %ebp, %ebp
  call emulation_enter
  hlt
.size emulation_start, .-emulation_start
)");

// Stacks are kept for the next block: to map one costs more than to run most threads.
class Stacks {
 public:
  char* take() {
    if (free_.empty()) {
      void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (stack == MAP_FAILED) throw std::runtime_error("adaptcomp_ext: no memory for the emulator's stacks");
      mprotect(
          stack, 4096,
          PROT_NONE);  // below the last frame: a thread that recurses without end dies by its own address
      free_.push_back(static_cast<char*>(stack));
    }
    char* stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void give(char* stack) { free_.push_back(stack); }

 private:
  std::vector<char*> free_;  // never unmapped: the process ends before
};
Stacks& stacks() {
  static auto* all = new Stacks;
  return *all;
}

// --- threads, warps and blocks

enum class Wait : unsigned char { ready, warp, block, left };

struct Thread {
  Wait wait = Wait::ready;
  unsigned index = 0;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Call call{};                            // where it waits
  [[maybe_unused]] void* fake = nullptr;  // AddressSanitizer's
};

// A meeting under way. Values alternate between two buffers, so that a thread which hurries on to the next
// meeting does not overwrite what others have still to read: the next but one cannot begin before they have.
struct Warp {
  alignas(16) unsigned char value[2][kWarpSize][16];
  unsigned arrived = 0, number = 0;
  Call call{};
};

class Block {
 public:
  Block(unsigned index, unsigned threads, size_t shared_bytes, const std::function<void()>& body,
        uint64_t seed)
      : index_(index),
        shared_bytes_(shared_bytes),
        body_(body),
        random_(seed),
        threads_(threads),
        warps_(threads / kWarpSize) {
    for (unsigned i = 0; i < threads; ++i) {
      Thread& t = threads_[i];
      t.index = i;
      t.stack = stacks().take();
#if defined(__SANITIZE_ADDRESS__)
      ASAN_UNPOISON_MEMORY_REGION(
          t.stack + 4096, kStack - 4096);  // the last block may not have come to the end of its frames
#endif
      auto* top = reinterpret_cast<void**>(t.stack + kStack - 64);
      *--top = nullptr;
      *--top = nullptr;
      *--top = reinterpret_cast<void*>(&emulation_start);
      for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
      t.stack_pointer = top;
    }
    lanes_.resize(kWarpSize);
    order_.resize(warps_.size());
    std::iota(lanes_.begin(), lanes_.end(), 0u);
    std::iota(order_.begin(), order_.end(), 0u);
    if (settings().order == Order::down) {
      std::reverse(lanes_.begin(), lanes_.end());
      std::reverse(order_.begin(), order_.end());
    }
  }
  ~Block() {
    for (Thread& t : threads_) stacks().give(t.stack);
  }

  // Advances each warp as far as it gets, or by about one meeting. False when there is nothing left to run,
  // or something is wrong.
  bool advance() {
    const bool far = settings().order == Order::up || settings().order == Order::down;
    bool moved = false;
    if (settings().order == Order::random) std::shuffle(order_.begin(), order_.end(), random_);
    for (const unsigned w : order_) {
      if (settings().order == Order::random && random_() % 2 != 0) continue;
      while (advance_warp(w)) {
        moved = true;
        if (!wrong.empty()) return false;
        if (!far) break;
      }
      if (!wrong.empty()) return false;
    }
    if (moved) return true;
    bool ready = false;
    const Thread* waits = nullptr;
    for (const Thread& t : threads_) {
      ready |= t.wait == Wait::ready;
      if ((t.wait == Wait::warp || t.wait == Wait::block) && !waits) waits = &t;
    }
    if (ready) return true;  // at random, nobody may have had a turn
    if (waits) stuck(*waits);
    return false;
  }

  // Shared memory belongs to the block that runs: the others' is kept beside it.
  void poison() {
    std::memset(shared_begin, kPoison, statics());
    std::memset(adaptcomp::shared_memory, kPoison,
                std::min(shared_bytes_ + kWatched, adaptcomp::kMostShared));
  }
  void install() {
    std::memcpy(shared_begin, statics_.data(), statics_.size());
    std::memcpy(adaptcomp::shared_memory, dynamic_.data(), dynamic_.size());
  }
  void remove() {
    statics_.assign(shared_begin, shared_begin + statics());
    dynamic_.assign(adaptcomp::shared_memory,
                    adaptcomp::shared_memory + std::min(shared_bytes_ + kWatched, adaptcomp::kMostShared));
  }
  // After the last thread: whether all that lies behind the block's shared memory is as it was.
  void check_end() {
    if (!wrong.empty()) return;
    const size_t end = std::min(shared_bytes_ + kWatched, adaptcomp::kMostShared);
    for (size_t i = shared_bytes_; i < end; ++i) {
      if (adaptcomp::shared_memory[i] == kPoison) continue;
      wrong = "block " + std::to_string(index_) + " has written past the end of its dynamic shared memory";
      return;
    }
  }

  LaneValues meet_warp(const Call& call, unsigned mask, const void* value, size_t bytes);
  int64_t meet_block(const Call& call, int64_t value);
  void enter() { body_(); }
  void leave(Thread& t) {
    t.wait = Wait::left;
    to_scheduler(t, true);
  }

  std::string wrong;  // the first thing that went wrong

 private:
  static size_t statics() { return static_cast<size_t>(shared_end - shared_begin); }

  bool advance_warp(unsigned w) {
    bool moved = false;
    if (settings().order == Order::random) std::shuffle(lanes_.begin(), lanes_.end(), random_);
    for (const unsigned l : lanes_) {
      Thread& t = threads_[w * kWarpSize + l];
      if (t.wait != Wait::ready) continue;
      to_thread(t);
      moved = true;
      if (!wrong.empty()) return true;
    }
    return moved;
  }
  void to_thread(Thread& t);
  void to_scheduler(Thread& t, bool last);

  static std::string name(const Call& call) {
    const std::string file = call.file;
    const size_t folder = file.rfind('/', file.rfind('/') - 1);
    return std::string(call.name) + " (" + (folder == std::string::npos ? file : file.substr(folder + 1)) +
           ":" + std::to_string(call.line) + ")";
  }
  std::string of(const Thread& t) const {
    return "thread " + std::to_string(t.index) + " of block " + std::to_string(index_);
  }
  void fail(const std::string& what) {
    if (wrong.empty()) wrong = what;
  }
  // Somebody waits, and nobody can go on: says for whom.
  void stuck(const Thread& waits) {
    const std::string what = of(waits) + " waits at " + name(waits.call) + " for ever: thread ";
    const Thread* left = nullptr;
    for (const Thread& t : threads_) {
      if (waits.wait == Wait::warp && t.index / kWarpSize != waits.index / kWarpSize) continue;
      if (t.wait == Wait::left) {
        left = &t;
      } else if (t.wait != waits.wait || t.call.line != waits.call.line) {
        fail(what + std::to_string(t.index) + " waits at " + name(t.call));
        return;
      }
    }
    fail(what + (left ? std::to_string(left->index) + " has left the kernel" : "? never came"));
  }
  // Whether a call is the one at which the others meet; the first to come decides.
  bool joins(const Call& call, Call& meeting, unsigned arrived) {
    if (arrived == 0) meeting = call;
    if (call.line == meeting.line && call.name == meeting.name && std::strcmp(call.file, meeting.file) == 0)
      return true;
    fail(of(*running_) + " arrives at " + name(call) + " where others wait at " + name(meeting));
    return false;
  }
  void wait(Wait how, const Call& call) {
    Thread& t = *running_;
    t.wait = how;
    t.call = call;
    to_scheduler(t, false);
  }

  unsigned index_;
  size_t shared_bytes_;
  const std::function<void()>& body_;
  std::mt19937_64 random_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<unsigned> lanes_, order_;  // in which they take their turns
  unsigned arrived_ = 0, number_ = 0;    // of the meeting of the whole block
  Call call_{};
  int64_t sum_[2] = {0, 0};
  Thread* running_ = nullptr;
  std::vector<unsigned char> statics_, dynamic_;

  void* scheduler_ = nullptr;
  [[maybe_unused]] void* scheduler_fake_ = nullptr;
  [[maybe_unused]] const void* scheduler_bottom_ = nullptr;
  [[maybe_unused]] size_t scheduler_size_ = 0;

  friend void enter_fiber();
  friend unsigned lane_of_running();
};

Block* running = nullptr;  // the block whose thread runs; one at a time

void Block::to_thread(Thread& t) {
  running = this;
  running_ = &t;
  threadIdx = dim3(t.index, 0, 0);
  blockIdx = dim3(index_, 0, 0);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_, t.stack, kStack);
#endif
  emulation_switch(&scheduler_, t.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_, nullptr, nullptr);
#endif
}

void Block::to_scheduler(Thread& t, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &t.fake, scheduler_bottom_, scheduler_size_);
#endif
  emulation_switch(&t.stack_pointer, scheduler_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(t.fake, nullptr, nullptr);
#endif
}

void enter_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &running->scheduler_bottom_, &running->scheduler_size_);
#endif
  running->enter();
  running->leave(*running->running_);
  std::abort();  // nobody goes on with a thread that has left
}

unsigned lane_of_running() { return running->running_->index % kWarpSize; }

extern "C" __attribute__((used)) void emulation_enter() { enter_fiber(); }

LaneValues Block::meet_warp(const Call& call, unsigned mask, const void* value, size_t bytes) {
  Thread& t = *running_;
  Warp& warp = warps_[t.index / kWarpSize];
  if (mask != ~0u) fail(of(t) + " calls " + name(call) + " with a mask that is not full");
  if (!wrong.empty() || !joins(call, warp.call, warp.arrived))
    to_scheduler(t, false);  // for ever: the block is given up
  const unsigned buffer = warp.number % 2;
  if (bytes > 0) std::memcpy(warp.value[buffer][t.index % kWarpSize], value, bytes);
  if (++warp.arrived < kWarpSize) {
    wait(Wait::warp, call);
  } else {
    warp.arrived = 0;
    ++warp.number;
    Thread* first = &threads_[t.index / kWarpSize * kWarpSize];
    for (unsigned l = 0; l < kWarpSize; ++l)
      if (first[l].wait == Wait::warp) first[l].wait = Wait::ready;
  }
  return warp.value[buffer];
}

int64_t Block::meet_block(const Call& call, int64_t value) {
  if (!joins(call, call_, arrived_)) to_scheduler(*running_, false);
  const unsigned buffer = number_ % 2;
  if (arrived_ == 0) sum_[buffer] = 0;
  sum_[buffer] += value;
  if (++arrived_ < threads_.size()) {
    wait(Wait::block, call);
  } else {
    arrived_ = 0;
    ++number_;
    for (Thread& t : threads_)
      if (t.wait == Wait::block) t.wait = Wait::ready;
  }
  return sum_[buffer];
}

// All blocks of a launch, as many at a time as are resident. Blocks that advance in turn carry their shared
// memory along.
std::string run_blocks(unsigned blocks, unsigned threads, size_t shared_bytes,
                       const std::function<void()>& body) {
  const Settings& s = settings();
  std::mt19937_64 random(s.seed);
  const bool in_turn = s.order == Order::together || s.order == Order::random;
  const auto resident = static_cast<size_t>(in_turn ? std::max(1, s.multiprocessors * s.resident_blocks) : 1);
  std::vector<std::unique_ptr<Block>> live;
  unsigned started = 0;
  size_t turn = 0;
  Block* installed = nullptr;
  while (started < blocks || !live.empty()) {
    while (live.size() < resident && started < blocks) {
      if (installed) installed->remove();
      const unsigned index = s.order == Order::down ? blocks - 1 - started : started;
      live.push_back(std::make_unique<Block>(index, threads, shared_bytes, body, s.seed * 1000003 + index));
      installed = live.back().get();
      installed->poison();
      ++started;
    }
    turn = s.order == Order::random ? random() % live.size() : (turn + 1) % live.size();
    Block* block = live[turn].get();
    if (block != installed) {
      installed->remove();
      block->install();
      installed = block;
    }
    if (block->advance()) continue;
    block->check_end();
    if (!block->wrong.empty()) return block->wrong;
    live.erase(live.begin() + static_cast<std::ptrdiff_t>(turn));
    installed = nullptr;
    if (!live.empty()) {
      installed = live[0].get();
      installed->install();
    }
  }
  return {};
}

// One launch at a time, whichever system threads they come from: the device's variables above are there once.
std::mutex& device() {
  static std::mutex mutex;
  return mutex;
}
thread_local std::string last_error;

}  // namespace

unsigned lane() { return lane_of_running(); }
LaneValues meet_warp(const Call& call, unsigned mask, const void* value, size_t bytes) {
  return running->meet_warp(call, mask, value, bytes);
}
int64_t meet_block(const Call& call, int64_t value) { return running->meet_block(call, value); }

std::string launch(unsigned blocks, unsigned threads, size_t shared_bytes,
                   const std::function<void()>& body) {
  if (blocks == 0 || threads == 0 || threads % kWarpSize != 0 || threads > 1024)
    return "invalid configuration of a launch";
  if (shared_bytes > static_cast<size_t>(settings().shared_memory) || shared_bytes > adaptcomp::kMostShared)
    return "a block asks for more shared memory than there is";
  const std::lock_guard<std::mutex> lock(device());
  ++settings().launches;
  gridDim = dim3(blocks, 1, 1);
  const std::string wrong = run_blocks(blocks, threads, shared_bytes, body);
  running = nullptr;
  return wrong;
}

cudaError_t fail(const std::string& what) {
  last_error = what;
  return cudaErrorLaunchFailure;
}

}  // namespace emulation

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? emulation::last_error.c_str() : "invalid value";
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  ++emulation::settings().launches;
  std::memset(p, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const emulation::Settings& s = emulation::settings();
  *value = which == cudaDevAttrMultiProcessorCount ? s.multiprocessors : static_cast<int>(s.shared_memory);
  return cudaSuccess;
}
