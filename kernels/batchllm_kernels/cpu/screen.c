/* The largest output of a linear layer, without computing all of them.
 *
 * Products of weights and states in 8-bit integers (vpdpbusd: twice the numbers of an instruction on bfloat16) say what
 * every output is, but for an error that has a bound. Outputs that could be the largest, a few of thousands, are then
 * computed as linear.c does. With w = s q + e (one scale s for each output) and x = t p + f (one t for each row),
 *
 *     w.x - s t q.p = e.x + s q.f,   at most |e| |x| + |s q| |f|  (Cauchy-Schwarz)
 *
 * and float32 sums add n 2^-24 |w| |x| to it. bytes.c packs the weights.
 */
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "bytes.h"
#include "products.h"

enum { CAPACITY = 512 };

/* As _Screen in screen.py. */
typedef struct {
    const bf16 *input;          /* [rows][inputs], input_row numbers apart */
    const uint32_t *weight;     /* as linear.c has it */
    const uint32_t *bytes;      /* [panels][steps][64] four weights of an output */
    const float *about;         /* [panels][4][64], as bytes.h has it */
    int64_t *tokens;            /* [rows] the first largest, once rounded; -1 where that was not found */
    int64_t rows, inputs, outputs, input_row;
} Screen;

/* A row of the input. */
typedef struct {
    float scale, norm, error;   /* t, and bounds of |x| and |f|; scale 0: out of range */
} Row;

typedef struct {
    int32_t token;
    float most;                 /* its output is no larger */
} Candidate;

/* What a thread knows of a row. */
typedef struct {
    float best;                 /* some output is no smaller */
    float from;                 /* outputs below this are smaller than that one, once rounded */
    int32_t count;              /* of candidates, or -1: too many */
} Found;

/* What every thread works on. */
typedef struct {
    const Screen *screen;
    const uint8_t *numbers;     /* [rows][4 * steps] p + 128 */
    const Row *rows;
    int64_t steps;
} Work;

/* Numbers below this round to bfloat16 numbers below that of `best`: they are more than half a unit of its last place
 * away. */
static float still_equal(float best)
{
    float near = _mm512_cvtss_f32(rounded(_mm512_set1_ps(best)));
    return near - fabsf(near) * 0x1p-8f;
}

static void quantise(const bf16 *input, int64_t count, uint8_t *numbers, Row *row)
{
    __m512 largest = _mm512_setzero_ps();
    for (int64_t at = 0; at < count; at += LANES)
        largest = _mm512_max_ps(largest, _mm512_abs_ps(load_bf16(input + at, count - at)));
    float most = _mm512_reduce_max_ps(largest);
    *row = (Row){0, 0, 0};
    if (!(most > SMALLEST && most < LARGEST)) return;
    row->scale = most / 127;
    __m512 scale = _mm512_set1_ps(row->scale), inverse = _mm512_set1_ps(127 / most);
    __m512 norm = _mm512_setzero_ps(), error = norm;
    for (int64_t at = 0; at < count; at += LANES) {
        __m512 number = load_bf16(input + at, count - at);
        __m512i integer = _mm512_cvtps_epi32(_mm512_mul_ps(number, inverse));
        __m512 missed = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(integer), scale, number);
        norm = _mm512_fmadd_ps(number, number, norm);
        error = _mm512_fmadd_ps(missed, missed, error);
        integer = _mm512_add_epi32(integer, _mm512_set1_epi32(128));
        _mm_mask_storeu_epi8(numbers + at, first_lanes(count - at), _mm512_cvtepi32_epi8(integer));
    }
    row->norm = sqrtf(_mm512_reduce_add_ps(norm)) * about_one(count) + TINY;
    row->error = sqrtf(_mm512_reduce_add_ps(error)) * about_one(count) + TINY;
    if (!(row->norm < LARGEST)) row->scale = 0; /* a number that is none */
}

static void drop(Candidate *candidates, Found *found)
{
    int32_t left = 0;
    for (int32_t i = 0; i < found->count; i++)
        if (candidates[i].most >= found->from) candidates[left++] = candidates[i];
    found->count = left;
}

