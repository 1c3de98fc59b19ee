/* The passes of a merge. Linear combinations: inner products, and the combination itself. Thinned task vectors: counts that find
 * ranks, ranks in rows, sums of magnitudes, and what is left, added.
 *
 * All take the elements in strips that stay in a core's first cache, as float32 whatever the file holds. The order of every
 * operation is that of methods/torch_span.py and methods/torch_sparse.py, so that both give the same bits: one operation of float32
 * at a time (built with -ffp-contract=off, since a fused one rounds once where two round twice), what is summed over a tensor in
 * float64, each lane by itself, an element's lane being its place in the call. Nothing here depends on the width of the processor's
 * registers. Python's lock is let go meanwhile.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define STRIP 1024 /* elements at a time: 4 KiB of float32 for each input */
#define LANES 8192 /* sums side by side: element k of a call goes to sum k % LANES */
#define DIGITS 65536 /* values of half the bits of an element */
#define SIGN 0x80000000u

/* Let the compiler make a version for each width of registers, chosen when the module is loaded, where its linker can. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define FOR_EVERY_WIDTH __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define FOR_EVERY_WIDTH
#endif

enum { BF16, F16, F32, F64, TYPES };
static const char *const NAMES[TYPES] = {"BF16", "F16", "F32", "F64"};
static const Py_ssize_t WIDTHS[TYPES] = {2, 2, 4, 8};

/* Elements are moved by memcpy, which compiles to plain loads and stores and asks nothing of a buffer's alignment. */
static inline uint32_t bits_of(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
static inline float float_of(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
static inline uint16_t half_at(const char *from, Py_ssize_t k) { uint16_t half; memcpy(&half, from + 2 * k, 2); return half; }

/* Elements on their way, as numbers or as their bits. */
typedef union {
    float numbers[STRIP];
    uint32_t bits[STRIP];
} Strip;

#define EXPONENT 0x7F800000u /* all of its bits are set in NaN and Inf alone */

/* Reading: `count` elements to float32; returns whether any is NaN or Inf. Steps of 16 and of 32 bits are loops of their own,
 * here and in writing, since compilers make good vectors of each and poor ones of both together. */

FOR_EVERY_WIDTH static void widen(const char *restrict from, uint32_t *restrict to, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) to[k] = (uint32_t)half_at(from, k) << 16;
}

FOR_EVERY_WIDTH static int unfit(const uint32_t *values, Py_ssize_t count) {
    uint32_t bad = 0;
    for (Py_ssize_t k = 0; k < count; k++) bad |= (values[k] & EXPONENT) == EXPONENT;
    return bad != 0;
}

/* From the upper 16 bits. */
FOR_EVERY_WIDTH static void spell_out_f16(uint32_t *values, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) {
        uint32_t bits = values[k], exponent = bits & 0x7C000000u;
        /* The biases of the exponents differ by 112. Without an exponent the digits are a multiple of 2^-24. */
        uint32_t moved = ((bits & ~SIGN) >> 3) + 0x38000000u;
        uint32_t small = bits_of(float_of(moved + 0x00800000u) - 0x1p-14f);
        moved = exponent == 0x7C000000u ? moved + 0x38000000u : moved;
        moved = exponent == 0 ? small : moved;
        values[k] = moved | (bits & SIGN);
    }
}

static int read_bf16(const char *from, Strip *to, Py_ssize_t count) {
    widen(from, to->bits, count);
    return unfit(to->bits, count);
}

static int read_f16(const char *from, Strip *to, Py_ssize_t count) {
    widen(from, to->bits, count);
    spell_out_f16(to->bits, count);
    return unfit(to->bits, count);
}

static int read_f32(const char *from, Strip *to, Py_ssize_t count) {
    memcpy(to, from, 4 * (size_t)count);
    return unfit(to->bits, count);
}

FOR_EVERY_WIDTH static void narrow_f64(const char *restrict from, float *restrict to, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) {
        double value;
        memcpy(&value, from + 8 * k, 8);
        to[k] = (float)value;
    }
}

static int read_f64(const char *from, Strip *to, Py_ssize_t count) {
    narrow_f64(from, to->numbers, count);
    return unfit(to->bits, count);
}

/* Writing: `count` elements, each rounded to the nearest, ties to even; returns whether any result is NaN or Inf. Every NaN is
 * the same one, since which one an operation makes is up to the processor. The strip is overwritten. */

#define NOT_A_NUMBER 0x7FC00000u

FOR_EVERY_WIDTH static void unify(uint32_t *values, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) values[k] = (values[k] & ~SIGN) > EXPONENT ? NOT_A_NUMBER : values[k];
}

FOR_EVERY_WIDTH static void narrow(const uint32_t *restrict from, char *restrict to, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) {
        uint16_t half = (uint16_t)(from[k] >> 16);
        memcpy(to + 2 * k, &half, 2);
    }
}

FOR_EVERY_WIDTH static void round_bf16(uint32_t *values, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) {
        uint32_t bits = values[k], rounded = bits + 0x7FFFu + (bits >> 16 & 1u);
        values[k] = (bits & ~SIGN) > EXPONENT ? NOT_A_NUMBER : rounded;
    }
}

