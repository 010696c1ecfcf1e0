/* One row of scores on its way to weights. A row is `vectors` x 16 floats, 64-byte aligned. */
#pragma once
#include "bfloat16.h"
#include "power.h"

#define HIDDEN -1e30f /* finite, so that a difference of two is a number */

/* cap * tanh(scale * score / cap) */
static inline void cap_scores(float *scores, int64_t vectors, float scale, float cap)
{
    __m512 factor = _mm512_set1_ps(2.0f * LOG2E * scale / cap), one = _mm512_set1_ps(1.0f);
    for (int64_t v = 0; v < vectors; v++) {
        __m512 power = power_of_two(_mm512_mul_ps(_mm512_load_ps(scores + v * LANES), factor));
        power = _mm512_min_ps(power, _mm512_set1_ps(1e30f));
        __m512 ratio = _mm512_div_ps(_mm512_sub_ps(power, one), _mm512_add_ps(power, one));
        _mm512_store_ps(scores + v * LANES, _mm512_mul_ps(ratio, _mm512_set1_ps(cap)));
    }
}

/* Hides what is outside keys low..high. */
static inline void hide_scores(float *scores, int64_t vectors, int64_t low, int64_t high)
{
    __m512 hidden = _mm512_set1_ps(HIDDEN);
    for (int64_t v = 0; v * LANES < low; v++)
        _mm512_mask_store_ps(scores + v * LANES, first_lanes(low - v * LANES), hidden);
    for (int64_t v = high / LANES; v < vectors; v++)
        _mm512_mask_store_ps(scores + v * LANES, ~first_lanes(high - v * LANES), hidden);
}

static inline float largest_score(const float *scores, int64_t vectors)
{
    __m512 even = _mm512_load_ps(scores), odd = even;
    int64_t v = 1;
    for (; v + 1 < vectors; v += 2) {
        even = _mm512_max_ps(even, _mm512_load_ps(scores + v * LANES));
        odd = _mm512_max_ps(odd, _mm512_load_ps(scores + (v + 1) * LANES));
    }
    if (v < vectors) even = _mm512_max_ps(even, _mm512_load_ps(scores + v * LANES));
    return _mm512_reduce_max_ps(_mm512_max_ps(even, odd));
}

/* 2^x to 8 parts in 100,000: weights are rounded to 1 in 500. */
static inline __m512 weight_of(__m512 x)
{
    static const float fit[] = {5.51708047e-02f, 2.42609277e-01f, 6.93260957e-01f, 9.99928190e-01f};
    return power_by(x, fit, 3);
}

/* weights [vectors, made even][16] = 2^(scores * scale - top), where top is the largest of scores * scale or more.
 * Returns their sum in parts, before they are rounded. */
static inline __m512 weigh(const float *scores, bf16 *weights, int64_t vectors, float scale, float top)
{
    __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(top), sum = _mm512_setzero_ps(), other = sum;
    for (int64_t v = 0; v < vectors; v += 2) {
        __m512 one = weight_of(_mm512_fmsub_ps(_mm512_load_ps(scores + v * LANES), factor, shift));
        __m512 two = _mm512_setzero_ps();
        if (v + 1 < vectors)
            two = weight_of(_mm512_fmsub_ps(_mm512_load_ps(scores + (v + 1) * LANES), factor, shift));
        sum = _mm512_add_ps(sum, one);
        other = _mm512_add_ps(other, two);
        _mm512_store_si512(weights + v * LANES, (__m512i)_mm512_cvtne2ps_pbh(two, one));
    }
    return _mm512_add_ps(sum, other);
}
