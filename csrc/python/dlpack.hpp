// SPDX-License-Identifier: Apache-2.0
// The part of DLPack's C exchange API that reads where a tensor is, without owning anything and without an import of
// torch's headers: https://dmlc.github.io/dlpack/latest/c_api.html. Layouts are those of major version 1.
#pragma once

#include <cstdint>

namespace spmd::dlpack {

constexpr const char* kCapsuleName = "dlpack_exchange_api";
constexpr uint32_t kMajorVersion = 1;

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;
};
static_assert(sizeof(Tensor) == 48, "DLTensor of a 64-bit platform");

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void* allocate;
  void* to_managed;
  void* from_managed;
  // 0, or -1 with a Python exception set. What it fills in lasts until control returns to Python.
  int (*describe)(void* object, Tensor* out);
  void* current_stream;
};

}  // namespace spmd::dlpack