/* To the upper 16 bits; returns whether any is NaN or Inf then. */
FOR_EVERY_WIDTH static int round_f16(uint32_t *values, Py_ssize_t count) {
    uint32_t bad = 0;
    for (Py_ssize_t k = 0; k < count; k++) {
        uint32_t bits = values[k], magnitude = bits & ~SIGN;
        /* Below 2^-14 the halves are multiples of 2^-24: adding 0.5, whose last bit is 2^-24, rounds to one. */
        uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
        uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
        uint32_t large = magnitude > EXPONENT ? 0x7E00u : 0x7C00u;
        uint32_t rounded = magnitude >= 0x47800000u ? large : magnitude < 0x38800000u ? small : normal;
        bad |= (rounded & 0x7C00u) == 0x7C00u;
        values[k] = rounded << 16 | (magnitude > EXPONENT ? 0 : bits & SIGN);
    }
    return bad != 0;
}

static int write_bf16(Strip *from, char *to, Py_ssize_t count) {
    round_bf16(from->bits, count);
    narrow(from->bits, to, count);
    return unfit(from->bits, count);
}

static int write_f16(Strip *from, char *to, Py_ssize_t count) {
    int bad = round_f16(from->bits, count);
    narrow(from->bits, to, count);
    return bad;
}

static int write_f32(Strip *from, char *to, Py_ssize_t count) {
    int bad = unfit(from->bits, count);
    if (bad) unify(from->bits, count);
    memcpy(to, from, 4 * (size_t)count);
    return bad;
}

FOR_EVERY_WIDTH static void widen_f64(const float *restrict from, char *restrict to, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) {
        double value = from[k];
        memcpy(to + 8 * k, &value, 8);
    }
}

static int write_f64(Strip *from, char *to, Py_ssize_t count) {
    int bad = unfit(from->bits, count);
    if (bad) unify(from->bits, count);
    widen_f64(from->numbers, to, count);
    return bad;
}

typedef int (*reader)(const char *, Strip *, Py_ssize_t);
typedef int (*writer)(Strip *, char *, Py_ssize_t);
static const reader READ[TYPES] = {read_bf16, read_f16, read_f32, read_f64};
static const writer WRITE[TYPES] = {write_bf16, write_f16, write_f32, write_f64};

/* Arithmetic on strips. */

FOR_EVERY_WIDTH static void subtract(float *restrict from, const float *restrict what, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) from[k] -= what[k];
}

/* NaN and Inf become 0. */
FOR_EVERY_WIDTH static void clear_unfit(uint32_t *values, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) values[k] = (values[k] & EXPONENT) == EXPONENT ? 0 : values[k];
}

FOR_EVERY_WIDTH static void add(float *restrict to, const float *restrict what, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) to[k] += what[k];
}

FOR_EVERY_WIDTH static void scale(float *restrict what, float by, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) what[k] *= by;
}

FOR_EVERY_WIDTH static void add_scaled(float *restrict to, const float *restrict what, float by, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) {
        float scaled = what[k] * by;
        to[k] += scaled;
    }
}

FOR_EVERY_WIDTH static void add_products(double *restrict to, const float *one, const float *other, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) {
        float product = one[k] * other[k];
        to[k] += product;
    }
}

/* What a call is given. */

typedef struct {
    Py_buffer view; /* .obj is NULL while there is none */
    int type;
} Input;

typedef struct {
    Input *inputs;
    Py_ssize_t number;
    Py_ssize_t size; /* elements of each */
} Inputs;

static void release(Inputs *given) {
    for (Py_ssize_t i = 0; given->inputs && i < given->number; i++) {
        if (given->inputs[i].view.obj) PyBuffer_Release(&given->inputs[i].view);
    }
    PyMem_Free(given->inputs);
    given->inputs = NULL;
}

static int type_of(PyObject *name) {
    for (int type = 0; type < TYPES; type++) {
        if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, NAMES[type]) == 0) return type;
    }
    PyErr_Format(PyExc_ValueError, "the type is one of BF16, F16, F32 and F64, not %R", name);
    return -1;
}

/* Take the buffers of a sequence of (buffer, type), all of one number of elements; returns 0, or -1 with an exception. */
static int take(PyObject *sequence, Inputs *given) {
    Py_ssize_t number = PySequence_Size(sequence);
    if (number < 0) return -1;
    if (number == 0) {
        PyErr_SetString(PyExc_ValueError, "there is no input");
        return -1;
    }
    given->inputs = PyMem_Calloc((size_t)number, sizeof(Input));
    if (!given->inputs) {
        PyErr_NoMemory();
        return -1;
    }
    given->number = number;
    for (Py_ssize_t i = 0; i < number; i++) {
        Input *input = &given->inputs[i];
        PyObject *buffer, *name, *pair = PySequence_GetItem(sequence, i);
        if (!pair) return -1;
        int fine = PyTuple_Check(pair) && PyArg_ParseTuple(pair, "OO;an input is (buffer, type)", &buffer, &name) &&
                   (input->type = type_of(name)) >= 0 && PyObject_GetBuffer(buffer, &input->view, PyBUF_SIMPLE) == 0;
        if (!fine && !PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "an input is (buffer, type)");
        Py_DECREF(pair);
        if (!fine) return -1;
        Py_ssize_t width = WIDTHS[input->type], size = input->view.len / width;
        if (input->view.len % width || (i && size != given->size)) {
            PyErr_Format(PyExc_ValueError, "input %zd has %zd bytes, which are not as many elements as the first has", i, input->view.len);
            return -1;
        }
        given->size = size;
    }
    return 0;
}

