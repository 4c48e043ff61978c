// SPDX-License-Identifier: Apache-2.0
#include "cuda/copy_table.hpp"

#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "check.hpp"
#include "cuda/device.hpp"

namespace spmd {
namespace {

constexpr uint64_t kMaxTileBytes = uint64_t{1} << 28;
constexpr uint64_t kMaxTiles = uint64_t{1} << 31;  // the kernel counts on beyond the last one

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

// The tiles from peers before those of the own device, and of all peers evenly from the first to the last, so that no
// peer is asked by everyone at the same time. Returns the number of those from peers.
uint32_t sort_by_peer(std::vector<Tile>& tiles, const std::vector<uint8_t>& peers) {
  std::array<uint32_t, 256> total{}, seen{};
  for (const Tile& tile : tiles) ++total[peers[tile.block]];
  std::vector<std::pair<double, Tile>> far;
  std::vector<Tile> near;
  for (const Tile& tile : tiles) {
    const uint8_t peer = peers[tile.block];
    if (peer == 0)
      near.push_back(tile);
    else
      far.emplace_back((seen[peer]++ + 0.5) / total[peer], tile);
  }
  std::stable_sort(far.begin(), far.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  tiles.clear();
  for (const auto& [_, tile] : far) tiles.push_back(tile);
  tiles.insert(tiles.end(), near.begin(), near.end());
  return static_cast<uint32_t>(far.size());
}

void check_tile_bytes(const char* name, uint64_t bytes) {
  if (bytes < 16 || bytes > kMaxTileBytes)  // the kernel counts within a tile in 32 bits
    throw TableError(std::string(name) + " = " + std::to_string(bytes) + ", expected 16 to 2^28");
}

bool same_shape(const BlockCopy& a, const BlockCopy& b) {
  return a.rows == b.rows && a.row_elems == b.row_elems && a.src_pitch == b.src_pitch && a.dst_pitch == b.dst_pitch &&
         a.src_dtype == b.src_dtype && a.dst_dtype == b.dst_dtype;
}

}  // namespace

struct CopyTable::DeviceState {
  DeviceState(size_t blocks, size_t tiles) : block_array(blocks), tile_array(tiles), taken(1) {}
  DeviceArray<BlockCopy> block_array;
  DeviceArray<Tile> tile_array;
  DeviceArray<TilesTaken> taken;
  Stream transfers;
  Event begin, end;
};

CopyTable::CopyTable(int device, std::vector<BlockCopy> table, const std::vector<uint8_t>& peers, uint64_t tile_bytes,
                     uint64_t far_tile_bytes)
    : device_(device), original_(table) {
  check_tile_bytes("tile_bytes", tile_bytes);
  check_tile_bytes("far_tile_bytes", far_tile_bytes);
  if (peers.size() != table.size())
    throw TableError("peers has " + std::to_string(peers.size()) + " entries for " + std::to_string(table.size()) +
                     " blocks");
  validate_table(table, std::nullopt);
  for (const BlockCopy& b : table) bytes_read_ += b.rows * b.row_elems * element_size(b.src_dtype);
  collapse_rows(table);
  tiles_ = cut_tiles(table, [&](uint32_t block) { return peers[block] == 0 ? tile_bytes : far_tile_bytes; });
  if (tiles_.size() >= kMaxTiles) throw TableError("the table has more than 2^31 tiles: use larger ones");
  far_tiles_ = sort_by_peer(tiles_, peers);

  const DeviceGuard guard(device_);
  int processors = 0;
  SPMD_CHECK_CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device_));
  grid_ = static_cast<unsigned int>(std::min<uint64_t>(tiles_.size(), static_cast<uint64_t>(processors)));
  auto made = std::make_unique<DeviceState>(table.size(), tiles_.size());  // if this fails, freed under the guard
  made->block_array.upload(table, made->transfers.get());
  made->tile_array.upload(tiles_, made->transfers.get());
  state_ = std::move(made);
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

TileQueues CopyTable::queues() {
  DeviceState& s = state();
  return {s.tile_array.get(), far_tiles_, static_cast<uint32_t>(tiles_.size()) - far_tiles_, s.taken.get()};
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
  // All launches count their tiles with the same counters, so each waits for the one before. On one stream that is
  // free.
  if (launched_) SPMD_CHECK_CUDA(cudaStreamWaitEvent(on, s.end.get(), 0));
  SPMD_CHECK_CUDA(cudaMemsetAsync(s.taken.get(), 0, sizeof(TilesTaken), on));
  SPMD_CHECK_CUDA(cudaEventRecord(s.begin.get(), on));
  launch_copy(s.block_array.get(), queues(), grid_, on);
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
  launch_compare(s.block_array.get(), queues(), device_results.get(), grid_, on);
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
