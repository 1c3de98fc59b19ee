/* Shared by the C files of the extension `_native`, which computes the passes of a merge.
 *
 * _native.c           the module
 * _native_inputs.c    arguments: buffers of elements and their types
 * _native_elements.c  conversion of elements from and to float32
 * _native_linear.c    linear combinations, and the inner products that their coefficients need
 * _native_ranks.c     order statistics of a task vector's magnitudes
 * _native_keep.c      which elements of a task vector are kept
 * _native_thinning.c  thinned task vectors: their sums of magnitudes, and their weighted sum
 *
 * All passes process the elements in strips that fit in a core's first-level cache, as float32
 * whatever type the file has. The order of every operation is that of methods/torch_span.py and
 * methods/torch_sparse.py, so that both give the same bits: single float32 operations (built with
 * -ffp-contract=off, since a fused operation rounds once where two operations round twice), and
 * float64 sums over a tensor in separate lanes, an element's lane being determined by its position
 * in the call. Nothing depends on the width of the processor's vector registers. Python's lock is
 * released while a pass runs.
 */

#ifndef FRANKENMERGE_NATIVE_H
#define FRANKENMERGE_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#define STRIP 1024 /* elements per strip: 4 KiB of float32 for each input */
#define LANES 8192 /* parallel sums: element k of a call is added to sum k % LANES */

#define SIGN 0x80000000u
#define EXPONENT 0x7F800000u /* all of these bits are set in NaN and Inf only */
#define NOT_A_NUMBER 0x7FC00000u

/* Let the compiler emit a version for each register width and select one when the module is
 * loaded, where its linker supports that. */
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
#define FOR_EVERY_WIDTH __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define FOR_EVERY_WIDTH
#endif

/* What one file defines for the others is not visible outside the extension. */
#if defined(__GNUC__)
#pragma GCC visibility push(hidden)
#endif

/* Bits. Elements are moved by memcpy, which compiles to plain loads and stores and does not need
 * an aligned buffer. */

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Elements being processed, as numbers or as their bits. */
typedef union {
    float numbers[STRIP];
    uint32_t bits[STRIP];
} Strip;

/* Operations on strips that several files use. */

/* Whether any element is NaN or Inf. */
FOR_EVERY_WIDTH static inline int any_nonfinite(const uint32_t *values, Py_ssize_t count) {
    uint32_t found = 0;
    for (Py_ssize_t k = 0; k < count; k++) found |= (values[k] & EXPONENT) == EXPONENT;
    return found != 0;
}

/* Replace NaN and Inf by 0. */
FOR_EVERY_WIDTH static inline void clear_nonfinite(uint32_t *values, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) {
        values[k] = (values[k] & EXPONENT) == EXPONENT ? 0 : values[k];
    }
}

/* Replace every NaN by the same one: which one an operation gives depends on the processor. */
FOR_EVERY_WIDTH static inline void unify_nan(uint32_t *values, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) {
        values[k] = (values[k] & ~SIGN) > EXPONENT ? NOT_A_NUMBER : values[k];
    }
}

FOR_EVERY_WIDTH static inline void add(
    float *restrict to, const float *restrict values, Py_ssize_t count
) {
    for (Py_ssize_t k = 0; k < count; k++) to[k] += values[k];
}

FOR_EVERY_WIDTH static inline void scale(float *restrict values, float by, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) values[k] *= by;
}

/* Types of elements (_native_elements.c). */

enum { BF16, F16, F32, F64, TYPES };

extern const Py_ssize_t WIDTHS[TYPES]; /* bytes per element */

/* Convert `count` elements to float32; returns whether any is NaN or Inf. */
int read_elements(int type, const char *from, Strip *to, Py_ssize_t count);

/* Convert `count` elements from float32, each rounded to nearest, ties to even, and every NaN
 * replaced by the same one; returns whether any result is NaN or Inf. Overwrites the strip. */
