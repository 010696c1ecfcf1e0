/* The panels of a product divided among threads. */
#pragma once
#include <omp.h>
#include <stdint.h>

#include "products.h"

enum {
    LAST = 2,                   /* panels for each thread that are divided by rows */
    PIECES = 8,                 /* of such a panel, at most */
    FEWEST_ROWS = 48            /* of a piece */
};

/* Some rows of one panel. */
typedef struct {
    int64_t panel, first, last;
} Piece;

/* Panels are taken whole, so that each is read once. The last few are divided by rows: threads that are done wait for
 * the others, and no longer than a small piece of work takes. */
typedef struct {
    int64_t whole;              /* panels that are taken whole */
    int64_t parts, size;        /* pieces of each other panel, and their rows */
    int64_t rows, count;        /* rows in all, pieces in all */
} Division;

static inline Division divide(int64_t rows, int64_t outputs)
{
    int64_t panels = (outputs + PANEL - 1) / PANEL, whole = most(0, panels - LAST * omp_get_max_threads());
    int64_t parts = most(1, least(PIECES, rows / FEWEST_ROWS));
    int64_t size = (rows + parts * ROWS - 1) / (parts * ROWS) * ROWS;
    return (Division){whole, parts, size, rows, whole + (panels - whole) * parts};
}

static inline Piece piece_of(const Division *d, int64_t number)
{
    if (number < d->whole) return (Piece){number, 0, d->rows};
    number -= d->whole;
    int64_t first = number % d->parts * d->size;
    return (Piece){d->whole + number / d->parts, first, least(first + d->size, d->rows)};
}
