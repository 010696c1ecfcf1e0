/* Drawing tokens: the largest of scaled logit + Gumbel noise. Hardly any logarithm is taken: most tokens are ruled out
 * by a bound of their noise. */
#include <math.h>
#include <string.h>

#include "bfloat16.h"
#include "power.h"

enum { UNDECIDED = -1, VECTORS = 4, BLOCK = VECTORS * LANES };

#define DOUBT 1e-4f /* more than rounding, of ours or torch's, can change the distance of two scores by */
#define LEAST_NOISE -2.9f
#define LARGEST_NOISE 22.3f
#define LN2 0.69314718f

/* batchllm/executor/random_numbers.py defines the noise: a hash of 31 bits, of a row's words and token id x SPREAD. */
#define SPREAD 0x9E3779B1u

/* Of sixteen tokens from this one on. */
static inline __m512i hash_bits(int64_t token, const int32_t *words)
{
    const __m512i first = _mm512_set1_epi32(words[0]), second = _mm512_set1_epi32(words[1]);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i spread = _mm512_mullo_epi32(lanes, _mm512_set1_epi32((int)SPREAD));
    spread = _mm512_add_epi32(spread, _mm512_set1_epi32((int)(SPREAD * (uint32_t)token)));
    __m512i bits = _mm512_xor_si512(spread, first);
    bits = _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 16));
    bits = _mm512_add_epi32(_mm512_mullo_epi32(bits, _mm512_set1_epi32(0x7FEB352D)), second);
    bits = _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 15));
    bits = _mm512_mullo_epi32(bits, _mm512_set1_epi32((int)0x846CA68Bu));
    bits = _mm512_xor_si512(bits, _mm512_srli_epi32(bits, 16));
    return _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
}

/* Of the number in (0, 1) that torch makes in float32, but with logarithms in float64. */
static double noise_of(int32_t bits)
{
    float number = ((float)bits + 0.5f) * 4.656612595521636e-10f; /* 2^-31 (1 - 2^-24) */
    return -log(-log1p(-(double)number));
}

/* Noise is BOUND_AT_0 - BOUND_SLOPE * as_integer(bits) at most, but for less than DOUBT: -log(1 - u) >= u, and log2(v)
 * is no less than the exponent and the mantissa of v, read as one number. */
#define BOUND_SLOPE (0x1p-23f * LN2)
#define BOUND_AT_0 ((127 + 31) * LN2)

static inline __m512 as_integer(__m512i bits)
{
    return _mm512_cvtepi32_ps(_mm512_castps_si512(_mm512_cvtepi32_ps(bits)));
}

/* NaN if any is none. */
static float largest_logit(const float *logits, int64_t size)
{
    __m512 none = _mm512_set1_ps(-INFINITY), even = none, odd = none;
    __mmask16 nan = 0;
    for (int64_t at = 0; at < size; at += 2 * LANES) {
        __m512 one = _mm512_mask_loadu_ps(none, first_lanes(size - at), logits + at);
        __m512 two = _mm512_mask_loadu_ps(none, first_lanes(size - at - LANES), logits + at + LANES);
        nan |= _mm512_cmp_ps_mask(one, two, _CMP_UNORD_Q);
        even = _mm512_max_ps(even, one);
        odd = _mm512_max_ps(odd, two);
    }
    return nan ? NAN : _mm512_reduce_max_ps(_mm512_max_ps(even, odd));
}

static inline __m512 largest_lanes(const __m512 *vectors)
{
    return _mm512_max_ps(_mm512_max_ps(vectors[0], vectors[1]), _mm512_max_ps(vectors[2], vectors[3]));
}

/* One row on its way to a token. */
struct row {
    float largest, temperature; /* the largest logit */
    int32_t words[2];
    double best, next; /* scores */
    int64_t token;     /* of the best */
    float hopeless;    /* scores below are not within DOUBT of the best, which is the largest logit's or more */
};

static void look_at(struct row *row, float logit, int32_t bits, int64_t token)
{
    double score = (double)((logit - row->largest) / row->temperature) + noise_of(bits);
    if (score > row->best)
        row->next = row->best, row->best = score, row->token = token;
    else
        row->next = fmax(row->next, score);
    row->hopeless = fmaxf((float)row->best, LEAST_NOISE) - 2 * DOUBT;
}

