/* Attention of one layer over contiguous stretches of KV, in bfloat16, for CPUs with AVX-512 BF16 products.
 *
 * Rows (tokens of a step) come in tiles; each tile has a list of segments: stretches of KV that some consecutive rows of
 * the tile read. A tile goes through its segments in blocks of keys and keeps, for each query, the running maximum, sum
 * and weighted values (online softmax, Milakov and Gimelshein 2018; as in FlashAttention, Dao et al. 2022). What a
 * query sees follows from positions alone, so shared prefixes, prompts over themselves and single decoded tokens are all
 * the same to this code: a prefix that many rows read is packed once for a tile of them.
 *
 * Products take pairs of bfloat16 (vdpbf16ps) and add in float32. Weights of keys are rounded to bfloat16 before they
 * meet the values; nothing else is rounded until the end.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "bfloat16.h"
#include "power.h"

enum {
    KEYS = 128,                 /* keys in a block; packed keys and values of a block stay in the first-level cache */
    VECTORS = KEYS / LANES,
    ROWS = 6,                   /* queries in a block: 6 x 4 accumulators of the 32 registers */
    WIDE = 4
};

#define HIDDEN -1e30f /* finite, so that a difference of two is a number */

/* As _Job in attention.py. Strides count elements. */
typedef struct {
    const bf16 *query;          /* [tokens][heads][key_dim] */
    const bf16 *keys;           /* [slots][kv_heads][key_dim] */
    const bf16 *values;         /* [slots][kv_heads][value_dim] */
    bf16 *output;               /* [tokens][heads][value_dim] */
    const float *sinks;         /* [heads], or NULL */
    const int64_t *token;       /* [rows] index of each row's token in query and output */
    const int64_t *position;    /* [rows] its absolute position */
    const int64_t *tile_first;  /* [tiles + 1] rows */
    const int64_t *segment_ptr; /* [tiles + 1] */
    const int64_t *segments;    /* [segments][5]: first row, last row, first slot, position of that slot, length */
    int64_t query_token, query_head, key_slot, key_head, value_slot, value_head, output_token, output_head;
    int64_t tiles, kv_heads, group, key_dim, value_dim;
    int64_t window;             /* a row at p sees p - window + 1 .. p; 0: all up to p */
    float scale, softcap;       /* softcap 0: none */
} Job;

/* What one thread works in. */
typedef struct {
    bf16 *query;                /* [queries][key_width] */
    float *sums;                /* [queries][value_width] weighted values so far */
    float *maximum;             /* [queries] largest score so far, times log2(e) */
    float *total;               /* [queries][LANES] sum of weights so far, in parts */
    uint32_t *keys;             /* [VECTORS][key_width / 2][LANES] pairs of a key's numbers */
    uint32_t *values;           /* [KEYS / 2][value_width] pairs of two keys' numbers */
    float *scores;              /* [ROWS][KEYS] */
    bf16 *weights;              /* [ROWS][KEYS] */
    int64_t key_width, value_width;
    int64_t first, last;        /* rows of the tile */
    int64_t head, heads;        /* first KV head and how many: queries are kept head by head */
} Work;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* cap * tanh(x / cap) */
static inline __m512 capped(__m512 x, float cap)
{
    __m512 power = power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(2.0f * LOG2E / cap)));
    power = _mm512_min_ps(power, _mm512_set1_ps(1e30f));
    __m512 one = _mm512_set1_ps(1.0f);
    __m512 ratio = _mm512_div_ps(_mm512_sub_ps(power, one), _mm512_add_ps(power, one));
    return _mm512_mul_ps(ratio, _mm512_set1_ps(cap));
}

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

/* Consecutive keys of one segment. */
typedef struct {
    const int64_t *segment;
    int64_t key, count;
} Block;

/* Asks for part `part` of `parts` of a block. A token's heads lie side by side: whole tokens come in one go, while the
 * heads, taken one by one, would each come in pieces too far apart for the CPU to foresee. */
