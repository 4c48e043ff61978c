// SPDX-License-Identifier: Apache-2.0
// The driver calls this module needs, looked up at run time: it must load on a machine that has no driver.
#pragma once

#include <cuda.h>
#undef cuMemGetAddressRange  // cuda.h renames calls to their newest version; `Driver` goes by their plain names
#include <cuda_runtime.h>

#include <string>

namespace spmd {

struct Driver {
  CUresult(CUDAAPI* cuGetErrorName)(CUresult, const char**);
  CUresult(CUDAAPI* cuCtxGetCurrent)(CUcontext*);
  CUresult(CUDAAPI* cuCtxSetCurrent)(CUcontext);
  CUresult(CUDAAPI* cuMemGetAddressRange)(CUdeviceptr*, size_t*, CUdeviceptr);
  CUresult(CUDAAPI* cuPointerGetAttribute)(void*, CUpointer_attribute, CUdeviceptr);
  CUresult(CUDAAPI* cuMemRetainAllocationHandle)(CUmemGenericAllocationHandle*, void*);
  CUresult(CUDAAPI* cuMemRelease)(CUmemGenericAllocationHandle);
  CUresult(CUDAAPI* cuMemExportToShareableHandle)(void*, CUmemGenericAllocationHandle, CUmemAllocationHandleType,
                                                  unsigned long long);
  CUresult(CUDAAPI* cuMemImportFromShareableHandle)(CUmemGenericAllocationHandle*, void*, CUmemAllocationHandleType);
  CUresult(CUDAAPI* cuMemAddressReserve)(CUdeviceptr*, size_t, size_t, CUdeviceptr, unsigned long long);
  CUresult(CUDAAPI* cuMemAddressFree)(CUdeviceptr, size_t);
  CUresult(CUDAAPI* cuMemMap)(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long);
  CUresult(CUDAAPI* cuMemUnmap)(CUdeviceptr, size_t);
  CUresult(CUDAAPI* cuMemSetAccess)(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t);

  std::string name(CUresult code) const;
};

// Throws CudaError where there is no driver, or one that lacks a call.
const Driver& driver();

}  // namespace spmd
