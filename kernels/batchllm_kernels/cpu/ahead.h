/* Memory that is read next, asked for line by line while the products of what is there already go on.
 *
 * All at once, requests would fill the queue of the first-level cache and the products behind them would wait; one
 * every few products costs next to nothing. Lines go to the second-level cache: the first is full of what is worked on.
 */
#pragma once
#include <immintrin.h>
#include <stdint.h>

enum { LINE = 64 };

/* `rows` pieces of `width` bytes, `stride` bytes apart. */
typedef struct {
    const char *row;
    int64_t width, stride, rows;
    int64_t at;             /* bytes of this row that have been asked for */
} Stretch;

typedef struct {
    Stretch keys, values;
    int64_t pace;           /* lines asked for at a time */
    int64_t rest;           /* loops ask at every step whose number has none of these bits */
} Ahead;

static inline void ask_line(Stretch *s)
{
    _mm_prefetch(s->row + s->at, _MM_HINT_T1);
    s->at += LINE;
    if (s->at < s->width) return;
    s->at = 0;
    s->row += s->stride;
    s->rows--;
}

static inline void ask(Ahead *ahead)
{
    for (int64_t i = 0; i < ahead->pace; i++) {
        if (ahead->keys.rows) ask_line(&ahead->keys);
        else if (ahead->values.rows) ask_line(&ahead->values);
        else ahead->pace = 0;
    }
}

/* Spreads the lines over `chances` to ask. */
static inline void set_pace(Ahead *ahead, int64_t chances)
{
    int64_t lines = (ahead->keys.rows * ahead->keys.width + ahead->values.rows * ahead->values.width) / LINE + 1;
    ahead->pace = (lines + chances - 1) / chances;
    ahead->rest = 0;
    while (ahead->rest < 7 && lines * 2 * (ahead->rest + 1) <= chances) ahead->rest = 2 * ahead->rest + 1;
}
