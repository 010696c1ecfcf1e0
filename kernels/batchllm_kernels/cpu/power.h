/* 2^x for sixteen floats. */
#pragma once
#include <immintrin.h>

#define LOG2E 1.44269504f

/* By a polynomial that is 2^x over -1/2 .. 1/2, the highest power's factor first; 0 far below. */
static inline __attribute__((always_inline)) __m512 power_by(__m512 x, const float *polynomial, const int degree)
{
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 rest = _mm512_sub_ps(x, whole), sum = _mm512_set1_ps(polynomial[0]);
    for (int i = 1; i <= degree; i++) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(polynomial[i]));
    return _mm512_scalef_ps(sum, whole);
}

/* To a few millionths of itself: a least-squares fit. */
static inline __m512 power_of_two(__m512 x)
{
    static const float fit[] = {9.56051983e-03f, 5.59171228e-02f, 2.40249817e-01f, 6.93121958e-01f, 9.99999190e-01f};
    return power_by(x, fit, 4);
}