/* Read elements [start, start + count) of every input to its strip, the first one subtracted from the others where `relative`; a NaN
 * among differences is the one NaN then, since its bits are a rank. `bad` becomes the number of the first input, in order, that was
 * found to hold NaN or Inf. */
static void read_strips(const Inputs *given, Py_ssize_t start, Py_ssize_t count, int relative, Strip *strips, Py_ssize_t *bad) {
    int first = 0;
    for (Py_ssize_t i = 0; i < given->number; i++) {
        const Input *input = &given->inputs[i];
        const char *from = (const char *)input->view.buf + start * WIDTHS[input->type];
        int unfit_here = READ[input->type](from, strips + i, count);
        if (unfit_here && (*bad < 0 || i < *bad)) *bad = i;
        if (!i) first = unfit_here;
        if (relative && i) {
            subtract(strips[i].numbers, strips[0].numbers, count);
            if (first || unfit_here) unify(strips[i].bits, count);
        }
    }
}

/* How many elements the strip has that begins at `start`, of `size` in all. */
static Py_ssize_t strip_from(Py_ssize_t start, Py_ssize_t size) { return size - start < STRIP ? size - start : STRIP; }

/* Strips for all inputs, and `more`. */
static Strip *strips_for(const Inputs *given, Py_ssize_t more) {
    Strip *strips = PyMem_Calloc((size_t)(given->number + more), sizeof(Strip));
    if (!strips) PyErr_NoMemory();
    return strips;
}

/* Memory that Python may change beneath a call would be read while it is written; of what is written and the inputs this is held. */
static int overlaps(const Py_buffer *target, const Inputs *given) {
    uintptr_t start = (uintptr_t)target->buf, stop = start + (uintptr_t)target->len;
    for (Py_ssize_t i = 0; i < given->number; i++) {
        uintptr_t first = (uintptr_t)given->inputs[i].view.buf;
        if (first < stop && start < first + (uintptr_t)given->inputs[i].view.len) {
            PyErr_SetString(PyExc_ValueError, "the result overlaps an input");
            return 1;
        }
    }
    return 0;
}

static int fits(const Py_buffer *result, int type, const Inputs *given) {
    if (result->len % WIDTHS[type] == 0 && result->len / WIDTHS[type] == given->size) return 1;
    PyErr_SetString(PyExc_ValueError, "the result has another number of elements than the inputs");
    return 0;
}

static int lies(const Py_buffer *given, size_t elements, size_t width) {
    if ((size_t)given->len == elements * width && (uintptr_t)given->buf % width == 0) return 1;
    PyErr_Format(PyExc_ValueError, "not %zu aligned numbers of %zu bytes", elements, width);
    return 0;
}

PyDoc_STRVAR(combine_doc,
"combine(inputs, coefficients, relative, result, type) -> (bad, finite)\n\n"
"Write `sum_i c_i x_i`, or with `relative` `b + sum_i c_i (x_i - b)`, rounded once from float32, to nearest, ties to even.\n\n"
"Args:\n"
"    inputs: (buffer, type) of every x, before them with `relative` that of b; the type is BF16, F16, F32 or F64.\n"
"    coefficients: a number for every x.\n"
"    relative: whether the first input is b.\n"
"    result: a buffer to be written, of as many elements.\n"
"    type: of the result.\n\n"
"Returns:\n"
"    The number of the first input that holds NaN or Inf, -1 if none does; whether the result holds none.\n\n"
"Raises:\n"
"    ValueError: for sizes or types that do not fit.");

static PyObject *combine(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *sequence, *numbers, *name;
    int relative;
    Inputs given = {0};
    Py_buffer result = {0};
    Strip *strips = NULL;
    float *coefficients = NULL;
    PyObject *told = NULL;
    if (!PyArg_ParseTuple(args, "OOpw*O", &sequence, &numbers, &relative, &result, &name)) return NULL;
    int type = type_of(name);
    if (type < 0 || take(sequence, &given) < 0 || overlaps(&result, &given)) goto end;
    Py_ssize_t first = relative ? 1 : 0, terms = given.number - first;
    if (terms < 1 || PySequence_Size(numbers) != terms) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "there is not one coefficient for every model");
        goto end;
    }
    if (!fits(&result, type, &given)) goto end;
    if (!(coefficients = PyMem_Calloc((size_t)terms, sizeof(float)))) {
        PyErr_NoMemory();
        goto end;
    }
    for (Py_ssize_t i = 0; i < terms; i++) {
        PyObject *number = PySequence_GetItem(numbers, i);
        coefficients[i] = number ? (float)PyFloat_AsDouble(number) : 0;
        Py_XDECREF(number);
        if (PyErr_Occurred()) goto end;
    }
    if (!(strips = strips_for(&given, 0))) goto end;
    Py_ssize_t bad = -1;
    int infinite = 0;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t start = 0; start < given.size; start += STRIP) {
        Py_ssize_t count = strip_from(start, given.size);
        read_strips(&given, start, count, relative, strips, &bad);
        Strip *total = strips + first;
        scale(total->numbers, coefficients[0], count);
        for (Py_ssize_t i = 1; i < terms; i++) add_scaled(total->numbers, total[i].numbers, coefficients[i], count);
        if (relative) add(total->numbers, strips[0].numbers, count);
        infinite |= WRITE[type](total, (char *)result.buf + start * WIDTHS[type], count);
    }
    Py_END_ALLOW_THREADS
    told = Py_BuildValue("nO", bad, infinite ? Py_False : Py_True);
