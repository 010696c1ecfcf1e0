/* Attention of one layer in one step. */
#pragma once
#include "bfloat16.h"

/* As AttentionJob in attention.py. Strides count elements. */
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

/* Fills the output of all rows. Returns 0, or 1 when memory ran out. */
int batchllm_attention(const Job *job);