static void fetch(const Job *job, const Work *w, Block block, int64_t part, int64_t parts)
{
    int64_t first = block.count * part / parts, last = block.count * (part + 1) / parts;
    for (int64_t key = first; key < last; key++) {
        int64_t slot = block.segment[2] + block.key + key;
        const bf16 *keys = job->keys + slot * job->key_slot + w->head * job->key_head;
        const bf16 *values = job->values + slot * job->value_slot + w->head * job->value_head;
        for (int64_t at = 0; at < w->heads * job->key_head; at += 32) (void)*(const volatile int *)(keys + at);
        for (int64_t at = 0; at < w->heads * job->value_head; at += 32)
            (void)*(const volatile int *)(values + at);
    }
}

/* Up to KEYS keys, pairs of numbers outermost, so that a vector holds the same pair of sixteen keys. */
static void pack_keys(const Job *job, Work *w, Block next, int64_t head, const bf16 *keys, int64_t stride, int64_t count, int64_t dim)
{
    int64_t pairs = w->key_width / 2;
    for (int64_t first = 0; first < count; first += LANES) {
        uint32_t *target = w->keys + first * pairs;
        fetch(job, w, next, head * 2 * VECTORS + first / LANES, w->heads * 2 * VECTORS);
        for (int64_t pair = 0; pair < pairs; pair += LANES) {
            int64_t left = dim - 2 * pair;
            __mmask32 mask = left >= 32 ? 0xffffffffu : left <= 0 ? 0 : (1u << left) - 1;
            __m512i row[LANES];
            for (int i = 0; i < LANES; i++)
                row[i] = first + i < count ? _mm512_maskz_loadu_epi16(mask, keys + (first + i) * stride + 2 * pair)
                                           : _mm512_setzero_si512();
            transpose(row);
            for (int i = 0; i < LANES; i++)
                _mm512_store_si512(target + (pair + i) * LANES, row[i]);
        }
    }
}

/* Up to KEYS values, the numbers of two neighbouring keys side by side. */
static void pack_values(const Job *job, Work *w, Block next, int64_t head, const bf16 *values, int64_t stride, int64_t count, int64_t dim)
{
    for (int64_t key = 0; key < count; key += 2) {
        const bf16 *even = values + key * stride, *odd = even + stride;
        uint32_t *target = w->values + key / 2 * w->value_width;
        if (key % LANES == 0) fetch(job, w, next, head * 2 * VECTORS + VECTORS + key / LANES, w->heads * 2 * VECTORS);
        for (int64_t at = 0; at < w->value_width; at += LANES) {
            __mmask16 mask = first_lanes(dim - at);
            __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even + at));
            __m512i b = _mm512_setzero_si512();
            if (key + 1 < count)
                b = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, odd + at)), 16);
            _mm512_store_si512(target + at, _mm512_or_si512(a, b));
        }
    }
}

static inline __m512 pair_product(__m512 sum, uint32_t pair, __m512i pairs)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32((int)pair), (__m512bh)pairs);
}

/* Scores of `rows` queries against `vectors` x 16 keys. Both counts are constants where this is inlined. */
static inline __attribute__((always_inline)) void score(
    const Work *w, const bf16 *query, int64_t vector, const int rows, const int vectors)
{
    int64_t pairs = w->key_width / 2;
    const uint32_t *keys = w->keys + vector * pairs * LANES;
    const uint32_t *q = (const uint32_t *)query;
    __m512 sum[ROWS][WIDE];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) sum[i][j] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; pair++) {
        __m512i key[WIDE];
        for (int j = 0; j < vectors; j++) key[j] = _mm512_load_si512(keys + (j * pairs + pair) * LANES);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < vectors; j++) sum[i][j] = pair_product(sum[i][j], q[i * pairs + pair], key[j]);
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) _mm512_store_ps(w->scores + i * KEYS + (vector + j) * LANES, sum[i][j]);
}

/* sums = sums * shrink + weights x values, for `vectors` x 16 of the values' numbers. */
static inline __attribute__((always_inline)) void gather(
    const Work *w, float *sums, const float *shrink, int64_t pairs, int64_t at, const int rows, const int vectors)
{
    const uint32_t *weights = (const uint32_t *)w->weights;
    __m512 sum[ROWS][WIDE];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++)
            sum[i][j] = _mm512_mul_ps(_mm512_load_ps(sums + i * w->value_width + at + j * LANES),
                                      _mm512_set1_ps(shrink[i]));
    for (int64_t pair = 0; pair < pairs; pair++) {
        __m512i value[WIDE];
        for (int j = 0; j < vectors; j++)
            value[j] = _mm512_load_si512(w->values + pair * w->value_width + at + j * LANES);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < vectors; j++)
                sum[i][j] = pair_product(sum[i][j], weights[i * (KEYS / 2) + pair], value[j]);
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < vectors; j++) _mm512_store_ps(sums + i * w->value_width + at + j * LANES, sum[i][j]);
}

