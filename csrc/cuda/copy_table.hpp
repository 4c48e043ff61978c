// SPDX-License-Identifier: Apache-2.0
// A table of block copies kept in device memory. copy_table.cpp is the host's side, copy.cu the kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "block_copy.hpp"

namespace spmd {

// What comparing one tile gives: how many elements differ, and the lowest number in the block of one that does.
struct TileResult {
  uint64_t wrong_elements;
  uint64_t first;  // UINT64_MAX: none
};

struct TilesTaken {
  uint32_t near, far;
};

// The tiles of a table in device memory: first those that come from other devices, then those of the own one.
struct TileQueues {
  const Tile* tiles;
  uint32_t far, near;
  TilesTaken* taken;  // zero before a launch
};

// Starts the kernel on the current device, with `grid` thread blocks: one a multiprocessor is what it is made for.
void launch_copy(const BlockCopy* blocks, const TileQueues& queues, unsigned int grid, cudaStream_t stream);

// Starts the comparison on the current device, with one result a tile.
void launch_compare(const BlockCopy* blocks, const TileQueues& queues, TileResult* results, unsigned int grid,
                    cudaStream_t stream);

class CopyTable {
 public:
  // `peers`: one number a block, 0 for memory of `device` and else that of another device. Throws TableError,
  // CudaError.
  CopyTable(int device, std::vector<BlockCopy> table, const std::vector<uint8_t>& peers, uint64_t tile_bytes,
            uint64_t far_tile_bytes);
  ~CopyTable();
  CopyTable(const CopyTable&) = delete;
  CopyTable& operator=(const CopyTable&) = delete;

  // Replaces src, dst and source; everything else must be as before. Waits for the last launch.
  void patch(std::vector<BlockCopy> table);
  // Starts the copy on a stream of the device. A launch on another stream than the one before waits for that one.
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
  TileQueues queues();

  int device_;
  unsigned int grid_ = 0;
  uint32_t far_tiles_ = 0;
  uint64_t bytes_read_ = 0;
  bool launched_ = false;
  std::vector<BlockCopy> original_;  // as given, to check patches against
  std::vector<Tile> tiles_;
  std::unique_ptr<DeviceState> state_;
};

}  // namespace spmd
