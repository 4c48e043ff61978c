// SPDX-License-Identifier: Apache-2.0
#include <pybind11/stl.h>

#include "cpu/copy.hpp"
#include "cpu/process_memory.hpp"
#include "python/bindings.hpp"

namespace py = pybind11;

namespace spmd {
namespace {

py::dict copy(const py::array& array, const std::vector<int64_t>& pids, int threads) {
  std::vector<BlockCopy> table = table_from_array(array);
  CopyStats stats{};
  {
    const py::gil_scoped_release unlocked;
    stats = copy_cpu(std::move(table), pids, threads);
  }
  py::dict answer;
  answer["bytes_read"] = stats.bytes_read;
  answer["blocks"] = stats.blocks;
  return answer;
}

py::dict compare(const py::array& array, const std::vector<int64_t>& pids, int threads) {
  std::vector<BlockCopy> table = table_from_array(array);
  CompareResult result{};
  {
    const py::gil_scoped_release unlocked;
    result = compare_cpu(std::move(table), pids, threads);
  }
  return to_python(result);
}

}  // namespace

void register_cpu(py::module_& m) {
  m.def("copy_cpu", copy, py::arg("table").noconvert(), py::arg("pids"), py::arg("threads"));
  m.def("compare_cpu", compare, py::arg("table").noconvert(), py::arg("pids"), py::arg("threads"));
  m.def("allow_ptrace_by_any", allow_ptrace_by_any);
}

}  // namespace spmd
