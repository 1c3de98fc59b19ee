/* Arguments of the passes, and reading of inputs into strips. */

#include "_native.h"

static const char *const NAMES[TYPES] = {"BF16", "F16", "F32", "F64"};

int parse_type(PyObject *name) {
    for (int type = 0; type < TYPES; type++) {
        if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, NAMES[type]) == 0) {
            return type;
        }
    }
    PyErr_Format(PyExc_ValueError, "the type must be BF16, F16, F32 or F64, not %R", name);
    return -1;
}

/* Get one buffer and its type; returns 0, or -1 with an exception. */
static int parse_input(PyObject *pair, Input *input) {
    PyObject *buffer, *name;
    if (!pair) return -1;
    if (!PyTuple_Check(pair)) {
        PyErr_SetString(PyExc_TypeError, "an input must be (buffer, type)");
        return -1;
    }
    if (!PyArg_ParseTuple(pair, "OO;an input must be (buffer, type)", &buffer, &name)) return -1;
    if ((input->type = parse_type(name)) < 0) return -1;
    return PyObject_GetBuffer(buffer, &input->view, PyBUF_SIMPLE);
}

int parse_inputs(PyObject *sequence, Inputs *inputs) {
    Py_ssize_t number = PySequence_Size(sequence);
    if (number < 0) return -1;
    if (number == 0) {
        PyErr_SetString(PyExc_ValueError, "there must be at least one input");
        return -1;
    }
    if (!(inputs->items = PyMem_Calloc((size_t)number, sizeof(Input)))) {
        PyErr_NoMemory();
        return -1;
    }
    inputs->number = number;
    for (Py_ssize_t i = 0; i < number; i++) {
        Input *input = &inputs->items[i];
        PyObject *pair = PySequence_GetItem(sequence, i);
        int failed = parse_input(pair, input) < 0;
        Py_XDECREF(pair);
        if (failed) return -1;
        Py_ssize_t width = WIDTHS[input->type], size = input->view.len / width;
        if (input->view.len % width || (i && size != inputs->size)) {
            PyErr_Format(
                PyExc_ValueError,
                "all inputs must have the same number of elements; input %zd has %zd bytes", i,
                input->view.len
            );
            return -1;
        }
        inputs->size = size;
    }
    return 0;
}

int parse_pair(PyObject *sequence, Inputs *inputs) {
    if (parse_inputs(sequence, inputs) < 0) return -1;
    if (inputs->number == 2) return 0;
    PyErr_SetString(PyExc_ValueError, "a task vector must have two inputs");
    return -1;
}

void release_inputs(Inputs *inputs) {
    for (Py_ssize_t i = 0; inputs->items && i < inputs->number; i++) {
        if (inputs->items[i].view.obj) PyBuffer_Release(&inputs->items[i].view);
    }
    PyMem_Free(inputs->items);
    inputs->items = NULL;
}

int parse_key(long long number, uint32_t *key) {
    if (number < 0 || number > (long long)~SIGN) {
        PyErr_Format(
            PyExc_ValueError, "the bits of a magnitude must be from 0 to 2^31 - 1, not %lld", number
        );
        return -1;
    }
    *key = (uint32_t)number;
    return 0;
}

int is_index(Py_ssize_t index) {
    if (index >= 0) return 1;
    PyErr_SetString(PyExc_ValueError, "an index must not be negative");
    return 0;
}

int is_array(const Py_buffer *buffer, size_t elements, size_t width) {
    if ((size_t)buffer->len == elements * width && (uintptr_t)buffer->buf % width == 0) return 1;
    PyErr_Format(
        PyExc_ValueError, "the buffer must be %zu aligned numbers of %zu bytes", elements, width
    );
    return 0;
}

int has_size_of_inputs(const Py_buffer *result, int type, const Inputs *inputs) {
    if (result->len % WIDTHS[type] == 0 && result->len / WIDTHS[type] == inputs->size) return 1;
    PyErr_SetString(PyExc_ValueError, "the result must have as many elements as the inputs");
    return 0;
}

int is_separate(const Py_buffer *result, const Inputs *inputs) {
    uintptr_t start = (uintptr_t)result->buf, stop = start + (uintptr_t)result->len;
    for (Py_ssize_t i = 0; i < inputs->number; i++) {
        uintptr_t first = (uintptr_t)inputs->items[i].view.buf;
        if (first < stop && start < first + (uintptr_t)inputs->items[i].view.len) {
            PyErr_SetString(PyExc_ValueError, "the result must not overlap an input");
            return 0;
        }
    }
    return 1;
}

Strip *allocate_strips(const Inputs *inputs, Py_ssize_t more) {
    Strip *strips = PyMem_Calloc((size_t)(inputs->number + more), sizeof(Strip));
    if (!strips) PyErr_NoMemory();
    return strips;
}

FOR_EVERY_WIDTH static void subtract(
    float *restrict from, const float *restrict values, Py_ssize_t count
) {
    for (Py_ssize_t k = 0; k < count; k++) from[k] -= values[k];
}

void read_strips(
    const Inputs *inputs, Py_ssize_t start, Py_ssize_t count, int relative, Strip *strips,
    Py_ssize_t *bad
) {
    int base_nonfinite = 0;
    for (Py_ssize_t i = 0; i < inputs->number; i++) {
        const Input *input = &inputs->items[i];
        const char *from = (const char *)input->view.buf + start * WIDTHS[input->type];
        int nonfinite = read_elements(input->type, from, strips + i, count);
        if (nonfinite && (*bad < 0 || i < *bad)) *bad = i;
        if (!i) base_nonfinite = nonfinite;
        if (relative && i) {
            subtract(strips[i].numbers, strips[0].numbers, count);
            if (base_nonfinite || nonfinite) unify_nan(strips[i].bits, count);
        }
    }
}
