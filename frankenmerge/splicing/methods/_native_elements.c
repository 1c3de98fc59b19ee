/* Conversion of elements from and to float32.
 *
 * Steps of 16 and of 32 bits are separate loops, since compilers vectorise each well and both
 * together poorly. */

#include "_native.h"

const Py_ssize_t WIDTHS[TYPES] = {2, 2, 4, 8};

/* Reading. */

/* Each half becomes the upper 16 bits. */
FOR_EVERY_WIDTH static void widen(
    const char *restrict from, uint32_t *restrict to, Py_ssize_t count
) {
    for (Py_ssize_t k = 0; k < count; k++) {
        uint16_t half;
        memcpy(&half, from + 2 * k, 2);
        to[k] = (uint32_t)half << 16;
    }
}

/* From float16 in the upper 16 bits to float32. */
FOR_EVERY_WIDTH static void expand_f16(uint32_t *values, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) {
        uint32_t bits = values[k], exponent = bits & 0x7C000000u;
        /* The biases of the exponents differ by 112. Subnormal numbers are multiples of 2^-24. */
        uint32_t moved = ((bits & ~SIGN) >> 3) + 0x38000000u;
        uint32_t small = bits_of(float_of(moved + 0x00800000u) - 0x1p-14f);
        moved = exponent == 0x7C000000u ? moved + 0x38000000u : moved;
        moved = exponent == 0 ? small : moved;
        values[k] = moved | (bits & SIGN);
    }
}

FOR_EVERY_WIDTH static void narrow_f64(
    const char *restrict from, float *restrict to, Py_ssize_t count
) {
    for (Py_ssize_t k = 0; k < count; k++) {
        double value;
        memcpy(&value, from + 8 * k, 8);
        to[k] = (float)value;
    }
}

int read_elements(int type, const char *from, Strip *to, Py_ssize_t count) {
    switch (type) {
    case BF16:
        widen(from, to->bits, count);
        break;
    case F16:
        widen(from, to->bits, count);
        expand_f16(to->bits, count);
        break;
    case F32:
        memcpy(to, from, 4 * (size_t)count);
        break;
    default:
        narrow_f64(from, to->numbers, count);
    }
    return any_nonfinite(to->bits, count);
}

/* Writing. */

/* The upper 16 bits become a half. */
FOR_EVERY_WIDTH static void narrow(
    const uint32_t *restrict from, char *restrict to, Py_ssize_t count
) {
    for (Py_ssize_t k = 0; k < count; k++) {
        uint16_t half = (uint16_t)(from[k] >> 16);
        memcpy(to + 2 * k, &half, 2);
    }
}

/* To bfloat16 in the upper 16 bits. */
FOR_EVERY_WIDTH static void round_bf16(uint32_t *values, Py_ssize_t count) {
    for (Py_ssize_t k = 0; k < count; k++) {
        uint32_t bits = values[k], rounded = bits + 0x7FFFu + (bits >> 16 & 1u);
        values[k] = (bits & ~SIGN) > EXPONENT ? NOT_A_NUMBER : rounded;
    }
}

/* To float16 in the upper 16 bits; returns whether any result is NaN or Inf. */
FOR_EVERY_WIDTH static int round_f16(uint32_t *values, Py_ssize_t count) {
    uint32_t found = 0;
    for (Py_ssize_t k = 0; k < count; k++) {
        uint32_t bits = values[k], magnitude = bits & ~SIGN;
        /* Below 2^-14 float16 has the multiples of 2^-24. Adding 0.5, whose last bit is 2^-24,
         * rounds to one. */
        uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u;
        uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
        uint32_t large = magnitude > EXPONENT ? 0x7E00u : 0x7C00u;
        uint32_t rounded = magnitude >= 0x47800000u  ? large
                           : magnitude < 0x38800000u ? small
                                                     : normal;
        found |= (rounded & 0x7C00u) == 0x7C00u;
        values[k] = rounded << 16 | (magnitude > EXPONENT ? 0 : bits & SIGN);
    }
    return found != 0;
}

FOR_EVERY_WIDTH static void widen_f64(
    const float *restrict from, char *restrict to, Py_ssize_t count
) {
    for (Py_ssize_t k = 0; k < count; k++) {
        double value = from[k];
        memcpy(to + 8 * k, &value, 8);
    }
}

int write_elements(int type, Strip *from, char *to, Py_ssize_t count) {
    int nonfinite;
    switch (type) {
    case BF16:
        round_bf16(from->bits, count);
        narrow(from->bits, to, count);
        return any_nonfinite(from->bits, count);
    case F16:
        nonfinite = round_f16(from->bits, count);
        narrow(from->bits, to, count);
        return nonfinite;
    default:
        nonfinite = any_nonfinite(from->bits, count);
        if (nonfinite) unify_nan(from->bits, count);
        if (type == F32) memcpy(to, from, 4 * (size_t)count);
        else widen_f64(from->numbers, to, count);
        return nonfinite;
    }
}
