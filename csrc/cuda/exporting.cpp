// SPDX-License-Identifier: Apache-2.0
#include "cuda/exporting.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <utility>

#include "check.hpp"
#include "cuda/chunk.hpp"
#include "cuda/device.hpp"
#include "cuda/driver.hpp"

namespace spmd {
namespace {

static_assert(sizeof(cudaIpcMemHandle_t) == 64);

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

// Whether the chunk that device memory at `address` lies in can be exported as a file descriptor. Otherwise `reason`
// says why not, and what to do.
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

}  // namespace spmd
