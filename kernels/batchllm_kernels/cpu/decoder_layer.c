/* A decoder layer of the Llama family in one call.
 *
 * Products fill the caches with weights. Whatever Python does between two of them begins with fetching itself from
 * memory: calls of 7 us took 60 in a job, and all of a layer's together 850 us, of 13 ms for 128 rows.
 */
#include "job.h"
#include "layer.h"
#include "linear.h"

/* As _Layer in decoder_layer.py. Of the products, what is the same in all steps. */
typedef struct {
    Product qkv, output, gated, down;
    const bf16 *input_norm, *mlp_norm;  /* [hidden] weights */
    const bf16 *query_norm, *key_norm;  /* [dim] weights, or NULL */
    int64_t hidden, heads, kv_heads, dim;
    float input_epsilon, mlp_epsilon, head_epsilon;
} Layer;

/* As _Step in decoder_layer.py. */
typedef struct {
    bf16 *hidden;                       /* [rows][hidden], in and out */
    const bf16 *cosine, *sine;          /* [rows][dim] */
    bf16 *keys, *values;                /* the layer's pool [slots][kv_heads][dim] */
    const int64_t *slot;                /* [rows] where in it new ones go */
    bf16 *normed, *joined, *attended, *gated; /* to work in: rows of hidden, of all heads, of query heads, of the MLP */
    int64_t rows;
} Step;

static void multiply_rows(Product product, const bf16 *input, bf16 *output, int64_t rows, int adds)
{
    product.input = input, product.output = output, product.rows = rows;
    product.input_row = product.inputs, product.output_row = product.gated ? product.outputs / 2 : product.outputs;
    if (adds) product.residual = output, product.residual_row = product.output_row;
    batchllm_linear(&product);
}

/* `job` reads its queries from step->joined and writes to step->attended. Returns 0, or 1 when memory ran out. */
int batchllm_decoder_layer(const Layer *layer, const Step *step, const Job *job)
{
    int64_t rows = step->rows, hidden = layer->hidden, width = layer->kv_heads * layer->dim;
    int64_t turned = layer->heads + layer->kv_heads, row = (turned + layer->kv_heads) * layer->dim;
    bf16 *key = step->joined + layer->heads * layer->dim, *value = key + width;
    batchllm_rms_norm(step->hidden, layer->input_norm, step->normed, rows, hidden, hidden, hidden,
                      layer->input_epsilon);
    multiply_rows(layer->qkv, step->normed, step->joined, rows, 0);
    if (layer->query_norm) {
        batchllm_norm_heads(step->joined, layer->query_norm, rows, layer->heads, layer->dim, row, layer->head_epsilon);
        batchllm_norm_heads(key, layer->key_norm, rows, layer->kv_heads, layer->dim, row, layer->head_epsilon);
    }
    batchllm_rotate(step->joined, step->cosine, step->sine, rows, turned, layer->dim, row);
    batchllm_store_kv(key, value, step->keys, step->values, step->slot, rows, width, row, row);
    Job attention = *job;
    attention.keys = step->keys, attention.values = step->values;
    if (batchllm_attention(&attention)) return 1;
    multiply_rows(layer->output, step->attended, step->hidden, rows, 1);
    batchllm_rms_norm(step->hidden, layer->mlp_norm, step->normed, rows, hidden, hidden, hidden, layer->mlp_epsilon);
    multiply_rows(layer->gated, step->normed, step->gated, rows, 0);
    multiply_rows(layer->down, step->gated, step->hidden, rows, 1);
    return 0;
}
