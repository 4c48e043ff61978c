// SPDX-License-Identifier: Apache-2.0
// Executes a table of block copies with threads of this process, on memory of any process of this host.
#pragma once

#include <cstdint>
#include <vector>

#include "block_copy.hpp"

namespace spmd {

struct CopyStats {
  uint64_t bytes_read;
  uint64_t blocks;
};

// Reads every block from process pids[block.source] and writes it to this process' memory. A pid of 0, or this process'
// own, means this process. Throws TableError or SourceError; after a SourceError the destinations are undefined.
CopyStats copy_cpu(std::vector<BlockCopy> table, const std::vector<int64_t>& pids, int threads);

// The same, but compares bit for bit what copy_cpu would write with what lies there.
CompareResult compare_cpu(std::vector<BlockCopy> table, const std::vector<int64_t>& pids, int threads);

}  // namespace spmd
