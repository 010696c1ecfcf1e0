/* Sixteen bfloat16 numbers as floats and back. `left`: how many there are, if fewer than sixteen. */
#pragma once
#include <immintrin.h>
#include <stdint.h>

typedef uint16_t bf16;

enum { LANES = 16 };

static inline __mmask16 first_lanes(int64_t left)
{
    return left >= LANES ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
}

/* The same of thirty-two. */
static inline __mmask32 first_pairs(int64_t left)
{
    return left >= 2 * LANES ? 0xffffffffu : left <= 0 ? 0 : (1u << left) - 1;
}

static inline __m512 widen(__m256i numbers)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

static inline __m512 load_bf16(const bf16 *at, int64_t left)
{
    return widen(_mm256_maskz_loadu_epi16(first_lanes(left), at));
}

static inline void store_bf16(bf16 *at, __m512 numbers, int64_t left)
{
    _mm256_mask_storeu_epi16(at, first_lanes(left), (__m256i)_mm512_cvtneps_pbh(numbers));
}

/* As if stored and loaded: where torch rounds between two operations, so do we. */
static inline __m512 rounded(__m512 numbers) { return widen((__m256i)_mm512_cvtneps_pbh(numbers)); }
