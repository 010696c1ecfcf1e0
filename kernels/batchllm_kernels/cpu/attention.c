/* Attention of one layer over contiguous stretches of KV, in bfloat16, for CPUs with AVX-512 BF16 products.
 *
 * Rows (tokens of a step) come in tiles; each tile has a list of segments: stretches of KV that some consecutive rows
 * of the tile read. A tile goes through its segments in blocks of keys and keeps, for each query, the running maximum,
 * sum and weighted values (online softmax, Milakov and Gimelshein 2018; as in FlashAttention, Dao et al. 2022). What a
 * query sees follows from positions alone, so shared prefixes, prompts over themselves and single decoded tokens are
 * all the same to this code: a prefix that many rows read is packed once for a tile of them.
 *
 * Products take pairs of bfloat16 (vdpbf16ps) and add in float32. Weights of keys are rounded to bfloat16 before they
 * meet the values; nothing else is rounded until the end.
 */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>

#include "few.h"
#include "packing.h"
#include "settled.h"

enum {
    NARROW = 32,                /* queries of a head that make a segment worth reading head by head */
    UNITS = 4                   /* pieces of work for each thread, so that none has much more than another */
};

/* Some KV heads of a tile: what a thread takes at a time. */
typedef struct {
    int64_t tile, head, heads;
} Unit;

/* Consecutive keys of one segment, for some of the heads. */
typedef struct {
    const int64_t *segment;
    int64_t head, heads;        /* counted from the first of Work */
    int64_t key, count;
} Block;

/* Up to ROWS queries from `first` on, of a head that `above` queries are kept before, against a packed block of `count`
 * keys, the first of them at position `start`. */
static void attend_rows(const Job *job, Work *w, int64_t above, int64_t first, int rows, int64_t start, int64_t count)
{
    Sight sight = sight_of(job, w, first, rows, start, count);
    if (!sight.end) return;
    int64_t number = above + first, vectors = (sight.end + LANES - 1) / LANES;
    if (is_settled(job, w, number, rows, &sight) && attend_settled(job, w, number, sight.end)) return;
    const bf16 *query = w->query + number * w->key_width;
    for (int64_t v = 0; v < vectors; v += WIDE) {
#define SCORE(R, N) score(w, query, v, R, N)
        FOR_EACH_SIZE(SCORE, rows, least(WIDE, vectors - v))
#undef SCORE
    }
    float shrink[LANES];
    soften(job, w, number, rows, &sight, shrink);
    float *sums = w->sums + number * w->value_width;
    int64_t pairs = (sight.end + 1) / 2, wide = w->value_width / LANES;
    for (int64_t v = 0; v < wide; v += WIDE) {
#define GATHER(R, N) gather(w, sums, shrink, pairs, v, R, N)
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

/* Keys that many queries read come head by head, so that a head's queries stay in the cache. Where few read them,
 * getting them from memory takes longest, and a token's heads lie side by side: they come for all heads at once. */
static int is_wide(const Job *job, const int64_t *segment) { return (segment[1] - segment[0]) * job->group > NARROW; }

/* The first block of `segment` or a later one, from head `head` and key `from` on; one without keys at the end. */
static Block next_block(const Job *job, Unit unit, const int64_t *segment, int64_t head, int64_t from)
{
    const int64_t *end = job->segments + 5 * job->segment_ptr[unit.tile + 1];
    for (; segment < end; segment += 5, head = 0, from = 0) {
        int64_t low, high, heads = is_wide(job, segment) ? 1 : unit.heads;
        visible(job, segment, &low, &high);
        for (; low < high && head < unit.heads; head += heads, from = 0) {
            int64_t key = most(from, low);
            if (key >= high) continue;
            int64_t blocks = (high - key + KEYS - 1) / KEYS, count = (high - key + blocks - 1) / blocks;
            return (Block){segment, head, heads, key, least((count + PART - 1) / PART * PART, high - key)};
        }
    }
    return (Block){end, 0, 0, 0, 0};
}

static Block first_block(const Job *job, Unit unit)
{
    return next_block(job, unit, job->segments + 5 * job->segment_ptr[unit.tile], 0, 0);
}

/* Block `next`, of a unit from KV head `head` on, to be asked for while `now` is worked on. */
static Ahead ahead_of(const Job *job, Block now, Block next, int64_t head)
{
    int64_t slot = next.segment[2] + next.key, bytes = sizeof(bf16);
    head += next.head;
    const bf16 *keys = job->keys + slot * job->key_slot + head * job->key_head;
    const bf16 *values = job->values + slot * job->value_slot + head * job->value_head;
    int64_t width = next.heads * job->key_head * bytes, value_width = next.heads * job->value_head * bytes;
    Ahead ahead;
    ahead.first = (Stretch){(const char *)keys, width, job->key_slot * bytes, next.count, 0};
    ahead.second = (Stretch){(const char *)values, value_width, job->value_slot * bytes, next.count, 0};
    int64_t queries = (now.segment[1] - now.segment[0]) * job->group, groups = (queries + ROWS - 1) / ROWS;
    /* Times to ask for four keys: two for their values, then for putting them in order, or one for their scores. */
    int64_t times = are_few(job, queries) ? 3 : 3 + 4 * groups;
    set_pace(&ahead, now.heads * now.count * times / 4 + 1);
    return ahead;
}

static void attend_block(const Job *job, Work *w, Block block)
{
    int64_t slot = block.segment[2] + block.key, start = block.segment[3] + block.key;
    int64_t first = (block.segment[0] - w->first) * job->group, last = (block.segment[1] - w->first) * job->group;
    for (int64_t head = block.head; head < block.head + block.heads; head++) {
        const bf16 *keys = job->keys + slot * job->key_slot + (w->head + head) * job->key_head;
        const bf16 *values = job->values + slot * job->value_slot + (w->head + head) * job->value_head;
        int64_t above = head * (w->last - w->first) * job->group; /* queries of the heads before */
        if (are_few(job, last - first)) {
            Sight sight = sight_of(job, w, first, (int)(last - first), start, block.count);
            if (sight.end) attend_few(job, w, above + first, (int)(last - first), &sight, keys, values);
            continue;
        }
        pack_keys(keys, job->key_slot, block.count, job->key_dim, w->key_width, w->keys, &w->ahead);
        pack_values(values, job->value_slot, block.count, job->value_dim, w->value_width, w->values, &w->ahead);
        for (int64_t query = first; query < last; query += ROWS)
            attend_rows(job, w, above, query, (int)least(ROWS, last - query), start, block.count);
    }
}

/* Number of a query in Work. Queries are kept head by head, and read token by token: a token's heads are neighbours. */
static inline int64_t query_number(const Job *job, const Work *w, int64_t row, int64_t head)
{
    return ((head / job->group - w->head) * (w->last - w->first) + row - w->first) * job->group + head % job->group;
}

static void begin_tile(const Job *job, Work *w)
{
    __m512 zero = _mm512_setzero_ps();
    for (int64_t row = w->first; row < w->last; row++)
        for (int64_t head = w->head * job->group; head < (w->head + w->heads) * job->group; head++) {
            int64_t number = query_number(job, w, row, head);
            const bf16 *from = job->query + job->token[row] * job->query_token + head * job->query_head;
            bf16 *query = w->query + number * w->key_width;
            for (int64_t at = 0; at < w->key_width; at += 2 * LANES)
                _mm512_store_si512(query + at, _mm512_maskz_loadu_epi16(first_pairs(job->key_dim - at), from + at));
            for (int64_t at = 0; at < w->value_width; at += LANES)
                _mm512_store_ps(w->sums + number * w->value_width + at, zero);
            /* A sink is one more key without a value. */
            w->maximum[number] = job->sinks ? job->sinks[head] * LOG2E : -INFINITY;
            _mm512_store_ps(w->total + number * LANES, _mm512_maskz_mov_ps(job->sinks != NULL, _mm512_set1_ps(1.0f)));
        }
}

static void end_tile(const Job *job, const Work *w)
{
    for (int64_t row = w->first; row < w->last; row++)
        for (int64_t head = w->head * job->group; head < (w->head + w->heads) * job->group; head++) {
            int64_t number = query_number(job, w, row, head);
            bf16 *output = job->output + job->token[row] * job->output_token + head * job->output_head;
            const float *sums = w->sums + number * w->value_width;
            __m512 scale = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_load_ps(w->total + number * LANES)));
            for (int64_t at = 0; at < job->value_dim; at += LANES)
                store_bf16(output + at, _mm512_mul_ps(_mm512_load_ps(sums + at), scale), job->value_dim - at);
        }
}

