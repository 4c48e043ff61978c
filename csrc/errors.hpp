// SPDX-License-Identifier: Apache-2.0
// The exceptions of the native module. python/module.cpp turns each into the Python class of the same name.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace spmd {

struct NativeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A table of block copies that must not be executed. ValueError in Python.
struct TableError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

struct PosixError : NativeError {
  PosixError(const std::string& what, int error) : NativeError(what), error(error) {}
  int error;  // errno
};

// Reading the memory of another process failed. `error` (errno) chooses the Python class.
struct SourceError : NativeError {
  SourceError(const std::string& what, int64_t pid, uint64_t address, uint64_t bytes, uint64_t block, int error)
      : NativeError(what), pid(pid), address(address), bytes(bytes), block(block), error(error) {}
  int64_t pid;
  uint64_t address;
  uint64_t bytes;
  uint64_t block;
  int error;
};

struct CudaError : NativeError {
  CudaError(const std::string& what, int code, std::string name)
      : NativeError(what), code(code), name(std::move(name)) {}
  int code;
  std::string name;
};

// Memory that its allocator did not make shareable between processes.
struct NotExportableError : CudaError {
  using CudaError::CudaError;
};

}  // namespace spmd
