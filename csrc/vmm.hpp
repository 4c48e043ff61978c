// SPDX-License-Identifier: Apache-2.0
// Memory of CUDA's virtual memory management, such as torch's expandable segments: chunks made by cuMemCreate and
// mapped side by side. Another process opens it chunk by chunk, through file descriptors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace spmd {

// Whether the chunk that device memory at `address` lies in can be exported as a file descriptor. Otherwise `reason`
// says why not, and what to do.
bool is_exportable_chunk(uint64_t address, std::string& reason);

// One new file descriptor for the chunk that each address lies in; the caller closes them. Each keeps its chunk's
// memory, also when the exporter has freed it.
std::vector<int> export_descriptors(const std::vector<uint64_t>& addresses);

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
  uint64_t base_ = 0;  // 0 once closed
  uint64_t end_ = 0;   // of what is mapped, counted from base_
  size_t mapped_ = 0;
};

}  // namespace spmd
