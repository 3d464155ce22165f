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

// Why the kernels for few tokens are not in this build (the numbers of setup.py); empty if they
// are.
#ifndef SPARSEKERN_NO_KERNELS
#define SPARSEKERN_NO_KERNELS 0
#endif
const char* const kNoKernels[] = {"", "no nvcc when it was built", "nvcc older than 12.5",
                                  "no libcudart_static.a beside nvcc", "nvcc failed"};

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:i,s:i,s:s}", "compiler", __VERSION__, "cuda", CUDART_VERSION,
                       "cusparse", CUSPARSE_VERSION, "kernels", kNoKernels[SPARSEKERN_NO_KERNELS]);
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