#define FOR_EACH_WIDTH(CALL, ROWS_, WIDTH_) \
    switch (WIDTH_) {                       \
    case 1: CALL(ROWS_, 1); break;          \
    case 2: CALL(ROWS_, 2); break;          \
    case 3: CALL(ROWS_, 3); break;          \
    default: CALL(ROWS_, 4); break;         \
    }
#define FOR_EACH_SIZE(CALL, ROWS_, WIDTH_)              \
    switch (ROWS_) {                                    \
    case 1: FOR_EACH_WIDTH(CALL, 1, WIDTH_) break;      \
    case 2: FOR_EACH_WIDTH(CALL, 2, WIDTH_) break;      \
    case 3: FOR_EACH_WIDTH(CALL, 3, WIDTH_) break;      \
    case 4: FOR_EACH_WIDTH(CALL, 4, WIDTH_) break;      \
    case 5: FOR_EACH_WIDTH(CALL, 5, WIDTH_) break;      \
    default: FOR_EACH_WIDTH(CALL, 6, WIDTH_) break;     \
    }

/* Applies the soft cap and hides what is outside keys low..high. */
static void limit_scores(const Job *job, float *scores, int64_t vectors, int64_t low, int64_t high)
{
    for (int64_t v = 0; v < vectors; v++) {
        int64_t begin = low - v * LANES, end = high - v * LANES;
        __m512 score = _mm512_load_ps(scores + v * LANES);
        if (job->softcap != 0.0f) score = capped(_mm512_mul_ps(score, _mm512_set1_ps(job->scale)), job->softcap);
        unsigned seen = (end <= 0 ? 0 : end >= LANES ? 0xffffu : (1u << end) - 1) &
                        (begin <= 0 ? 0xffffu : begin >= LANES ? 0 : 0xffffu << begin);
        _mm512_store_ps(scores + v * LANES, _mm512_mask_mov_ps(_mm512_set1_ps(HIDDEN), (__mmask16)seen, score));
    }
}

/* Turns one row's scores of keys low..high (at least one) into weights. Returns what earlier sums shrink by. */
static inline float soften(const Job *job, const Work *w, int row, int64_t vectors, int64_t low, int64_t high,
                           float *maximum, float *total)
{
    float *scores = w->scores + row * KEYS;
    bf16 *weights = w->weights + row * KEYS;
    if (low > 0 || high < vectors * LANES || job->softcap != 0.0f) limit_scores(job, scores, vectors, low, high);
    __m512 largest = _mm512_load_ps(scores);
    for (int64_t v = 1; v < vectors; v++) largest = _mm512_max_ps(largest, _mm512_load_ps(scores + v * LANES));
    float scale = (job->softcap != 0.0f ? 1.0f : job->scale) * LOG2E;
    float before = *maximum, now = fmaxf(before, _mm512_reduce_max_ps(largest) * scale);
    __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(now), sum = _mm512_setzero_ps();
    for (int64_t v = 0; v < vectors; v += 2) {
        __m512 one = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores + v * LANES), factor, shift));
        __m512 two = _mm512_setzero_ps();
        if (v + 1 < vectors)
            two = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores + (v + 1) * LANES), factor, shift));
        sum = _mm512_add_ps(sum, _mm512_add_ps(one, two));
        _mm512_store_si512(weights + v * LANES, (__m512i)_mm512_cvtne2ps_pbh(two, one));
    }
    float shrink = now == before ? 1.0f : exp2f(before - now);
    _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_load_ps(total), _mm512_set1_ps(shrink), sum));
    *maximum = now;
    return shrink;
}

/* Up to ROWS queries from `first` on, of a head that `above` queries are kept before, against a packed block of `count`
 * keys, the first of them at position `start`. */
