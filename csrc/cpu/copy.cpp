// SPDX-License-Identifier: Apache-2.0
#include "cpu/copy.hpp"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>

#include "block_copy.hpp"
#include "casts.hpp"
#include "cpu/process_memory.hpp"
#include "cpu/threads.hpp"
#include "errors.hpp"

namespace spmd {
namespace {

constexpr uint64_t kTileBytes = uint64_t{1} << 18;

// A further piece in an iovec list costs about as much as reading this many bytes more. It is less than a page, so a
// gap cannot hide a page that no row touches: reading over gaps meets no unmapped page.
constexpr uint64_t kLongestGap = 3072;
// Bounds the staging buffer, and keeps it in the cache.
constexpr uint64_t kStagingBytes = kTileBytes;

using CastRow = void (*)(const std::byte*, std::byte*, size_t);

template <typename From, typename To, To (*cast)(From)>
void cast_row(const std::byte* src, std::byte* dst, size_t elems) {
  for (size_t i = 0; i < elems; ++i) {
    From from;
    std::memcpy(&from, src + i * sizeof(From), sizeof(From));
    const To to = cast(from);
    std::memcpy(dst + i * sizeof(To), &to, sizeof(To));
  }
}

inline uint16_t bf16_from_f16(uint16_t h) { return bf16_from_f32(f32_from_f16(h)); }
inline uint16_t f16_from_bf16(uint16_t b) { return f16_from_f32(f32_from_bf16(b)); }

constexpr CastRow kCasts[3][3] = {
    {nullptr, cast_row<uint32_t, uint16_t, f16_from_f32>, cast_row<uint32_t, uint16_t, bf16_from_f32>},
    {cast_row<uint16_t, uint32_t, f32_from_f16>, nullptr, cast_row<uint16_t, uint16_t, bf16_from_f16>},
    {cast_row<uint16_t, uint32_t, f32_from_bf16>, cast_row<uint16_t, uint16_t, f16_from_bf16>, nullptr}};

CastRow find_cast(const BlockCopy& b) {
  return b.src_dtype == b.dst_dtype ? nullptr : kCasts[b.src_dtype][b.dst_dtype];
}

class Buffer {
 public:
  std::byte* reserve(size_t bytes) {
    if (bytes > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{64})));
      size_ = bytes;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<std::byte, Free> data_;
  size_t size_ = 0;
};

// Rows of a tile that this process can address.
struct Rows {
  const std::byte* data;
  int64_t pitch;
};

struct Worker {
  Buffer staging;
  Buffer cast_row;
  std::vector<iovec> local, remote;
  uint64_t bytes_read = 0;
  CompareResult compared{0, std::nullopt};
};

// A tile with its addresses worked out.
struct Piece {
  const BlockCopy& block;
  Tile tile;
  uint64_t src, dst, src_row_bytes, dst_row_bytes;
  pid_t pid;  // 0: this process

  Piece(const BlockCopy& b, const Tile& t, pid_t source_pid)
      : block(b),
        tile(t),
        src(b.src + t.first_row * static_cast<uint64_t>(b.src_pitch) + t.first_elem * element_size(b.src_dtype)),
        dst(b.dst + t.first_row * static_cast<uint64_t>(b.dst_pitch) + t.first_elem * element_size(b.dst_dtype)),
        src_row_bytes(t.elems * element_size(b.src_dtype)),
        dst_row_bytes(t.elems * element_size(b.dst_dtype)),
        pid(source_pid) {}

  std::byte* dst_row(uint64_t row) const {
    return reinterpret_cast<std::byte*>(dst + row * static_cast<uint64_t>(block.dst_pitch));
  }
  uint64_t src_row(uint64_t row) const { return src + row * static_cast<uint64_t>(block.src_pitch); }

  bool read_over_gaps() const {
    if (tile.rows == 1) return true;
    if (block.src_pitch <= 0) return false;
    return static_cast<uint64_t>(block.src_pitch) <= src_row_bytes + kLongestGap;
  }

