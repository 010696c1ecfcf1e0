/* Weights in 8-bit integers, and how far they are from what they stand for. */
#pragma once
#include "products.h"

enum {
    SCALE = 0, ERROR, NORM, SHIFT, ABOUT    /* what is known of each output of a panel, 64 numbers of a kind */
};
/* SCALE: s. ERROR: a bound of |e|, and of what sums in float32 may be off by for states of norm 1. NORM: of |s q|.
 * SHIFT (int32): -128 times the sum of q, for states are multiplied as unsigned numbers, 128 too large. */

/* Squares stay far from the ends of float32 for norms within these, and what is flushed to zero is below TINY. */
#define SMALLEST 0x1p-20f
#define LARGEST 0x1p40f
#define TINY 0x1p-50f

/* No less than what `count` roundings may have made of 1. */
static inline float about_one(int64_t count) { return 1 + (float)(count + 64) * 0x1p-24f; }

/* Functions with instructions (vpdpbusd) that not every CPU with BF16 products has to have. */
#define BYTE_PRODUCTS __attribute__((target("avx512vnni")))
