/* The module of the extension; _native.h describes its files. */

#include "_native.h"

static int fill(PyObject *module) {
    PyMethodDef *const tables[] = {LINEAR_METHODS, RANK_METHODS, THINNING_METHODS};
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) {
        if (PyModule_AddFunctions(module, tables[i]) < 0) return -1;
    }
    return PyModule_AddIntConstant(module, "LANES", LANES);
}

static PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, (void *)fill}, {0, NULL}};

PyDoc_STRVAR(module_doc,
"The passes of a merge in C; methods/native_span.py and methods/native_sparse.py call them.");

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_native",
    .m_doc = module_doc,
    .m_slots = SLOTS,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&MODULE); }
