/* Products of bfloat16 matrices, pairs of numbers at a time (vdpbf16ps), with float32 sums that stay in registers. */
#pragma once
#include "ahead.h"
#include "bfloat16.h"

enum {
    ROWS = 6, /* rows at a time: 6 x 4 sums, 4 vectors of the right side and one pair of the left fill 32 registers */
    WIDE = 4, /* vectors of sums of each row */
    PANEL = WIDE * LANES /* columns of a panel of packed weights */
};

typedef __m512 Sums[ROWS][WIDE];

static inline __attribute__((always_inline)) void clear_sums(Sums sums, const int rows, const int vectors)
{
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) sums[i][j] = _mm512_setzero_ps();
}

/* Rows of the memory are `width` floats, 64-byte aligned. */
static inline __attribute__((always_inline)) void load_sums(Sums sums, const float *from, int64_t width, const int rows,
                                                            const int vectors)
{
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) sums[i][j] = _mm512_load_ps(from + i * width + j * LANES);
}

static inline __attribute__((always_inline)) void store_sums(Sums sums, float *to, int64_t width, const int rows,
                                                             const int vectors)
{
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) _mm512_store_ps(to + i * width + j * LANES, sums[i][j]);
}

/* sums[i][j] += left row i x right column j, where a column is a vector of 16. Left rows are `left_row` pairs apart; on
 * the right, one pair and the next are `right_pair` words apart, and vectors `right_vector`. `rows` and `vectors` are
 * constants where this is inlined, `ahead` too if it is NULL. */
static inline __attribute__((always_inline)) void multiply(
    Sums sums, const uint32_t *left, int64_t left_row, const uint32_t *right, int64_t right_pair, int64_t right_vector,
    int64_t pairs, Ahead *ahead, const int rows, const int vectors)
{
    int64_t rest = ahead ? ahead->rest : 0;
    for (int64_t pair = 0; pair < pairs; pair++) {
        __m512i column[WIDE];
        if (ahead && !(pair & rest)) ask(ahead);
        for (int j = 0; j < vectors; j++) column[j] = _mm512_load_si512(right + pair * right_pair + j * right_vector);
        for (int i = 0; i < rows; i++) {
            __m512bh one = (__m512bh)_mm512_set1_epi32((int)left[i * left_row + pair]);
            for (int j = 0; j < vectors; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], one, (__m512bh)column[j]);
        }
    }
}

/* CALL(rows) with a constant. */
#define FOR_EACH_COUNT(CALL, ROWS_) \
    switch (ROWS_) {                \
    case 1: CALL(1); break;         \
    case 2: CALL(2); break;         \
    case 3: CALL(3); break;         \
    case 4: CALL(4); break;         \
    case 5: CALL(5); break;         \
    default: CALL(6); break;        \
    }

/* CALL(rows, vectors) with both as constants. */
#define FOR_EACH_WIDTH(CALL, ROWS_, WIDTH_) \
    switch (WIDTH_) {                       \
    case 1: CALL(ROWS_, 1); break;          \
    case 2: CALL(ROWS_, 2); break;          \
    case 3: CALL(ROWS_, 3); break;          \
    default: CALL(ROWS_, 4); break;         \
    }
#define FOR_EACH_SIZE(CALL, ROWS_, WIDTH_)              \
    switch (ROWS_) {                                    \
    case 1: FOR_EACH_WIDTH(CALL, 1, WIDTH_) break;      \
    case 2: FOR_EACH_WIDTH(CALL, 2, WIDTH_) break;      \
    case 3: FOR_EACH_WIDTH(CALL, 3, WIDTH_) break;      \
    case 4: FOR_EACH_WIDTH(CALL, 4, WIDTH_) break;      \
    case 5: FOR_EACH_WIDTH(CALL, 5, WIDTH_) break;      \
    default: FOR_EACH_WIDTH(CALL, 6, WIDTH_) break;     \
    }

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