static void attend_rows(const Job *job, Work *w, int64_t above, int64_t first, int rows, int64_t start, int64_t count)
{
    int64_t low[ROWS], high[ROWS], seen = 0;
    for (int i = 0; i < rows; i++) {
        int64_t at = job->position[w->first + (first + i) / job->group] - start;
        high[i] = most(0, least(count, at + 1));
        low[i] = job->window ? least(high[i], most(0, at + 1 - job->window)) : 0;
        if (high[i] > low[i]) seen = most(seen, high[i]);
    }
    if (!seen) return;
    first += above;
    int64_t vectors = (seen + LANES - 1) / LANES;
    const bf16 *query = w->query + first * w->key_width;
    for (int64_t v = 0; v < vectors; v += WIDE) {
#define SCORE(R, N) score(w, query, v, R, N)
        FOR_EACH_SIZE(SCORE, rows, least(WIDE, vectors - v))
#undef SCORE
    }
    float shrink[ROWS];
    for (int i = 0; i < rows; i++) {
        if (high[i] > low[i]) {
            shrink[i] = soften(job, w, i, vectors, low[i], high[i], w->maximum + first + i,
                               w->total + (first + i) * LANES);
        } else {
            shrink[i] = 1.0f;
            memset(w->weights + i * KEYS, 0, KEYS * sizeof(bf16));
        }
    }
    float *sums = w->sums + first * w->value_width;
    int64_t pairs = (seen + 1) / 2, wide = w->value_width / LANES;
    for (int64_t v = 0; v < wide; v += WIDE) {
#define GATHER(R, N) gather(w, sums, shrink, pairs, v *LANES, R, N)
        FOR_EACH_SIZE(GATHER, rows, least(WIDE, wide - v))
#undef GATHER
    }
}

/* The keys of a segment that some of its rows see. */
static void visible(const Job *job, const int64_t *segment, int64_t *low, int64_t *high)
{
    int64_t start = segment[3], length = segment[4];
    *low = length, *high = 0;
    for (int64_t row = segment[0]; row < segment[1]; row++) {
        int64_t at = job->position[row] - start;
        *high = most(*high, least(length, at + 1));
        *low = least(*low, job->window ? most(0, at + 1 - job->window) : 0);
    }
}

/* The first block at or after key `from` of `segment`; a block without keys at the end of the tile. */
static Block next_block(const Job *job, const int64_t *segment, const int64_t *end, int64_t from)
{
    for (; segment < end; segment += 5, from = 0) {
        int64_t low, high;
        visible(job, segment, &low, &high);
        int64_t key = most(from, low);
        if (key < high) return (Block){segment, key, least(KEYS, high - key)};
    }
    return (Block){end, 0, 0};
}

static void attend_block(const Job *job, Work *w, Block block, Block next, int64_t head)
{
    int64_t slot = block.segment[2] + block.key, kv_head = w->head + head;
    int64_t first = (block.segment[0] - w->first) * job->group, last = (block.segment[1] - w->first) * job->group;
    int64_t above = head * (w->last - w->first) * job->group; /* queries of the heads before */
    pack_keys(job, w, next, head, job->keys + slot * job->key_slot + kv_head * job->key_head, job->key_slot, block.count, job->key_dim);
    pack_values(job, w, next, head, job->values + slot * job->value_slot + kv_head * job->value_head, job->value_slot, block.count,
                job->value_dim);
    for (int64_t query = first; query < last; query += ROWS)
        attend_rows(job, w, above, query, (int)least(ROWS, last - query), block.segment[3] + block.key, block.count);
}

static void begin_tile(const Job *job, Work *w)
{
    int64_t number = 0;
    for (int64_t head = w->head * job->group; head < (w->head + w->heads) * job->group; head += job->group)
        for (int64_t row = w->first; row < w->last; row++)
            for (int64_t g = head; g < head + job->group; g++, number++) {
                bf16 *query = w->query + number * w->key_width;
                memcpy(query, job->query + job->token[row] * job->query_token + g * job->query_head,
                       job->key_dim * sizeof(bf16));
                memset(query + job->key_dim, 0, (w->key_width - job->key_dim) * sizeof(bf16));
                /* A sink is one more key without a value. */
                w->maximum[number] = job->sinks ? job->sinks[g] * LOG2E : -INFINITY;
                memset(w->total + number * LANES, 0, LANES * sizeof(float));
                if (job->sinks) w->total[number * LANES] = 1.0f;
            }
    memset(w->sums, 0, number * w->value_width * sizeof(float));
}

