// SPDX-License-Identifier: Apache-2.0
#include "memory_handle.hpp"

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "check.hpp"
#include "driver.hpp"
#include "vmm.hpp"

namespace spmd {
namespace {

static_assert(sizeof(cudaIpcMemHandle_t) == 64);

// Which device each open mapping belongs to, and how often it was opened: closing needs that device to be current.
struct Mapping {
  int device;
  int opened;
};
std::mutex mappings_mutex;
std::map<uint64_t, Mapping> mappings;

}  // namespace

ExportedAllocation export_allocation(uint64_t address) {
  cudaPointerAttributes attributes{};
  SPMD_CHECK_CUDA(cudaPointerGetAttributes(&attributes, reinterpret_cast<void*>(address)));
  if (attributes.type != cudaMemoryTypeDevice)
    throw NotExportableError(hex(address) + " is no device memory", cudaErrorInvalidValue, "cudaErrorInvalidValue");
  const DeviceGuard guard(attributes.device);

  int capable = 0;
  SPMD_CHECK_DRIVER(driver(),
                    cuPointerGetAttribute(&capable, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, address));
  std::string reason;
  if (capable == 0 && !is_exportable_chunk(address, reason))
    throw NotExportableError("device memory at " + hex(address) + " cannot be shared with another process: " + reason,
                             cudaErrorInvalidValue, "cudaErrorInvalidValue");

  CUdeviceptr base = 0;
  size_t size = 0;
  SPMD_CHECK_DRIVER(driver(), cuMemGetAddressRange(&base, &size, address));
  if (capable == 0) return {base, size, ""};
  cudaIpcMemHandle_t handle;
  SPMD_CHECK_CUDA(cudaIpcGetMemHandle(&handle, reinterpret_cast<void*>(base)));
  return {base, size, std::string(reinterpret_cast<const char*>(&handle), sizeof(handle))};
}

std::vector<uint64_t> allocation_ids(const std::vector<uint64_t>& addresses) {
  std::vector<uint64_t> ids;
  ids.reserve(addresses.size());
  for (const uint64_t address : addresses) {
    unsigned long long id = 0;
    if (driver().cuPointerGetAttribute(&id, CU_POINTER_ATTRIBUTE_BUFFER_ID, address) != CUDA_SUCCESS) id = 0;
    ids.push_back(id);
  }
  return ids;
}

uint64_t open_handle(int device, const std::string& handle) {
  cudaIpcMemHandle_t raw;
  if (handle.size() != sizeof(raw)) throw NativeError("a handle has 64 bytes, got " + std::to_string(handle.size()));
  std::memcpy(&raw, handle.data(), sizeof(raw));
  const DeviceGuard guard(device);
  void* mapped = nullptr;
  const std::lock_guard lock(mappings_mutex);
  SPMD_CHECK_CUDA(cudaIpcOpenMemHandle(&mapped, raw, cudaIpcMemLazyEnablePeerAccess));
  const auto address = reinterpret_cast<uint64_t>(mapped);
  ++mappings.try_emplace(address, Mapping{device, 0}).first->second.opened;
  return address;
}

void close_handle(uint64_t address) {
  const std::lock_guard lock(mappings_mutex);
  const auto found = mappings.find(address);
  if (found == mappings.end()) throw NativeError(hex(address) + " was not returned by open_handle, or is closed");
  const DeviceGuard guard(found->second.device);
  if (--found->second.opened == 0) mappings.erase(found);
  SPMD_CHECK_CUDA(cudaIpcCloseMemHandle(reinterpret_cast<void*>(address)));
}

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
