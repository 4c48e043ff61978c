// SPDX-License-Identifier: Apache-2.0
// A table of block copies kept in device memory. copy_table.cpp is the host's side, copy.cu the kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "copy.hpp"

namespace spmd {

// What comparing one tile gives: how many elements differ, and the lowest number in the block of one that does.
struct TileResult {
  uint64_t wrong_elements;
  uint64_t first;  // UINT64_MAX: none
};

inline constexpr int kThreads = 512;

// How many thread blocks of the copy kernel a multiprocessor of the current device holds at a time.
int resident_blocks();

// Starts the kernel on the current device. With `results`, one a tile, it compares instead of copying.
void launch_copy(const BlockCopy* blocks, const Tile* tiles, uint64_t tile_count, TileResult* results,
                 unsigned int grid, cudaStream_t stream);

class CopyTable {
 public:
  // `blocks_per_sm` is cut to what a multiprocessor holds. `remote`: one flag a block; tiles of remote blocks are
  // spread evenly among the others. Throws TableError, CudaError.
  CopyTable(int device, std::vector<BlockCopy> table, const std::vector<uint8_t>& remote, int blocks_per_sm,
            uint64_t tile_bytes);
  ~CopyTable();
  CopyTable(const CopyTable&) = delete;
  CopyTable& operator=(const CopyTable&) = delete;

  // Replaces src, dst and source; everything else must be as before. Waits for the last launch.
  void patch(std::vector<BlockCopy> table);
  void launch(uint64_t stream);
  // Waits for the last launch.
  float elapsed_ms();
  CompareResult compare(uint64_t stream);
  // Waits for the last launch and frees the device memory. Twice is fine.
  void close();

  uint64_t tile_count() const { return tiles_.size(); }
  uint64_t bytes_read() const { return bytes_read_; }

 private:
  struct DeviceState;
  DeviceState& state();

  int device_;
  unsigned int grid_ = 0;
  uint64_t bytes_read_ = 0;
  bool launched_ = false;
  std::vector<BlockCopy> original_;  // as given, to check patches against
  std::vector<Tile> tiles_;
  std::unique_ptr<DeviceState> state_;
};

}  // namespace spmd
