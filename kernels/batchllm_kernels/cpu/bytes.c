/* Weights of linear.c's panels as 8-bit integers, for screen.c. */
#include <math.h>

#include "bytes.h"
#include "products.h"

int batchllm_has_byte_products(void) { return __builtin_cpu_supports("avx512vnni") != 0; }

/* The two numbers of each pair. */
static inline void split(__m512i pairs, __m512 *numbers)
{
    numbers[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    numbers[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
}

static inline void largest_of(const uint32_t *weight, int64_t pairs, __m512 *largest)
{
    __m512 numbers[2];
    for (int j = 0; j < WIDE; j++) largest[j] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; pair++)
        for (int j = 0; j < WIDE; j++) {
            split(_mm512_load_si512(weight + pair * PANEL + j * LANES), numbers);
            largest[j] = _mm512_max_ps(largest[j], _mm512_abs_ps(numbers[0]));
            largest[j] = _mm512_max_ps(largest[j], _mm512_abs_ps(numbers[1]));
        }
}

/* Sixteen outputs. Returns whether all are numbers, and none too large. */
static inline int pack(const uint32_t *weight, uint32_t *bytes, float *about, int64_t pairs, __m512 largest)
{
    __mmask16 some = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(SMALLEST * TINY), _CMP_GT_OQ);
    __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(127), largest);
    __m512 scale = _mm512_div_ps(largest, _mm512_set1_ps(127));
    __m512 error = _mm512_setzero_ps(), norm = error;
    __m512i sum = _mm512_setzero_si512();
    for (int64_t pair = 0; pair < pairs; pair += 2) {
        __m512 numbers[4];
        split(_mm512_load_si512(weight + pair * PANEL), numbers);
        split(pair + 1 < pairs ? _mm512_load_si512(weight + (pair + 1) * PANEL) : _mm512_setzero_si512(), numbers + 2);
        __m512i four = _mm512_setzero_si512();
        for (int i = 0; i < 4; i++) {
            __m512i integer = _mm512_cvtps_epi32(_mm512_mul_ps(numbers[i], inverse));
            __m512 whole = _mm512_cvtepi32_ps(integer), missed = _mm512_fnmadd_ps(whole, scale, numbers[i]);
            sum = _mm512_add_epi32(sum, integer);
            error = _mm512_fmadd_ps(missed, missed, error);
            norm = _mm512_fmadd_ps(whole, whole, norm);
            four = _mm512_or_si512(_mm512_srli_epi32(four, 8), _mm512_slli_epi32(integer, 24));
        }
        _mm512_store_si512(bytes + pair / 2 * PANEL, four);
    }
    __m512 tiny = _mm512_set1_ps(TINY), more = _mm512_set1_ps(about_one(2 * pairs));
    error = _mm512_fmadd_ps(_mm512_sqrt_ps(error), more, tiny);
    norm = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_sqrt_ps(norm), scale), more, tiny);
    /* Twice what sums of so many numbers, each rounded, may be off by; and what screen.c rounds. */
    __m512 off = _mm512_set1_ps((float)(2 * pairs + 16) * 0x1p-23f);
    error = _mm512_fmadd_ps(_mm512_add_ps(error, norm), off, error);
    _mm512_store_ps(about + SCALE * PANEL, scale);
    _mm512_store_ps(about + ERROR * PANEL, error);
    _mm512_store_ps(about + NORM * PANEL, norm);
    _mm512_store_si512(about + SHIFT * PANEL, _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), sum), 7));
    __m512 size = _mm512_add_ps(error, norm);
    return _mm512_cmp_ps_mask(size, _mm512_set1_ps(LARGEST), _CMP_LT_OQ) == 0xffff;
}

/* weight [panels][pairs][64] -> bytes [panels][(pairs + 1) / 2][64], about [panels][ABOUT][64]. Returns 0 where weights
 * are not numbers, or too large for bounds to hold. */
int batchllm_pack_bytes(const uint32_t *weight, uint32_t *bytes, float *about, int64_t panels, int64_t pairs)
{
    int fits = 1;
#pragma omp parallel for schedule(static) reduction(&& : fits)
    for (int64_t panel = 0; panel < panels; panel++) {
        const uint32_t *from = weight + panel * pairs * PANEL;
        __m512 largest[WIDE];
        largest_of(from, pairs, largest);
        for (int j = 0; j < WIDE; j++)
            fits = pack(from + j * LANES, bytes + panel * ((pairs + 1) / 2) * PANEL + j * LANES,
                        about + panel * ABOUT * PANEL + j * LANES, pairs, largest[j]) && fits;
    }
    return fits;
}
