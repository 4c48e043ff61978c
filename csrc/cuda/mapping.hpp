// SPDX-License-Identifier: Apache-2.0
// Maps device memory of another process (exporting.hpp) into this one. A mapping owns what it has opened: it closes it
// at its end, or earlier by close(). base() is the address here, 0 once closed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace spmd {

// What cudaMalloc made in another process, by its handle.
class IpcMapping {
 public:
  // Opens a cudaIpcMemHandle_t, of 64 bytes, for `device` to read. This process must not have exported it.
  IpcMapping(int device, const std::string& handle);
  ~IpcMapping();
  IpcMapping(const IpcMapping&) = delete;
  IpcMapping& operator=(const IpcMapping&) = delete;

  // Unmaps it. No copy from it may still run. Twice is fine.
  void close();

  uint64_t base() const { return base_; }

 private:
  int device_;
  uint64_t base_ = 0;
};

// Chunks of another process, mapped side by side in one range of addresses. For one thread at a time.
class ChunkMapping {
 public:
  // Reserves addresses for chunks of these sizes, in bytes, that `device` will read.
  ChunkMapping(int device, std::vector<uint64_t> sizes);
  ~ChunkMapping();
  ChunkMapping(const ChunkMapping&) = delete;
  ChunkMapping& operator=(const ChunkMapping&) = delete;

  // Maps the chunks that follow those already mapped. The descriptors may be closed afterwards.
  void map(const std::vector<int>& descriptors);
  // Unmaps all of it. No copy from it may still run. Twice is fine.
  void close();

  uint64_t base() const { return base_; }
  size_t mapped() const { return mapped_; }

 private:
  int device_;
  std::vector<uint64_t> sizes_;
  uint64_t total_ = 0;
  uint64_t base_ = 0;
  uint64_t end_ = 0;  // of what is mapped, counted from base_
  size_t mapped_ = 0;
};

}  // namespace spmd