int write_elements(int type, Strip *from, char *to, Py_ssize_t count);

/* Arguments (_native_inputs.c). */

typedef struct {
    Py_buffer view; /* .obj is NULL if there is none */
    int type;
} Input;

typedef struct {
    Input *items;
    Py_ssize_t number;
    Py_ssize_t size; /* elements of each */
} Inputs;

/* The type of that name, or -1 with an exception. */
int parse_type(PyObject *name);

/* Get the buffers of a sequence of (buffer, type), all with the same number of elements; returns 0,
 * or -1 with an exception. In both cases the caller releases them. */
int parse_inputs(PyObject *sequence, Inputs *inputs);

/* The same for the two buffers of a task vector: base and model. */
int parse_pair(PyObject *sequence, Inputs *inputs);

void release_inputs(Inputs *inputs);

/* Parse the bits of a magnitude; returns 0, or -1 with an exception. */
int parse_key(long long number, uint32_t *key);

/* The following return whether an argument is valid, and set an exception if not. */

/* The index of an element is not negative. */
int is_index(Py_ssize_t index);

/* The buffer consists of that many aligned numbers. */
int is_array(const Py_buffer *buffer, size_t elements, size_t width);

/* The result has as many elements as the inputs. */
int has_size_of_inputs(const Py_buffer *result, int type, const Inputs *inputs);

/* The result shares no memory with an input: that would be read while it is written. */
int is_separate(const Py_buffer *result, const Inputs *inputs);

/* Number of elements of the strip that starts at `start`, out of `size`. */
static inline Py_ssize_t strip_length(Py_ssize_t start, Py_ssize_t size) {
    return size - start < STRIP ? size - start : STRIP;
}

/* Allocate a strip for every input and `more`; NULL with an exception if there is no memory. */
Strip *allocate_strips(const Inputs *inputs, Py_ssize_t more);

/* Read elements [start, start + count) of every input into its strip and, if `relative`, subtract
 * the first input from the others. NaN differences are unified, since their bits are ranks. `bad`
 * becomes the number of the first input in which NaN or Inf was found. */
void read_strips(
    const Inputs *inputs, Py_ssize_t start, Py_ssize_t count, int relative, Strip *strips,
    Py_ssize_t *bad
);

/* Which elements of a task vector are kept (_native_keep.c). */

/* numpy's interface to a bit generator (numpy/random/bitgen.h), the content of its capsule. */
typedef struct {
    void *state;
    uint64_t (*next_uint64)(void *);
    uint32_t (*next_uint32)(void *);
    double (*next_double)(void *);
    uint64_t (*next_raw)(void *);
} Generator;

/* Elements whose rank lies between two boundaries, or whose random word is below a limit. */
typedef struct {
    uint32_t first_key, end_key;
    Py_ssize_t first_index, end_index;
    Generator *noise; /* generates the words to compare with `limit`; NULL if there is no limit */
    PyObject *owner; /* owns the generator: a reference keeps it alive */
    uint32_t limit;
    Py_buffer words, limits; /* a word and a limit per element; .obj is NULL if there are none */
} Keep;

/* Parse None, (key, index, key, index), (generator, limit) or (words, limits) for `size` elements;
 * returns 0, or -1 with an exception. In both cases the caller releases it. */
int parse_keep(PyObject *object, Py_ssize_t size, Keep *keep);

void release_keep(Keep *keep);

/* Set to 0 what is not kept of a strip that starts at element `offset` of a call whose first
 * element has the index `base`. Overwrites `spare`. */
void thin_strip(
    Strip *strip, const Keep *keep, Py_ssize_t base, Py_ssize_t offset, Py_ssize_t count,
    Strip *spare
);

/* The functions for Python that each file defines. */

extern PyMethodDef LINEAR_METHODS[];
extern PyMethodDef RANK_METHODS[];
extern PyMethodDef THINNING_METHODS[];

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#endif
