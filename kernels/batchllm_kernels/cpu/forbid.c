/* Structured output: what must not come gets a logit of minus infinity. */
#include <math.h>

#include "bfloat16.h"

/* Of logits [..][size], rows of which lie apart by so many numbers, those of `rows` [count]; allowed [count][words]: a
 * bit for each token, lowest first. */
void batchllm_forbid(float *logits, const int64_t *rows, const uint32_t *allowed, int64_t count, int64_t size,
                     int64_t logits_row, int64_t words)
{
    const __m512 never = _mm512_set1_ps(-INFINITY);
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < count; n++) {
        const uint16_t *bits = (const uint16_t *)(allowed + n * words);
        for (int64_t at = 0; at < size; at += LANES) {
            const __mmask16 forbidden = ~bits[at / LANES] & first_lanes(size - at);
            if (forbidden) _mm512_mask_storeu_ps(logits + rows[n] * logits_row + at, forbidden, never);
        }
    }
}