/* BLOCK tokens from this one on. */
static inline void look_at_block(struct row *row, const float *logits, int64_t token)
{
    __m512 bound[VECTORS];
    __m512i bits[VECTORS];
    __m512 largest = _mm512_set1_ps(row->largest), factor = _mm512_set1_ps(1.0f / row->temperature);
    for (int v = 0; v < VECTORS; v++)
        bound[v] = _mm512_fmadd_ps(_mm512_sub_ps(_mm512_loadu_ps(logits + v * LANES), largest), factor,
                                   _mm512_set1_ps(BOUND_AT_0));
    __m512 even_luckiest = _mm512_set1_ps(row->hopeless + (BOUND_AT_0 - LARGEST_NOISE));
    if (!_mm512_cmp_ps_mask(largest_lanes(bound), even_luckiest, _CMP_GE_OQ)) return;
    for (int v = 0; v < VECTORS; v++) {
        bits[v] = hash_bits(token + v * LANES, row->words);
        bound[v] = _mm512_fnmadd_ps(as_integer(bits[v]), _mm512_set1_ps(BOUND_SLOPE), bound[v]);
    }
    __m512 hopeless = _mm512_set1_ps(row->hopeless);
    if (!_mm512_cmp_ps_mask(largest_lanes(bound), hopeless, _CMP_GE_OQ)) return;
    int32_t bits_of[BLOCK];
    memcpy(bits_of, bits, sizeof bits);
    for (int v = 0; v < VECTORS; v++)
        for (unsigned left = _mm512_cmp_ps_mask(bound[v], hopeless, _CMP_GE_OQ); left; left &= left - 1) {
            int place = v * LANES + __builtin_ctz(left);
            look_at(row, logits[place], bits_of[place], token + place);
        }
}

/* The token of one row, or UNDECIDED if two scores are within DOUBT, or something is not finite. */
static int64_t draw(const float *logits, int64_t size, float temperature, const int32_t *words)
{
    struct row row = {largest_logit(logits, size), temperature, {words[0], words[1]}, -INFINITY, -INFINITY, UNDECIDED,
                      LEAST_NOISE - 2 * DOUBT};
    if (!isfinite(row.largest) || !isnormal(1.0f / temperature)) return UNDECIDED;
    int64_t at = 0;
    for (; at + BLOCK <= size; at += BLOCK) look_at_block(&row, logits + at, at);
    float rest[BLOCK];
    for (int64_t i = 0; i < BLOCK; i++) rest[i] = at + i < size ? logits[at + i] : -INFINITY;
    look_at_block(&row, rest, at);
    return row.next < row.best - DOUBT ? row.token : UNDECIDED;
}

/* tokens [count]: of logits [..][size], rows of which lie apart by so many numbers, those of `rows` [count];
 * temperatures [count], words [count][2]. */
void batchllm_draw(const float *logits, const int64_t *rows, const float *temperatures, const int32_t *words,
                   int64_t *tokens, int64_t count, int64_t size, int64_t logits_row)
{
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < count; n++)
        tokens[n] = draw(logits + rows[n] * logits_row, size, temperatures[n], words + 2 * n);
}

/* Three weights, as shares of the largest logit's: of other tokens with a larger scaled logit, or one less than DOUBT
 * below; of the token itself; of all. */
static void stand(const float *logits, int64_t size, float temperature, int64_t token, float *weights)
{
    const float largest = largest_logit(logits, size), own = (logits[token] - largest) / temperature * LOG2E;
    const __m512 top = _mm512_set1_ps(largest), factor = _mm512_set1_ps(LOG2E / temperature);
    const __m512 least = _mm512_set1_ps(own - DOUBT * LOG2E);
    __m512 above = _mm512_setzero_ps(), total = _mm512_setzero_ps();
    for (int64_t at = 0; at < size; at += LANES) {
        __mmask16 lanes = first_lanes(size - at);
        __m512 power = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, logits + at), top), factor);
        __mmask16 before = _mm512_mask_cmp_ps_mask(lanes, power, least, _CMP_GE_OQ);
        if (token - at >= 0 && token - at < LANES) before &= ~(1 << (token - at));
        __m512 weight = power_of_two(power);
        total = _mm512_mask_add_ps(total, lanes, total, weight);
        above = _mm512_mask_add_ps(above, before, above, weight);
    }
    weights[0] = _mm512_reduce_add_ps(above);
    weights[1] = exp2f(own);
    weights[2] = _mm512_reduce_add_ps(total);
}

/* `stand` for the tokens [count] of these rows that are not UNDECIDED; weights [count][3]. */
void batchllm_stand(const float *logits, const int64_t *rows, const float *temperatures, const int64_t *tokens,
                    float *weights, int64_t count, int64_t size, int64_t logits_row)
{
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < count; n++)
        if (tokens[n] != UNDECIDED)
            stand(logits + rows[n] * logits_row, size, temperatures[n], tokens[n], weights + 3 * n);
}
