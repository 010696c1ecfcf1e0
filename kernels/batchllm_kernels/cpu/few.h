/* A few queries of one head against keys and values as they lie in memory.
 *
 * A decoded token's own keys are read by the queries of one group alone. Putting them in order for products of many
 * queries would take longer than these products: here scores are sums along a key's numbers instead.
 */
#pragma once
#include "rows.h"

enum {
    FEW = 4,                    /* queries at most */
    STRIP = 2 * LANES           /* numbers of a key or value in one vector */
};

/* Four sums along four vectors each: vectors 4 i .. 4 i + 3 give words 4 i .. 4 i + 3. */
static inline __attribute__((always_inline)) __m512 sums_along(const __m512 *v)
{
    __m512 four[4], two[2];
    for (int i = 0; i < 4; i++) {
        const __m512 *of = v + 4 * i;
        __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(of[0], of[1]), _mm512_unpackhi_ps(of[0], of[1]));
        __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(of[2], of[3]), _mm512_unpackhi_ps(of[2], of[3]));
        __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
        __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b));
        four[i] = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    }
    for (int i = 0; i < 2; i++)
        two[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                               _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(two[0], two[1], 0x88), _mm512_shuffle_f32x4(two[0], two[1], 0xdd));
}

/* Scores of `rows` queries against `count` keys `stride` apart, sixteen at a time; behind them some that mean nothing. */
static inline __attribute__((always_inline)) void score_few(const Job *job, Work *w, const bf16 *query,
                                                            const bf16 *keys, int64_t stride, int64_t count,
                                                            const int rows)
{
    const int fours = rows > 2 ? 1 : FEW / rows; /* of keys, for each query */
    for (int64_t key = 0; key < count; key += 4 * fours) {
        __m512 sums[4 * FEW];
        ask(&w->ahead);
        for (int i = 0; i < 4 * FEW; i++) sums[i] = _mm512_setzero_ps();
        for (int64_t at = 0; at < job->key_dim; at += STRIP)
            for (int k = 0; k < 4 * fours; k++) {
                __m512bh one = (__m512bh)_mm512_loadu_si512(keys + least(key + k, count - 1) * stride + at);
                for (int i = 0; i < rows; i++) {
                    __m512 *sum = sums + i * 4 * fours + k;
                    *sum = _mm512_dpbf16_ps(*sum, one, (__m512bh)_mm512_load_si512(query + i * w->key_width + at));
                }
            }
        __m512 scores = sums_along(sums);
        for (int i = 0; i < rows; i++) {
            float *to = w->scores + i * KEYS + key;
            if (fours == 4) _mm512_storeu_ps(to, scores);
            else if (fours == 2 && i == 0) _mm256_storeu_ps(to, _mm512_extractf32x8_ps(scores, 0));
            else if (fours == 2) _mm256_storeu_ps(to, _mm512_extractf32x8_ps(scores, 1));
            else if (i == 0) _mm_storeu_ps(to, _mm512_extractf32x4_ps(scores, 0));
            else if (i == 1) _mm_storeu_ps(to, _mm512_extractf32x4_ps(scores, 1));
            else if (i == 2) _mm_storeu_ps(to, _mm512_extractf32x4_ps(scores, 2));
            else _mm_storeu_ps(to, _mm512_extractf32x4_ps(scores, 3));
        }
    }
}

/* to = to * shrink + weights x values for `strips` x 32 numbers of `count` values. */
static inline __attribute__((always_inline)) void gather_few(Work *w, float *to, const float *shrink,
                                                             const bf16 *values, int64_t stride, int64_t count,
                                                             const int rows, const int strips)
{
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    __m512 sums[FEW][2 * 2];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 2 * strips; j++) sums[i][j] = _mm512_setzero_ps();
    for (int64_t key = 0; key < count; key += 2) {
        const bf16 *even = values + key * stride, *odd = key + 1 < count ? even + stride : even; /* of weight 0 */
        __m512i pairs[2 * 2];
        ask(&w->ahead);
        for (int j = 0; j < strips; j++) {
            __m512i a = _mm512_loadu_si512(even + j * STRIP), b = _mm512_loadu_si512(odd + j * STRIP);
            pairs[2 * j] = _mm512_unpacklo_epi16(a, b), pairs[2 * j + 1] = _mm512_unpackhi_epi16(a, b);
        }
        for (int i = 0; i < rows; i++) {
            __m512bh two = (__m512bh)_mm512_set1_epi32(((const int *)w->weights)[(i * KEYS + key) / 2]);
            for (int j = 0; j < 2 * strips; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], two, (__m512bh)pairs[j]);
        }
    }
    for (int i = 0; i < rows; i++, to += w->value_width)
        for (int j = 0; j < 2 * strips; j++) {
            const __m512 *both = &sums[i][j & ~1];
            __m512 sum = _mm512_permutex2var_ps(both[0], j & 1 ? second : first, both[1]);
            float *at = to + j * LANES;
            _mm512_store_ps(at, _mm512_fmadd_ps(_mm512_load_ps(at), _mm512_set1_ps(shrink[i]), sum));
        }
}

/* Whether `attend_few` is for so many queries. */
static inline int are_few(const Job *job, int64_t queries)
{
    return queries <= FEW && job->key_dim % STRIP == 0 && job->value_dim % STRIP == 0;
}

static inline __attribute__((always_inline)) void attend_some(const Job *job, Work *w, int64_t number,
                                                              const Sight *sight, const bf16 *keys,
                                                              const bf16 *values, const int rows)
{
    float shrink[LANES], *sums = w->sums + number * w->value_width;
    score_few(job, w, w->query + number * w->key_width, keys, job->key_slot, sight->end, rows);
    soften(job, w, number, rows, sight, shrink);
    int64_t at = 0;
    for (; at + 2 * STRIP <= job->value_dim; at += 2 * STRIP)
        gather_few(w, sums + at, shrink, values + at, job->value_slot, sight->end, rows, 2);
    if (at < job->value_dim) gather_few(w, sums + at, shrink, values + at, job->value_slot, sight->end, rows, 1);
}

/* `rows` queries, the first of them `number`, against the keys that they see. */
static void attend_few(const Job *job, Work *w, int64_t number, int rows, const Sight *sight, const bf16 *keys,
                       const bf16 *values)
{
    switch (rows) {
    case 1: attend_some(job, w, number, sight, keys, values, 1); break;
    case 2: attend_some(job, w, number, sight, keys, values, 2); break;
    case 3: attend_some(job, w, number, sight, keys, values, 3); break;
    default: attend_some(job, w, number, sight, keys, values, 4); break;
    }
}
