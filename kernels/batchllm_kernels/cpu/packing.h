/* Keys and values in the order in which products of pairs (vdpbf16ps) read them. */
#pragma once
#include "ahead.h"
#include "bfloat16.h"

/* Sixteen rows of sixteen 32-bit words, turned. */
static inline void transpose(__m512i *r)
{
    __m512i t[16];
    for (int i = 0; i < 16; i += 4) {
        __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
        __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
        t[i] = _mm512_unpacklo_epi64(a, c);
        t[i + 1] = _mm512_unpackhi_epi64(a, c);
        t[i + 2] = _mm512_unpacklo_epi64(b, d);
        t[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; i++) {
        __m512i low = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88), high = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
        __m512i low2 = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
        __m512i high2 = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
        r[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(high, high2, 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
}

/* [count][dim] at `stride` -> [count / 16][width / 2][16] pairs of a key's numbers: a vector holds the same pair of
 * sixteen keys. What lies beyond count and dim is 0. */
static inline void pack_keys(const bf16 *keys, int64_t stride, int64_t count, int64_t dim, int64_t width,
                             uint32_t *packed, Ahead *ahead)
{
    int64_t pairs = width / 2;
    for (int64_t first = 0; first < count; first += LANES) {
        uint32_t *target = packed + first * pairs;
        for (int64_t pair = 0; pair < pairs; pair += LANES) {
            __mmask32 mask = first_pairs(dim - 2 * pair);
            __m512i row[LANES];
            for (int i = 0; i < LANES; i++)
                row[i] = first + i < count ? _mm512_maskz_loadu_epi16(mask, keys + (first + i) * stride + 2 * pair)
                                           : _mm512_setzero_si512();
            ask(ahead);
            transpose(row);
            ask(ahead);
            for (int i = 0; i < LANES; i++) _mm512_store_si512(target + (pair + i) * LANES, row[i]);
        }
    }
}

/* Words of two vectors in turn: first those from word `first` on of each. */
static inline __m512i interleave(__m512i even, __m512i odd, int first)
{
#define BOTH(I) ((I) | ((I) + 32) << 16)
    const __m512i order = _mm512_setr_epi32(BOTH(0), BOTH(1), BOTH(2), BOTH(3), BOTH(4), BOTH(5), BOTH(6), BOTH(7),
                                            BOTH(8), BOTH(9), BOTH(10), BOTH(11), BOTH(12), BOTH(13), BOTH(14), BOTH(15));
#undef BOTH
    return _mm512_permutex2var_epi16(even, _mm512_add_epi16(order, _mm512_set1_epi16((short)first)), odd);
}

/* [count][dim] at `stride` -> [count / 2][width] pairs: the same number of two neighbouring keys. */
static inline void pack_values(const bf16 *values, int64_t stride, int64_t count, int64_t dim, int64_t width,
                               uint32_t *packed, Ahead *ahead)
{
    for (int64_t key = 0; key < count; key += 2) {
        const bf16 *even = values + key * stride;
        uint32_t *target = packed + key / 2 * width;
        ask(ahead);
        for (int64_t at = 0; at < width; at += 2 * LANES) {
            __mmask32 mask = first_pairs(dim - at);
            __m512i a = _mm512_maskz_loadu_epi16(mask, even + at);
            __m512i b = _mm512_maskz_loadu_epi16(key + 1 < count ? mask : 0, even + stride + at);
            _mm512_store_si512(target + at, interleave(a, b, 0));
            if (at + LANES < width) _mm512_store_si512(target + at + LANES, interleave(a, b, LANES));
        }
    }
}
