/* A few queries against one block of packed keys and values. */
#pragma once
#include <math.h>
#include <string.h>

#include "job.h"
#include "products.h"
#include "softmax.h"

enum { KEYS = 256 };            /* keys in a block; packed keys and values of a block stay in the second-level cache */

/* What one thread works in. */
typedef struct {
    bf16 *query;                /* [queries][key_width] */
    float *sums;                /* [queries][value_width] weighted values so far */
    float *maximum;             /* [queries] largest score so far, times log2(e) */
    float *total;               /* [queries][LANES] sum of weights so far, in parts */
    uint32_t *keys;             /* [KEYS / LANES][key_width / 2][LANES] pairs of a key's numbers */
    uint32_t *values;           /* [KEYS / 2][value_width] pairs of two keys' numbers */
    float *scores;              /* [ROWS][KEYS] */
    bf16 *weights;              /* [ROWS][KEYS] */
    int64_t key_width, value_width;
    int64_t first, last;        /* rows of the tile */
    int64_t head, heads;        /* first KV head and how many: queries are kept head by head */
    Ahead ahead;                /* of the next block */
} Work;

/* Scores of `rows` queries against `vectors` x 16 keys from vector `first` on. */
static inline __attribute__((always_inline)) void score(Work *w, const bf16 *query, int64_t first, const int rows,
                                                        const int vectors)
{
    int64_t pairs = w->key_width / 2;
    Sums sums;
    clear_sums(sums, rows, vectors);
    multiply(sums, (const uint32_t *)query, pairs, w->keys + first * pairs * LANES, LANES, pairs * LANES, pairs,
             &w->ahead, rows, vectors);
    store_sums(sums, w->scores + first * LANES, KEYS, rows, vectors);
}

/* to = to * shrink + weights x values, for `vectors` x 16 of the values' numbers. */
static inline __attribute__((always_inline)) void gather(Work *w, float *to, const float *shrink, int64_t pairs,
                                                         int64_t first, const int rows, const int vectors)
{
    Sums sums;
    to += first * LANES;
    load_sums(sums, to, w->value_width, rows, vectors);
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) sums[i][j] = _mm512_mul_ps(sums[i][j], _mm512_set1_ps(shrink[i]));
    multiply(sums, (const uint32_t *)w->weights, KEYS / 2, w->values + first * LANES, w->value_width, LANES, pairs,
             &w->ahead, rows, vectors);
    store_sums(sums, to, w->value_width, rows, vectors);
}

/* The keys of a block that each of some queries sees. */
typedef struct {
    int64_t low[ROWS], high[ROWS];
    int64_t end;                /* the last that any sees; 0: none */
} Sight;

static Sight sight_of(const Job *job, const Work *w, int64_t first, int rows, int64_t start, int64_t count)
{
    Sight sight = {.end = 0};
    for (int i = 0; i < rows; i++) {
        int64_t at = job->position[w->first + (first + i) / job->group] - start;
        sight.high[i] = most(0, least(count, at + 1));
        sight.low[i] = job->window ? least(sight.high[i], most(0, at + 1 - job->window)) : 0;
        if (sight.high[i] > sight.low[i]) sight.end = most(sight.end, sight.high[i]);
    }
    return sight;
}

/* Turns scores of `rows` queries, the first of them `number`, into weights; shrink[i]: what earlier sums shrink by. */
static void soften(const Job *job, Work *w, int64_t number, int rows, const Sight *sight, float *shrink)
{
    int64_t vectors = (sight->end + LANES - 1) / LANES;
    float scale = (job->softcap != 0.0f ? 1.0f : job->scale) * LOG2E, top[LANES] = {0};
    for (int i = 0; i < rows; i++) {
        float *scores = w->scores + i * KEYS;
        top[i] = w->maximum[number + i];
        if (sight->high[i] <= sight->low[i]) continue;
        if (job->softcap != 0.0f) cap_scores(scores, vectors, job->scale, job->softcap);
        hide_scores(scores, vectors, sight->low[i], sight->high[i]);
        top[i] = fmaxf(top[i], largest_score(scores, vectors) * scale);
    }
    __mmask16 these = first_lanes(rows);
    __m512 before = _mm512_maskz_loadu_ps(these, w->maximum + number), after = _mm512_loadu_ps(top);
    /* Where nothing has been seen yet this is -inf minus a number, or minus itself; sums are 0 then. */
    __m512 fall = _mm512_max_ps(_mm512_sub_ps(before, after), _mm512_set1_ps(-1000.0f));
    _mm512_storeu_ps(shrink, power_of_two(fall));
    _mm512_mask_storeu_ps(w->maximum + number, these, after);
    for (int i = 0; i < rows; i++) {
        float *total = w->total + (number + i) * LANES;
        if (sight->high[i] > sight->low[i]) {
            __m512 sum = weigh(w->scores + i * KEYS, w->weights + i * KEYS, vectors, scale, top[i]);
            _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_load_ps(total), _mm512_set1_ps(shrink[i]), sum));
        } else {
            shrink[i] = 1.0f;
            memset(w->weights + i * KEYS, 0, KEYS * sizeof(bf16));
        }
    }
}
