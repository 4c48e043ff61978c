// SPDX-License-Identifier: Apache-2.0
#include "block_copy.hpp"

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <string>

#include "errors.hpp"

namespace spmd {
namespace {

constexpr uint64_t kAddressLimit = uint64_t{1} << 63;

std::string describe(const BlockCopy& b) {
  char text[320];
  std::snprintf(text, sizeof(text),
                "src=0x%" PRIx64 " dst=0x%" PRIx64 " rows=%" PRIu64 " row_elems=%" PRIu64 " src_pitch=%" PRId64
                " dst_pitch=%" PRId64 " source=%" PRIu32 " src_dtype=%u dst_dtype=%u",
                b.src, b.dst, b.rows, b.row_elems, b.src_pitch, b.dst_pitch, b.source, b.src_dtype, b.dst_dtype);
  return text;
}

[[noreturn]] void refuse(size_t index, const BlockCopy& block, const std::string& why) {
  throw TableError("block " + std::to_string(index) + ": " + why + " (" + describe(block) + ")");
}

// All bytes of all rows lie below kAddressLimit and above zero.
bool fits(uint64_t address, uint64_t rows, uint64_t row_bytes, int64_t pitch) {
  if (rows > kAddressLimit) return false;
  const __int128 last = static_cast<__int128>(address) + static_cast<__int128>(rows - 1) * pitch;
  const __int128 low = std::min<__int128>(address, last);
  const __int128 high = std::max<__int128>(address, last) + row_bytes;
  return low > 0 && high <= static_cast<__int128>(kAddressLimit);
}

void validate_block(size_t index, const BlockCopy& b, std::optional<uint64_t> sources) {
  for (const auto& [side, type] : {std::pair{"src_dtype", b.src_dtype}, std::pair{"dst_dtype", b.dst_dtype}}) {
    if (type >= kElementTypes)
      refuse(index, b, std::string(side) + " " + std::to_string(type) + " is no element type (0 to 6)");
  }
  if (b.src_dtype != b.dst_dtype && !(is_float(b.src_dtype) && is_float(b.dst_dtype)))
    refuse(index, b,
           "cannot cast element type " + std::to_string(b.src_dtype) + " to " + std::to_string(b.dst_dtype) +
               "; casts exist among F32 (0), F16 (1) and BF16 (2)");
  if (sources && b.source >= *sources)
    refuse(index, b, "source " + std::to_string(b.source) + " of " + std::to_string(*sources) + " sources");
  if (b.rows == 0 || b.row_elems == 0) return;

  if (b.src == 0) refuse(index, b, "src is null");
  if (b.dst == 0) refuse(index, b, "dst is null");
  if (b.row_elems >= kAddressLimit / 8) refuse(index, b, "a row does not fit the address space");
  const uint64_t src_bytes = b.row_elems * element_size(b.src_dtype);
  const uint64_t dst_bytes = b.row_elems * element_size(b.dst_dtype);
  if (!fits(b.src, b.rows, src_bytes, b.src_pitch)) refuse(index, b, "src does not fit the address space");
  if (!fits(b.dst, b.rows, dst_bytes, b.dst_pitch)) refuse(index, b, "dst does not fit the address space");
  const uint64_t dst_step = b.dst_pitch < 0 ? -static_cast<uint64_t>(b.dst_pitch) : b.dst_pitch;
  if (b.rows > 1 && dst_step < dst_bytes)
    refuse(index, b, "destination rows of " + std::to_string(dst_bytes) + " bytes overlap");
}

}  // namespace

void validate_table(const std::vector<BlockCopy>& table, std::optional<uint64_t> sources) {
  if (table.size() > UINT32_MAX) throw TableError("a table holds at most 2^32 - 1 blocks");
  for (size_t i = 0; i < table.size(); ++i) validate_block(i, table[i], sources);
}

void collapse_rows(std::vector<BlockCopy>& table) {
  for (BlockCopy& b : table) {
    const auto src_bytes = static_cast<int64_t>(b.row_elems * element_size(b.src_dtype));
    const auto dst_bytes = static_cast<int64_t>(b.row_elems * element_size(b.dst_dtype));
    if (b.rows > 1 && b.src_pitch == src_bytes && b.dst_pitch == dst_bytes) {
      b.row_elems *= b.rows;
      b.rows = 1;
    }
  }
}

std::vector<Tile> cut_tiles(const std::vector<BlockCopy>& table, const std::function<uint64_t(uint32_t)>& tile_bytes) {
  std::vector<Tile> tiles;
  for (uint32_t i = 0; i < table.size(); ++i) {
    const BlockCopy& b = table[i];
    if (b.rows == 0 || b.row_elems == 0) continue;
    const uint64_t size = std::max(element_size(b.src_dtype), element_size(b.dst_dtype));
    const uint64_t tile_elems = std::max<uint64_t>(tile_bytes(i) / size, 1);
    if (b.row_elems > tile_elems) {
      for (uint64_t row = 0; row < b.rows; ++row)
        for (uint64_t at = 0; at < b.row_elems; at += tile_elems)
          tiles.push_back({i, 1, row, at, std::min(tile_elems, b.row_elems - at)});
    } else {
      const uint64_t step = tile_elems / b.row_elems;
      for (uint64_t row = 0; row < b.rows; row += step)
        tiles.push_back({i, static_cast<uint32_t>(std::min(step, b.rows - row)), row, 0, b.row_elems});
    }
  }
  return tiles;
}

}  // namespace spmd
