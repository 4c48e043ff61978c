// SPDX-License-Identifier: Apache-2.0
// Reads where all tensors of a module or a mapping are, as numbers to compare with those of an earlier look. It links
// nothing of torch: modules and DTensors are Python objects here, and tensors are asked through DLPack. A loop over 400
// modules and as many tensors in Python takes ten times as long, on the path of every weight update.
//
// After a training step none of these thousands of objects is in a cache, and one leads to the next: to wait for each
// takes several times as long as to look at all. So a look also tells which addresses it has visited, for `prefetch`.
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "python/bindings.hpp"
#include "python/dlpack.hpp"

namespace py = pybind11;

namespace spmd {
namespace {

// The attributes' names, made once: looking an attribute up by a C string would make a string each time.
struct Names {
  py::str modules = intern("_modules"), parameters = intern("_parameters"), buffers = intern("_buffers");
  py::str spec = intern("_spec"), local = intern("_local_tensor");

  static py::str intern(const char* text) { return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(text)); }
};

py::object checked(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

PyTypeObject* type_of(const py::type& type) { return reinterpret_cast<PyTypeObject*>(type.ptr()); }

const dlpack::ExchangeApi& exchange_api(const py::type& tensor_type) {
  const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  const void* api = PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName);
  if (api == nullptr) throw py::error_already_set();
  const auto& found = *static_cast<const dlpack::ExchangeApi*>(api);
  if (found.major != dlpack::kMajorVersion || found.describe == nullptr) {
    throw py::type_error("tensors do not tell where they are by DLPack 1");
  }
  return found;
}

constexpr uintptr_t kCacheLine = 64;

class Snapshot {
 public:
  Snapshot(const Names& names, const py::type& tensor_type, const py::type& sharded_type)
      : names_(names),
        api_(exchange_api(tensor_type)),
        tensor_type_(type_of(tensor_type)),
        sharded_type_(type_of(sharded_type)) {}

  void add_module(const py::handle& module) {
    const py::object attributes = checked(PyObject_GenericGetDict(module.ptr(), nullptr));
    visit(module.ptr());
    visit_dict(attributes.ptr());
    add_registry(registry(attributes, names_.modules), false);
    add_registry(registry(attributes, names_.parameters), true);
    add_registry(registry(attributes, names_.buffers), true);
  }

  void add_registry(const py::handle& registry, bool of_tensors) {
    put(static_cast<uint64_t>(PyDict_GET_SIZE(registry.ptr())));
    visit_dict(registry.ptr());
    PyObject *name = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(registry.ptr(), &at, &name, &value) != 0;) {
      put_hash(name);
      visit(name);
      put(reinterpret_cast<uint64_t>(value));
      if (of_tensors && value != Py_None) add_tensor(py::reinterpret_borrow<py::object>(value));
    }
  }

  py::bytes seen() const { return as_bytes(seen_); }
  py::bytes visited() const { return as_bytes(visited_); }

 private:
  static py::bytes as_bytes(const std::vector<uint64_t>& numbers) {
    return py::bytes(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(uint64_t));
  }

  static py::handle registry(const py::object& attributes, const py::str& name) {
    PyObject* found = PyDict_GetItemWithError(attributes.ptr(), name.ptr());
    if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (found == nullptr || PyDict_Check(found) == 0) throw py::type_error("a module registers its parts in a dict");
    return found;
  }

  void put(uint64_t number) { seen_.push_back(number); }
  void visit(const void* place) { visited_.push_back(reinterpret_cast<uint64_t>(place)); }
  void visit_dict(PyObject* dict) {
    visit(dict);
    visit(reinterpret_cast<PyDictObject*>(dict)->ma_keys);
  }
  void put_hash(PyObject* object) {
    const Py_hash_t hash = PyObject_Hash(object);
    if (hash == -1) throw py::error_already_set();
    put(static_cast<uint64_t>(hash));
  }

  void add_tensor(const py::object& tensor) {
    py::object local = tensor;
    visit(tensor.ptr());
    if (PyType_IsSubtype(Py_TYPE(tensor.ptr()), sharded_type_) != 0) {
      put(reinterpret_cast<uint64_t>(checked(PyObject_GetAttr(tensor.ptr(), names_.spec.ptr())).ptr()));
      local = checked(PyObject_GetAttr(tensor.ptr(), names_.local.ptr()));
      put(reinterpret_cast<uint64_t>(local.ptr()));
      visit(local.ptr());
    }
    if (PyType_IsSubtype(Py_TYPE(local.ptr()), tensor_type_) == 0) throw py::type_error("no tensor is registered");
    dlpack::Tensor found;
    if (api_.describe(local.ptr(), &found) != 0) throw py::error_already_set();
    visit(found.shape);
    put(reinterpret_cast<uint64_t>(found.data) + found.byte_offset);
    put(static_cast<uint64_t>(found.device_type) << 32 | static_cast<uint32_t>(found.device_id));
    put(static_cast<uint64_t>(found.ndim) << 32 | found.type_lanes << 16 | found.type_bits << 8 | found.type_code);
    for (int32_t dim = 0; dim < found.ndim; ++dim) {
      put(static_cast<uint64_t>(found.shape[dim]));
      put(static_cast<uint64_t>(found.strides[dim]));
    }
  }

  const Names& names_;
  const dlpack::ExchangeApi& api_;
  PyTypeObject* tensor_type_;
  PyTypeObject* sharded_type_;
  std::vector<uint64_t> seen_, visited_;
};

py::tuple snapshot(const py::list& modules, const py::dict& mapping, const py::type& tensor_type,
                   const py::type& sharded_type) {
  static const auto* names = new Names();  // never freed: the interpreter may end before this module
  Snapshot seen(*names, tensor_type, sharded_type);
  for (const py::handle& module : modules) seen.add_module(module);
  seen.add_registry(mapping, true);
  return py::make_tuple(seen.seen(), seen.visited());
}

// Fetches the line of each place, and the one after it. Nothing need be there any more: a prefetch does not fault.
void prefetch(const py::bytes& visited) {
  const std::string_view bytes = visited;
  for (size_t at = 0; at + sizeof(uint64_t) <= bytes.size(); at += sizeof(uint64_t)) {
    uint64_t place = 0;
    std::memcpy(&place, bytes.data() + at, sizeof(place));
    __builtin_prefetch(reinterpret_cast<const void*>(place));
    __builtin_prefetch(reinterpret_cast<const void*>(place + kCacheLine));
  }
}

}  // namespace

void register_snapshot(py::module_& m) {
  m.def("snapshot", snapshot, py::arg("modules"), py::arg("mapping"), py::arg("tensor_type"), py::arg("sharded_type"));
  m.def("prefetch", prefetch, py::arg("visited"));
}

}  // namespace spmd
