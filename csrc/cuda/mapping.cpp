// SPDX-License-Identifier: Apache-2.0
#include "cuda/mapping.hpp"

#include <cstring>
#include <utility>

#include "check.hpp"
#include "cuda/chunk.hpp"
#include "cuda/device.hpp"
#include "cuda/driver.hpp"

namespace spmd {

IpcMapping::IpcMapping(int device, const std::string& handle) : device_(device) {
  cudaIpcMemHandle_t raw;
  if (handle.size() != sizeof(raw)) throw NativeError("a handle has 64 bytes, got " + std::to_string(handle.size()));
  std::memcpy(&raw, handle.data(), sizeof(raw));
  const DeviceGuard guard(device_);
  void* mapped = nullptr;
  SPMD_CHECK_CUDA(cudaIpcOpenMemHandle(&mapped, raw, cudaIpcMemLazyEnablePeerAccess));
  base_ = reinterpret_cast<uint64_t>(mapped);
}

IpcMapping::~IpcMapping() {
  try {
    close();
  } catch (const NativeError&) {  // the device is lost, and its mappings with it
  }
}

void IpcMapping::close() {
  if (base_ == 0) return;
  const DeviceGuard guard(device_);  // the driver closes the mapping of the current device
  SPMD_CHECK_CUDA(cudaIpcCloseMemHandle(reinterpret_cast<void*>(std::exchange(base_, 0))));
}

ChunkMapping::ChunkMapping(int device, std::vector<uint64_t> sizes) : device_(device), sizes_(std::move(sizes)) {
  for (const uint64_t size : sizes_)
    if (size == 0 || __builtin_add_overflow(total_, size, &total_))
      throw NativeError("a chunk of " + std::to_string(size) + " bytes cannot be mapped");
  if (sizes_.empty()) throw NativeError("a mapping needs at least one chunk");
  const DeviceGuard guard(device_);
  CUdeviceptr base = 0;
  SPMD_CHECK_DRIVER(driver(), cuMemAddressReserve(&base, total_, 0, 0, 0));
  base_ = base;
}

ChunkMapping::~ChunkMapping() {
  try {
    close();
  } catch (const NativeError&) {  // the device is lost, and its mappings with it
  }
}

void ChunkMapping::map(const std::vector<int>& descriptors) {
  if (base_ == 0) throw NativeError("the mapping is closed");
  if (descriptors.size() > sizes_.size() - mapped_)
    throw NativeError("got " + std::to_string(descriptors.size()) + " descriptors for the last " +
                      std::to_string(sizes_.size() - mapped_) + " of " + std::to_string(sizes_.size()) + " chunks");
  if (descriptors.empty()) return;
  const DeviceGuard guard(device_);
  const uint64_t begin = end_;
  for (const int descriptor : descriptors) {
    CUmemGenericAllocationHandle handle = 0;
    SPMD_CHECK_DRIVER(
        driver(), cuMemImportFromShareableHandle(&handle, reinterpret_cast<void*>(static_cast<uintptr_t>(descriptor)),
                                                 CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
    const Chunk chunk(handle);
    SPMD_CHECK_DRIVER(driver(), cuMemMap(base_ + end_, sizes_[mapped_], 0, chunk.get(), 0));
    end_ += sizes_[mapped_++];
  }
  CUmemAccessDesc access{};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = device_;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  SPMD_CHECK_DRIVER(driver(), cuMemSetAccess(base_ + begin, end_ - begin, &access, 1));
}

void ChunkMapping::close() {
  if (base_ == 0) return;
  const DeviceGuard guard(device_);
  const uint64_t base = std::exchange(base_, 0);
  if (end_ > 0) SPMD_CHECK_DRIVER(driver(), cuMemUnmap(base, end_));
  SPMD_CHECK_DRIVER(driver(), cuMemAddressFree(base, total_));
}

}  // namespace spmd
