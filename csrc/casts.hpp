// SPDX-License-Identifier: Apache-2.0
// Casts among F32, F16 and BF16 as IEEE 754 asks: to nearest, ties to even, overflow to infinity, subnormals kept.
// They work on bits, so neither flush-to-zero modes nor the compiler's target change a result. A NaN becomes the NaN
// that NVIDIA's conversion instructions give (all ones, positive), so both backends agree.
#pragma once

#include <bit>
#include <cstdint>

namespace spmd {

inline uint32_t f32_from_bf16(uint16_t b) { return uint32_t{b} << 16; }

inline uint16_t bf16_from_f32(uint32_t f) {
  const uint32_t rounded = (f + 0x7FFFu + ((f >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((f & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FFFu : rounded);
}

inline uint32_t f32_from_f16(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16;
  const uint32_t mag = h & 0x7FFFu;
  const uint32_t normal = (mag << 13) + (112u << 23);
  // A subnormal half is a whole number of 2^-24, and a normal float.
  const uint32_t subnormal = std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(mag)) * 0x1p-24f);
  const uint32_t finite = mag < 0x0400u ? subnormal : normal;
  const uint32_t value = sign | (mag == 0x7C00u ? 0x7F800000u : finite);
  return mag > 0x7C00u ? 0x7FFFFFFFu : value;
}

inline uint16_t f16_from_f32(uint32_t f) {
  const uint32_t sign = (f >> 16) & 0x8000u;
  const uint32_t mag = f & 0x7FFFFFFFu;
  const uint32_t normal = (mag - (112u << 23) + 0x0FFFu + ((mag >> 13) & 1u)) >> 13;
  // The last place of 0.5f is 2^-24, so the addition rounds to a whole number of smallest halves.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(mag) + 0.5f) - 0x3F000000u;
  const uint32_t finite = mag < 0x38800000u ? subnormal : normal;
  const uint32_t value = sign | (mag >= 0x477FF000u ? 0x7C00u : finite);  // from 65520 on: infinity
  return static_cast<uint16_t>(mag > 0x7F800000u ? 0x7FFFu : value);
}

}  // namespace spmd
