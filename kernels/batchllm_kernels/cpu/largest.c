/* The largest few of many logits. */
#include <stdlib.h>

#include "bfloat16.h"

#define LEAST ((int32_t)0x807FFFFF) /* the key of minus infinity */

/* Integers in the order of the floats, both zeros the same. */
static inline __m512i in_order(__m512 numbers)
{
    __m512i bits = _mm512_castps_si512(_mm512_add_ps(numbers, _mm512_setzero_ps()));
    __m512i keys = _mm512_xor_si512(bits, _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1));
    return _mm512_max_epi32(keys, _mm512_set1_epi32(LEAST)); /* not NaN: all keys can be looked for */
}

static inline float from_order(int32_t key)
{
    int32_t bits = key ^ (int32_t)((uint32_t)(key >> 31) >> 1);
    float number;
    __builtin_memcpy(&number, &bits, sizeof number);
    return number;
}

/* The largest key that so many of these are not below. */
static int32_t key_at(const int32_t *keys, int64_t size, int64_t wanted)
{
    int64_t low = LEAST, high = INT32_MAX, middle = low + 1; /* often most are ruled out */
    while (low < high) {
        int64_t found = 0;
        __m512i least = _mm512_set1_epi32((int32_t)middle);
        for (int64_t at = 0; at < size; at += LANES)
            found += __builtin_popcount(_mm512_mask_cmp_epi32_mask(
                first_lanes(size - at), _mm512_loadu_si512(keys + at), least, _MM_CMPINT_NLT));
        if (found >= wanted)
            low = middle;
        else
            high = middle - 1;
        middle = low + (high - low + 1) / 2;
    }
    return (int32_t)low;
}

/* A key that at least `wanted` are not below, and not many more: of the maxima of twice as many groups, as many are not
 * below it. groups: space for 2 x wanted + LANES. */
static int32_t rough_key(const float *logits, int64_t size, int64_t wanted, int32_t *groups)
{
    int64_t vectors = (2 * wanted + LANES - 1) / LANES;
    if (vectors * LANES * 2 > size) return LEAST;
    for (int64_t v = 0; v < vectors; v++)
        _mm512_storeu_si512(groups + v * LANES, _mm512_set1_epi32(LEAST));
    for (int64_t at = 0, v = 0; at < size; at += LANES, v = v + 1 < vectors ? v + 1 : 0) {
        __m512i group = _mm512_loadu_si512(groups + v * LANES);
        __mmask16 lanes = first_lanes(size - at);
        group = _mm512_mask_max_epi32(group, lanes, group, in_order(_mm512_maskz_loadu_ps(lanes, logits + at)));
        _mm512_storeu_si512(groups + v * LANES, group);
    }
    return key_at(groups, vectors * LANES, wanted);
}

/* The tokens not below `least`, by rising id: how many. keys and ids: space for size + LANES. */
static int64_t tokens_from(const float *logits, int64_t size, int32_t least, int32_t *keys, int32_t *ids)
{
    int64_t found = 0;
    __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t at = 0; at < size; at += LANES) {
        __mmask16 some = first_lanes(size - at);
        __m512i key = in_order(_mm512_maskz_loadu_ps(some, logits + at));
        some = _mm512_mask_cmp_epi32_mask(some, key, _mm512_set1_epi32(least), _MM_CMPINT_NLT);
        if (!some) continue;
        _mm512_storeu_si512(keys + found, _mm512_maskz_compress_epi32(some, key));
        __m512i id = _mm512_add_epi32(lanes, _mm512_set1_epi32((int32_t)at));
        _mm512_storeu_si512(ids + found, _mm512_maskz_compress_epi32(some, id));
        found += __builtin_popcount(some);
    }
    return found;
}

/* values, tokens [rows][wanted]: the largest of logits [rows][size], of equal ones the first, by rising token. Rows of
 * logits lie apart by so many numbers. Returns 0, or 1 where there is no memory. */
int batchllm_largest(const float *logits, float *values, int64_t *tokens, int64_t rows, int64_t size, int64_t wanted,
                     int64_t logits_row)
{
    int failed = 0;
#pragma omp parallel reduction(|| : failed)
    {
        int32_t *keys = malloc(2 * (size + LANES) * sizeof *keys), *ids = keys + size + LANES;
        failed = !keys;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            if (!keys) continue;
            const float *from = logits + row * logits_row;
            int64_t found = tokens_from(from, size, rough_key(from, size, wanted, keys), keys, ids);
            int32_t least = key_at(keys, found, wanted);
            int64_t equal = wanted, to = row * wanted;
            for (int64_t i = 0; i < found; i++) equal -= keys[i] > least;
            for (int64_t i = 0; i < found; i++)
                if (keys[i] > least || (keys[i] == least && equal-- > 0))
                    values[to] = from_order(keys[i]), tokens[to++] = ids[i];
        }
        free(keys);
    }
    return failed;
}
