/* Linear layers whose weights and inputs are 8-bit integers (W8A8), on the scales of torchao's
 * Int8DynamicActivationInt8WeightConfig: one for each output, and one for each row of the input, found anew. Sums of
 * integers are exact (vpdpbusd), so a row's result does not depend on what rows come with it.
 *
 * Weights are packed as panels of 64 outputs: [outputs / 64][steps][64] fours of neighbouring inputs (byte_linear.py).
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bytes.h"
#include "pieces.h"
#include "products.h"

/* As _ByteProduct in byte_linear.py. Strides count elements. */
typedef struct {
    const bf16 *input;          /* [rows][inputs] */
    const uint32_t *weight;     /* packed */
    const int32_t *shift;       /* [panels * 64] -128 times the sum of an output's weights */
    const float *scale;         /* [panels * 64] */
    const bf16 *bias;           /* [outputs], or NULL */
    const bf16 *residual;       /* [rows][outputs], added to the rounded product, or NULL; may be the output itself */
    bf16 *output;               /* [rows][outputs] */
    int64_t rows, inputs, outputs, input_row, residual_row, output_row;
} ByteProduct;

/* What every thread works on. */
typedef struct {
    const ByteProduct *product;
    uint8_t *numbers;           /* [rows][4 * steps] the input's integers, 128 too large */
    float *scales;              /* [rows] */
    int64_t steps;              /* fours of inputs */
} Work;

static float rounded_once(float number) { return _mm512_cvtss_f32(rounded(_mm512_set1_ps(number))); }

/* A row's integers and its scale, rounded where torchao's operations round. The largest number comes to a half above the
 * largest integer. A row with a number that is none has a scale that is none. */
static void quantise(const Work *w, int64_t row)
{
    const bf16 *input = w->product->input + row * w->product->input_row;
    uint8_t *numbers = w->numbers + row * 4 * w->steps;
    int64_t count = w->product->inputs;
    __m512 largest = _mm512_setzero_ps();
    __mmask16 strange = 0;
    for (int64_t at = 0; at < count; at += LANES) {
        __m512 size = _mm512_abs_ps(load_bf16(input + at, count - at));
        strange |= _mm512_cmp_ps_mask(size, size, _CMP_UNORD_Q);
        largest = _mm512_max_ps(largest, size);
    }
    float scale = strange ? NAN : fmaxf(rounded_once(_mm512_reduce_max_ps(largest) / 127.5f), 0x1p-23f);
    __m512 inverse = _mm512_set1_ps(1 / scale);
    w->scales[row] = scale;
    memset(numbers + 4 * (w->steps - 1), 0, 4);
    for (int64_t at = 0; at < count; at += LANES) {
        __m512i integer = _mm512_cvtps_epi32(_mm512_mul_ps(load_bf16(input + at, count - at), inverse));
        integer = _mm512_add_epi32(_mm512_min_epi32(integer, _mm512_set1_epi32(127)), _mm512_set1_epi32(128));
        _mm_mask_storeu_epi8(numbers + at, first_lanes(count - at), _mm512_cvtepi32_epi8(integer));
    }
}

/* A row's sums with a panel become its outputs. */
static void finish(const Work *w, const int32_t *sums, int64_t row, int64_t panel)
{
    const ByteProduct *p = w->product;
    bf16 *output = p->output + row * p->output_row;
    __m512 scale = _mm512_set1_ps(w->scales[row]);
    int64_t at = panel * PANEL;
    for (int j = 0; j < WIDE; j++, at += LANES) {
        int64_t left = p->outputs - at;
        __m512i whole = _mm512_add_epi32(_mm512_load_si512(sums + j * LANES), _mm512_loadu_si512(p->shift + at));
        __m512 sum = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(whole), scale), _mm512_loadu_ps(p->scale + at));
        if (p->bias) sum = _mm512_add_ps(sum, load_bf16(p->bias + at, left));
        if (p->residual) sum = _mm512_add_ps(rounded(sum), load_bf16(p->residual + row * p->residual_row + at, left));
        store_bf16(output + at, sum, left);
    }
}

BYTE_PRODUCTS static inline __attribute__((always_inline)) void some_rows(const Work *w, int64_t row, int64_t panel,
                                                                          const int rows)
{
    _Alignas(LINE) int32_t sums[ROWS][PANEL];
    multiply_bytes(sums, (const uint32_t *)w->numbers + row * w->steps,
                   w->product->weight + panel * w->steps * PANEL, w->steps, rows);
    for (int i = 0; i < rows; i++) finish(w, sums[i], row + i, panel);
}

BYTE_PRODUCTS static void do_piece(const Work *w, Piece piece)
{
    for (int64_t row = piece.first; row < piece.last; row += ROWS) {
#define SOME(N) some_rows(w, row, piece.panel, N)
        FOR_EACH_COUNT(SOME, least(ROWS, piece.last - row))
#undef SOME
    }
}

/* Returns 1 where there is no memory for the integers. */
int batchllm_byte_linear(const ByteProduct *p)
{
    Work w = {.product = p, .steps = (p->inputs + 3) / 4};
    w.numbers = malloc((size_t)(p->rows * 4 * w.steps + 1));
    w.scales = malloc((size_t)p->rows * sizeof *w.scales + 1);
    int failed = !w.numbers || !w.scales;
    if (!failed) {
        Division division = divide(p->rows, p->outputs);
#pragma omp parallel
        {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < p->rows; row++) quantise(&w, row);
#pragma omp for schedule(dynamic)
            for (int64_t number = 0; number < division.count; number++) do_piece(&w, piece_of(&division, number));
        }
    }
    free(w.numbers);
    free(w.scales);
    return failed;
}
