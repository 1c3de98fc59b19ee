/* Thinned task vectors: the sums of their magnitudes, and their weighted sum. */

#include "_native.h"

/* Keep elements whose sign is the elected one, which for -0 is plus. */
FOR_EVERY_WIDTH static void keep_agreeing(
    uint32_t *restrict values, const float *restrict elected, Py_ssize_t count
) {
    for (Py_ssize_t k = 0; k < count; k++) {
        values[k] = (values[k] ^ bits_of(elected[k] + 0.0f)) & SIGN ? 0 : values[k];
    }
}

FOR_EVERY_WIDTH static void add_magnitudes(
    double *restrict to, const uint32_t *restrict values, Py_ssize_t count
) {
    for (Py_ssize_t k = 0; k < count; k++) to[k] += float_of(values[k] & ~SIGN);
}

FOR_EVERY_WIDTH static void add_weight(
    float *restrict to, const float *restrict values, float weight, Py_ssize_t count
) {
    for (Py_ssize_t k = 0; k < count; k++) to[k] += (float)(values[k] != 0.0f) * weight;
}

FOR_EVERY_WIDTH static void divide(
    float *restrict values, const float *restrict by, float least, Py_ssize_t count
) {
    for (Py_ssize_t k = 0; k < count; k++) {
        float nothing = by[k] <= least && by[k] >= -least;
        values[k] /= by[k] + nothing;
    }
}

static void add_all(const Strip *terms, Py_ssize_t number, Strip *total, Py_ssize_t count) {
    memcpy(total, terms, 4 * (size_t)count);
    for (Py_ssize_t i = 1; i < number; i++) add(total->numbers, terms[i].numbers, count);
}

PyDoc_STRVAR(sum_magnitudes_doc,
"sum_magnitudes(inputs, keep, start, finite_only, sums) -> bad\n\n"
"Add the magnitudes of a task vector, and of its kept elements, to float64 sums.\n\n"
"Args:\n"
"    inputs: (buffer, type) of the base and of the model.\n"
"    keep: as for `thin`.\n"
"    start: the index of the first element.\n"
"    finite_only: whether NaN and Inf count as 0.\n"
"    sums: a buffer of float64 [2, LANES], of all elements and of the kept ones; element k of the\n"
"        inputs is added to sum k % LANES.\n\n"
"Returns:\n"
"    The number of the first input that contains NaN or Inf, -1 if none does.\n\n"
"Raises:\n"
"    ValueError: if sizes do not match or a type is unknown.");

static PyObject *sum_magnitudes(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *sequence, *kept, *returned = NULL;
    Py_ssize_t first;
    int finite_only;
    Keep keep = {0};
    Inputs inputs = {0};
    Py_buffer sums = {0};
    Strip *strips = NULL;
    if (!PyArg_ParseTuple(args, "OOnpw*", &sequence, &kept, &first, &finite_only, &sums)) {
        return NULL;
    }
    if (!is_index(first) || parse_pair(sequence, &inputs) < 0) goto end;
    if (!is_separate(&sums, &inputs) || !is_array(&sums, 2 * LANES, sizeof(double))) goto end;
    if (parse_keep(kept, inputs.size, &keep) < 0) goto end;
    if (!(strips = allocate_strips(&inputs, 1))) goto end;
    Py_ssize_t bad = -1;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t start = 0; start < inputs.size; start += STRIP) {
        Py_ssize_t size = strip_length(start, inputs.size);
        double *lanes = (double *)sums.buf + start % LANES;
        Strip *delta = strips + 1, *spare = strips + 2;
        read_strips(&inputs, start, size, 1, strips, &bad);
        memcpy(spare, delta, 4 * (size_t)size);
        if (finite_only) clear_nonfinite(spare->bits, size);
        add_magnitudes(lanes, spare->bits, size);
        thin_strip(delta, &keep, first, start, size, spare);
        if (finite_only) clear_nonfinite(delta->bits, size);
        add_magnitudes(lanes + LANES, delta->bits, size);
    }
    Py_END_ALLOW_THREADS
    returned = PyLong_FromSsize_t(bad);
end:
    PyMem_Free(strips);
    release_keep(&keep);
    release_inputs(&inputs);
    PyBuffer_Release(&sums);
    return returned;
}

/* One task vector in the sum. */
typedef struct {
    float coefficient;
    float weight; /* added to the divisor where its sign agrees */
    Keep keep;
} Term;

static void release_terms(Term *terms, Py_ssize_t number) {
    for (Py_ssize_t i = 0; terms && i < number; i++) release_keep(&terms[i].keep);
    PyMem_Free(terms);
}

/* Returns 0, or -1 with an exception. */
static int parse_term(PyObject *object, Py_ssize_t size, Term *term) {
    PyObject *keep;
    if (!object) return -1;
    if (!PyTuple_Check(object)) {
        PyErr_SetString(PyExc_TypeError, "a term must be (coefficient, weight, keep)");
        return -1;
    }
    if (!PyArg_ParseTuple(object, "ffO", &term->coefficient, &term->weight, &keep)) return -1;
    return parse_keep(keep, size, &term->keep);
}

