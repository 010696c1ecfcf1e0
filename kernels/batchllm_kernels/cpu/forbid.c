/* Structured output: what must not come gets a logit of minus infinity. */
#include <math.h>

#include "bfloat16.h"

/* logits [rows][size]; allowed [rows]: a bit for each token, lowest first, in 32-bit words. Rows of both may lie apart,
 * by so many numbers. */
void batchllm_forbid(float *logits, const uint32_t *allowed, int64_t rows, int64_t size, int64_t logits_row,
                     int64_t allowed_row)
{
    const __m512 never = _mm512_set1_ps(-INFINITY);
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const uint16_t *bits = (const uint16_t *)(allowed + row * allowed_row);
        for (int64_t at = 0; at < size; at += LANES) {
            const __mmask16 forbidden = ~bits[at / LANES] & first_lanes(size - at);
            if (forbidden) _mm512_mask_storeu_ps(logits + row * logits_row + at, forbidden, never);
        }
    }
}
