/* A linear layer with packed weights. */
#pragma once
#include "bfloat16.h"

/* As Product in linear.py. Strides count elements. */
typedef struct {
    const bf16 *input;          /* [rows][inputs] */
    const uint32_t *weight;     /* packed */
    const bf16 *bias;           /* [outputs], or NULL */
    const bf16 *residual;       /* [rows][outputs], added to the rounded product, or NULL; may be the output itself */
    bf16 *output;               /* [rows][outputs], or [rows][outputs / 2] of a gated product */
    int64_t rows, inputs, outputs, input_row, residual_row, output_row;
    int64_t gated;              /* panels hold 32 gates, then the 32 numbers they apply to */
} Product;

void batchllm_linear(const Product *p);
