/* Linear layers in bfloat16 with packed weights, and what follows a product while its sums are still in registers.
 *
 * Weights are packed as panels of 64 outputs: [outputs / 64][inputs / 2][64] pairs of neighbouring inputs (linear.py).
 * A panel stays in the second-level cache while all rows pass by, six at a time; a row's sums are the same whatever
 * rows come with it.
 */
#include <stddef.h>

#include "gate.h"
#include "linear.h"
#include "packing.h"
#include "pieces.h"
#include "products.h"

static inline __attribute__((always_inline)) void finish(const Product *p, Sums sums, int64_t row, int64_t panel,
                                                         const int rows)
{
    for (int i = 0; i < rows; i++) {
        bf16 *output = p->output + (row + i) * p->output_row;
        if (p->gated) {
            int64_t at = panel * PANEL / 2;
            for (int j = 0; j < WIDE / 2; j++, at += LANES) {
                __m512 gate = rounded(sums[i][j]), up = rounded(sums[i][j + WIDE / 2]);
                store_bf16(output + at, silu_times(gate, up), p->outputs / 2 - at);
            }
            continue;
        }
        int64_t at = panel * PANEL;
        for (int j = 0; j < WIDE; j++, at += LANES) {
            int64_t left = p->outputs - at;
            __m512 sum = sums[i][j];
            if (p->bias) sum = _mm512_add_ps(sum, load_bf16(p->bias + at, left));
            if (p->residual)
                sum = _mm512_add_ps(rounded(sum), load_bf16(p->residual + (row + i) * p->residual_row + at, left));
            store_bf16(output + at, sum, left);
        }
    }
}

static inline const uint32_t *panel_of(const Product *p, int64_t panel)
{
    return p->weight + panel * (p->inputs / 2) * PANEL;
}

static inline __attribute__((always_inline)) void some_rows(const Product *p, int64_t row, int64_t panel, Ahead *ahead,
                                                            const int rows)
{
    Sums sums;
    clear_sums(sums, rows, WIDE);
    multiply(sums, (const uint32_t *)(p->input + row * p->input_row), p->input_row / 2,
             panel_of(p, panel), PANEL, LANES, p->inputs / 2, ahead, rows, WIDE);
    finish(p, sums, row, panel, rows);
}

static void do_piece(const Product *p, Piece piece, Ahead *ahead)
{
    for (int64_t row = piece.first; row < piece.last; row += ROWS) {
#define SOME(N) some_rows(p, row, piece.panel, ahead, N)
        FOR_EACH_COUNT(SOME, least(ROWS, piece.last - row))
#undef SOME
    }
}

/* The weights of `next`, to be asked for while `now` is worked on. */
static Ahead weights_ahead(const Product *p, Piece now, Piece next)
{
    Ahead ahead = {.pace = 0};
    if (next.panel == now.panel) return ahead;
    int64_t bytes = p->inputs / 2 * PANEL * sizeof *p->weight;
    ahead.first = (Stretch){(const char *)panel_of(p, next.panel), bytes, bytes, 1, 0};
    set_pace(&ahead, (now.last - now.first + ROWS - 1) / ROWS * (p->inputs / 2) + 1);
    return ahead;
}

/* Threads take a piece while they still have one to do, so that its weights can come meanwhile. */
void batchllm_linear(const Product *p)
{
    Division division = divide(p->rows, p->outputs);
    int64_t taken = 0;
#pragma omp parallel
    {
        int64_t number = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
        while (number < division.count) {
            int64_t after = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
            Piece now = piece_of(&division, number), next = after < division.count ? piece_of(&division, after) : now;
            Ahead ahead = weights_ahead(p, now, next);
            do_piece(p, now, &ahead);
            number = after;
        }
    }
}

/* As _Part in linear.py: some rows of a joined weight. */
typedef struct {
    const bf16 *weight; /* [rows][inputs], contiguous */
    int64_t rows;
} Part;

/* A row of the joined weight; NULL below the last. */
static const bf16 *find_row(const Part *parts, int64_t count, int64_t inputs, int64_t row)
{
    for (; count > 0; parts++, count--) {
        if (row < parts->rows) return parts->weight + row * inputs;
        row -= parts->rows;
    }
    return NULL;
}

/* The parts' rows, inputs even -> panels, filled up with zeros. Gated: two parts, of which the first are gates. */
void batchllm_pack_panels(const Part *parts, int64_t count, uint32_t *packed, int64_t panels, int64_t inputs,
                          int64_t gated)
{
    int64_t width = gated ? PANEL / 2 : PANEL, pairs = inputs / 2;
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t at = 0; at < PANEL; at += LANES) {
            const Part *from = parts + at / width;
            const bf16 *rows[LANES];
            for (int i = 0; i < LANES; i++)
                rows[i] = find_row(from, gated ? 1 : count, inputs, panel * width + at % width + i);
            for (int64_t pair = 0; pair < pairs; pair += LANES) {
                __mmask16 mask = first_lanes(pairs - pair);
                __m512i row[LANES];
                for (int i = 0; i < LANES; i++)
                    row[i] = rows[i] ? _mm512_maskz_loadu_epi32(mask, rows[i] + 2 * pair) : _mm512_setzero_si512();
                transpose(row);
                uint32_t *target = packed + (panel * pairs + pair) * PANEL + at;
                for (int i = 0; i < least(LANES, pairs - pair); i++) _mm512_store_si512(target + i * PANEL, row[i]);
            }
        }
}
