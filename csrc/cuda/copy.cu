// SPDX-License-Identifier: Apache-2.0
// The kernel that executes a table of block copies. A thread block takes one tile at a time. Addresses may change
// between launches, so how wide the accesses of a tile can be is decided here.
#include "check.hpp"
#include "cuda/copy_table.hpp"
#include "cuda/copy_unit.cuh"

namespace spmd {
namespace {

constexpr uint32_t kWarp = 32;
constexpr uint32_t kThreads = 512;
// On H200, 128 threads a multiprocessor leave NVLink idle at times while the near team works.
constexpr uint32_t kFarThreads = 192;
constexpr uint32_t kNoTile = UINT32_MAX;
// Shorter rows are walked as one sequence; longer ones get a warp each.
constexpr uint32_t kShortRowBytes = 256;

// What one thread has found to differ in a tile.
struct Tally {
  uint32_t wrong = 0;
  uint64_t first = UINT64_MAX;
};

// Where a unit lies: the row of the tile and the element in that row.
struct Place {
  uint32_t row, elem;
};

// A run of units in one row.
struct InRow {
  uint32_t first_elem, elems_per_unit;
  __device__ Place operator()(uint32_t unit) const { return {0, first_elem + unit * elems_per_unit}; }
};

// The single elements in front of a run of wide units, and those behind it.
struct AroundRun {
  uint32_t head, tail_begin;
  __device__ Place operator()(uint32_t unit) const { return {0, unit < head ? unit : unit - head + tail_begin}; }
};

// All units of all rows, one row after the other.
struct OverRows {
  uint32_t units_per_row, elems_per_unit;
  __device__ Place operator()(uint32_t unit) const {
    const uint32_t row = unit / units_per_row;
    return {row, (unit - row * units_per_row) * elems_per_unit};
  }
};

// The rows that a team of threads works on. `first_elem` is the number in the block of the first element.
struct Area {
  const char* src;
  char* dst;
  int64_t src_pitch, dst_pitch;
  uint64_t first_elem, row_elems;

