/* A few queries that have all seen keys before, against a block that they all see: no largest score is looked for.
 *
 * Weights count from the largest score so far; a larger one gives a weight above 1, which floating point bears as well.
 * So scores become weights part by part, while products go on: these keep the multipliers busy, and most of what a power
 * takes is done by the adders beside them.
 */
#pragma once
#include "rows.h"

enum { PART = WIDE * LANES, TURNS = ROWS * WIDE / 2 };

#define LARGEST_SUM 0x1p60f     /* of weights; far from where sums of values overflow */

/* ROWS x PART scores on their way to weights. */
typedef struct {
    const float *scores;        /* [ROWS][KEYS], from this part on */
    bf16 *weights;              /* the same place */
    const float *top;           /* [ROWS] what weights count from */
    __m512 *sum;                /* [ROWS] of weights so far, in parts */
    float scale;
} Softening;

/* One of TURNS: two vectors. */
static inline __attribute__((always_inline)) void soften_two(const Softening *s, int turn)
{
    int row = turn / (WIDE / 2), at = row * KEYS + turn % (WIDE / 2) * 2 * LANES;
    __m512 factor = _mm512_set1_ps(s->scale), top = _mm512_set1_ps(s->top[row]);
    __m512 one = weight_of(_mm512_fmsub_ps(_mm512_load_ps(s->scores + at), factor, top));
    __m512 two = weight_of(_mm512_fmsub_ps(_mm512_load_ps(s->scores + at + LANES), factor, top));
    s->sum[row] = _mm512_add_ps(s->sum[row], _mm512_add_ps(one, two));
    _mm512_store_si512(s->weights + at, (__m512i)_mm512_cvtne2ps_pbh(two, one));
}

/* `multiply` of ROWS x WIDE, and beside the first `over` pairs all turns of a softening. */
static inline __attribute__((always_inline)) void multiply_and_soften(
    Sums sums, const uint32_t *left, int64_t left_row, const uint32_t *right, int64_t right_pair, int64_t right_vector,
    int64_t pairs, int64_t over, Ahead *ahead, const Softening *softening)
{
    int64_t each = over / TURNS, done = each * TURNS;
    for (int turn = 0; turn < TURNS; turn++) {
        multiply(sums, left + turn * each, left_row, right + turn * each * right_pair, right_pair, right_vector, each,
                 ahead, ROWS, WIDE);
        soften_two(softening, turn);
    }
    multiply(sums, left + done, left_row, right + done * right_pair, right_pair, right_vector, pairs - done, ahead,
             ROWS, WIDE);
}

/* Scores of part after part of `count` keys, and while those of one are computed, weights of the one before. */
static inline __attribute__((always_inline)) void score_parts(Work *w, const uint32_t *query, int64_t count,
                                                              const int64_t pairs, Softening *softening)
{
    for (int64_t key = 0; key < count; key += PART) {
        const uint32_t *keys = w->keys + key * pairs;
        Sums scores;
        clear_sums(scores, ROWS, WIDE);
        if (key) {
            multiply_and_soften(scores, query, pairs, keys, LANES, pairs * LANES, pairs, pairs, &w->ahead, softening);
            softening->scores += PART, softening->weights += PART;
        } else {
            multiply(scores, query, pairs, keys, LANES, pairs * LANES, pairs, &w->ahead, ROWS, WIDE);
        }
        store_sums(scores, w->scores + key, KEYS, ROWS, WIDE);
    }
}

/* Whether `attend_settled` is for these queries. */
static int is_settled(const Job *job, const Work *w, int64_t number, int rows, const Sight *sight)
{
    int is = rows == ROWS && job->softcap == 0.0f && sight->end % PART == 0 && w->value_width % PART == 0;
    for (int i = 0; is && i < ROWS; i++)
        is = !sight->low[i] && sight->high[i] == sight->end && w->maximum[number + i] > HIDDEN;
    return is;
}

/* ROWS queries, the first of them `number`, against the first `count` keys of the block. Returns 0, and has changed
 * nothing, if a score is so far above all before that weights must count from it. */
static int attend_settled(const Job *job, Work *w, int64_t number, int64_t count)
{
    const uint32_t *query = (const uint32_t *)(w->query + number * w->key_width);
    __m512 sum[ROWS] = {0};
    Softening softening = {w->scores, w->weights, w->maximum + number, sum, job->scale * LOG2E};
    if (w->key_width == 64) score_parts(w, query, count, 32, &softening); /* a loop of known length is faster */
    else score_parts(w, query, count, w->key_width / 2, &softening);
    const uint32_t *weights = (const uint32_t *)w->weights;
    for (int64_t at = 0; at < w->value_width; at += PART) {
        float *to = w->sums + number * w->value_width + at;
        Sums sums;
        load_sums(sums, to, w->value_width, ROWS, WIDE);
        if (at) {
            multiply(sums, weights, KEYS / 2, w->values + at, w->value_width, LANES, count / 2, &w->ahead, ROWS, WIDE);
        } else {
            multiply_and_soften(sums, weights, KEYS / 2, w->values, w->value_width, LANES, count / 2,
                                (count - PART) / 2, &w->ahead, &softening);
            __mmask16 large = 0;
            for (int i = 0; i < ROWS; i++)
                large |= _mm512_cmp_ps_mask(sum[i], _mm512_set1_ps(LARGEST_SUM), _CMP_NLT_UQ);
            if (large) return 0;
        }
        store_sums(sums, to, w->value_width, ROWS, WIDE);
    }
    for (int i = 0; i < ROWS; i++) {
        float *total = w->total + (number + i) * LANES;
        _mm512_store_ps(total, _mm512_add_ps(_mm512_load_ps(total), sum[i]));
    }
    return 1;
}
