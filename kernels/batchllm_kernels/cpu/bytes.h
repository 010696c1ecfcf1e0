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

/* sums [rows][64] of left [rows][steps] x right [steps][64]: fours of unsigned numbers on the left, of signed ones on the
 * right. Sums go through memory: what follows them, in one function with the loop, would cost registers of its. `rows` is
 * a constant where this is inlined. */
BYTE_PRODUCTS static inline __attribute__((always_inline)) void multiply_bytes(
    int32_t (*sums)[PANEL], const uint32_t *left, const uint32_t *right, int64_t steps, const int rows)
{
    __m512i held[ROWS][WIDE];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < WIDE; j++) held[i][j] = _mm512_setzero_si512();
    for (int64_t step = 0; step < steps; step++) {
        __m512i column[WIDE];
        for (int j = 0; j < WIDE; j++) column[j] = _mm512_load_si512(right + step * PANEL + j * LANES);
        for (int i = 0; i < rows; i++) {
            __m512i four = _mm512_set1_epi32((int)left[i * steps + step]);
            for (int j = 0; j < WIDE; j++) held[i][j] = _mm512_dpbusd_epi32(held[i][j], four, column[j]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < WIDE; j++) _mm512_store_si512(sums[i] + j * LANES, held[i][j]);
}