  __device__ Area row(uint32_t r) const {
    return {src + r * src_pitch, dst + r * dst_pitch, 0, 0, first_elem + r * row_elems, row_elems};
  }
};

struct Team {
  uint32_t rank, size;
};

template <typename Unit>
__device__ void tally_unit(const typename Unit::Out& expected, const typename Unit::Out& got, uint64_t first_elem,
                           Tally& tally) {
  if (expected == got) return;
#pragma unroll
  for (uint32_t i = 0; i < Unit::kElems; ++i) {
    if (Unit::same_element(expected, got, i)) continue;
    ++tally.wrong;
    tally.first = min(tally.first, first_elem + i);
  }
}

// Moves (or compares) units that a team of threads takes in turn, with 64 bytes a thread loaded before the first store.
template <bool compare, typename Unit, typename Where>
__device__ __forceinline__ void run(const Area& area, Team team, uint32_t units, Where where, Tally& tally) {
  constexpr uint32_t kUnroll = compare ? 1 : Unit::kUnroll;
  for (uint32_t begin = team.rank; begin < units; begin += team.size * kUnroll) {
    typename Unit::In in[kUnroll];
#pragma unroll
    for (uint32_t u = 0; u < kUnroll; ++u) {
      const uint32_t unit = begin + u * team.size;
      if (unit < units) {
        const Place at = where(unit);
        in[u] = Unit::load(area.src + at.row * area.src_pitch + at.elem * Unit::kSrcSize);
      }
    }
#pragma unroll
    for (uint32_t u = 0; u < kUnroll; ++u) {
      const uint32_t unit = begin + u * team.size;
      if (unit < units) {
        const Place at = where(unit);
        char* dst = area.dst + at.row * area.dst_pitch + at.elem * Unit::kDstSize;
        const typename Unit::Out out = Unit::convert(in[u]);
        if constexpr (compare) {
          const uint64_t elem = area.first_elem + at.row * area.row_elems + at.elem;
          tally_unit<Unit>(out, Unit::load_stored(dst), elem, tally);
        } else {
          Unit::store(out, dst);
        }
      }
    }
  }
}

__device__ uint32_t low_bits(const void* at, uint32_t modulus) {
  return static_cast<uint32_t>(reinterpret_cast<uint64_t>(at)) & (modulus - 1);
}

// One row: wide units where the destination is aligned, single elements around them.
template <bool compare, ElementType from, ElementType to>
__device__ __forceinline__ void run_row(const Area& row, uint32_t elems, Team team, Tally& tally) {
  constexpr uint32_t kSrcSize = size_of<from>, kDstSize = size_of<to>;
  if (low_bits(row.src, kSrcSize) != 0 || low_bits(row.dst, kDstSize) != 0) {
    run<compare, ByteUnit<from, to>>(row, team, elems, InRow{0, 1}, tally);
    return;
  }
  using Wide = WideUnit<from, to>;
  uint32_t head = min((16 - low_bits(row.dst, 16)) % 16 / kDstSize, elems);
  uint32_t groups = (elems - head) / Wide::kElems;
  const uint32_t shift = low_bits(row.src + head * kSrcSize, 16);
  if (shift == 0) {
    run<compare, Wide>(row, team, groups, InRow{head, Wide::kElems}, tally);
  } else if constexpr (from == to) {
    // Shifted loads read up to 15 bytes before and behind; keep them inside the row.
    if (groups > 0 && head * kSrcSize < shift) head += Wide::kElems, --groups;
    if (groups > 0 && (elems - head - groups * Wide::kElems) * kSrcSize < 16 - shift) --groups;
    run<compare, ShiftedUnit<from>>(row, team, groups, InRow{head, Wide::kElems}, tally);
  } else {
    head = elems;
    groups = 0;
  }
  const AroundRun around{head, head + groups * Wide::kElems};
  run<compare, ElementUnit<from, to>>(row, team, elems - groups * Wide::kElems, around, tally);
}

template <bool compare, ElementType from, ElementType to>
__device__ __forceinline__ void run_tile(const BlockCopy& b, const Tile& tile, Team all, Tally& tally) {
  constexpr uint32_t kSrcSize = size_of<from>, kDstSize = size_of<to>;
  const auto elems = static_cast<uint32_t>(tile.elems);
  const uint32_t rows = tile.rows;
  const auto first_row = static_cast<int64_t>(tile.first_row);
  const Area area{reinterpret_cast<const char*>(b.src) + first_row * b.src_pitch + tile.first_elem * kSrcSize,
                  reinterpret_cast<char*>(b.dst) + first_row * b.dst_pitch + tile.first_elem * kDstSize,
                  b.src_pitch,
                  b.dst_pitch,
                  tile.first_row * b.row_elems + tile.first_elem,
                  b.row_elems};
  const uint64_t src_bits = reinterpret_cast<uint64_t>(area.src) | static_cast<uint64_t>(area.src_pitch);
  const uint64_t dst_bits = reinterpret_cast<uint64_t>(area.dst) | static_cast<uint64_t>(area.dst_pitch);
  constexpr uint32_t kGroup = WideUnit<from, to>::kElems;
  if (rows > 1 && ((src_bits | dst_bits) & 15) == 0 && elems % kGroup == 0) {
    const uint32_t groups = elems / kGroup;
    run<compare, WideUnit<from, to>>(area, all, groups * rows, OverRows{groups, kGroup}, tally);
  } else if (rows > 1 && elems * (kSrcSize > kDstSize ? kSrcSize : kDstSize) < kShortRowBytes &&
             (src_bits & (kSrcSize - 1)) == 0 && (dst_bits & (kDstSize - 1)) == 0) {
    run<compare, ElementUnit<from, to>>(area, all, elems * rows, OverRows{elems, 1}, tally);
  } else {
    const bool alone = rows == 1;
    const Team team = alone ? all : Team{all.rank % kWarp, kWarp};
    const uint32_t step = alone ? 1 : all.size / kWarp;
    for (uint32_t r = alone ? 0 : all.rank / kWarp; r < rows; r += step)
      run_row<compare, from, to>(area.row(r), elems, team, tally);
  }
}

__host__ __device__ constexpr uint32_t kind(ElementType from, ElementType to) {
  return static_cast<uint32_t>(from) * kElementTypes + static_cast<uint32_t>(to);
}

template <bool compare>
__device__ __forceinline__ void dispatch(const BlockCopy& b, const Tile& tile, Team team, Tally& tally) {
  using enum ElementType;
  switch (uint32_t{b.src_dtype} * kElementTypes + b.dst_dtype) {
    case kind(RAW8, RAW8):
      return run_tile<compare, RAW8, RAW8>(b, tile, team, tally);
    case kind(F16, F16):
    case kind(BF16, BF16):
    case kind(RAW16, RAW16):
      return run_tile<compare, RAW16, RAW16>(b, tile, team, tally);
    case kind(F32, F32):
    case kind(RAW32, RAW32):
      return run_tile<compare, RAW32, RAW32>(b, tile, team, tally);
    case kind(RAW64, RAW64):
      return run_tile<compare, RAW64, RAW64>(b, tile, team, tally);
    case kind(F32, F16):
      return run_tile<compare, F32, F16>(b, tile, team, tally);
    case kind(F32, BF16):
      return run_tile<compare, F32, BF16>(b, tile, team, tally);
    case kind(F16, F32):
      return run_tile<compare, F16, F32>(b, tile, team, tally);
    case kind(F16, BF16):
      return run_tile<compare, F16, BF16>(b, tile, team, tally);
    case kind(BF16, F32):
      return run_tile<compare, BF16, F32>(b, tile, team, tally);
    case kind(BF16, F16):
      return run_tile<compare, BF16, F16>(b, tile, team, tally);
  }
}

// Waits for the other threads of a team. The barriers of a thread block are numbered; 0 is that of __syncthreads.
__device__ void sync_team(uint32_t barrier, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Each thread block has two teams. The near one copies what lies on this device, with as many loads under way as its
// memory is fastest with; the far one, beside it, keeps the links full from the first tile to the last. When nothing
// near is left, the near one helps with the rest.
template <uint32_t far_threads>
__global__ void __launch_bounds__(kThreads + far_threads, 1)
    copy_kernel(const BlockCopy* __restrict__ blocks, TileQueues queues) {
  __shared__ uint32_t next[2][2];
  const bool is_far = threadIdx.x >= kThreads;
  const Team team = is_far ? Team{threadIdx.x - kThreads, far_threads} : Team{threadIdx.x, kThreads};
  bool near_left = !is_far;
  const auto take = [&]() -> uint32_t {
    if (near_left) {
      const uint32_t number = atomicAdd(&queues.taken->near, 1u);
      if (number < queues.near) return queues.far + number;
      near_left = false;
    }
    const uint32_t number = atomicAdd(&queues.taken->far, 1u);
    return number < queues.far ? number : kNoTile;
  };
  uint32_t* const turns = next[is_far];
  if (team.rank == 0) turns[0] = take();
  sync_team(1 + is_far, team.size);
  Tally unused;
  for (uint32_t turn = 0, tile; (tile = turns[turn]) != kNoTile; turn ^= 1) {
    // The next one is asked for early, so that the answer is there when this one is done.
    if (team.rank == 0) turns[turn ^ 1] = take();
    dispatch<false>(blocks[queues.tiles[tile].block], queues.tiles[tile], team, unused);
    sync_team(1 + is_far, team.size);
  }
}

__global__ void __launch_bounds__(kThreads, 2)
    compare_kernel(const BlockCopy* __restrict__ blocks, const Tile* __restrict__ tiles, uint32_t tile_count,
                   TileResult* __restrict__ results) {
  __shared__ unsigned long long wrong, first;
  for (uint32_t t = blockIdx.x; t < tile_count; t += gridDim.x) {
    if (threadIdx.x == 0) wrong = 0, first = UINT64_MAX;
    __syncthreads();
    Tally tally;
    dispatch<true>(blocks[tiles[t].block], tiles[t], {threadIdx.x, kThreads}, tally);
    if (tally.wrong != 0) {
      atomicAdd(&wrong, static_cast<unsigned long long>(tally.wrong));
      atomicMin(&first, static_cast<unsigned long long>(tally.first));
    }
    __syncthreads();
    if (threadIdx.x == 0) results[t] = {wrong, first};
  }
}

}  // namespace

void launch_copy(const BlockCopy* blocks, const TileQueues& queues, unsigned int grid, cudaStream_t stream) {
  if (grid == 0) return;
  if (queues.far == 0)
    copy_kernel<0><<<grid, kThreads, 0, stream>>>(blocks, queues);
  else
    copy_kernel<kFarThreads><<<grid, kThreads + kFarThreads, 0, stream>>>(blocks, queues);
  SPMD_CHECK_CUDA(cudaGetLastError());
}

void launch_compare(const BlockCopy* blocks, const TileQueues& queues, TileResult* results, unsigned int grid,
                    cudaStream_t stream) {
  if (grid == 0) return;
  compare_kernel<<<grid, kThreads, 0, stream>>>(blocks, queues.tiles, queues.far + queues.near, results);
  SPMD_CHECK_CUDA(cudaGetLastError());
}

}  // namespace spmd
