// SPDX-License-Identifier: Apache-2.0
#include "cuda/device.hpp"

#include <cstdio>

#include "check.hpp"

namespace spmd {
namespace {

// The context that is current in this thread; null if none is, as in each thread before cuInit. The runtime's
// cudaGetDevice cannot tell: it answers 0 in a thread that has none.
// https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__CTX.html
CUcontext current_context() {
  CUcontext context = nullptr;
  if (driver().cuCtxGetCurrent(&context) == CUDA_ERROR_NOT_INITIALIZED) return nullptr;
  return context;
}

}  // namespace

DeviceGuard::DeviceGuard(int device) : former_(current_context()) { SPMD_CHECK_CUDA(cudaSetDevice(device)); }

DeviceGuard::~DeviceGuard() { (void)driver().cuCtxSetCurrent(former_); }

void pin(int device, uint64_t address, uint64_t size) {
  const DeviceGuard guard(device);
  SPMD_CHECK_CUDA(cudaHostRegister(reinterpret_cast<void*>(address), size, cudaHostRegisterPortable));
}

void unpin(int device, uint64_t address) {
  const DeviceGuard guard(device);
  SPMD_CHECK_CUDA(cudaHostUnregister(reinterpret_cast<void*>(address)));
}

std::string device_uuid(int device) {
  cudaDeviceProp properties;
  SPMD_CHECK_CUDA(cudaGetDeviceProperties(&properties, device));
  std::string text = "GPU";
  for (int i = 0; i < 16; ++i) {
    if (i == 0 || i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    char byte[3];
    std::snprintf(byte, sizeof(byte), "%02x", static_cast<unsigned char>(properties.uuid.bytes[i]));
    text += byte;
  }
  return text;
}

}  // namespace spmd
