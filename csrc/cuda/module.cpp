// The Python module of the CUDA half. Importing it registers the library products as ops and starts
// nothing: the libraries are opened and handles made when a product first needs them.
#include <Python.h>

#include "handles.h"

namespace {

PyObject* free_plan(PyObject*, PyObject* number) {
  const long long n = PyLong_AsLongLong(number);
  if (n == -1 && PyErr_Occurred()) return nullptr;
  return PyBool_FromLong(sparsekern::free_plan(n));
}

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:i,s:i}", "compiler", __VERSION__, "cuda", CUDART_VERSION, "cusparse",
                       CUSPARSE_VERSION);
}

PyMethodDef methods[] = {
    {"free_plan", free_plan, METH_O, "Free a plan of cuSPARSE by its number."},
    {"build_info", build_info, METH_NOARGS, "Compiler and header versions of this build."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda() {
  return PyModule_Create(&module);
}
