// SPDX-License-Identifier: Apache-2.0
#include "vmm.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <utility>

#include "check.hpp"
#include "driver.hpp"

namespace spmd {
namespace {

// A reference to a chunk. Mappings and descriptors keep the chunk without it.
class Chunk {
 public:
  explicit Chunk(CUmemGenericAllocationHandle handle) : handle_(handle) {}
  ~Chunk() { (void)driver().cuMemRelease(handle_); }
  Chunk(const Chunk&) = delete;
  Chunk& operator=(const Chunk&) = delete;
  CUmemGenericAllocationHandle get() const { return handle_; }

 private:
  CUmemGenericAllocationHandle handle_;
};

// Closes what was not handed out.
class Descriptors {
 public:
  explicit Descriptors(size_t count) { open_.reserve(count); }
  ~Descriptors() {
    for (const int descriptor : open_) (void)::close(descriptor);
  }
  Descriptors(const Descriptors&) = delete;
  Descriptors& operator=(const Descriptors&) = delete;
  void add(int descriptor) { open_.push_back(descriptor); }
  std::vector<int> hand_out() { return std::exchange(open_, {}); }

 private:
  std::vector<int> open_;
};

template <typename Value>
Value attribute(CUpointer_attribute which, uint64_t address) {
  Value value{};
  SPMD_CHECK_DRIVER(driver(), cuPointerGetAttribute(&value, which, address));
  return value;
}

}  // namespace

bool is_exportable_chunk(uint64_t address, std::string& reason) {
  if (attribute<CUmemoryPool>(CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE, address) != nullptr) {
    reason =
        "cudaMallocAsync made it; use torch's own allocator for the weights (no backend:cudaMallocAsync in "
        "PYTORCH_CUDA_ALLOC_CONF)";
    return false;
  }
  const auto types = attribute<unsigned long long>(CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES, address);
  if ((types & CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) == 0) {
    reason = "it was made with handle types " + std::to_string(types) +
             ", without that of file descriptors (1). If torch's expandable segments made it, unset "
             "TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC, or leave expandable_segments out of PYTORCH_CUDA_ALLOC_CONF; memory "
             "of torch_memory_saver can never be shared, so keep the weights outside of its regions";
    return false;
  }
  return true;
}

std::vector<int> export_descriptors(const std::vector<uint64_t>& addresses) {
  Descriptors exported(addresses.size());
  for (const uint64_t address : addresses) {
    CUmemGenericAllocationHandle handle = 0;
    const CUresult code = driver().cuMemRetainAllocationHandle(&handle, reinterpret_cast<void*>(address));
    if (code != CUDA_SUCCESS)
      throw CudaError("no chunk is mapped at " + hex(address) + ": " + driver().name(code) + "; was it freed?", code,
                      driver().name(code));
    const Chunk chunk(handle);
    int descriptor = -1;
    SPMD_CHECK_DRIVER(
        driver(), cuMemExportToShareableHandle(&descriptor, chunk.get(), CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    exported.add(descriptor);
    if (fcntl(descriptor, F_SETFD, FD_CLOEXEC) != 0) SPMD_THROW_POSIX("fcntl(F_SETFD)");
  }
  return exported.hand_out();
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
