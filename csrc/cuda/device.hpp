// SPDX-License-Identifier: Apache-2.0
// Chooses the device that calls go to, names devices, and pins memory of the CPU for them.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/driver.hpp"

namespace spmd {

// Makes a device current, and afterwards what the thread had before: another context, or none. A thread that had none
// must not be left with one: it would make a context on a device that nobody asked for.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  CUcontext former_;
};

// Lets GPUs copy from and to memory of the CPU at full speed, as cudaHostAlloc's. It must stay mapped until it is
// unpinned.
void pin(int device, uint64_t address, uint64_t size);
void unpin(int device, uint64_t address);

// As nvidia-smi prints it.
std::string device_uuid(int device);

}  // namespace spmd