/* Returns one term per model, or NULL with an exception. */
static Term *parse_terms(PyObject *sequence, const Inputs *inputs) {
    Py_ssize_t number = inputs->number - 1;
    if (PySequence_Size(sequence) != number) {
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_ValueError, "there must be one term for every model");
        }
        return NULL;
    }
    Term *terms = PyMem_Calloc((size_t)number, sizeof(Term));
    if (!terms) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < number; i++) {
        PyObject *term = PySequence_GetItem(sequence, i);
        int failed = parse_term(term, inputs->size, &terms[i]) < 0;
        Py_XDECREF(term);
        if (failed) {
            release_terms(terms, number);
            return NULL;
        }
    }
    return terms;
}

/* Write to `total` the sum of the elements that have the sign of the sum of all terms. If `least`
 * is not negative, divide it by the sum of their weights where that exceeds `least`. */
static void add_agreeing(
    Strip *strips, const Term *terms, Py_ssize_t number, float least, Strip *total, Strip *spare,
    Py_ssize_t count
) {
    add_all(strips, number, total, count);
    if (any_nonfinite(total->bits, count)) unify_nan(total->bits, count);
    for (Py_ssize_t i = 0; i < number; i++) keep_agreeing(strips[i].bits, total->numbers, count);
    add_all(strips, number, total, count);
    if (least < 0) return;
    memset(spare, 0, 4 * (size_t)count);
    for (Py_ssize_t i = 0; i < number; i++) {
        add_weight(spare->numbers, strips[i].numbers, terms[i].weight, count);
    }
    divide(total->numbers, spare->numbers, least, count);
}

PyDoc_STRVAR(thin_doc,
"thin(inputs, terms, start, consensus, least, factor, result, type) -> (bad, finite)\n\n"
"Write `b + f sum_i c_i keep_i(x_i - b)`.\n\n"
"The float32 sum is rounded once, to nearest, ties to even.\n\n"
"Args:\n"
"    inputs: (buffer, type) of b and of every x. Types are BF16, F16, F32 and F64.\n"
"    terms: (c, weight, keep) for every x. keep is one of\n"
"        None: all elements are kept.\n"
"        (key, index, key, index): from the first boundary to before the second. Larger\n"
"            magnitudes rank first, and of equal ones the lower index.\n"
"        (generator, limit): elements whose word is below the limit. The generator is a bit\n"
"            generator of numpy that nobody else uses during the call; each of its numbers of 64\n"
"            bits gives two words of 31 bits.\n"
"        (words, limits): the same with buffers of uint32, one word and one limit per element.\n"
"    start: the index of the first element.\n"
"    consensus: whether elements without the sign of the sum are dropped.\n"
"    least: the sum of the others is divided by the sum of their weights where that exceeds this\n"
"        value; a negative value: never.\n"
"    factor: f.\n"
"    result: a writable buffer for as many elements.\n"
"    type: the type of the result.\n\n"
"Returns:\n"
"    The number of the first input that contains NaN or Inf, -1 if none does; and whether the\n"
"    result is finite.\n\n"
"Raises:\n"
"    ValueError: if sizes do not match or a type is unknown.");

static PyObject *thin(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *sequence, *listed, *name, *returned = NULL;
    Py_ssize_t first;
    int consensus;
    float least, factor;
    Inputs inputs = {0};
    Py_buffer result = {0};
    Term *terms = NULL;
    Strip *strips = NULL;
    if (!PyArg_ParseTuple(
            args, "OOnpffw*O", &sequence, &listed, &first, &consensus, &least, &factor, &result,
            &name
        )) {
        return NULL;
    }
    int type = parse_type(name);
    if (type < 0 || !is_index(first) || parse_inputs(sequence, &inputs) < 0) goto end;
    if (!is_separate(&result, &inputs) || !has_size_of_inputs(&result, type, &inputs)) goto end;
    Py_ssize_t number = inputs.number - 1;
    if (!number) {
        PyErr_SetString(PyExc_ValueError, "there must be at least one model besides the base");
        goto end;
    }
    if (!(terms = parse_terms(listed, &inputs))) goto end;
    if (!(strips = allocate_strips(&inputs, 2))) goto end;
    Py_ssize_t bad = -1;
    int nonfinite = 0;
    Py_BEGIN_ALLOW_THREADS
    Strip *deltas = strips + 1, *total = deltas + number, *spare = total + 1;
    for (Py_ssize_t start = 0; start < inputs.size; start += STRIP) {
        Py_ssize_t size = strip_length(start, inputs.size);
        read_strips(&inputs, start, size, 1, strips, &bad);
        for (Py_ssize_t i = 0; i < number; i++) {
            thin_strip(deltas + i, &terms[i].keep, first, start, size, spare);
            scale(deltas[i].numbers, terms[i].coefficient, size);
        }
        if (consensus) add_agreeing(deltas, terms, number, least, total, spare, size);
        else add_all(deltas, number, total, size);
        scale(total->numbers, factor, size);
        add(total->numbers, strips[0].numbers, size);
        char *to = (char *)result.buf + start * WIDTHS[type];
        nonfinite |= write_elements(type, total, to, size);
    }
    Py_END_ALLOW_THREADS
    returned = Py_BuildValue("nO", bad, nonfinite ? Py_False : Py_True);
end:
    PyMem_Free(strips);
    release_terms(terms, inputs.number - 1);
    release_inputs(&inputs);
    PyBuffer_Release(&result);
    return returned;
}

PyMethodDef THINNING_METHODS[] = {
    {"sum_magnitudes", sum_magnitudes, METH_VARARGS, sum_magnitudes_doc},
    {"thin", thin, METH_VARARGS, thin_doc},
    {NULL, NULL, 0, NULL},
};
