/* Rounds tokens to int8, block by block, for all instruction sets of an architecture. */
#pragma once

ANY_TARGET INLINE float mean_of(const float *block) {
  f8 sums = f8_add(f8_add(f8_load(block), f8_load(block + 8)),
                   f8_add(f8_load(block + 16), f8_load(block + 24)));
  return f8_sum(sums) / BLOCK;
}

/* Block `index` of the token: x [inputs], then the means of its blocks if wanted, then zeros. */
ANY_TARGET INLINE const float *block_of(const float *x, size_t inputs, int means, size_t index,
                                        float buffer[BLOCK]) {
  size_t from = index * BLOCK;
  if (from + BLOCK <= inputs) return x + from;
  for (size_t i = 0; i < BLOCK; i++) {
    size_t place = from + i, behind = place - inputs;
    if (place < inputs)
      buffer[i] = x[place];
    else
      buffer[i] = means && behind < inputs / BLOCK ? mean_of(x + behind * BLOCK) : 0;
  }
  return buffer;
}

ANY_TARGET static void quantise_f32_a8(const float *x, size_t inputs, int means, size_t blocks,
                                       int bits, const Tokens *tokens, size_t token) {
  int8_t *to = tokens->numbers + token * tokens->pairs * PAIR;
  float *scales = tokens->scales + token * tokens->pairs * SPREAD;
  float *sums = tokens->sums + token * tokens->padded;
  for (size_t block = 0; block < blocks; block++) {
    float buffer[BLOCK];
    i8x32 numbers;
    float scale = round_block(block_of(x, inputs, means, block, buffer), &numbers);
    for (int i = 0; i < SPREAD / 2; i++) scales[block * (SPREAD / 2) + i] = scale;
    sums[block] = scale * sum_of(numbers);
    if (bits == 8) {
      store_in_order(to + block * BLOCK, numbers);
    } else {
      int8_t *even = to + block / 2 * PAIR + block % 2 * (BLOCK / 2);
      store_even_odd(even, even + BLOCK, numbers);
    }
  }
  /* Levels that the loops read past the last block are multiplied by zero. */
  if (blocks % 2)
    for (int i = 0; i < SPREAD / 2; i++) scales[blocks * (SPREAD / 2) + i] = 0;
  for (size_t block = blocks; block < tokens->padded; block++) sums[block] = 0;
}
