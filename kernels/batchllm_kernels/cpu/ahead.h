/* Memory that is read next, asked for bit by bit while the products of what is there already go on.
 *
 * All at once, requests would fill the queue of the first-level cache and the products behind them would wait; a line
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
    Stretch first, second;
    int64_t pace;           /* bytes asked for at a time */
    int64_t rest;           /* loops ask at every step whose number has none of these bits */
} Ahead;

/* Asks for so many bytes of the stretch, at most; returns how many. */
static inline int64_t ask_some(Stretch *s, int64_t bytes)
{
    int64_t end = s->at + bytes < s->width ? s->at + bytes : s->width, asked = end - s->at;
    for (int64_t at = s->at; at < end; at += LINE) _mm_prefetch(s->row + at, _MM_HINT_T1);
    s->at = end;
    if (end == s->width) s->at = 0, s->row += s->stride, s->rows--;
    return asked;
}

static inline void ask(Ahead *ahead)
{
    for (int64_t left = ahead->pace; left > 0;) {
        if (ahead->first.rows) left -= ask_some(&ahead->first, left);
        else if (ahead->second.rows) left -= ask_some(&ahead->second, left);
        else ahead->pace = left = 0;
    }
}

/* Rows without gaps are one. */
static inline void join_rows(Stretch *s)
{
    if (s->width != s->stride || !s->rows) return;
    s->width *= s->rows;
    s->rows = 1;
}

/* Spreads the lines over `chances` to ask. */
static inline void set_pace(Ahead *ahead, int64_t chances)
{
    int64_t lines = (ahead->first.rows * ahead->first.width + ahead->second.rows * ahead->second.width) / LINE + 1;
    ahead->pace = (lines + chances - 1) / chances * LINE;
    ahead->rest = 0;
    while (ahead->rest < 7 && lines * 2 * (ahead->rest + 1) <= chances) ahead->rest = 2 * ahead->rest + 1;
    join_rows(&ahead->first);
    join_rows(&ahead->second);
}
