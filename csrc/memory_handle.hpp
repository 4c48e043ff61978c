// SPDX-License-Identifier: Apache-2.0
// Device memory that another process can open. A handle is a string of bytes that says nothing about how it is made, so
// that further kinds (such as the file descriptors of CUDA's virtual memory management) can join.
#pragma once

#include <cstdint>
#include <string>

namespace spmd {

struct ExportedAllocation {
  uint64_t base;  // address in the exporting process
  uint64_t size;
  std::string handle;  // 64 bytes: cudaIpcMemHandle_t
};

// Exports the whole allocation that `address` lies in; it must stay allocated while another process has it open.
// Throws NotExportableError for memory that legacy CUDA IPC cannot share.
ExportedAllocation export_allocation(uint64_t address);

// Maps an allocation of another process and returns its address here. Every success needs one close_handle.
uint64_t open_handle(int device, const std::string& handle);
void close_handle(uint64_t address);

// As nvidia-smi prints it.
std::string device_uuid(int device);

}  // namespace spmd
