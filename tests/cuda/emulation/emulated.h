// CUDA kernels on a CPU, for tests: a block's threads are fibers that run until a barrier or an operation of their
// warp; every access through device.h is checked (bounds, alignment, read-only and unwritten memory, races). A check
// that fails ends the launch with an error whose text emulated::error() keeps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorMemoryAllocation = 2;
// The text of the last failure, whatever the error.
const char* cudaGetErrorString(cudaError_t error);
// What a kernel may have of shared memory, by device; the device is the one that emulated::set_device was told last.
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
// Kernels run at once here; what these answer is what emulated::pretend was told last.
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaMemGetInfo(size_t* unused, size_t* total);

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace dx::cuda::emulated {

constexpr int kWarp = 32;
constexpr size_t kSlotBytes = 64;
constexpr size_t kMostShared = 227 * 1024;

struct Failure {
  std::string text;
};

// ---- launches -------------------------------------------------------------------------------------------------------
cudaError_t run(const void* kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, int threads, size_t shared,
                const std::function<void()>& body);
// How many kernels were launched so far, and how often one was allowed shared memory.
int launches();
int allowances();
void set_device(int device);
// The order in which a block's threads run: 0 first to last, 1 last to first, others shuffled by this seed.
void set_order(unsigned order);
// What a GPU would tell the operators: the error of an earlier kernel (0: none), and whether the stream is capturing.
void pretend(cudaError_t error, bool capturing);
// The text of the first failure since the last call, or "".
std::string take_error();
[[noreturn]] void fail(const std::string& text);

// ---- the running thread ---------------------------------------------------------------------------------------------
struct Place {
  unsigned thread, block[3], grid[3];
  int threads;
};
const Place& here();
void sync_block();
void sync_warp();
// Hands `bytes` (at most kSlotBytes) to the warp; returns what all lanes gave, lane i at i * kSlotBytes, valid until
// this lane's next exchange. All 32 lanes must come with the same operation.
const unsigned char* exchange(const char* operation, const void* mine, size_t bytes);

// ---- memory ---------------------------------------------------------------------------------------------------------
unsigned char* shared_bytes();
// Global memory that kernels may touch from now on.
void add_memory(const void* begin, size_t bytes, bool writable, const char* name);
void clear_memory();
// Whether memory that was not added counts as a kernel's own, unchecked: whole networks have too much of it.
void trust_memory(bool trusted);
// Accesses of the running thread, checked; `alignment` 1 asks for none.
void check_read(const void* p, size_t bytes, size_t alignment);
void check_write(void* p, size_t bytes, size_t alignment);

// cp.async: what is copied arrives at the wait; until then reading it is an error.
void copy_async(void* shared, const void* global, size_t size, size_t valid);
void commit_async();
void wait_async(size_t groups_in_flight);

}  // namespace dx::cuda::emulated