end:
    PyMem_Free(strips);
    PyMem_Free(coefficients);
    release(&given);
    PyBuffer_Release(&result);
    return told;
}

PyDoc_STRVAR(products_doc,
"products(inputs, relative, finite_only, sums) -> bad\n\n"
"Add the products of every two inputs, or with `relative` of their differences from the first, to sums of float64.\n\n"
"Args:\n"
"    inputs: (buffer, type) of every input.\n"
"    relative: whether the first input is subtracted from the others, and has no products of its own.\n"
"    finite_only: whether NaN and Inf, in what is multiplied, count as 0.\n"
"    sums: a buffer of float64 [pairs, LANES], pairs (0, 0), (1, 0), (1, 1), (2, 0)...; element k adds to sum k % LANES.\n\n"
"Returns:\n"
"    The number of the first input that holds NaN or Inf, -1 if none does.\n\n"
"Raises:\n"
"    ValueError: for sizes or types that do not fit.");

static PyObject *products(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *sequence;
    int relative, finite_only;
    Inputs given = {0};
    Py_buffer sums = {0};
    Strip *strips = NULL;
    PyObject *told = NULL;
    if (!PyArg_ParseTuple(args, "Oppw*", &sequence, &relative, &finite_only, &sums)) return NULL;
    if (take(sequence, &given) < 0 || overlaps(&sums, &given)) goto end;
    Py_ssize_t first = relative ? 1 : 0, terms = given.number - first;
    if (terms < 1 || terms > 1 << 15) {
        PyErr_SetString(PyExc_ValueError, "there is nothing to multiply, or too much");
        goto end;
    }
    if (!lies(&sums, (size_t)(terms * (terms + 1) / 2 * LANES), sizeof(double))) goto end;
    if (!(strips = strips_for(&given, 0))) goto end;
    Py_ssize_t bad = -1;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t start = 0; start < given.size; start += STRIP) {
        Py_ssize_t count = strip_from(start, given.size);
        read_strips(&given, start, count, relative, strips, &bad);
        for (Py_ssize_t i = first; finite_only && i < given.number; i++) clear_unfit(strips[i].bits, count);
        double *lanes = (double *)sums.buf + start % LANES;
        for (Py_ssize_t i = first; i < given.number; i++) {
            for (Py_ssize_t j = first; j <= i; j++, lanes += LANES) {
                add_products(lanes, strips[i].numbers, strips[j].numbers, count);
            }
        }
    }
    Py_END_ALLOW_THREADS
    told = PyLong_FromSsize_t(bad);
end:
    PyMem_Free(strips);
    release(&given);
    PyBuffer_Release(&sums);
    return told;
}

/* Task vectors that are thinned out. */

/* numpy's interface to a bit generator (numpy/random/bitgen.h), which a capsule of that name points to. */
typedef struct {
    void *state;
    uint64_t (*next_uint64)(void *);
    uint32_t (*next_uint32)(void *);
    double (*next_double)(void *);
    uint64_t (*next_raw)(void *);
} Generator;

/* What stays of a task vector: what ranks from one boundary to before another, or where a random word is below a limit. */
typedef struct {
    uint32_t first_key, end_key;
    Py_ssize_t first_index, end_index;
    Generator *noise; /* draws the words for `limit`; NULL where it does not */
    PyObject *owner; /* of the generator: it lives as long as this is held */
    uint32_t limit;
    Py_buffer words, limits; /* a word and a limit for every element; .obj is NULL while there are none */
} Keep;

static void release_keep(Keep *keep) {
    Py_XDECREF(keep->owner);
    if (keep->words.obj) PyBuffer_Release(&keep->words);
    if (keep->limits.obj) PyBuffer_Release(&keep->limits);
}

static int is_index(Py_ssize_t start) {
    if (start >= 0) return 1;
    PyErr_SetString(PyExc_ValueError, "an index is not negative");
    return 0;
}

static int take_key(long long key, uint32_t *to) {
    if (key < 0 || key > (long long)~SIGN) {
        PyErr_Format(PyExc_ValueError, "the bits of a magnitude are from 0 to 2^31 - 1, not %lld", key);
        return -1;
    }
    *to = (uint32_t)key;
    return 0;
}

/* Of None, (key, index, key, index), (generator, limit) or (words, limits) for `size` elements; returns 0, or -1 with an exception. What
 * it holds is to be released in either case. */
static int take_keep(PyObject *given, Py_ssize_t size, Keep *keep) {
    long long first_key = ~SIGN, end_key = 0;
    memset(keep, 0, sizeof *keep);
    keep->end_index = PY_SSIZE_T_MAX;
    if (given != Py_None && !PyTuple_Check(given)) {
        PyErr_SetString(PyExc_TypeError, "what stays is None, two boundaries, (generator, limit) or (words, limits)");
        return -1;
    }
    if (given != Py_None && PyTuple_Size(given) == 2) {
        PyObject *source = PyTuple_GetItem(given, 0), *limit = PyTuple_GetItem(given, 1);
        if (PyLong_Check(limit)) {
            long long number = PyLong_AsLongLong(limit);
            if (PyErr_Occurred() || take_key(number, &keep->limit) < 0) return -1;
            Py_INCREF(source);
            keep->owner = source;
            PyObject *capsule = PyObject_GetAttrString(source, "capsule");
            keep->noise = capsule ? PyCapsule_GetPointer(capsule, "BitGenerator") : NULL;
            Py_XDECREF(capsule);
            return keep->noise ? 0 : -1;
        }
        if (PyObject_GetBuffer(source, &keep->words, PyBUF_SIMPLE) < 0 || PyObject_GetBuffer(limit, &keep->limits, PyBUF_SIMPLE) < 0) return -1;
        return lies(&keep->words, (size_t)size, 4) && lies(&keep->limits, (size_t)size, 4) ? 0 : -1;
    }
    if (given != Py_None &&
        !PyArg_ParseTuple(given, "LnLn;two boundaries are (key, index, key, index)", &first_key, &keep->first_index, &end_key, &keep->end_index)) {
        return -1;
    }
    if (!is_index(keep->first_index) || !is_index(keep->end_index)) return -1;
    return take_key(first_key, &keep->first_key) < 0 || take_key(end_key, &keep->end_key) < 0 ? -1 : 0;
}

