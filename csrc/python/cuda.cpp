// SPDX-License-Identifier: Apache-2.0
#include <pybind11/stl.h>

#include <memory>

#include "cuda/copy_table.hpp"
#include "cuda/device.hpp"
#include "cuda/exporting.hpp"
#include "cuda/mapping.hpp"
#include "python/bindings.hpp"

namespace py = pybind11;

namespace spmd {
namespace {

using Unlocked = py::call_guard<py::gil_scoped_release>;

std::unique_ptr<CopyTable> make_table(int device, const py::array& array, const std::vector<uint8_t>& peers,
                                      uint64_t tile_bytes, uint64_t far_tile_bytes) {
  std::vector<BlockCopy> table = table_from_array(array);
  const py::gil_scoped_release unlocked;
  return std::make_unique<CopyTable>(device, std::move(table), peers, tile_bytes, far_tile_bytes);
}

void patch(CopyTable& self, const py::array& array) {
  std::vector<BlockCopy> table = table_from_array(array);
  const py::gil_scoped_release unlocked;
  self.patch(std::move(table));
}

py::dict compare(CopyTable& self, uint64_t stream) {
  CompareResult result{};
  {
    const py::gil_scoped_release unlocked;
    result = self.compare(stream);
  }
  return to_python(result);
}

py::tuple export_bytes(uint64_t address) {
  const ExportedAllocation exported = export_allocation(address);
  return py::make_tuple(exported.base, exported.size, py::bytes(exported.handle));
}

std::unique_ptr<IpcMapping> open_handle(int device, const py::bytes& handle) {
  const std::string raw = handle;
  const py::gil_scoped_release unlocked;
  return std::make_unique<IpcMapping>(device, raw);
}

}  // namespace

void register_cuda(py::module_& m) {
  m.attr("has_cuda") = true;
  m.def("export_allocation", export_bytes, py::arg("address"));
  m.def("allocation_ids", allocation_ids, py::arg("addresses"));
  m.def("pin", pin, py::arg("device"), py::arg("address"), py::arg("size"), Unlocked());
  m.def("unpin", unpin, py::arg("device"), py::arg("address"), Unlocked());
  m.def("device_uuid", device_uuid, py::arg("device"), Unlocked());
  m.def("export_descriptors", export_descriptors, py::arg("addresses"), Unlocked());
  py::class_<IpcMapping>(m, "IpcMapping")
      .def(py::init(&open_handle), py::arg("device"), py::arg("handle"))
      .def("close", &IpcMapping::close, Unlocked())
      .def_property_readonly("base", &IpcMapping::base);
  py::class_<ChunkMapping>(m, "ChunkMapping")
      .def(py::init<int, std::vector<uint64_t>>(), py::arg("device"), py::arg("sizes"), Unlocked())
      .def("map", &ChunkMapping::map, py::arg("descriptors"), Unlocked())
      .def("close", &ChunkMapping::close, Unlocked())
      .def_property_readonly("base", &ChunkMapping::base)
      .def_property_readonly("mapped", &ChunkMapping::mapped);
  py::class_<CopyTable>(m, "CopyTable")
      .def(py::init(&make_table), py::arg("device"), py::arg("table").noconvert(), py::arg("peers"),
           py::arg("tile_bytes"), py::arg("far_tile_bytes"))
      .def("patch", patch, py::arg("table").noconvert())
      .def("launch", &CopyTable::launch, py::arg("stream"), Unlocked())
      .def("elapsed_ms", &CopyTable::elapsed_ms, Unlocked())
      .def("compare", compare, py::arg("stream"))
      .def("close", &CopyTable::close, Unlocked())
      .def_property_readonly("tiles", &CopyTable::tile_count)
      .def_property_readonly("bytes_read", &CopyTable::bytes_read);
}

}  // namespace spmd