/* Takes in 64 outputs of a row: about what they are, and how much more or less they may be. */
static __attribute__((noinline)) void take_in(const __m512 *guess, const __m512 *slack, int64_t token, int64_t outputs,
                                              Candidate *candidates, Found *found)
{
    __m512 lowest = _mm512_set1_ps(-INFINITY);
    for (int j = 0; j < WIDE; j++)
        lowest = _mm512_mask_max_ps(lowest, first_lanes(outputs - token - j * LANES), lowest,
                                    _mm512_sub_ps(guess[j], slack[j]));
    float best = _mm512_reduce_max_ps(lowest);
    if (best > found->best) found->best = best, found->from = still_equal(best);
    if (found->count > CAPACITY - PANEL) drop(candidates, found);
    if (found->count > CAPACITY - PANEL) {
        found->count = -1, found->from = INFINITY;
        return;
    }
    for (int j = 0; j < WIDE; j++) {
        float most[LANES];
        __m512 numbers = _mm512_add_ps(guess[j], slack[j]);
        __mmask16 some = first_lanes(outputs - token - j * LANES);
        some = _mm512_mask_cmp_ps_mask(some, numbers, _mm512_set1_ps(found->from), _CMP_GE_OQ);
        if (!some) continue;
        _mm512_storeu_ps(most, numbers);
        for (unsigned left = some; left; left &= left - 1) {
            int lane = __builtin_ctz(left);
            candidates[found->count++] = (Candidate){(int32_t)(token + j * LANES + lane), most[lane]};
        }
    }
}

/* Looks at the sums of a row with a panel. */
static void look_at(const Work *w, int64_t row, int64_t panel, const int32_t *sums, Candidate *candidates, Found *found)
{
    if (found->count < 0) return;
    const float *about = w->screen->about + panel * ABOUT * PANEL;
    __m512 scale = _mm512_set1_ps(w->rows[row].scale), norm = _mm512_set1_ps(w->rows[row].norm);
    __m512 error = _mm512_set1_ps(w->rows[row].error), from = _mm512_set1_ps(found->from), guess[WIDE], slack[WIDE];
    unsigned any = 0;
    for (int j = 0; j < WIDE; j++, about += LANES) {
        __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums + j * LANES), _mm512_load_si512(about + SHIFT * PANEL));
        guess[j] = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_load_ps(about + SCALE * PANEL));
        guess[j] = _mm512_mul_ps(guess[j], scale);
        slack[j] = _mm512_mul_ps(norm, _mm512_load_ps(about + ERROR * PANEL));
        slack[j] = _mm512_fmadd_ps(error, _mm512_load_ps(about + NORM * PANEL), slack[j]);
        any |= _mm512_cmp_ps_mask(_mm512_add_ps(guess[j], slack[j]), from, _CMP_GE_OQ);
    }
    if (any) take_in(guess, slack, panel * PANEL, w->screen->outputs, candidates, found);
}

BYTE_PRODUCTS static inline __attribute__((always_inline)) void some_rows(
    const Work *w, int64_t row, int64_t panel, Candidate *candidates, Found *found, const int rows)
{
    _Alignas(LINE) int32_t sums[ROWS][PANEL];
    multiply_bytes(sums, (const uint32_t *)w->numbers + row * w->steps,
                   w->screen->bytes + panel * w->steps * PANEL, w->steps, rows);
    for (int i = 0; i < rows; i++)
        look_at(w, row + i, panel, sums[i], candidates + (row + i) * CAPACITY, found + row + i);
}

BYTE_PRODUCTS static void one_panel(const Work *w, int64_t panel, Candidate *candidates, Found *found)
{
    int64_t last = w->screen->rows;
    for (int64_t row = 0; row < last; row += ROWS) {
#define SOME(N) some_rows(w, row, panel, candidates, found, N)
        FOR_EACH_COUNT(SOME, least(ROWS, last - row))
#undef SOME
    }
}

enum { TOGETHER = 4 }; /* outputs computed at once: sums wait for each other */

/* The outputs of these candidates as linear.c computes them, not rounded yet. */
static void compute(const Screen *s, int64_t row, const Candidate *candidates, int64_t count, float *outputs)
{
    const uint32_t *input = (const uint32_t *)(s->input + row * s->input_row), *weight[TOGETHER];
    int64_t pairs = s->inputs / 2;
    __m512 sums[TOGETHER];
    for (int i = 0; i < TOGETHER; i++) {
        int64_t token = candidates[least(i, count - 1)].token;
        weight[i] = s->weight + token / PANEL * pairs * PANEL + token % PANEL / LANES * LANES;
        sums[i] = _mm512_setzero_ps();
    }
    for (int64_t pair = 0; pair < pairs; pair++) {
        __m512bh one = (__m512bh)_mm512_set1_epi32((int)input[pair]);
        for (int i = 0; i < TOGETHER; i++)
            sums[i] = _mm512_dpbf16_ps(sums[i], one, (__m512bh)_mm512_load_si512(weight[i] + pair * PANEL));
    }
    for (int i = 0; i < count; i++) {
        float lanes[LANES];
        _mm512_storeu_ps(lanes, rounded(sums[i]));
        outputs[i] = lanes[candidates[i].token % LANES];
    }
}

