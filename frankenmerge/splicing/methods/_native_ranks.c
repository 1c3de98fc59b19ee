/* Order statistics of a task vector's magnitudes. The bits of a magnitude are its key, which orders
 * as the magnitude does. */

#include "_native.h"

#define DIGITS 65536 /* values of one half of a key */

/* Count the upper halves of all keys. */
static void count_upper(const uint32_t *values, int64_t *counts, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) counts[(values[k] & ~SIGN) >> 16]++;
}

/* Count the lower halves of the keys with the upper half `upper`. */
static void count_lower(
    const uint32_t *values, uint32_t upper, int64_t *counts, Py_ssize_t count
) {
    for (Py_ssize_t k = 0; k < count; k++) {
        if ((values[k] & ~SIGN) >> 16 == upper) counts[values[k] & 0xFFFFu]++;
    }
}

PyDoc_STRVAR(count_doc,
"count(inputs, upper, counts) -> bad\n\n"
"Count the upper or lower halves of a task vector's keys, the bits of its magnitudes.\n\n"
"Args:\n"
"    inputs: (buffer, type) of the base and of the model.\n"
"    upper: None to count the upper halves; otherwise the upper half of the keys whose lower\n"
"        halves are counted.\n"
"    counts: a buffer of int64 [65536] to which the counts are added.\n\n"
"Returns:\n"
"    The number of the first input that contains NaN or Inf, -1 if none does.\n\n"
"Raises:\n"
"    ValueError: if sizes do not match or a type is unknown.");

static PyObject *count(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *sequence, *half, *returned = NULL;
    Inputs inputs = {0};
    Py_buffer counts = {0};
    Strip *strips = NULL;
    if (!PyArg_ParseTuple(args, "OOw*", &sequence, &half, &counts)) return NULL;
    long upper = half == Py_None ? -1 : PyLong_AsLong(half);
    if (half != Py_None && (upper < 0 || upper >= DIGITS)) {
        if (!PyErr_Occurred()) {
            PyErr_Format(
                PyExc_ValueError, "the upper half of a key must be from 0 to 65535, not %ld", upper
            );
        }
        goto end;
    }
    if (parse_pair(sequence, &inputs) < 0 || !is_separate(&counts, &inputs)) goto end;
    if (!is_array(&counts, DIGITS, sizeof(int64_t))) goto end;
    if (!(strips = allocate_strips(&inputs, 0))) goto end;
    Py_ssize_t bad = -1;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t start = 0; start < inputs.size; start += STRIP) {
        Py_ssize_t size = strip_length(start, inputs.size);
        read_strips(&inputs, start, size, 1, strips, &bad);
        if (upper < 0) count_upper(strips[1].bits, counts.buf, size);
        else count_lower(strips[1].bits, (uint32_t)upper, counts.buf, size);
    }
    Py_END_ALLOW_THREADS
    returned = PyLong_FromSsize_t(bad);
end:
    PyMem_Free(strips);
    release_inputs(&inputs);
    PyBuffer_Release(&counts);
    return returned;
}

PyDoc_STRVAR(find_doc,
"find(inputs, key, nth) -> (index, equal)\n\n"
"Find the nth element of a task vector, counted from 0, whose magnitude has the bits `key`.\n\n"
"Args:\n"
"    inputs: (buffer, type) of the base and of the model.\n"
"    key: the bits of a magnitude.\n"
"    nth: how many such elements precede it.\n\n"
"Returns:\n"
"    Its index, -1 if there are fewer; and the number of such elements up to and including it.\n\n"
"Raises:\n"
"    ValueError: if sizes do not match or a type is unknown.");

static PyObject *find(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *sequence, *returned = NULL;
    long long number;
    uint32_t key;
    Py_ssize_t nth;
    Inputs inputs = {0};
    Strip *strips = NULL;
    if (!PyArg_ParseTuple(args, "OLn", &sequence, &number, &nth)) return NULL;
    if (parse_key(number, &key) < 0 || parse_pair(sequence, &inputs) < 0) goto end;
    if (!(strips = allocate_strips(&inputs, 0))) goto end;
    Py_ssize_t bad = -1, index = -1, equal = 0;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t start = 0; start < inputs.size && index < 0; start += STRIP) {
        Py_ssize_t size = strip_length(start, inputs.size);
        read_strips(&inputs, start, size, 1, strips, &bad);
        for (Py_ssize_t k = 0; k < size && index < 0; k++) {
            if ((strips[1].bits[k] & ~SIGN) == key && equal++ == nth) index = start + k;
        }
    }
    Py_END_ALLOW_THREADS
    returned = Py_BuildValue("nn", index, equal);
