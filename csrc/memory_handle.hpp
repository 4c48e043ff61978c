// SPDX-License-Identifier: Apache-2.0
// Device memory that another process can open. A handle is a string of bytes that says nothing about how it is made, so
// that further kinds (such as the file descriptors of CUDA's virtual memory management) can join.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace spmd {

struct ExportedAllocation {
  uint64_t base;  // address in the exporting process
  uint64_t size;
  std::string handle;  // 64 bytes: cudaIpcMemHandle_t
};

// Exports the whole allocation that `address` lies in; it must stay allocated while another process has it open.
// Throws NotExportableError for memory that legacy CUDA IPC cannot share.
ExportedAllocation export_allocation(uint64_t address);

// For each address a number that no other allocation of this process has had or will have, so that memory which was
// freed and allocated again at the same address is noticed; 0 for what is not allocated.
std::vector<uint64_t> allocation_ids(const std::vector<uint64_t>& addresses);

// Maps an allocation of another process and returns its address here. Every success needs one close_handle.
uint64_t open_handle(int device, const std::string& handle);
void close_handle(uint64_t address);

// As nvidia-smi prints it.
std::string device_uuid(int device);

}  // namespace spmd
