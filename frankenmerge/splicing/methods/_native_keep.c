/* Which elements of a task vector are kept: parsing, and thinning of strips. */

#include "_native.h"

void release_keep(Keep *keep) {
    Py_XDECREF(keep->owner);
    if (keep->words.obj) PyBuffer_Release(&keep->words);
    if (keep->limits.obj) PyBuffer_Release(&keep->limits);
}

/* (generator, limit); returns 0, or -1 with an exception, as the next two do. */
static int parse_generator(PyObject *owner, PyObject *limit, Keep *keep) {
    long long number = PyLong_AsLongLong(limit);
    if (PyErr_Occurred() || parse_key(number, &keep->limit) < 0) return -1;
    Py_INCREF(owner);
    keep->owner = owner;
    PyObject *capsule = PyObject_GetAttrString(owner, "capsule");
    keep->noise = capsule ? PyCapsule_GetPointer(capsule, "BitGenerator") : NULL;
    Py_XDECREF(capsule);
    return keep->noise ? 0 : -1;
}

/* (words, limits), one of each per element */
static int parse_words(PyObject *words, PyObject *limits, Py_ssize_t size, Keep *keep) {
    if (PyObject_GetBuffer(words, &keep->words, PyBUF_SIMPLE) < 0) return -1;
    if (PyObject_GetBuffer(limits, &keep->limits, PyBUF_SIMPLE) < 0) return -1;
    if (!is_array(&keep->words, (size_t)size, 4)) return -1;
    return is_array(&keep->limits, (size_t)size, 4) ? 0 : -1;
}

/* (key, index, key, index) */
static int parse_boundaries(PyObject *tuple, Keep *keep) {
    long long first, end;
    if (!PyArg_ParseTuple(
            tuple, "LnLn;two boundaries must be (key, index, key, index)", &first,
            &keep->first_index, &end, &keep->end_index
        )) {
        return -1;
    }
    if (!is_index(keep->first_index) || !is_index(keep->end_index)) return -1;
    return parse_key(first, &keep->first_key) < 0 ? -1 : parse_key(end, &keep->end_key);
}

int parse_keep(PyObject *object, Py_ssize_t size, Keep *keep) {
    memset(keep, 0, sizeof *keep);
    if (object == Py_None) {
        keep->first_key = ~SIGN;
        keep->end_index = PY_SSIZE_T_MAX;
        return 0;
    }
    if (!PyTuple_Check(object)) {
        PyErr_SetString(
            PyExc_TypeError,
            "keep must be None, two boundaries, (generator, limit) or (words, limits)"
        );
        return -1;
    }
    if (PyTuple_Size(object) != 2) return parse_boundaries(object, keep);
    PyObject *source = PyTuple_GetItem(object, 0), *limit = PyTuple_GetItem(object, 1);
    if (PyLong_Check(limit)) return parse_generator(source, limit, keep);
    return parse_words(source, limit, size, keep);
}

/* Thinning of strips. What is dropped becomes 0. */

/* Keep magnitudes from `low` to below `high`. */
FOR_EVERY_WIDTH static void keep_between(
    uint32_t *values, uint32_t low, uint32_t high, Py_ssize_t count
) {
    uint32_t range = high - low;
    for (Py_ssize_t k = 0; k < count; k++) {
        values[k] = (values[k] & ~SIGN) - low < range ? values[k] : 0;
    }
}

FOR_EVERY_WIDTH static void keep_below(
    uint32_t *restrict values, const uint32_t *restrict words, uint32_t limit, Py_ssize_t count
) {
    for (Py_ssize_t k = 0; k < count; k++) {
        values[k] = (words[k] & ~SIGN) < limit ? values[k] : 0;
    }
}

FOR_EVERY_WIDTH static void keep_below_each(
    uint32_t *restrict values, const uint32_t *restrict words, const uint32_t *restrict limits,
    Py_ssize_t count
) {
    for (Py_ssize_t k = 0; k < count; k++) {
        values[k] = (words[k] & ~SIGN) < limits[k] ? values[k] : 0;
    }
}

/* Two words from every number of 64 bits, the lower half first. */
static void generate_words(const Generator *noise, uint32_t *words, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k += 2) {
        uint64_t number = noise->next_uint64(noise->state);
        words[k] = (uint32_t)number;
        words[k + 1] = (uint32_t)(number >> 32);
    }
}

void thin_strip(
    Strip *strip, const Keep *keep, Py_ssize_t base, Py_ssize_t offset, Py_ssize_t count,
    Strip *spare
) {
    if (keep->noise) {
        generate_words(keep->noise, spare->bits, count);
        keep_below(strip->bits, spare->bits, keep->limit, count);
        return;
    }
    if (keep->words.obj) {
        const uint32_t *words = keep->words.buf, *limits = keep->limits.buf;
        keep_below_each(strip->bits, words + offset, limits + offset, count);
        return;
    }
    /* From a boundary's own index on, elements equal to it rank after it. */
    Py_ssize_t first = keep->first_index - base - offset, end = keep->end_index - base - offset;
    for (Py_ssize_t done = 0, next; done < count; done = next) {
        next = count;
        if (first > done && first < next) next = first;
        if (end > done && end < next) next = end;
        uint32_t low = keep->end_key + (end <= done), high = keep->first_key + (first <= done);
        keep_between(strip->bits + done, low, high, next - done);
    }
}
