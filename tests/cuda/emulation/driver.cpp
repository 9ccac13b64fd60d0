// What the Python tests call (by ctypes) besides the launchers, which are called through launchers.cpp.
#include <cstring>

#include "emulated.h"

extern "C" {

void dx_add_memory(const void* begin, size_t bytes, int writable, const char* name) {
  dx::cuda::emulated::add_memory(begin, bytes, writable != 0, name);
}
void dx_clear_memory() { dx::cuda::emulated::clear_memory(); }
int dx_launches() { return dx::cuda::emulated::launches(); }
int dx_allowances() { return dx::cuda::emulated::allowances(); }
void dx_set_device(int device) { dx::cuda::emulated::set_device(device); }
void dx_set_order(unsigned order) { dx::cuda::emulated::set_order(order); }
// Copies the text of the last failure, or "", into `text`.
void dx_take_error(char* text, size_t size) {
  std::strncpy(text, dx::cuda::emulated::take_error().c_str(), size - 1);
  text[size - 1] = 0;
}

}  // extern "C"
