/* Linear combinations, and the inner products that their coefficients need. */

#include "_native.h"

FOR_EVERY_WIDTH static void add_scaled(
    float *restrict to, const float *restrict values, float by, Py_ssize_t count
) {
    for (Py_ssize_t k = 0; k < count; k++) {
        float scaled = values[k] * by;
        to[k] += scaled;
    }
}

FOR_EVERY_WIDTH static void add_products(
    double *restrict to, const float *one, const float *other, Py_ssize_t count
) {
    for (Py_ssize_t k = 0; k < count; k++) {
        float product = one[k] * other[k];
        to[k] += product;
    }
}

/* Returns one number per model, or NULL with an exception. */
static float *parse_coefficients(PyObject *sequence, Py_ssize_t models) {
    if (models < 1 || PySequence_Size(sequence) != models) {
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_ValueError, "there must be one coefficient for every model");
        }
        return NULL;
    }
    float *coefficients = PyMem_Calloc((size_t)models, sizeof(float));
    if (!coefficients) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < models; i++) {
        PyObject *number = PySequence_GetItem(sequence, i);
        coefficients[i] = number ? (float)PyFloat_AsDouble(number) : 0;
        Py_XDECREF(number);
        if (PyErr_Occurred()) {
            PyMem_Free(coefficients);
            return NULL;
        }
    }
    return coefficients;
}

PyDoc_STRVAR(combine_doc,
"combine(inputs, coefficients, relative, result, type) -> (bad, finite)\n\n"
"Write `sum_i c_i x_i`, or if `relative`, `b + sum_i c_i (x_i - b)`.\n\n"
"The float32 sum is rounded once, to nearest, ties to even.\n\n"
"Args:\n"
"    inputs: (buffer, type) of every x, preceded by b if `relative`. Types are BF16, F16, F32\n"
"        and F64.\n"
"    coefficients: one number for every x.\n"
"    relative: whether the first input is b.\n"
"    result: a writable buffer for as many elements.\n"
"    type: the type of the result.\n\n"
"Returns:\n"
"    The number of the first input that contains NaN or Inf, -1 if none does; and whether the\n"
"    result is finite.\n\n"
"Raises:\n"
"    ValueError: if sizes do not match or a type is unknown.");

static PyObject *combine(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *sequence, *numbers, *name, *returned = NULL;
    int relative;
    Inputs inputs = {0};
    Py_buffer result = {0};
    Strip *strips = NULL;
    float *coefficients = NULL;
    if (!PyArg_ParseTuple(args, "OOpw*O", &sequence, &numbers, &relative, &result, &name)) {
        return NULL;
    }
    int type = parse_type(name);
    if (type < 0 || parse_inputs(sequence, &inputs) < 0) goto end;
    if (!is_separate(&result, &inputs) || !has_size_of_inputs(&result, type, &inputs)) goto end;
    Py_ssize_t first = relative ? 1 : 0, models = inputs.number - first;
    if (!(coefficients = parse_coefficients(numbers, models))) goto end;
    if (!(strips = allocate_strips(&inputs, 0))) goto end;
    Py_ssize_t bad = -1;
    int nonfinite = 0;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t start = 0; start < inputs.size; start += STRIP) {
        Py_ssize_t count = strip_length(start, inputs.size);
        read_strips(&inputs, start, count, relative, strips, &bad);
        Strip *total = strips + first;
        scale(total->numbers, coefficients[0], count);
        for (Py_ssize_t i = 1; i < models; i++) {
            add_scaled(total->numbers, total[i].numbers, coefficients[i], count);
        }
        if (relative) add(total->numbers, strips[0].numbers, count);
        char *to = (char *)result.buf + start * WIDTHS[type];
        nonfinite |= write_elements(type, total, to, count);
    }
    Py_END_ALLOW_THREADS
    returned = Py_BuildValue("nO", bad, nonfinite ? Py_False : Py_True);
end:
    PyMem_Free(strips);
    PyMem_Free(coefficients);
    release_inputs(&inputs);
    PyBuffer_Release(&result);
    return returned;
}

PyDoc_STRVAR(products_doc,
"products(inputs, relative, finite_only, sums) -> bad\n\n"
"Add the products of all pairs of inputs to float64 sums.\n\n"
"Args:\n"
"    inputs: (buffer, type) of every input.\n"
"    relative: whether to subtract the first input from the others and multiply only those.\n"
"    finite_only: whether NaN and Inf factors count as 0.\n"
"    sums: a buffer of float64 [pairs, LANES], pairs (0, 0), (1, 0), (1, 1), (2, 0)...; element k\n"
"        is added to sum k % LANES.\n\n"
"Returns:\n"
"    The number of the first input that contains NaN or Inf, -1 if none does.\n\n"
"Raises:\n"
"    ValueError: if sizes do not match or a type is unknown.");

static PyObject *products(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *sequence, *returned = NULL;
    int relative, finite_only;
    Inputs inputs = {0};
    Py_buffer sums = {0};
    Strip *strips = NULL;
    if (!PyArg_ParseTuple(args, "Oppw*", &sequence, &relative, &finite_only, &sums)) return NULL;
    if (parse_inputs(sequence, &inputs) < 0 || !is_separate(&sums, &inputs)) goto end;
    Py_ssize_t first = relative ? 1 : 0, models = inputs.number - first;
    if (models < 1 || models > 1 << 15) {
        PyErr_SetString(PyExc_ValueError, "there must be from 1 to 32768 vectors to multiply");
        goto end;
    }
    size_t pairs = (size_t)(models * (models + 1) / 2);
    if (!is_array(&sums, pairs * LANES, sizeof(double))) goto end;
    if (!(strips = allocate_strips(&inputs, 0))) goto end;
    Py_ssize_t bad = -1;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t start = 0; start < inputs.size; start += STRIP) {
        Py_ssize_t count = strip_length(start, inputs.size);
        read_strips(&inputs, start, count, relative, strips, &bad);
        for (Py_ssize_t i = first; finite_only && i < inputs.number; i++) {
            clear_nonfinite(strips[i].bits, count);
        }
        double *lanes = (double *)sums.buf + start % LANES;
        for (Py_ssize_t i = first; i < inputs.number; i++) {
            for (Py_ssize_t j = first; j <= i; j++, lanes += LANES) {
                add_products(lanes, strips[i].numbers, strips[j].numbers, count);
            }
        }
    }
    Py_END_ALLOW_THREADS
    returned = PyLong_FromSsize_t(bad);
end:
    PyMem_Free(strips);
    release_inputs(&inputs);
    PyBuffer_Release(&sums);
    return returned;
}

PyMethodDef LINEAR_METHODS[] = {
    {"combine", combine, METH_VARARGS, combine_doc},
    {"products", products, METH_VARARGS, products_doc},
    {NULL, NULL, 0, NULL},
};
