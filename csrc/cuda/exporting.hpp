// SPDX-License-Identifier: Apache-2.0
// Names device memory so that another process can map it (mapping.hpp): what cudaMalloc made, by a handle of 64 bytes,
// and chunks of CUDA's virtual memory management, by file descriptors.
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

// One new file descriptor for the chunk that each address lies in; the caller closes them. Each keeps its chunk's
// memory, also when the exporter has freed it.
std::vector<int> export_descriptors(const std::vector<uint64_t>& addresses);

// For each address a number that no other allocation, or mapping of a chunk, of this process has had or will have, so
// that memory which was freed and allocated again at the same address is noticed; 0 for what is not allocated.
std::vector<uint64_t> allocation_ids(const std::vector<uint64_t>& addresses);

}  // namespace spmd
