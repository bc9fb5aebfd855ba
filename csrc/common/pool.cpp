#include "common/pool.h"

#include <cstdlib>
#include <new>

namespace adaptcomp {
namespace {

constexpr int64_t kUnit = 4096;     // smaller blocks are left to malloc
constexpr int64_t kMost = 1 << 25;  // bytes that are kept
constexpr int kPlaces = 64;

struct Kept {
  void* block;
  int64_t bytes;
};
Kept kept[kPlaces];
int count = 0;
int64_t total = 0;
int locked = 0;

// Never waits: after a fork the lock may be held by a thread that is gone.
class Lock {
 public:
  Lock() : mine_(__atomic_exchange_n(&locked, 1, __ATOMIC_ACQUIRE) == 0) {}
  ~Lock() {
    if (mine_) __atomic_store_n(&locked, 0, __ATOMIC_RELEASE);
  }
  bool mine() const { return mine_; }

 private:
  bool mine_;
};

int64_t whole(int64_t bytes) { return (bytes + kUnit - 1) / kUnit * kUnit; }

}  // namespace

void throw_out_of_memory() { throw std::bad_alloc(); }

void* take_block(int64_t bytes) {
  if (bytes < kUnit) {
    bytes = (bytes + 127) / 64 * 64;
  } else {
    bytes = whole(bytes);
    const Lock lock;
    // Only a block of the same size: a longer one would be given back as a shorter one.
    for (int i = count - 1; lock.mine() && i >= 0; --i) {
      if (kept[i].bytes != bytes) continue;
      void* block = kept[i].block;
      for (--count; i < count; ++i) kept[i] = kept[i + 1];
      total -= bytes;
      return block;
    }
  }
  void* block = std::aligned_alloc(64, static_cast<size_t>(bytes));
  if (!block) throw std::bad_alloc();
  return block;
}

void give_block(void* block, int64_t bytes) {
  if (block && bytes >= kUnit && whole(bytes) <= kMost) {
    bytes = whole(bytes);
    const Lock lock;
    if (lock.mine()) {
      // The blocks that were given first make room: their sizes may not be asked for any more.
      int gone = 0;
      for (; gone < count && (count - gone == kPlaces || total + bytes > kMost); ++gone) {
        std::free(kept[gone].block);
        total -= kept[gone].bytes;
      }
      for (int i = gone; i < count; ++i) kept[i - gone] = kept[i];
      count -= gone;
      kept[count++] = {block, bytes};
      total += bytes;
      return;
    }
  }
  std::free(block);
}

}  // namespace adaptcomp