end:
    PyMem_Free(strips);
    release_inputs(&inputs);
    return returned;
}

/* Sort pairs of a key (upper half) and a column (lower half) by key: a stable radix sort, 8 bits at
 * a time. `count` is positive. Returns the sorted pairs, in one of the two buffers. */
static uint64_t *sort(uint64_t *pairs, uint64_t *spare, Py_ssize_t count) {
    static const int DIGIT = 8;
    uint32_t counts[4][256];
    memset(counts, 0, sizeof counts);
    for (Py_ssize_t k = 0; k < count; k++) {
        for (int digit = 0; digit < 4; digit++) {
            counts[digit][pairs[k] >> (32 + DIGIT * digit) & 255]++;
        }
    }
    for (int digit = 0; digit < 4; digit++) {
        uint32_t *offsets = counts[digit], before = 0;
        int shift = 32 + DIGIT * digit;
        if (offsets[pairs[0] >> shift & 255] == (uint32_t)count) continue; /* all are equal */
        for (int value = 0; value < 256; value++) {
            uint32_t here = offsets[value];
            offsets[value] = before;
            before += here;
        }
        for (Py_ssize_t k = 0; k < count; k++) spare[offsets[pairs[k] >> shift & 255]++] = pairs[k];
        uint64_t *sorted = spare;
        spare = pairs;
        pairs = sorted;
    }
    return pairs;
}

PyDoc_STRVAR(row_limits_doc,
"row_limits(inputs, limits, result) -> bad\n\n"
"Write, for every element of a task vector, the limit of its magnitude's rank in its row.\n\n"
"Of equal magnitudes, the one with the higher index ranks higher.\n\n"
"Args:\n"
"    inputs: (buffer, type) of the base and of the model, whole rows.\n"
"    limits: a buffer of uint32 with the length of a row, from the smallest magnitude's limit to\n"
"        the largest's.\n"
"    result: a writable buffer of uint32, with as many elements as the inputs.\n\n"
"Returns:\n"
"    The number of the first input that contains NaN or Inf, -1 if none does.\n\n"
"Raises:\n"
"    ValueError: if sizes do not match or a type is unknown.");

static PyObject *row_limits(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *sequence, *returned = NULL;
    Inputs inputs = {0};
    Py_buffer limits = {0}, result = {0};
    Strip *strips = NULL;
    uint64_t *pairs = NULL;
    if (!PyArg_ParseTuple(args, "Oy*w*", &sequence, &limits, &result)) return NULL;
    Py_ssize_t width = limits.len / 4;
    if (parse_pair(sequence, &inputs) < 0 || !is_separate(&result, &inputs)) goto end;
    if (!is_array(&limits, (size_t)width, 4)) goto end;
    if (!is_array(&result, (size_t)inputs.size, 4)) goto end;
    if (!width || width > UINT32_MAX || inputs.size % width) {
        PyErr_Format(
            PyExc_ValueError, "%zd elements are not whole rows of %zd", inputs.size, width
        );
        goto end;
    }
    if (!(strips = allocate_strips(&inputs, 0))) goto end;
    if (!(pairs = PyMem_Calloc(2 * (size_t)width, sizeof *pairs))) {
        PyErr_NoMemory();
        goto end;
    }
    Py_ssize_t bad = -1;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t row = 0; row < inputs.size; row += width) {
        for (Py_ssize_t start = 0; start < width; start += STRIP) {
            Py_ssize_t size = strip_length(start, width);
            read_strips(&inputs, row + start, size, 1, strips, &bad);
            for (Py_ssize_t k = 0; k < size; k++) {
                uint64_t key = strips[1].bits[k] & ~SIGN;
                pairs[start + k] = key << 32 | (uint64_t)(start + k);
            }
        }
        const uint64_t *sorted = sort(pairs, pairs + width, width);
        const uint32_t *from = limits.buf;
        uint32_t *to = (uint32_t *)result.buf + row;
        for (Py_ssize_t k = 0; k < width; k++) to[(uint32_t)sorted[k]] = from[k];
    }
    Py_END_ALLOW_THREADS
    returned = PyLong_FromSsize_t(bad);
end:
    PyMem_Free(pairs);
    PyMem_Free(strips);
    release_inputs(&inputs);
    PyBuffer_Release(&limits);
    PyBuffer_Release(&result);
    return returned;
}

PyMethodDef RANK_METHODS[] = {
    {"count", count, METH_VARARGS, count_doc},
    {"find", find, METH_VARARGS, find_doc},
    {"row_limits", row_limits, METH_VARARGS, row_limits_doc},
    {NULL, NULL, 0, NULL},
};