/* Keep magnitudes from `low` to below `high`; the others become 0. */
FOR_EVERY_WIDTH static void keep_between(uint32_t *values, uint32_t low, uint32_t high, Py_ssize_t count) {
    uint32_t range = high - low;
    for (Py_ssize_t k = 0; k < count; k++) values[k] = (values[k] & ~SIGN) - low < range ? values[k] : 0;
}

FOR_EVERY_WIDTH static void keep_below(uint32_t *restrict values, const uint32_t *restrict words, uint32_t limit, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) values[k] = (words[k] & ~SIGN) < limit ? values[k] : 0;
}

FOR_EVERY_WIDTH static void keep_below_each(
    uint32_t *restrict values, const uint32_t *restrict words, const uint32_t *restrict limits, Py_ssize_t count
) {
    for (Py_ssize_t k = 0; k < count; k++) values[k] = (words[k] & ~SIGN) < limits[k] ? values[k] : 0;
}

/* Two words from every draw, the lower half first. */
static void draw(const Generator *noise, uint32_t *words, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k += 2) {
        uint64_t drawn = noise->next_uint64(noise->state);
        words[k] = (uint32_t)drawn;
        words[k + 1] = (uint32_t)(drawn >> 32);
    }
}

/* Thin out a strip, which begins at element `offset` of a call whose first one has the index `base`; `spare` is overwritten. */
static void thin_out(Strip *strip, const Keep *keep, Py_ssize_t base, Py_ssize_t offset, Py_ssize_t count, Strip *spare) {
    if (keep->noise) {
        draw(keep->noise, spare->bits, count);
        keep_below(strip->bits, spare->bits, keep->limit, count);
        return;
    }
    if (keep->words.obj) {
        keep_below_each(strip->bits, (const uint32_t *)keep->words.buf + offset, (const uint32_t *)keep->limits.buf + offset, count);
        return;
    }
    /* From a boundary's own index on an element that equals it ranks behind it. */
    Py_ssize_t first = keep->first_index - base - offset, end = keep->end_index - base - offset;
    for (Py_ssize_t done = 0, next; done < count; done = next) {
        next = count;
        if (first > done && first < next) next = first;
        if (end > done && end < next) next = end;
        keep_between(strip->bits + done, keep->end_key + (end <= done), keep->first_key + (first <= done), next - done);
    }
}

FOR_EVERY_WIDTH static void add_magnitudes(double *restrict to, const uint32_t *restrict what, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) to[k] += float_of(what[k] & ~SIGN);
}

/* 0 where the sign is not the elected one, which is plus for -0. */
FOR_EVERY_WIDTH static void keep_agreeing(uint32_t *restrict what, const float *restrict elected, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) what[k] = (what[k] ^ bits_of(elected[k] + 0.0f)) & SIGN ? 0 : what[k];
}

FOR_EVERY_WIDTH static void add_weight(float *restrict to, const float *restrict what, float weight, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) to[k] += (float)(what[k] != 0.0f) * weight;
}

FOR_EVERY_WIDTH static void divide(float *restrict what, const float *restrict by, float least, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) {
        float nothing = by[k] <= least && by[k] >= -least;
        what[k] /= by[k] + nothing;
    }
}

static void add_all(const Strip *terms, Py_ssize_t number, Strip *total, Py_ssize_t count) {
    memcpy(total, terms, 4 * (size_t)count);
    for (Py_ssize_t i = 1; i < number; i++) add(total->numbers, terms[i].numbers, count);
}

/* The base's and a model's buffers; returns 0, or -1 with an exception. */
static int take_pair(PyObject *sequence, Inputs *given) {
    if (take(sequence, given) < 0) return -1;
    if (given->number == 2) return 0;
    PyErr_SetString(PyExc_ValueError, "a task vector is of two inputs");
    return -1;
}

/* One half of every key: the upper one, or the lower one of those whose upper one is `upper`. */
static void count_upper(const uint32_t *values, int64_t *counts, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) counts[(values[k] & ~SIGN) >> 16]++;
}

static void count_lower(const uint32_t *values, uint32_t upper, int64_t *counts, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) {
        if ((values[k] & ~SIGN) >> 16 == upper) counts[values[k] & 0xFFFFu]++;
    }
}

