// Linked before the CUDA files: see emulator.cpp.
namespace emulation {
extern thread_local unsigned char shared_begin[64];
alignas(64) thread_local unsigned char shared_begin[64];
}  // namespace emulation
