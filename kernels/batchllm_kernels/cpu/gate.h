/* The gate of an MLP, rounded where transformers' modules round. */
#pragma once
#include "bfloat16.h"
#include "power.h"

/* silu(gate) * up of numbers that are bfloat16 already; the caller rounds the result. */
static inline __m512 silu_times(__m512 gate, __m512 up)
{
    /* Below -87 the power is infinite and silu 0, as it should be. */
    __m512 power = power_of_two(_mm512_mul_ps(gate, _mm512_set1_ps(-LOG2E)));
    __m512 silu = rounded(_mm512_div_ps(gate, _mm512_add_ps(power, _mm512_set1_ps(1.0f))));
    return _mm512_mul_ps(silu, up);
}
