// SPDX-License-Identifier: Apache-2.0
// Turns error codes into exceptions that print code, name, file:line. The CUDA macros expand only where cuda_runtime.h
// or cuda/driver.hpp is included.
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

#include "errors.hpp"

namespace spmd {

inline std::string hex(uint64_t address) {
  char text[24];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(address));
  return text;
}

}  // namespace spmd

#define SPMD_HERE (std::string(" at ") + __FILE_NAME__ + ":" + std::to_string(__LINE__))

#define SPMD_THROW_POSIX(what)                                                                          \
  do {                                                                                                  \
    const int spmd_errno = errno;                                                                       \
    throw ::spmd::PosixError(std::string(what) + " failed: " + std::strerror(spmd_errno) + " (errno " + \
                                 std::to_string(spmd_errno) + ")" + SPMD_HERE,                          \
                             spmd_errno);                                                               \
  } while (0)

#define SPMD_CHECK_CUDA(call)                                                                                       \
  do {                                                                                                              \
    const cudaError_t spmd_code = (call);                                                                           \
    if (spmd_code != cudaSuccess) {                                                                                 \
      (void)cudaGetLastError();                                                                                     \
      throw ::spmd::CudaError(std::string(#call) + " failed: " + cudaGetErrorString(spmd_code) + " (" +             \
                                  cudaGetErrorName(spmd_code) + ", " + std::to_string(spmd_code) + ")" + SPMD_HERE, \
                              spmd_code, cudaGetErrorName(spmd_code));                                              \
    }                                                                                                               \
  } while (0)

#define SPMD_CHECK_DRIVER(driver, call)                                                                      \
  do {                                                                                                       \
    const CUresult spmd_code = (driver).call;                                                                \
    if (spmd_code != CUDA_SUCCESS) {                                                                         \
      const std::string spmd_name = (driver).name(spmd_code);                                                \
      throw ::spmd::CudaError(                                                                               \
          std::string(#call) + " failed: " + spmd_name + " (" + std::to_string(spmd_code) + ")" + SPMD_HERE, \
          spmd_code, spmd_name);                                                                             \
    }                                                                                                        \
  } while (0)