PyDoc_STRVAR(count_doc,
"count(inputs, upper, counts) -> bad\n\n"
"Count halves of a task vector's keys, the bits of its magnitudes.\n\n"
"Args:\n"
"    inputs: (buffer, type) of the base and of the model.\n"
"    upper: None to count the upper halves; otherwise the upper half of those whose lower halves are counted.\n"
"    counts: a buffer of int64 [65536], to which is added.\n\n"
"Returns:\n"
"    The number of the first input that holds NaN or Inf, -1 if none does.\n\n"
"Raises:\n"
"    ValueError: for sizes or types that do not fit.");

static PyObject *count(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *sequence, *half, *told = NULL;
    Inputs given = {0};
    Py_buffer counts = {0};
    Strip *strips = NULL;
    if (!PyArg_ParseTuple(args, "OOw*", &sequence, &half, &counts)) return NULL;
    long upper = half == Py_None ? -1 : PyLong_AsLong(half);
    if (half != Py_None && (upper < 0 || upper >= DIGITS)) {
        if (!PyErr_Occurred()) PyErr_Format(PyExc_ValueError, "the upper half of a key is from 0 to 65535, not %ld", upper);
        goto end;
    }
    if (take_pair(sequence, &given) < 0 || overlaps(&counts, &given) || !lies(&counts, DIGITS, sizeof(int64_t))) goto end;
    if (!(strips = strips_for(&given, 0))) goto end;
    Py_ssize_t bad = -1;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t start = 0; start < given.size; start += STRIP) {
        Py_ssize_t size = strip_from(start, given.size);
        read_strips(&given, start, size, 1, strips, &bad);
        if (upper < 0) count_upper(strips[1].bits, counts.buf, size);
        else count_lower(strips[1].bits, (uint32_t)upper, counts.buf, size);
    }
    Py_END_ALLOW_THREADS
    told = PyLong_FromSsize_t(bad);
end:
    PyMem_Free(strips);
    release(&given);
    PyBuffer_Release(&counts);
    return told;
}

PyDoc_STRVAR(find_doc,
"find(inputs, key, nth) -> (place, equal)\n\n"
"Where the nth element of a task vector, from 0, whose magnitude has the bits `key` is: -1 where there are fewer; and how many there\n"
"are up to there.\n\n"
"Args:\n"
"    inputs: (buffer, type) of the base and of the model.\n\n"
"Raises:\n"
"    ValueError: for sizes or types that do not fit.");

static PyObject *find(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *sequence, *told = NULL;
    long long wanted;
    uint32_t key;
    Py_ssize_t nth;
    Inputs given = {0};
    Strip *strips = NULL;
    if (!PyArg_ParseTuple(args, "OLn", &sequence, &wanted, &nth)) return NULL;
    if (take_key(wanted, &key) < 0 || take_pair(sequence, &given) < 0 || !(strips = strips_for(&given, 0))) goto end;
    Py_ssize_t bad = -1, place = -1, equal = 0;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t start = 0; start < given.size && place < 0; start += STRIP) {
        Py_ssize_t size = strip_from(start, given.size);
        read_strips(&given, start, size, 1, strips, &bad);
        for (Py_ssize_t k = 0; k < size && place < 0; k++) {
            if ((strips[1].bits[k] & ~SIGN) == key && equal++ == nth) place = start + k;
        }
    }
    Py_END_ALLOW_THREADS
    told = Py_BuildValue("nn", place, equal);
end:
    PyMem_Free(strips);
    release(&given);
    return told;
}

/* Sort `count` pairs of a key, above, and a place, below, by the keys; equal ones stay in order. Returns where they lie then. */
static uint64_t *sort(uint64_t *pairs, uint64_t *spare, Py_ssize_t count) {
    static const int DIGIT = 8;
    uint32_t counts[4][256];
    memset(counts, 0, sizeof counts);
    for (Py_ssize_t k = 0; k < count; k++) {
        for (int digit = 0; digit < 4; digit++) counts[digit][pairs[k] >> (32 + DIGIT * digit) & 255]++;
    }
    for (int digit = 0; digit < 4; digit++) {
        uint32_t *places = counts[digit], before = 0;
        int shift = 32 + DIGIT * digit;
        if (places[pairs[0] >> shift & 255] == (uint32_t)count) continue; /* all alike */
        for (int value = 0; value < 256; value++) {
            uint32_t here = places[value];
            places[value] = before;
            before += here;
        }
        for (Py_ssize_t k = 0; k < count; k++) spare[places[pairs[k] >> shift & 255]++] = pairs[k];
        uint64_t *sorted = spare;
        spare = pairs;
        pairs = sorted;
    }
    return pairs;
}

PyDoc_STRVAR(row_limits_doc,
"row_limits(inputs, limits, result) -> bad\n\n"
"Write for every element of a task vector the limit of its magnitude's rank in its row; of equal ones the one further on ranks higher.\n\n"
"Args:\n"
"    inputs: (buffer, type) of the base and of the model, whole rows.\n"
"    limits: a buffer of uint32 as long as a row, from the smallest magnitude's to the largest's.\n"
"    result: a buffer of uint32 to be written, of as many elements as the inputs.\n\n"
"Returns:\n"
"    The number of the first input that holds NaN or Inf, -1 if none does.\n\n"
"Raises:\n"
"    ValueError: for sizes or types that do not fit.");

