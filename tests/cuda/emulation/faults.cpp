// Small kernels with one fault each, so that the tests know that the emulator sees it, and one without any.
#include <cstring>

#include "../../../csrc/cuda/launch.h"

namespace dx::cuda {
namespace {

struct Args {
  const float* in;
  float* out;
};

// out[i] = in[63 - i], through shared memory.
template <bool Barrier>
void reverse(const Args args) {
  DX_SHARED_BYTES(bytes);
  const Shared<float> tile = shared_as<float>(bytes);
  const int i = thread_x();
  tile[i] = load_one(args.in + i);
  if (Barrier) sync_block();
  store_one(args.out + i, float(tile[63 - i]));
}
void reverse_in_warp(const Args args) {
  DX_SHARED_BYTES(bytes);
  const Shared<float> tile = shared_as<float>(bytes);
  const int i = thread_x();
  tile[i] = load_one(args.in + i);
  sync_warp();
  store_one(args.out + i, float(tile[i ^ 31]));
}
void beyond(const Args args) { store_one(args.out + thread_x(), load_one(args.in + thread_x() + 1)); }
void global_store_to_shared(const Args) {
  DX_SHARED_BYTES(bytes);
  store_global8(bytes + 8 * thread_x(), make_uint2(0, 0));
}
void into_input(const Args args) { store_one(const_cast<float*>(args.in) + thread_x(), 1.0f); }
void misaligned(const Args args) { store4(args.out + thread_x(), uint32_t(load8(args.in + 1).x)); }
void same_word(const Args args) { store_one(args.out, float(thread_x())); }
void blocks_overlap(const Args args) { store_one(args.out + thread_x(), float(block_x())); }
void unwritten(const Args args) {
  DX_SHARED_BYTES(bytes);
  store_one(args.out + thread_x(), float(shared_as<float>(bytes)[thread_x()]));
}
void half_barrier(const Args) {
  if (thread_x() < 32) sync_block();
}
void diverged_warp(const Args) {
  if (thread_x() % 2)
    sync_warp();
  else
    shuffle_xor(1, 1);
}
template <bool Wait>
void copied(const Args args) {
  DX_SHARED_BYTES(bytes);
  const Shared<float> tile = shared_as<float>(bytes);
  const int i = thread_x();
  cp_async16(tile + 4 * i, args.in + 4 * (i % 16), 12);
  cp_async_commit();
  if (Wait) cp_async_wait<0>();
  sync_block();
  store_one(args.out + i, float(tile[i]));
  cp_async_wait<0>();
}

}  // namespace

extern "C" int dx_fault(const char* name, const float* in, float* out) {
  const struct {
    const char* name;
    void (*kernel)(Args);
    unsigned blocks;
  } faults[] = {{"none", reverse<true>, 1},
                {"none in warp", reverse_in_warp, 1},
                {"none in copy", copied<true>, 1},
                {"no barrier", reverse<false>, 1},
                {"beyond the end", beyond, 1},
                {"write to input", into_input, 1},
                {"shared for global", global_store_to_shared, 1},
                {"misaligned", misaligned, 1},
                {"two writers", same_word, 1},
                {"two blocks", blocks_overlap, 2},
                {"unwritten", unwritten, 1},
                {"half a barrier", half_barrier, 1},
                {"diverged warp", diverged_warp, 1},
                {"copy not waited for", copied<false>, 1}};
  for (const auto& fault : faults)
    if (std::strcmp(fault.name, name) == 0) return launch(fault.kernel, fault.blocks, 64, 1024, nullptr, Args{in, out});
  return -1;
}

}  // namespace dx::cuda
