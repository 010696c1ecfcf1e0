/* What a decoder layer does between its products: see layer.c. */
#pragma once
#include "bfloat16.h"

void batchllm_rms_norm(const bf16 *states, const bf16 *weight, bf16 *normed, int64_t rows, int64_t size,
                       int64_t states_row, int64_t normed_row, float epsilon);
void batchllm_norm_heads(bf16 *states, const bf16 *weight, int64_t rows, int64_t heads, int64_t dim, int64_t states_row,
                         float epsilon);
void batchllm_rotate(bf16 *states, const bf16 *cosine, const bf16 *sine, int64_t rows, int64_t heads, int64_t dim,
                     int64_t states_row);
void batchllm_store_kv(const bf16 *key, const bf16 *value, bf16 *keys, bf16 *values, const int64_t *slot, int64_t rows,
                       int64_t width, int64_t key_row, int64_t value_row);
