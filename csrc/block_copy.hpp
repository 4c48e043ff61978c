// SPDX-License-Identifier: Apache-2.0
// Describes, checks and cuts the table of block copies that both backends (cpu/copy.cpp, cuda/copy.cu) execute.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

namespace spmd {

// Equal codes copy bits. Unequal codes cast, and only among F32, F16 and BF16.
enum class ElementType : uint16_t { F32 = 0, F16 = 1, BF16 = 2, RAW8 = 3, RAW16 = 4, RAW32 = 5, RAW64 = 6 };
inline constexpr uint16_t kElementTypes = 7;

constexpr uint64_t element_size(uint16_t type) {
  constexpr uint64_t sizes[kElementTypes] = {4, 2, 2, 1, 2, 4, 8};
  return sizes[type];
}

constexpr bool is_float(uint16_t type) { return type <= static_cast<uint16_t>(ElementType::BF16); }

// One row of the table. spmd_engine/_native.py has the same layout as BLOCK_COPY_DTYPE.
struct BlockCopy {
  uint64_t src;        // address of the first element, in the address space of `source`
  uint64_t dst;        // address of the first element, in this process or device
  uint64_t rows;       // number of rows
  uint64_t row_elems;  // elements a row, contiguous on both sides
  int64_t src_pitch;   // bytes from a row to the next
  int64_t dst_pitch;
  uint32_t source;  // index of the process the source lies in
  uint16_t src_dtype;
  uint16_t dst_dtype;
};
static_assert(sizeof(BlockCopy) == 56 && alignof(BlockCopy) == 8);

// A piece of one block: either some whole rows, or a part of a single row.
struct Tile {
  uint32_t block;
  uint32_t rows;
  uint64_t first_row;
  uint64_t first_elem;
  uint64_t elems;  // elements of each row
};
static_assert(sizeof(Tile) == 32);

struct CompareResult {
  uint64_t wrong_elements;
  std::optional<std::pair<uint64_t, uint64_t>> first;  // block, element in the block (row-major)
};

// Throws TableError, naming the block and the values, for a table that must not be executed. `sources`: how many
// sources the table may name; without it the source index is not looked at.
void validate_table(const std::vector<BlockCopy>& table, std::optional<uint64_t> sources);

// Turns blocks whose rows follow each other without a gap on both sides into blocks of one row.
void collapse_rows(std::vector<BlockCopy>& table);

// Cuts a validated table into tiles of about `tile_bytes(block)` (of the wider side), in table order. Empty blocks give
// none.
std::vector<Tile> cut_tiles(const std::vector<BlockCopy>& table, const std::function<uint64_t(uint32_t)>& tile_bytes);

}  // namespace spmd
