// SPDX-License-Identifier: Apache-2.0
// Registers the parts of the Python module `spmd_engine._C`. Nothing outside of this folder knows Python.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <vector>

#include "block_copy.hpp"

namespace spmd {

// Copies the rows of a numpy table, which may be read-only. Throws TableError for another layout.
std::vector<BlockCopy> table_from_array(const pybind11::array& array);
pybind11::dict to_python(const CompareResult& result);

void register_errors(pybind11::module_& m);
void register_cpu(pybind11::module_& m);
void register_snapshot(pybind11::module_& m);
// Defined by cuda.cpp or cuda_absent.cpp; CMake chooses.
void register_cuda(pybind11::module_& m);

}  // namespace spmd
