// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/driver.hpp"

namespace spmd {

// A reference to a chunk of CUDA's virtual memory management. Mappings and descriptors keep the chunk without it.
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

}  // namespace spmd
