// SPDX-License-Identifier: Apache-2.0
// Units: what one thread of the copy kernel moves at a time, kept in registers as 32-bit words.
//   WideUnit     16-byte loads and stores; both sides aligned to 16 bytes
//   ShiftedUnit  16-byte stores, and 16-byte loads of what lies around a source that is aligned otherwise
//   ElementUnit  one element, aligned to its size
//   ByteUnit     one element at any address
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "block_copy.hpp"

namespace spmd {

template <ElementType type>
inline constexpr uint32_t size_of = type == ElementType::RAW64                               ? 8
                                    : type == ElementType::F32 || type == ElementType::RAW32 ? 4
                                    : type == ElementType::RAW8                              ? 1
                                                                                             : 2;

template <uint32_t N>
struct Words {
  uint32_t w[N];

  __device__ bool operator==(const Words& other) const {
    uint32_t difference = 0;
#pragma unroll
    for (uint32_t i = 0; i < N; ++i) difference |= w[i] ^ other.w[i];
    return difference == 0;
  }
};

// Element i (a constant, once unrolled) of at most 4 bytes.
template <uint32_t size, uint32_t N>
__device__ __forceinline__ uint32_t get(const Words<N>& words, uint32_t i) {
  if constexpr (size == 4) return words.w[i];
  const uint32_t mask = (1u << (8 * size % 32)) - 1;
  return words.w[i * size / 4] >> (i * size % 4 * 8) & mask;
}

template <ElementType from, ElementType to>
__device__ __forceinline__ uint32_t convert_bits(uint32_t bits) {
  using enum ElementType;
  float value;
  if constexpr (from == F32) value = __uint_as_float(bits);
  if constexpr (from == BF16) value = __uint_as_float(bits << 16);
  if constexpr (from == F16) value = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  if constexpr (to == F16) return __half_as_ushort(__float2half_rn(value));
  if constexpr (to == BF16) return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  // The narrowing conversions give this NaN too.
  if constexpr (from == F16) return (bits & 0x7FFFu) > 0x7C00u ? 0x7FFFFFFFu : __float_as_uint(value);
  return __float_as_uint(value);
}

template <uint32_t N>
__device__ __forceinline__ Words<N> load_words(const char* at) {
  Words<N> words;
#pragma unroll
  for (uint32_t i = 0; i < N / 4; ++i) {
    const uint4 q = reinterpret_cast<const uint4*>(at)[i];
    words.w[4 * i] = q.x, words.w[4 * i + 1] = q.y, words.w[4 * i + 2] = q.z, words.w[4 * i + 3] = q.w;
  }
  return words;
}

template <ElementType from, ElementType to>
struct WideUnit {
  static constexpr uint32_t kSrcSize = size_of<from>, kDstSize = size_of<to>;
  static constexpr uint32_t kElems = 16 / (kSrcSize < kDstSize ? kSrcSize : kDstSize);
  static constexpr uint32_t kInWords = kElems * kSrcSize / 4, kOutWords = kElems * kDstSize / 4;
  static constexpr uint32_t kUnroll = 16 / (kInWords > kOutWords ? kInWords : kOutWords);
  using In = Words<kInWords>;
  using Out = Words<kOutWords>;

  static __device__ __forceinline__ In load(const char* at) { return load_words<kInWords>(at); }
  static __device__ __forceinline__ Out load_stored(const char* at) { return load_words<kOutWords>(at); }

  static __device__ __forceinline__ Out convert(const In& in) {
    if constexpr (from == to) {
      return in;
    } else {
      Out out{};
#pragma unroll
      for (uint32_t i = 0; i < kElems; ++i)
        out.w[i * kDstSize / 4] |= convert_bits<from, to>(get<kSrcSize>(in, i)) << (i * kDstSize % 4 * 8);
      return out;
    }
  }

  static __device__ __forceinline__ void store(const Out& out, char* at) {
#pragma unroll
    for (uint32_t i = 0; i < kOutWords / 4; ++i)
      reinterpret_cast<uint4*>(at)[i] = make_uint4(out.w[4 * i], out.w[4 * i + 1], out.w[4 * i + 2], out.w[4 * i + 3]);
  }

