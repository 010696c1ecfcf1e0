/* 2^x for sixteen floats. */
#pragma once
#include <immintrin.h>

#define LOG2E 1.44269504f

/* To a few millionths of itself; 0 far below. The polynomial is a least-squares fit over -1/2 .. 1/2. */
static inline __m512 power_of_two(__m512 x)
{
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 rest = _mm512_sub_ps(x, whole);
    __m512 sum = _mm512_set1_ps(9.56051983e-03f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.59171228e-02f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(2.40249817e-01f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.93121958e-01f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(9.99999190e-01f));
    return _mm512_scalef_ps(sum, whole);
}
