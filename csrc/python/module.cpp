// SPDX-License-Identifier: Apache-2.0
#include <cerrno>
#include <cstring>
#include <string>

#include "errors.hpp"
#include "python/bindings.hpp"

namespace py = pybind11;

namespace spmd {
namespace {

// Python's exception classes, alive as long as the interpreter.
struct ErrorClasses {
  PyObject *native, *table, *posix, *source, *gone, *permission, *fault, *cuda, *not_exportable;
};
ErrorClasses classes;

PyObject* add_class(py::module_& m, const char* name, PyObject* base, const char* doc) {
  const std::string qualified = std::string("spmd_engine._C.") + name;
  PyObject* type = PyErr_NewExceptionWithDoc(qualified.c_str(), doc, base, nullptr);
  if (type == nullptr) throw py::error_already_set();
  m.add_object(name, py::reinterpret_borrow<py::object>(type));
  return type;
}

void raise(PyObject* type, const char* what, const py::dict& attributes) {
  const py::object error = py::reinterpret_borrow<py::object>(type)(what);
  for (const auto& [name, value] : attributes) error.attr(name) = value;
  PyErr_SetObject(type, error.ptr());
}

PyObject* source_class(int error) {
  switch (error) {
    case ESRCH:
      return classes.gone;
    case EPERM:
      return classes.permission;
    case EFAULT:
      return classes.fault;
    default:
      return classes.source;
  }
}

void translate(std::exception_ptr pending) {  // NOLINT(performance-unnecessary-value-param): pybind11 asks for it
  using namespace py::literals;
  try {
    if (pending) std::rethrow_exception(pending);
  } catch (const SourceError& e) {
    raise(source_class(e.error), e.what(),
          py::dict("pid"_a = e.pid, "address"_a = e.address, "bytes"_a = e.bytes, "block"_a = e.block,
                   "errno"_a = e.error));
  } catch (const PosixError& e) {
    raise(classes.posix, e.what(), py::dict("errno"_a = e.error));
  } catch (const NotExportableError& e) {
    raise(classes.not_exportable, e.what(), py::dict("code"_a = e.code, "name"_a = e.name));
  } catch (const CudaError& e) {
    raise(classes.cuda, e.what(), py::dict("code"_a = e.code, "name"_a = e.name));
  } catch (const NativeError& e) {
    raise(classes.native, e.what(), py::dict());
  } catch (const TableError& e) {
    raise(classes.table, e.what(), py::dict());
  }
}

}  // namespace

std::vector<BlockCopy> table_from_array(const py::array& array) {
  if (array.ndim() != 1 || array.itemsize() != static_cast<py::ssize_t>(sizeof(BlockCopy)) ||
      array.dtype().kind() != 'V' || (array.size() > 1 && array.strides(0) != array.itemsize()))
    throw TableError("a table is a C-contiguous array of one dimension with rows of BLOCK_COPY_DTYPE (56 bytes); got " +
                     std::to_string(array.ndim()) + " dimensions and rows of " + std::to_string(array.itemsize()) +
                     " bytes of kind '" + array.dtype().kind() + "'");
  std::vector<BlockCopy> table(static_cast<size_t>(array.size()));
  if (!table.empty()) std::memcpy(table.data(), array.data(), table.size() * sizeof(BlockCopy));
  return table;
}

py::dict to_python(const CompareResult& result) {
  py::dict answer;
  answer["wrong_elements"] = result.wrong_elements;
  answer["first"] = result.first ? py::object(py::make_tuple(result.first->first, result.first->second)) : py::none();
  return answer;
}

void register_errors(py::module_& m) {
  classes.native = add_class(m, "NativeError", PyExc_RuntimeError, "Base of the errors of the native module.");
  classes.table = add_class(m, "TableError", PyExc_ValueError, "A table of block copies that must not be executed.");
  classes.posix = add_class(m, "PosixError", classes.native, "A system call failed; errno says how.");
  classes.source = add_class(m, "SourceError", classes.native,
                             "Reading another process failed; has pid, address, bytes, block and errno.");
  classes.gone = add_class(m, "SourceGoneError", classes.source, "The source process is gone.");
  classes.permission = add_class(m, "SourcePermissionError", classes.source, "The source process may not be read.");
  classes.fault = add_class(m, "SourceFaultError", classes.source, "The source address is not mapped.");
  classes.cuda = add_class(m, "CudaError", classes.native, "A CUDA call failed; has code and name.");
  classes.not_exportable =
      add_class(m, "NotExportableError", classes.cuda, "Device memory that its allocator did not make shareable.");
  py::register_local_exception_translator(translate);
}

}  // namespace spmd

PYBIND11_MODULE(_C, m) {
  m.doc() = "Copies blocks of memory between processes and devices. Use spmd_engine._native.";
  spmd::register_errors(m);
  spmd::register_cpu(m);
  spmd::register_snapshot(m);
  spmd::register_cuda(m);
}
