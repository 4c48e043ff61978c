// SPDX-License-Identifier: Apache-2.0
#include "cuda/driver.hpp"

#include "check.hpp"

namespace spmd {
namespace {

template <typename Function>
void look_up(const char* symbol, unsigned int version, Function& function) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
  SPMD_CHECK_CUDA(cudaGetDriverEntryPointByVersion(symbol, &found, version, cudaEnableDefault, &result));
  if (result != cudaDriverEntryPointSuccess || found == nullptr)
    throw CudaError(std::string("the CUDA driver has no ") + symbol, CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND");
  function = reinterpret_cast<Function>(found);
}

Driver load() {
  Driver d{};
  look_up("cuGetErrorName", 12000, d.cuGetErrorName);
  look_up("cuCtxGetCurrent", 12000, d.cuCtxGetCurrent);
  look_up("cuCtxSetCurrent", 12000, d.cuCtxSetCurrent);
  look_up("cuMemGetAddressRange", 12000, d.cuMemGetAddressRange);
  look_up("cuPointerGetAttribute", 12000, d.cuPointerGetAttribute);
  look_up("cuMemRetainAllocationHandle", 12000, d.cuMemRetainAllocationHandle);
  look_up("cuMemRelease", 12000, d.cuMemRelease);
  look_up("cuMemExportToShareableHandle", 12000, d.cuMemExportToShareableHandle);
  look_up("cuMemImportFromShareableHandle", 12000, d.cuMemImportFromShareableHandle);
  look_up("cuMemAddressReserve", 12000, d.cuMemAddressReserve);
  look_up("cuMemAddressFree", 12000, d.cuMemAddressFree);
  look_up("cuMemMap", 12000, d.cuMemMap);
  look_up("cuMemUnmap", 12000, d.cuMemUnmap);
  look_up("cuMemSetAccess", 12000, d.cuMemSetAccess);
  return d;
}

}  // namespace

std::string Driver::name(CUresult code) const {
  const char* text = nullptr;
  return cuGetErrorName(code, &text) == CUDA_SUCCESS && text != nullptr ? text : "unknown CUresult";
}

const Driver& driver() {
  static const Driver loaded = load();
  return loaded;
}

}  // namespace spmd