  static __device__ __forceinline__ bool same_element(const Out& a, const Out& b, uint32_t i) {
    if constexpr (kDstSize == 8) {
      return a.w[2 * i] == b.w[2 * i] && a.w[2 * i + 1] == b.w[2 * i + 1];
    } else {
      return get<kDstSize>(a, i) == get<kDstSize>(b, i);
    }
  }
};

template <ElementType type>
struct ShiftedUnit : WideUnit<type, type> {
  // Each load takes twice the registers until it is shifted.
  static constexpr uint32_t kUnroll = 2;

  static __device__ __forceinline__ Words<4> load(const char* at) {
    const auto address = reinterpret_cast<uint64_t>(at);
    Words<8> around = load_words<8>(reinterpret_cast<const char*>(address & ~uint64_t{15}));
    const uint32_t shift = static_cast<uint32_t>(address) & 15;
#pragma unroll
    for (uint32_t i = 0; i < 6; ++i) around.w[i] = (shift & 8) != 0 ? around.w[i + 2] : around.w[i];
#pragma unroll
    for (uint32_t i = 0; i < 5; ++i) around.w[i] = (shift & 4) != 0 ? around.w[i + 1] : around.w[i];
    Words<4> words;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) words.w[i] = __funnelshift_r(around.w[i], around.w[i + 1], (shift & 3) * 8);
    return words;
  }
};

template <uint32_t size>
struct Bits {
  using Type = uint32_t;
};
template <>
struct Bits<1> {
  using Type = uint8_t;
};
template <>
struct Bits<2> {
  using Type = uint16_t;
};
template <>
struct Bits<8> {
  using Type = uint64_t;
};

template <ElementType from, ElementType to>
struct ElementUnit {
  static constexpr uint32_t kSrcSize = size_of<from>, kDstSize = size_of<to>;
  static constexpr uint32_t kElems = 1, kUnroll = 4;
  using In = typename Bits<kSrcSize>::Type;
  using Out = typename Bits<kDstSize>::Type;

  static __device__ __forceinline__ In load(const char* at) { return *reinterpret_cast<const In*>(at); }
  static __device__ __forceinline__ Out load_stored(const char* at) { return *reinterpret_cast<const Out*>(at); }
  static __device__ __forceinline__ void store(Out out, char* at) { *reinterpret_cast<Out*>(at) = out; }
  static __device__ __forceinline__ bool same_element(Out a, Out b, uint32_t) { return a == b; }

  static __device__ __forceinline__ Out convert(In in) {
    if constexpr (from == to) {
      return in;
    } else {
      return static_cast<Out>(convert_bits<from, to>(in));
    }
  }
};

template <ElementType from, ElementType to>
struct ByteUnit : ElementUnit<from, to> {
  static constexpr uint32_t kUnroll = 1;
  using typename ElementUnit<from, to>::In;
  using typename ElementUnit<from, to>::Out;

  template <typename T>
  static __device__ __forceinline__ T gather(const char* at) {
    T bits = 0;
#pragma unroll
    for (uint32_t i = 0; i < sizeof(T); ++i)
      bits |= static_cast<T>(static_cast<T>(static_cast<unsigned char>(at[i])) << (8 * i));
    return bits;
  }
  static __device__ __forceinline__ In load(const char* at) { return gather<In>(at); }
  static __device__ __forceinline__ Out load_stored(const char* at) { return gather<Out>(at); }
  static __device__ __forceinline__ void store(Out out, char* at) {
    if constexpr (sizeof(Out) == 2) {
      // ptxas of CUDA 13.0 turns "store the low byte of what cvt.rn.bf16.f32 gave" into a conversion to an integer
      // (F2I.U8.F16). A byte permutation keeps it from seeing the two next to each other.
      at[0] = static_cast<char>(__byte_perm(out, 0, 0x4440));
      at[1] = static_cast<char>(__byte_perm(out, 0, 0x4441));
    } else {
#pragma unroll
      for (uint32_t i = 0; i < sizeof(Out); ++i) at[i] = static_cast<char>(out >> (8 * i));
    }
  }
};

}  // namespace spmd
