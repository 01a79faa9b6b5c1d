/* The kernels in plain C, one number at a time, in the order of additions that all instruction sets
 * keep: eight lanes to a sum, lanes 0 to 3 for the even blocks and 4 to 7 for the odd ones. */
#pragma once
#include <math.h>
#include <string.h>

#include "../../runtime/native/kernels.h"

static float f32_of(float16 half) {
  int sign = half >> 15, exponent = half >> 10 & 31, fraction = half & 1023;
  float size = exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
  if (exponent == 31) size = fraction ? NAN : INFINITY;
  return sign ? -size : size;
}

static float sum8(const float *v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

static float reference_mean(const float *block) {
  float lanes[8];
  for (int i = 0; i < 8; i++) lanes[i] = (block[i] + block[i + 8]) + (block[i + 16] + block[i + 24]);
  return sum8(lanes) / BLOCK;
}

/* Where number i of a block is stored in its token. */
static size_t place_of(size_t block, size_t i, int bits) {
  if (bits == 8) return block * BLOCK + i;
  return block / 2 * PAIR + i % 2 * BLOCK + block % 2 * (BLOCK / 2) + i / 2;
}

static void reference_quantise(const float *x, size_t inputs, int means, size_t blocks, int bits,
                               const Tokens *tokens, size_t token) {
  int8_t *numbers = tokens->numbers + token * tokens->pairs * PAIR;
  float *scales = tokens->scales + token * tokens->pairs * SPREAD;
  for (size_t block = 0; block < tokens->padded; block++) {
    float values[BLOCK] = {0}, most = 0;
    for (size_t i = 0; i < BLOCK; i++) {
      size_t place = block * BLOCK + i;
      if (place < inputs)
        values[i] = x[place];
      else if (means && place - inputs < inputs / BLOCK)
        values[i] = reference_mean(x + (place - inputs) * BLOCK);
      if (fabsf(values[i]) > most) most = fabsf(values[i]);
    }
    int sum = 0;
    for (size_t i = 0; i < BLOCK && block < blocks; i++) {
      int whole = (int)rintf(values[i] * (most > 0 ? 127 / most : 0));
      sum += whole;
      numbers[place_of(block, i, bits)] = (int8_t)whole;
    }
    tokens->sums[token * tokens->padded + block] = block < blocks ? most / 127 * sum : 0;
    for (int lane = 0; lane < 4 && block < 2 * tokens->pairs; lane++)
      scales[block * 4 + lane] = block < blocks ? most / 127 : 0;
  }
}

static float scale_of(const Matrix *m, size_t index) {
  if (m->scale_size == sizeof(float)) return ((const float *)m->scales)[index];
  return f32_of(((const float16 *)m->scales)[index]);
}

/* The lane that a product of a block's number i is added to, among the block's four. */
static size_t lane_of(size_t i, int bits) { return bits == 4 ? i / 8 : i % 16 / 4; }

/* `shift` is taken off the levels before they are multiplied, and off the zero points. */
static float reference_dot(const Matrix *m, int bits, size_t row, const Tokens *x, size_t token,
                           int shift) {
  const uint8_t *levels = m->levels + row * m->blocks * (BLOCK * bits / 8);
  const int8_t *numbers = x->numbers + token * x->pairs * PAIR;
  float lanes[8] = {0};
  for (size_t block = 0; block < m->blocks; block++) {
    int products[4] = {0};
    for (size_t i = 0; i < BLOCK; i++) {
      size_t at = block * BLOCK + i;
      int level = bits == 8 ? levels[at] - shift : levels[at / 2] >> at % 2 * 4 & 15;
      products[lane_of(i, bits)] += level * numbers[place_of(block, i, bits)];
    }
    float scale = scale_of(m, row * m->blocks + block);
    scale *= x->scales[(token * x->pairs * 2 + block) * 4];
    for (int lane = 0; lane < 4; lane++) {
      float *total = lanes + block % 2 * 4 + lane;
      *total = fmaf(products[lane], scale, *total);
    }
  }
  for (size_t block = 0; block < m->blocks; block++) {
    float zero = bits == 4 ? 8 : 128 - shift;
    const uint8_t *zeros = m->zeros + row * ((m->blocks + 1) / 2);
    if (m->zeros) zero = zeros[block / 2] >> block % 2 * 4 & 15;
    float offset = scale_of(m, row * m->blocks + block) * zero;
    lanes[block % 8] = fmaf(-offset, x->sums[token * x->padded + block], lanes[block % 8]);
  }
  return sum8(lanes);
}

static float reference_down(const float *x, const float16 *a, size_t inputs, float weight) {
  float lanes[8] = {0};
  size_t whole = inputs / 8 * 8;
  for (size_t i = 0; i < whole; i++) lanes[i % 8] = fmaf(f32_of(a[i]), x[i], lanes[i % 8]);
  float sum = sum8(lanes);
  for (size_t i = whole; i < inputs; i++) sum = fmaf(f32_of(a[i]), x[i], sum);
  return weight * sum;
}

static float reference_up(const float16 *adapters, const Span *spans, size_t n, size_t max_rank,
                          size_t columns, size_t column, const float *hidden) {
  float sum = 0;
  for (size_t i = 0; i < n; i++)
    for (int64_t r = 0; r < spans[i].rank; r++)
      sum = fmaf(f32_of(adapters[spans[i].b + r * columns + column]), hidden[i * max_rank + r], sum);
  return sum;
}