static PyObject *row_limits(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *sequence, *told = NULL;
    Inputs given = {0};
    Py_buffer limits = {0}, result = {0};
    Strip *strips = NULL;
    uint64_t *pairs = NULL;
    if (!PyArg_ParseTuple(args, "Oy*w*", &sequence, &limits, &result)) return NULL;
    Py_ssize_t width = limits.len / 4;
    if (take_pair(sequence, &given) < 0 || overlaps(&result, &given) || !lies(&limits, (size_t)width, 4)) goto end;
    if (!lies(&result, (size_t)given.size, 4)) goto end;
    if (!width || width > UINT32_MAX || given.size % width) {
        PyErr_Format(PyExc_ValueError, "%zd elements are not whole rows of %zd", given.size, width);
        goto end;
    }
    if (!(strips = strips_for(&given, 0))) goto end;
    if (!(pairs = PyMem_Calloc(2 * (size_t)width, sizeof *pairs))) {
        PyErr_NoMemory();
        goto end;
    }
    Py_ssize_t bad = -1;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t row = 0; row < given.size; row += width) {
        for (Py_ssize_t start = 0; start < width; start += STRIP) {
            Py_ssize_t size = strip_from(start, width);
            read_strips(&given, row + start, size, 1, strips, &bad);
            for (Py_ssize_t k = 0; k < size; k++) pairs[start + k] = (uint64_t)(strips[1].bits[k] & ~SIGN) << 32 | (uint64_t)(start + k);
        }
        const uint64_t *sorted = sort(pairs, pairs + width, width);
        uint32_t *to = (uint32_t *)result.buf + row;
        for (Py_ssize_t k = 0; k < width; k++) to[(uint32_t)sorted[k]] = ((const uint32_t *)limits.buf)[k];
    }
    Py_END_ALLOW_THREADS
    told = PyLong_FromSsize_t(bad);
end:
    PyMem_Free(pairs);
    PyMem_Free(strips);
    release(&given);
    PyBuffer_Release(&limits);
    PyBuffer_Release(&result);
    return told;
}

PyDoc_STRVAR(sum_magnitudes_doc,
"sum_magnitudes(inputs, keep, start, finite_only, sums) -> bad\n\n"
"Add the magnitudes of a task vector, and of what stays of it, to sums of float64.\n\n"
"Args:\n"
"    inputs: (buffer, type) of the base and of the model.\n"
"    keep: as for `thin`.\n"
"    start: the index of the first element.\n"
"    finite_only: whether NaN and Inf count as 0.\n"
"    sums: a buffer of float64 [2, LANES], the whole and what stays; element k of the inputs adds to sum k % LANES.\n\n"
"Returns:\n"
"    The number of the first input that holds NaN or Inf, -1 if none does.\n\n"
"Raises:\n"
"    ValueError: for sizes or types that do not fit.");

static PyObject *sum_magnitudes(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *sequence, *kept, *told = NULL;
    Py_ssize_t first;
    int finite_only;
    Keep keep = {0};
    Inputs given = {0};
    Py_buffer sums = {0};
    Strip *strips = NULL;
    if (!PyArg_ParseTuple(args, "OOnpw*", &sequence, &kept, &first, &finite_only, &sums)) return NULL;
    if (!is_index(first) || take_pair(sequence, &given) < 0 || overlaps(&sums, &given) || take_keep(kept, given.size, &keep) < 0) goto end;
    if (!lies(&sums, 2 * LANES, sizeof(double)) || !(strips = strips_for(&given, 1))) goto end;
    Py_ssize_t bad = -1;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t start = 0; start < given.size; start += STRIP) {
        Py_ssize_t size = strip_from(start, given.size);
        double *lanes = (double *)sums.buf + start % LANES;
        Strip *delta = strips + 1, *spare = strips + 2;
        read_strips(&given, start, size, 1, strips, &bad);
        memcpy(spare, delta, 4 * (size_t)size);
        if (finite_only) clear_unfit(spare->bits, size);
        add_magnitudes(lanes, spare->bits, size);
        thin_out(delta, &keep, first, start, size, spare);
        if (finite_only) clear_unfit(delta->bits, size);
        add_magnitudes(lanes + LANES, delta->bits, size);
    }
    Py_END_ALLOW_THREADS
    told = PyLong_FromSsize_t(bad);
end:
    PyMem_Free(strips);
    release_keep(&keep);
    release(&given);
    PyBuffer_Release(&sums);
    return told;
}

/* A task vector's part in the sum. */
typedef struct {
    float coefficient;
    float weight; /* counted where it agrees */
    Keep keep;
} Term;

static void release_terms(Term *terms, Py_ssize_t number) {
    for (Py_ssize_t i = 0; terms && i < number; i++) release_keep(&terms[i].keep);
    PyMem_Free(terms);
}

static Term *take_terms(PyObject *sequence, const Inputs *given) {
    Py_ssize_t number = given->number - 1;
    if (PySequence_Size(sequence) != number) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "there is not one term for every model");
        return NULL;
    }
    Term *terms = PyMem_Calloc((size_t)number, sizeof(Term));
    if (!terms) {
        PyErr_NoMemory();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < number; i++) {
        PyObject *keep, *term = PySequence_GetItem(sequence, i);
        int fine = term && PyTuple_Check(term) && PyArg_ParseTuple(term, "ffO", &terms[i].coefficient, &terms[i].weight, &keep) &&
                   take_keep(keep, given->size, &terms[i].keep) == 0;
        if (!fine && !PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "a term is (coefficient, weight, what stays)");
        Py_XDECREF(term);
        if (!fine) {
            release_terms(terms, number);
            return NULL;
        }
    }
    return terms;
}