/* The `wanted` candidates that may be largest come first. */
static void put_first(Candidate *candidates, int64_t count, int64_t wanted)
{
    for (int64_t first = 0; first < wanted; first++)
        for (int64_t i = first + 1; i < count; i++)
            if (candidates[i].most > candidates[first].most) {
                Candidate other = candidates[first];
                candidates[first] = candidates[i], candidates[i] = other;
            }
}

/* The first largest output of a row. After the likeliest few, most of the others need not be computed. */
static int64_t choose(const Screen *s, int64_t row, Candidate *candidates, Found *found)
{
    float best = -INFINITY, outputs[TOGETHER];
    int32_t token = -1;
    while (found->count) {
        int64_t count = least(TOGETHER, found->count);
        put_first(candidates, found->count, count);
        compute(s, row, candidates, count, outputs);
        for (int64_t i = 0; i < count; i++) {
            int32_t other = candidates[i].token;
            if (outputs[i] > best || (outputs[i] == best && other < token)) best = outputs[i], token = other;
        }
        found->from = still_equal(best);
        found->count -= (int32_t)count, candidates += count;
        drop(candidates, found);
    }
    return token;
}

/* All threads' candidates of a row become the first one's; of each thread, `candidates` and `found` lie so far apart. */
static int gather(Candidate **candidates, Found **found, int threads, int64_t row)
{
    Found all = {-INFINITY, -INFINITY, 0};
    for (int i = 0; i < threads; i++) {
        if (found[i][row].count < 0) return 0;
        if (found[i][row].best > all.best) all.best = found[i][row].best;
    }
    all.from = still_equal(all.best);
    Candidate *to = candidates[0] + row * CAPACITY;
    for (int i = 0; i < threads; i++) {
        Found *other = &found[i][row];
        Candidate *more = candidates[i] + row * CAPACITY;
        other->from = all.from;
        drop(more, other);
        if (all.count + other->count > CAPACITY) return 0;
        memmove(to + all.count, more, other->count * sizeof *more);
        all.count += other->count;
    }
    found[0][row] = all;
    return 1;
}

/* Returns 1 where there is no memory. */
int batchllm_screen(const Screen *s)
{
    int64_t panels = (s->outputs + PANEL - 1) / PANEL, steps = (s->inputs + 3) / 4;
    int most = omp_get_max_threads(), threads = 1, failed = 0;
    uint8_t *numbers = calloc(s->rows * steps, 4);
    Row *rows = malloc(s->rows * sizeof *rows);
    Candidate **candidates = calloc(most, sizeof *candidates);
    Found **found = calloc(most, sizeof *found);
    Work w = {s, numbers, rows, steps};
    failed = !numbers || !rows || !candidates || !found;
    if (!failed) {
#pragma omp parallel reduction(|| : failed)
        {
            int me = omp_get_thread_num();
            Candidate *mine = candidates[me] = malloc(s->rows * CAPACITY * sizeof *mine);
            Found *known = found[me] = malloc(s->rows * sizeof *known);
            failed = !mine || !known;
#pragma omp single
            threads = omp_get_num_threads();
#pragma omp for schedule(static)
            for (int64_t row = 0; row < s->rows; row++)
                quantise(s->input + row * s->input_row, s->inputs, numbers + row * steps * 4, rows + row);
            for (int64_t row = 0; row < s->rows && !failed; row++)
                known[row] = rows[row].scale > 0 ? (Found){-INFINITY, -INFINITY, 0} : (Found){0, INFINITY, -1};
#pragma omp for schedule(dynamic, 1)
            for (int64_t panel = 0; panel < panels; panel++)
                if (!failed) one_panel(&w, panel, mine, known);
        }
    }
    if (!failed) {
#pragma omp parallel for schedule(dynamic, 4)
        for (int64_t row = 0; row < s->rows; row++)
            s->tokens[row] = gather(candidates, found, threads, row)
                                 ? choose(s, row, candidates[0] + row * CAPACITY, found[0] + row)
                                 : -1;
    }
    for (int i = 0; candidates && i < most; i++) free(candidates[i]);
    for (int i = 0; found && i < most; i++) free(found[i]);
    free(numbers), free(rows), free(candidates), free(found);
    return failed;
}
