/* What a decoder layer does between its matrix products, in bfloat16: one pass over the rows each.
 *
 * Every function rounds to bfloat16 where transformers' modules do, so results differ from theirs in the order of a sum
 * alone.
 */
#include <math.h>
#include <string.h>

#include "bfloat16.h"
#include "gate.h"
#include "layer.h"

static inline void norm_row(const bf16 *from, const bf16 *weight, bf16 *to, int64_t size, float epsilon)
{
    __m512 squares = _mm512_setzero_ps();
    for (int64_t at = 0; at < size; at += LANES) {
        __m512 number = load_bf16(from + at, size - at);
        squares = _mm512_fmadd_ps(number, number, squares);
    }
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / size + epsilon));
    for (int64_t at = 0; at < size; at += LANES) {
        __m512 number = rounded(_mm512_mul_ps(load_bf16(from + at, size - at), scale));
        store_bf16(to + at, _mm512_mul_ps(number, load_bf16(weight + at, size - at)), size - at);
    }
}

/* normed [rows][size] = RMSNorm (Zhang and Sennrich 2019) of states [rows][size], times weight. */
void batchllm_rms_norm(const bf16 *states, const bf16 *weight, bf16 *normed, int64_t rows, int64_t size,
                       int64_t states_row, int64_t normed_row, float epsilon)
{
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++)
        norm_row(states + row * states_row, weight, normed + row * normed_row, size, epsilon);
}

/* The same of every head of states [rows][heads][dim], in place. */
void batchllm_norm_heads(bf16 *states, const bf16 *weight, int64_t rows, int64_t heads, int64_t dim, int64_t states_row,
                         float epsilon)
{
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (bf16 *head = states + row * states_row, *end = head + heads * dim; head < end; head += dim)
            norm_row(head, weight, head, dim, epsilon);
}

/* output [rows][size] = silu(joined[:, :size]) * joined[:, size:] */
void batchllm_silu_and_mul(const bf16 *joined, bf16 *output, int64_t rows, int64_t size)
{
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *gate = joined + 2 * row * size, *up = gate + size;
        bf16 *to = output + row * size;
        for (int64_t at = 0; at < size; at += LANES) {
            int64_t left = size - at;
            store_bf16(to + at, silu_times(load_bf16(gate + at, left), load_bf16(up + at, left)), left);
        }
    }
}

/* Rotary positions (Su et al. 2021) in place, half of each head rotated against the other.
 * states [rows][heads][dim], cosine and sine [rows][dim] with equal halves. */
void batchllm_rotate(bf16 *states, const bf16 *cosine, const bf16 *sine, int64_t rows, int64_t heads, int64_t dim,
                     int64_t states_row)
{
    int64_t half = dim / 2;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++) {
            bf16 *low = states + row * states_row + head * dim, *high = low + half;
            for (int64_t at = 0; at < half; at += LANES) {
                int64_t left = half - at;
                __m512 a = load_bf16(low + at, left), b = load_bf16(high + at, left);
                __m512 c = load_bf16(cosine + row * dim + at, left), s = load_bf16(sine + row * dim + at, left);
                __m512 turned_a = _mm512_sub_ps(rounded(_mm512_mul_ps(a, c)), rounded(_mm512_mul_ps(b, s)));
                __m512 turned_b = _mm512_add_ps(rounded(_mm512_mul_ps(b, c)), rounded(_mm512_mul_ps(a, s)));
                store_bf16(low + at, turned_a, left);
                store_bf16(high + at, turned_b, left);
            }
        }
}

/* KV of rows [rows][width] goes to slots of a pool [slots][width], where a token's heads lie side by side. */
void batchllm_store_kv(const bf16 *key, const bf16 *value, bf16 *keys, bf16 *values, const int64_t *slot, int64_t rows,
                       int64_t width, int64_t key_row, int64_t value_row)
{
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        memcpy(keys + slot[row] * width, key + row * key_row, width * sizeof *key);
        memcpy(values + slot[row] * width, value + row * value_row, width * sizeof *value);
    }
}
