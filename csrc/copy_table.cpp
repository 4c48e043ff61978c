// SPDX-License-Identifier: Apache-2.0
#include "copy_table.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "check.hpp"
#include "driver.hpp"

namespace spmd {
namespace {

constexpr uint64_t kMaxTileBytes = uint64_t{1} << 28;

template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) {
    if (count > 0) SPMD_CHECK_CUDA(cudaMalloc(&data_, count * sizeof(T)));
  }
  ~DeviceArray() { (void)cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  // Complete when it returns, for every stream of the device.
  void upload(const std::vector<T>& from, cudaStream_t stream) {
    if (from.empty()) return;
    SPMD_CHECK_CUDA(cudaMemcpyAsync(data_, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice, stream));
    SPMD_CHECK_CUDA(cudaStreamSynchronize(stream));
  }
  void download(std::vector<T>& to, cudaStream_t stream) const {
    if (to.empty()) return;
    SPMD_CHECK_CUDA(cudaMemcpyAsync(to.data(), data_, to.size() * sizeof(T), cudaMemcpyDeviceToHost, stream));
    SPMD_CHECK_CUDA(cudaStreamSynchronize(stream));
  }
  T* get() const { return data_; }

 private:
  T* data_ = nullptr;
};

class Stream {
 public:
  Stream() { SPMD_CHECK_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~Stream() { (void)cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  Event() { SPMD_CHECK_CUDA(cudaEventCreate(&event_)); }
  ~Event() { (void)cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

// Merges the tiles of remote blocks evenly into the others, keeping the order of each, so that the link to the peer and
// the device's own memory are both busy from the first tile to the last.
std::vector<Tile> spread_remote(const std::vector<Tile>& tiles, const std::vector<uint8_t>& remote) {
  std::vector<Tile> near, far, merged;
  for (const Tile& tile : tiles) (remote[tile.block] != 0 ? far : near).push_back(tile);
  merged.reserve(tiles.size());
  size_t used = 0;
  for (size_t i = 0; i < tiles.size(); ++i) {
    const size_t due = static_cast<size_t>(static_cast<unsigned __int128>(i + 1) * far.size() / tiles.size());
    if (used < due)
      merged.push_back(far[used++]);
    else
      merged.push_back(near[i - used]);
  }
  return merged;
}

bool same_shape(const BlockCopy& a, const BlockCopy& b) {
  return a.rows == b.rows && a.row_elems == b.row_elems && a.src_pitch == b.src_pitch && a.dst_pitch == b.dst_pitch &&
         a.src_dtype == b.src_dtype && a.dst_dtype == b.dst_dtype;
}

}  // namespace

struct CopyTable::DeviceState {
  DeviceState(size_t blocks, size_t tiles) : block_array(blocks), tile_array(tiles) {}
  DeviceArray<BlockCopy> block_array;
  DeviceArray<Tile> tile_array;
  Stream transfers;
  Event begin, end;
};

CopyTable::CopyTable(int device, std::vector<BlockCopy> table, const std::vector<uint8_t>& remote, int blocks_per_sm,
                     uint64_t tile_bytes)
    : device_(device), original_(table) {
  if (blocks_per_sm < 1) throw TableError("blocks_per_sm = " + std::to_string(blocks_per_sm) + ", expected 1 or more");
  if (tile_bytes < 16 || tile_bytes > kMaxTileBytes)  // the kernel counts within a tile in 32 bits
    throw TableError("tile_bytes = " + std::to_string(tile_bytes) + ", expected 16 to 2^28");
  if (remote.size() != table.size())
    throw TableError("remote has " + std::to_string(remote.size()) + " entries for " + std::to_string(table.size()) +
                     " blocks");
  validate_table(table, std::nullopt);
  for (const BlockCopy& b : table) bytes_read_ += b.rows * b.row_elems * element_size(b.src_dtype);
  collapse_rows(table);
  tiles_ = spread_remote(cut_tiles(table, tile_bytes), remote);

  const DeviceGuard guard(device_);
  int processors = 0;
  SPMD_CHECK_CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device_));
  // More blocks than fit would run after the others, with their share of the tiles still to do.
  const auto blocks = static_cast<uint64_t>(processors) * std::min(blocks_per_sm, resident_blocks());
  grid_ = static_cast<unsigned int>(std::min<uint64_t>(tiles_.size(), blocks));
  state_ = std::make_unique<DeviceState>(table.size(), tiles_.size());
  state_->block_array.upload(table, state_->transfers.get());
  state_->tile_array.upload(tiles_, state_->transfers.get());
}

CopyTable::~CopyTable() {
  try {
    close();
  } catch (const NativeError&) {  // the device is lost, and its memory with it
  }
}

CopyTable::DeviceState& CopyTable::state() {
  if (!state_) throw NativeError("this CopyTable is closed");
  return *state_;
}

void CopyTable::patch(std::vector<BlockCopy> table) {
  DeviceState& s = state();
  if (table.size() != original_.size())
    throw TableError("a patch needs " + std::to_string(original_.size()) + " blocks, got " +
                     std::to_string(table.size()));
  for (size_t i = 0; i < table.size(); ++i) {
    if (!same_shape(table[i], original_[i]))
      throw TableError("block " + std::to_string(i) + ": a patch may change src, dst and source only");
  }
  validate_table(table, std::nullopt);
  collapse_rows(table);
  const DeviceGuard guard(device_);
  if (launched_) SPMD_CHECK_CUDA(cudaEventSynchronize(s.end.get()));
  s.block_array.upload(table, s.transfers.get());
}

void CopyTable::launch(uint64_t stream) {
  DeviceState& s = state();
  const DeviceGuard guard(device_);
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  SPMD_CHECK_CUDA(cudaEventRecord(s.begin.get(), on));
  launch_copy(s.block_array.get(), s.tile_array.get(), tiles_.size(), nullptr, grid_, on);
  SPMD_CHECK_CUDA(cudaEventRecord(s.end.get(), on));
  launched_ = true;
}

float CopyTable::elapsed_ms() {
  DeviceState& s = state();
  if (!launched_) throw NativeError("this CopyTable was not launched yet");
  const DeviceGuard guard(device_);
  float elapsed = 0;
  SPMD_CHECK_CUDA(cudaEventSynchronize(s.end.get()));
  SPMD_CHECK_CUDA(cudaEventElapsedTime(&elapsed, s.begin.get(), s.end.get()));
  return elapsed;
}

CompareResult CopyTable::compare(uint64_t stream) {
  DeviceState& s = state();
  const DeviceGuard guard(device_);
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  std::vector<TileResult> results(tiles_.size());
  const DeviceArray<TileResult> device_results(results.size());
  launch_copy(s.block_array.get(), s.tile_array.get(), tiles_.size(), device_results.get(), grid_, on);
  device_results.download(results, on);

  CompareResult answer{0, std::nullopt};
  for (size_t i = 0; i < results.size(); ++i) {
    answer.wrong_elements += results[i].wrong_elements;
    if (results[i].wrong_elements == 0) continue;
    const std::pair<uint64_t, uint64_t> at{tiles_[i].block, results[i].first};
    if (!answer.first || at < *answer.first) answer.first = at;
  }
  return answer;
}

void CopyTable::close() {
  if (!state_) return;
  const DeviceGuard guard(device_);
  const std::unique_ptr<DeviceState> closing = std::move(state_);
  if (launched_) SPMD_CHECK_CUDA(cudaEventSynchronize(closing->end.get()));
}

}  // namespace spmd
