/* Rounds tokens to int8, block by block (x86-64 with AVX2). */
#include <math.h>

#define TARGET __attribute__((target("avx2,fma")))

/* Rounds 32 numbers to int8, in order; returns their scale. */
TARGET INLINE float round_block(const float *x, __m256i *numbers) {
  /* Compared as integers, so that NaN counts as the largest. */
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i largest = _mm256_setzero_si256();
  __m256 part[4];
  for (int i = 0; i < 4; i++) {
    part[i] = _mm256_loadu_ps(x + 8 * i);
    largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(part[i]), magnitude));
  }
  __m128i lanes = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  lanes = _mm_max_epi32(lanes, _mm_shuffle_epi32(lanes, 0x4e));
  lanes = _mm_max_epi32(lanes, _mm_shuffle_epi32(lanes, 0xb1));
  float most = _mm_cvtss_f32(_mm_castsi128_ps(lanes));
  __m256 factor = _mm256_set1_ps(most > 0 ? 127 / most : 0);
  __m256i whole[4];
  for (int i = 0; i < 4; i++) whole[i] = _mm256_cvtps_epi32(_mm256_mul_ps(part[i], factor));
  __m256i low = _mm256_packs_epi32(whole[0], whole[1]), high = _mm256_packs_epi32(whole[2], whole[3]);
  *numbers = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high),
                                         _mm256_set_epi32(7, 3, 6, 2, 5, 1, 4, 0));
  return most / 127;
}

TARGET INLINE int sum_of(__m256i numbers) {
  __m256i sums = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), numbers),
                                   _mm256_set1_epi16(1));
  __m128i lanes = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  lanes = _mm_add_epi32(lanes, _mm_shuffle_epi32(lanes, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(lanes, _mm_shuffle_epi32(lanes, 0xb1)));
}

TARGET INLINE float mean_of(const float *block) {
  __m256 sums = _mm256_add_ps(_mm256_add_ps(_mm256_loadu_ps(block), _mm256_loadu_ps(block + 8)),
                              _mm256_add_ps(_mm256_loadu_ps(block + 16), _mm256_loadu_ps(block + 24)));
  __m128 lanes = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
  lanes = _mm_add_ps(lanes, _mm_movehl_ps(lanes, lanes));
  return _mm_cvtss_f32(_mm_add_ss(lanes, _mm_movehdup_ps(lanes))) / BLOCK;
}

/* Block `index` of the token: x [inputs], then the means of its blocks if wanted, then zeros. */
TARGET INLINE const float *block_of(const float *x, size_t inputs, int means, size_t index,
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

/* Rounds x [inputs] into one token of `blocks` blocks, for a matrix of `bits` bits. */
TARGET static void quantise(const float *x, size_t inputs, int means, size_t blocks, int bits,
                            const Tokens *tokens, size_t token) {
  int8_t *to = tokens->numbers + token * tokens->pairs * PAIR;
  float *scales = tokens->scales + token * tokens->pairs * SPREAD;
  float *sums = tokens->sums + token * tokens->padded;
  const __m256i apart = _mm256_broadcastsi128_si256(
      _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0));
  for (size_t block = 0; block < blocks; block++) {
    float buffer[BLOCK];
    __m256i numbers;
    float scale = round_block(block_of(x, inputs, means, block, buffer), &numbers);
    _mm_storeu_ps(scales + block * (SPREAD / 2), _mm_set1_ps(scale));
    sums[block] = scale * sum_of(numbers);
    if (bits == 8) {
      _mm256_storeu_si256((__m256i *)(to + block * BLOCK), numbers);
      continue;
    }
    numbers = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(numbers, apart), 0xd8);
    int8_t *even = to + block / 2 * PAIR + block % 2 * (BLOCK / 2);
    _mm_storeu_si128((__m128i *)even, _mm256_castsi256_si128(numbers));
    _mm_storeu_si128((__m128i *)(even + BLOCK), _mm256_extracti128_si256(numbers, 1));
  }
  /* Levels that the loops read past the last block are multiplied by zero. */
  if (blocks % 2) _mm_storeu_ps(scales + blocks * (SPREAD / 2), _mm_setzero_ps());
  for (size_t block = blocks; block < tokens->padded; block++) sums[block] = 0;
}
#undef TARGET