/* One without heads when all are taken. */
static Unit take_unit(const Job *job, int64_t heads, int64_t *taken)
{
    int64_t number = __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED);
    int64_t parts = (job->kv_heads + heads - 1) / heads, tile = number / parts, head = number % parts * heads;
    if (tile >= job->tiles) return (Unit){0, 0, 0};
    return (Unit){tile, head, least(heads, job->kv_heads - head)};
}

/* Attention of one unit. Returns the one to do next, taken when the last keys are worked on, so that its first can come
 * meanwhile. */
static Unit attend_unit(const Job *job, Work *w, Unit unit, int64_t heads, int64_t *taken)
{
    w->first = job->tile_first[unit.tile], w->last = job->tile_first[unit.tile + 1];
    w->head = unit.head, w->heads = unit.heads;
    begin_tile(job, w);
    Unit next = {0, 0, 0};
    for (Block block = first_block(job, unit); block.count;) {
        Block then = next_block(job, unit, block.segment, block.head, block.key + block.count);
        if (!then.count) next = take_unit(job, heads, taken);
        if (then.count) w->ahead = ahead_of(job, block, then, unit.head);
        else if (next.heads) w->ahead = ahead_of(job, block, first_block(job, next), next.head);
        else w->ahead = (Ahead){.pace = 0};
        attend_block(job, w, block);
        block = then;
    }
    end_tile(job, w);
    return next;
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
    while (heads > 1 && job->tiles * ((job->kv_heads + heads - 1) / heads) < UNITS * omp_get_max_threads())
        heads = (heads + 1) / 2;
    return heads;
}

/* Fills the output of all rows. Returns 0, or 1 when memory ran out. */
int batchllm_attention(const Job *job)
{
    int64_t rows = 0, heads = heads_together(job), taken = 0;
    for (int64_t tile = 0; tile < job->tiles; tile++)
        rows = most(rows, job->tile_first[tile + 1] - job->tile_first[tile]);
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        Work work;
        int ready = prepare(job, &work, rows, heads);
        failed |= !ready;
        Unit unit = take_unit(job, heads, &taken);
        while (ready && unit.heads) unit = attend_unit(job, &work, unit, heads, &taken);
        release(&work);
    }
    return failed;
}