static void end_tile(const Job *job, const Work *w)
{
    int64_t number = 0;
    for (int64_t head = w->head * job->group; head < (w->head + w->heads) * job->group; head += job->group)
        for (int64_t row = w->first; row < w->last; row++)
            for (int64_t g = head; g < head + job->group; g++, number++) {
                bf16 *output = job->output + job->token[row] * job->output_token + g * job->output_head;
                __m512 total = _mm512_load_ps(w->total + number * LANES);
                __m512 scale = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
                for (int64_t at = 0; at < job->value_dim; at += LANES) {
                    __m512 sum = _mm512_mul_ps(_mm512_load_ps(w->sums + number * w->value_width + at), scale);
                    store_bf16(output + at, sum, job->value_dim - at);
                }
            }
}

/* All segments of one tile, for some of the heads. */
static void attend_tile(const Job *job, Work *w, int64_t tile)
{
    const int64_t *segment = job->segments + 5 * job->segment_ptr[tile];
    const int64_t *end = job->segments + 5 * job->segment_ptr[tile + 1];
    w->first = job->tile_first[tile], w->last = job->tile_first[tile + 1];
    begin_tile(job, w);
    Block block = next_block(job, segment, end, 0);
    fetch(job, w, block, 0, 1);
    while (block.count) {
        Block next = next_block(job, block.segment, end, block.key + block.count);
        for (int64_t head = 0; head < w->heads; head++) {
            attend_block(job, w, block, next, head);
        }
        block = next;
    }
    end_tile(job, w);
}

static void *aligned(int64_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

static int prepare(const Job *job, Work *w, int64_t rows, int64_t heads)
{
    int64_t queries = rows * job->group * heads;
    w->key_width = (job->key_dim + 31) / 32 * 32;
    w->value_width = (job->value_dim + LANES - 1) / LANES * LANES;
    w->query = aligned(queries * w->key_width * sizeof(bf16));
    w->sums = aligned(queries * w->value_width * sizeof(float));
    w->maximum = aligned(queries * sizeof(float));
    w->total = aligned(queries * LANES * sizeof(float));
    w->keys = aligned(KEYS * w->key_width * sizeof(bf16));
    w->values = aligned(KEYS * w->value_width * sizeof(bf16));
    w->scores = aligned(ROWS * KEYS * sizeof(float));
    w->weights = aligned(ROWS * KEYS * sizeof(bf16));
    return w->query && w->sums && w->maximum && w->total && w->keys && w->values && w->scores && w->weights;
}

static void release(Work *w)
{
    free(w->query), free(w->sums), free(w->maximum), free(w->total);
    free(w->keys), free(w->values), free(w->scores), free(w->weights);
}

/* KV heads that a thread takes together: all of them, unless that leaves too few pieces of work for all threads. */
static int64_t heads_together(const Job *job)
{
    int64_t heads = job->kv_heads;
    while (heads > 1 && job->tiles * ((job->kv_heads + heads - 1) / heads) < 6 * omp_get_max_threads())
        heads = (heads + 1) / 2;
    return heads;
}

/* Fills the output of all rows. Returns 0, or 1 when memory ran out. */
int batchllm_attention(const Job *job)
{
    int64_t rows = 0, heads = heads_together(job), parts = (job->kv_heads + heads - 1) / heads;
    for (int64_t tile = 0; tile < job->tiles; tile++)
        rows = most(rows, job->tile_first[tile + 1] - job->tile_first[tile]);
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        Work work;
        int ready = prepare(job, &work, rows, heads);
        failed |= !ready;
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < job->tiles * parts; unit++) {
            work.head = unit % parts * heads;
            work.heads = least(heads, job->kv_heads - work.head);
            if (ready) attend_tile(job, &work, unit / parts);
        }
        release(&work);
    }
    return failed;
}
