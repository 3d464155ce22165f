// The Python module of the CPU half. Importing it runs the op registrations; the functions tell
// what was built and which instruction set runs. Plain C API of Python (limited), so that one build
// serves every Python and, with the stable ABI of torch, every torch from 2.11.
#include <Python.h>

#include <string>

#include "../cpu/isa.h"

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) {
  return PyUnicode_FromString(sparsekern::kernels().name);
}

PyObject* available_isas(PyObject*, PyObject*) {
  const auto names = sparsekern::available_isas();
  PyObject* list = PyList_New(0);
  for (const auto& name : names) {
    PyObject* item = list ? PyUnicode_FromString(name.c_str()) : nullptr;
    if (!item || PyList_Append(list, item) < 0) {
      Py_XDECREF(item);
      Py_XDECREF(list);
      return nullptr;
    }
    Py_DECREF(item);
  }
  return list;
}

PyObject* set_cpu_isa(PyObject*, PyObject* name) {
  PyObject* bytes = PyUnicode_AsUTF8String(name);
  if (!bytes) return nullptr;
  const std::string wanted = PyBytes_AsString(bytes);
  Py_DECREF(bytes);
  if (sparsekern::set_cpu_isa(wanted)) Py_RETURN_NONE;
  std::string have;
  for (const auto& n : sparsekern::available_isas()) have += (have.empty() ? "" : ", ") + n;
  return PyErr_Format(PyExc_ValueError, "set_cpu_isa: expected one of %s, got '%s'", have.c_str(),
                      wanted.c_str());
}

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s}", "compiler", __VERSION__, "standard",
                       std::to_string(__cplusplus).c_str());
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "Name of the instruction set whose kernels run."},
    {"available_isas", available_isas, METH_NOARGS, "Instruction sets that this CPU can run."},
    {"set_cpu_isa", set_cpu_isa, METH_O, "Force an instruction set; for tests."},
    {"build_info", build_info, METH_NOARGS, "Compiler of this build."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  return PyModule_Create(&module);
}