  // How many rows fit the staging buffer.
  uint64_t rows_at_once() const {
    if (pid == 0 || tile.rows == 1 || !read_over_gaps()) return tile.rows;
    return std::max<uint64_t>(kStagingBytes / static_cast<uint64_t>(block.src_pitch), 1);
  }
};

// Reads rows of another process in lists of pieces; `to(row)` says where a row goes.
template <typename To>
void read_rows(const Piece& piece, Worker& worker, To to) {
  for (uint64_t begin = 0; begin < piece.tile.rows; begin += kMaxPieces) {
    const uint64_t end = std::min<uint64_t>(begin + kMaxPieces, piece.tile.rows);
    worker.local.clear();
    worker.remote.clear();
    for (uint64_t row = begin; row < end; ++row) {
      worker.local.push_back({to(row), piece.src_row_bytes});
      worker.remote.push_back({reinterpret_cast<void*>(piece.src_row(row)), piece.src_row_bytes});
    }
    read_process(piece.pid, piece.tile.block, worker.local, worker.remote);
  }
}

// Makes the rows of a tile addressable, through the staging buffer if they lie in another process.
Rows fetch(const Piece& piece, Worker& worker) {
  if (piece.pid == 0) return {reinterpret_cast<const std::byte*>(piece.src), piece.block.src_pitch};
  if (piece.read_over_gaps()) {
    const uint64_t span = (piece.tile.rows - 1) * static_cast<uint64_t>(piece.block.src_pitch) + piece.src_row_bytes;
    std::byte* data = worker.staging.reserve(span);
    worker.local.assign(1, {data, span});
    worker.remote.assign(1, {reinterpret_cast<void*>(piece.src), span});
    read_process(piece.pid, piece.tile.block, worker.local, worker.remote);
    return {data, piece.block.src_pitch};
  }
  std::byte* data = worker.staging.reserve(piece.tile.rows * piece.src_row_bytes);
  read_rows(piece, worker, [&](uint64_t row) { return data + row * piece.src_row_bytes; });
  return {data, static_cast<int64_t>(piece.src_row_bytes)};
}

void copy_tile(const Piece& piece, Worker& worker) {
  const CastRow cast = find_cast(piece.block);
  worker.bytes_read += piece.tile.rows * piece.src_row_bytes;
  if (piece.pid != 0 && cast == nullptr && (piece.tile.rows == 1 || !piece.read_over_gaps())) {
    read_rows(piece, worker, [&](uint64_t row) { return piece.dst_row(row); });
    return;
  }
  const Rows rows = fetch(piece, worker);
  for (uint64_t row = 0; row < piece.tile.rows; ++row) {
    const std::byte* src = rows.data + static_cast<int64_t>(row) * rows.pitch;
    if (cast != nullptr)
      cast(src, piece.dst_row(row), piece.tile.elems);
    else
      std::memcpy(piece.dst_row(row), src, piece.src_row_bytes);
  }
}

void compare_row(const std::byte* expected, const std::byte* got, size_t size, uint64_t elems, uint64_t block,
                 uint64_t first_elem, CompareResult& result) {
  if (std::memcmp(expected, got, elems * size) == 0) return;
  for (uint64_t i = 0; i < elems; ++i) {
    if (std::memcmp(expected + i * size, got + i * size, size) == 0) continue;
    ++result.wrong_elements;
    const std::pair at{block, first_elem + i};
    if (!result.first || at < *result.first) result.first = at;
  }
}

void compare_tile(const Piece& piece, Worker& worker) {
  const CastRow cast = find_cast(piece.block);
  const Rows rows = fetch(piece, worker);
  for (uint64_t row = 0; row < piece.tile.rows; ++row) {
    const std::byte* expected = rows.data + static_cast<int64_t>(row) * rows.pitch;
    if (cast != nullptr) {
      std::byte* converted = worker.cast_row.reserve(piece.dst_row_bytes);
      cast(expected, converted, piece.tile.elems);
      expected = converted;
    }
    const uint64_t first_elem = (piece.tile.first_row + row) * piece.block.row_elems + piece.tile.first_elem;
    compare_row(expected, piece.dst_row(row), element_size(piece.block.dst_dtype), piece.tile.elems, piece.tile.block,
                first_elem, worker.compared);
  }
}

std::vector<pid_t> resolve_pids(const std::vector<int64_t>& pids) {
  std::vector<pid_t> resolved;
  for (size_t i = 0; i < pids.size(); ++i) {
    if (pids[i] < 0 || pids[i] > INT32_MAX)
      throw TableError("pids[" + std::to_string(i) + "] = " + std::to_string(pids[i]) + " is no process id");
    resolved.push_back(pids[i] == getpid() ? 0 : static_cast<pid_t>(pids[i]));
  }
  return resolved;
}

// Cuts the table and lets `threads` workers take tiles until none is left or one of them has failed.
std::vector<Worker> run_tiles(std::vector<BlockCopy>& table, const std::vector<int64_t>& pids, int threads,
                              void (*run_tile)(const Piece&, Worker&)) {
  if (threads < 1) throw TableError("threads = " + std::to_string(threads) + ", expected 1 or more");
  validate_table(table, pids.size());
  const std::vector<pid_t> resolved = resolve_pids(pids);
  collapse_rows(table);
  const std::vector<Tile> tiles = cut_tiles(table, [](uint32_t) { return kTileBytes; });

  std::vector<Worker> workers(std::clamp<size_t>(tiles.size(), 1, static_cast<size_t>(threads)));
  std::atomic<size_t> next{0};
  std::atomic<bool> stop{false};
  std::mutex failure_mutex;
  std::exception_ptr failure;
  const auto work = [&](Worker& worker) {
    try {
      for (size_t i = next++; i < tiles.size() && !stop.load(std::memory_order_relaxed); i = next++) {
        Tile part = tiles[i];
        const uint64_t end = part.first_row + part.rows;
        const BlockCopy& block = table[part.block];
        const pid_t pid = resolved[block.source];
        const uint64_t step = Piece(block, part, pid).rows_at_once();
        for (; part.first_row < end; part.first_row += step) {
          part.rows = static_cast<uint32_t>(std::min(step, end - part.first_row));
          run_tile(Piece(block, part, pid), worker);
        }
      }
    } catch (...) {
      const std::lock_guard lock(failure_mutex);
      if (!failure) failure = std::current_exception();
      stop = true;
    }
  };
  run_on_threads(static_cast<int>(workers.size()), [&](int number) { work(workers[static_cast<size_t>(number)]); });
  if (failure) std::rethrow_exception(failure);
  return workers;
}

}  // namespace

CopyStats copy_cpu(std::vector<BlockCopy> table, const std::vector<int64_t>& pids, int threads) {
  CopyStats stats{0, table.size()};
  for (const Worker& worker : run_tiles(table, pids, threads, copy_tile)) stats.bytes_read += worker.bytes_read;
  return stats;
}

CompareResult compare_cpu(std::vector<BlockCopy> table, const std::vector<int64_t>& pids, int threads) {
  CompareResult result{0, std::nullopt};
  for (const Worker& worker : run_tiles(table, pids, threads, compare_tile)) {
    result.wrong_elements += worker.compared.wrong_elements;
    const auto& first = worker.compared.first;
    if (first && (!result.first || *first < *result.first)) result.first = first;
  }
  return result;
}

}  // namespace spmd