/* Leave of the terms what has the sign of their sum, and add that to `total`, over the sum of its weights where `least` is not
 * negative and the sum is beyond it. */
static void agree(Strip *strips, const Term *terms, Py_ssize_t number, float least, Strip *total, Strip *spare, Py_ssize_t count) {
    add_all(strips, number, total, count);
    if (unfit(total->bits, count)) unify(total->bits, count);
    for (Py_ssize_t i = 0; i < number; i++) keep_agreeing(strips[i].bits, total->numbers, count);
    add_all(strips, number, total, count);
    if (least < 0) return;
    memset(spare, 0, 4 * (size_t)count);
    for (Py_ssize_t i = 0; i < number; i++) add_weight(spare->numbers, strips[i].numbers, terms[i].weight, count);
    divide(total->numbers, spare->numbers, least, count);
}

PyDoc_STRVAR(thin_doc,
"thin(inputs, terms, start, consensus, least, factor, result, type) -> (bad, finite)\n\n"
"Write `b + f sum_i c_i keep_i(x_i - b)`, rounded once from float32, to nearest, ties to even.\n\n"
"Args:\n"
"    inputs: (buffer, type) of b and of every x; the type is BF16, F16, F32 or F64.\n"
"    terms: (c, weight, keep) for every x. keep is None, all stays; or (key, index, key, index), what ranks before the second\n"
"        boundary and not before the first, larger magnitudes and of equal ones lower indices ranking before; or (generator, limit),\n"
"        a bit generator of numpy that nobody else draws from meanwhile, two of whose words of 31 bits come from every draw of 64: what has a word below the limit; or\n"
"        (words, limits), buffers of uint32 for every element: the same.\n"
"    start: the index of the first element.\n"
"    consensus: whether what has not the sign of the sum is left out.\n"
"    least: the sum is then divided by the weights of what was not, where these come to more than this; below 0: never.\n"
"    factor: f.\n"
"    result: a buffer to be written, of as many elements.\n"
"    type: of the result.\n\n"
"Returns:\n"
"    The number of the first input that holds NaN or Inf, -1 if none does; whether the result holds none.\n\n"
"Raises:\n"
"    ValueError: for sizes or types that do not fit.");

static PyObject *thin(PyObject *module, PyObject *args) {
    (void)module;
    PyObject *sequence, *listed, *name, *told = NULL;
    Py_ssize_t first;
    int consensus;
    float least, factor;
    Inputs given = {0};
    Py_buffer result = {0};
    Term *terms = NULL;
    Strip *strips = NULL;
    if (!PyArg_ParseTuple(args, "OOnpffw*O", &sequence, &listed, &first, &consensus, &least, &factor, &result, &name)) return NULL;
    int type = type_of(name);
    if (!is_index(first) || type < 0 || take(sequence, &given) < 0 || overlaps(&result, &given) || !fits(&result, type, &given)) goto end;
    Py_ssize_t number = given.number - 1;
    if (!number) {
        PyErr_SetString(PyExc_ValueError, "there is no model beside the base");
        goto end;
    }
    if (!(terms = take_terms(listed, &given)) || !(strips = strips_for(&given, 2))) goto end;
    Py_ssize_t bad = -1;
    int infinite = 0;
    Py_BEGIN_ALLOW_THREADS
    Strip *deltas = strips + 1, *total = deltas + number, *spare = total + 1;
    for (Py_ssize_t start = 0; start < given.size; start += STRIP) {
        Py_ssize_t size = strip_from(start, given.size);
        read_strips(&given, start, size, 1, strips, &bad);
        for (Py_ssize_t i = 0; i < number; i++) {
            thin_out(deltas + i, &terms[i].keep, first, start, size, spare);
            scale(deltas[i].numbers, terms[i].coefficient, size);
        }
        if (consensus) agree(deltas, terms, number, least, total, spare, size);
        else add_all(deltas, number, total, size);
        scale(total->numbers, factor, size);
        add(total->numbers, strips[0].numbers, size);
        infinite |= WRITE[type](total, (char *)result.buf + start * WIDTHS[type], size);
    }
    Py_END_ALLOW_THREADS
    told = Py_BuildValue("nO", bad, infinite ? Py_False : Py_True);
end:
    PyMem_Free(strips);
    release_terms(terms, given.number - 1);
    release(&given);
    PyBuffer_Release(&result);
    return told;
}

static PyMethodDef METHODS[] = {
    {"combine", combine, METH_VARARGS, combine_doc},
    {"products", products, METH_VARARGS, products_doc},
    {"count", count, METH_VARARGS, count_doc},
    {"find", find, METH_VARARGS, find_doc},
    {"row_limits", row_limits, METH_VARARGS, row_limits_doc},
    {"sum_magnitudes", sum_magnitudes, METH_VARARGS, sum_magnitudes_doc},
    {"thin", thin, METH_VARARGS, thin_doc},
    {NULL, NULL, 0, NULL},
};

static int fill(PyObject *module) { return PyModule_AddIntConstant(module, "LANES", LANES); }

static PyModuleDef_Slot SLOTS[] = {{Py_mod_exec, fill}, {0, NULL}};

static struct PyModuleDef MODULE = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_native",
    .m_doc = "The hot passes of a merge in C; methods/native_span.py and methods/native_sparse.py say what they are for.",
    .m_methods = METHODS,
    .m_slots = SLOTS,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&MODULE); }
