// The CUDA operators (csrc/ops/cuda.h) over emulated kernels, as densenet_ext_emulated::<name> for CPU tensors: torch
// calls them as it calls the GPU's, and what stands between torch and the kernels runs here as it runs there.
#include <dlfcn.h>

#include <cstring>
#include <map>
#include <string>

#include "../../../csrc/ops/around.h"
#include "../../../csrc/ops/basic_layers.h"
#include "../../../csrc/ops/conv1x1.h"
#include "../../../csrc/ops/conv3x3.h"
#include "../../../csrc/ops/cuda.h"
#include "../../../csrc/ops/dense_layers.h"
#include "../../../csrc/ops/elementwise.h"
#include "../../../csrc/ops/pool.h"
#include "../../../csrc/ops/schemas.h"

namespace {

int streams_asked_for = 0, guards = 0;
bool allocator_fails = false;
std::map<std::string, int> torch_calls;  // by operator

}  // namespace

// What torch has for GPUs only.
extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  ++streams_asked_for;
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  ++guards;
  *guard = reinterpret_cast<DeviceGuardHandle>(&guards);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  --guards;
  return AOTI_TORCH_SUCCESS;
}

// Torch's, but that a test may have the workspaces' allocator fail.
AOTITorchError torch_call_dispatcher(const char* name, const char* overload, StableIValue* stack, uint64_t version) {
  ++torch_calls[name];
  if (allocator_fails && std::strcmp(name, "aten::new_empty") == 0) return AOTI_TORCH_FAILURE;
  static const auto torchs =
      reinterpret_cast<decltype(&torch_call_dispatcher)>(dlsym(RTLD_NEXT, "torch_call_dispatcher"));
  return torchs(name, overload, stack, version);
}

// For tests: what a GPU would answer, an allocator that fails, the guards that are alive, and how often a stream or one
// of torch's operators was asked for.
void dx_pretend(int error, bool capturing, bool no_memory) {
  dx::cuda::emulated::pretend(error, capturing);
  allocator_fails = no_memory;
}
int dx_guards() { return guards; }
int dx_streams_asked_for() { return streams_asked_for; }
int dx_torch_calls(const char* name) { return torch_calls[name]; }

}  // extern "C"

STABLE_TORCH_LIBRARY_FRAGMENT(densenet_ext_emulated, m) { dx::ops::define_operators(m); }
STABLE_TORCH_LIBRARY_IMPL(densenet_ext_emulated, CPU, m) {
  dx::cuda::emulated::trust_memory(true);
  dx::ops::implement_elementwise<dx::ops::Cuda>(m);
  dx::ops::implement_conv1x1<dx::ops::Cuda>(m);
  dx::ops::implement_conv3x3<dx::ops::Cuda>(m);
  dx::ops::implement_pool<dx::ops::Cuda>(m);
  dx::ops::implement_dense_layers<dx::ops::Cuda>(m);
  dx::ops::implement_basic_layers<dx::ops::Cuda>(m);
  dx::ops::implement_around<dx::ops::Cuda>(m);
}
STABLE_TORCH_LIBRARY_IMPL(densenet_ext_emulated, CompositeExplicitAutograd, m) {
  m.impl("keep_tensors", TORCH_BOX(&dx::ops::keep_tensors));
  m.impl("kept_hold", TORCH_BOX(&dx::ops::kept_hold));
  m.impl("drop_kept", TORCH_BOX(&dx::ops::drop_kept));
  m.impl("keep_layers", TORCH_BOX(&dx::ops::keep_layers));
}
