// SPDX-License-Identifier: Apache-2.0
// Reads where all tensors of a module or a mapping are, as numbers to compare with those of an earlier look. It works
// on Python objects, by the names of their attributes, and links nothing of torch: a loop over 400 modules and as many
// tensors in Python takes several times as long, on the path of every weight update.
#include <cstdint>
#include <vector>

#include "bindings.hpp"

namespace py = pybind11;

namespace spmd {
namespace {

// The attributes' names, made once: looking an attribute up by a C string would make a string each time.
struct Names {
  py::str modules = intern("_modules"), parameters = intern("_parameters"), buffers = intern("_buffers");
  py::str spec = intern("_spec"), local = intern("_local_tensor"), dtype = intern("dtype");
  py::str data_ptr = intern("data_ptr"), size = intern("size"), stride = intern("stride");

  static py::str intern(const char* text) { return py::reinterpret_steal<py::str>(PyUnicode_InternFromString(text)); }
};

py::object checked(PyObject* result) {
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

class Snapshot {
 public:
  Snapshot(const Names& names, PyTypeObject* sharded_type) : names_(names), sharded_type_(sharded_type) {}

  void add_module(const py::handle& module) {
    add_registry(attribute(module, names_.modules), false);
    add_registry(attribute(module, names_.parameters), true);
    add_registry(attribute(module, names_.buffers), true);
  }

  void add_registry(const py::object& registry, bool of_tensors) {
    if (!PyDict_Check(registry.ptr())) throw py::type_error("a module registers its parts in a dict");
    put(static_cast<uint64_t>(PyDict_GET_SIZE(registry.ptr())));
    PyObject *name = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(registry.ptr(), &at, &name, &value) != 0;) {
      const auto kept = py::reinterpret_borrow<py::object>(value);
      put_hash(py::reinterpret_borrow<py::object>(name));
      put_identity(kept);
      if (of_tensors && !kept.is_none()) add_tensor(kept);
    }
  }

  py::bytes bytes() const {
    return py::bytes(reinterpret_cast<const char*>(numbers_.data()), numbers_.size() * sizeof(uint64_t));
  }

 private:
  static py::object attribute(const py::handle& of, const py::str& name) {
    return checked(PyObject_GetAttr(of.ptr(), name.ptr()));
  }
  static py::object call(const py::handle& of, const py::str& method) {
    return checked(PyObject_CallMethodNoArgs(of.ptr(), method.ptr()));
  }

  void put(uint64_t number) { numbers_.push_back(number); }
  void put_identity(const py::handle& object) { put(reinterpret_cast<uint64_t>(object.ptr())); }
  void put_hash(const py::handle& object) {
    const Py_hash_t hash = PyObject_Hash(object.ptr());
    if (hash == -1) throw py::error_already_set();
    put(static_cast<uint64_t>(hash));
  }

  void add_tensor(const py::object& tensor) {
    py::object local = tensor;
    if (PyType_IsSubtype(Py_TYPE(tensor.ptr()), sharded_type_) != 0) {
      put_identity(attribute(tensor, names_.spec));
      local = attribute(tensor, names_.local);
      put_identity(local);
    }
    put_hash(call(local, names_.data_ptr));
    put_hash(call(local, names_.size));
    put_hash(call(local, names_.stride));
    put_identity(attribute(local, names_.dtype));
  }

  const Names& names_;
  PyTypeObject* sharded_type_;
  std::vector<uint64_t> numbers_;
};

py::bytes snapshot(const py::list& modules, const py::dict& mapping, const py::type& sharded_type) {
  static const auto* names = new Names();  // never freed: the interpreter may end before this module
  Snapshot seen(*names, reinterpret_cast<PyTypeObject*>(sharded_type.ptr()));
  for (const py::handle& module : modules) seen.add_module(module);
  seen.add_registry(mapping, true);
  return seen.bytes();
}

}  // namespace

void register_snapshot(py::module_& m) {
  m.def("snapshot", snapshot, py::arg("modules"), py::arg("mapping"), py::arg("sharded_type"));
}

}  // namespace spmd
