// SPDX-License-Identifier: Apache-2.0
// Device memory that another process can open: what cudaMalloc made, by a handle of 64 bytes, and chunks of CUDA's
// virtual memory management, by file descriptors (vmm.hpp).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace spmd {

struct ExportedAllocation {
  uint64_t base;  // address in the exporting process
  uint64_t size;
  std::string handle;  // 64 bytes: cudaIpcMemHandle_t; empty for a chunk, which export_descriptors exports
};

// Exports the whole allocation, or finds the chunk, that `address` lies in. An allocation must stay allocated while
// another process has it open. Throws NotExportableError for memory that can be shared in neither way.
ExportedAllocation export_allocation(uint64_t address);

// For each address a number that no other allocation, or mapping of a chunk, of this process has had or will have, so
// that memory which was freed and allocated again at the same address is noticed; 0 for what is not allocated.
std::vector<uint64_t> allocation_ids(const std::vector<uint64_t>& addresses);

// Maps an allocation of another process and returns its address here. Every success needs one close_handle.
uint64_t open_handle(int device, const std::string& handle);
void close_handle(uint64_t address);

// Lets GPUs copy from and to memory of the CPU at full speed, as cudaHostAlloc's. It must stay mapped until it is
// unpinned.
void pin(int device, uint64_t address, uint64_t size);
void unpin(int device, uint64_t address);

// As nvidia-smi prints it.
std::string device_uuid(int device);

}  // namespace spmd
