/* Vectors of 8 floats on x86-64 with AVX2, FMA and F16C. */
#pragma once
#include <immintrin.h>

#include "../kernels.h"

#define VECTOR \
  __attribute__((always_inline, target("avx2,fma,f16c"))) static inline

typedef __m256 f8;

VECTOR f8 f8_zero(void) { return _mm256_setzero_ps(); }
VECTOR f8 f8_all(float x) { return _mm256_set1_ps(x); }
VECTOR f8 f8_load(const float *x) { return _mm256_loadu_ps(x); }
VECTOR void f8_store(float *to, f8 x) { _mm256_storeu_ps(to, x); }
VECTOR f8 f8_add(f8 a, f8 b) { return _mm256_add_ps(a, b); }
VECTOR f8 f8_mul(f8 a, f8 b) { return _mm256_mul_ps(a, b); }
/* c + a b and c - a b, rounded once */
VECTOR f8 f8_fma(f8 a, f8 b, f8 c) { return _mm256_fmadd_ps(a, b, c); }
VECTOR f8 f8_fnma(f8 a, f8 b, f8 c) { return _mm256_fnmadd_ps(a, b, c); }
VECTOR float f8_sum(f8 v) {
  __m128 lanes = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  lanes = _mm_add_ps(lanes, _mm_movehl_ps(lanes, lanes));
  return _mm_cvtss_f32(_mm_add_ss(lanes, _mm_movehdup_ps(lanes)));
}
VECTOR f8 f8_widen(const float16 *x) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x));
}
VECTOR float f1_widen(float16 x) { return _cvtsh_ss(x); }

/* The zero points of 8 blocks, from 4 bytes. */
VECTOR f8 f8_zeros(const uint8_t *zeros) {
  __m128i bytes = _mm_loadu_si32(zeros), low = _mm_set1_epi8(15);
  __m128i even = _mm_and_si128(bytes, low);
  __m128i odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), low);
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd)));
}

/* The scales of two blocks, of `size` bytes, each in four lanes. */
VECTOR f8 f8_two_scales(const size_t size, const uint8_t *scales) {
  const __m256i spread = _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0);
  __m128 two = size == sizeof(float16) ? _mm_cvtph_ps(_mm_loadu_si32(scales))
                                       : _mm_castsi128_ps(_mm_loadu_si64(scales));
  return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(two), spread);
}

/* The scales of 8 blocks. */
VECTOR f8 f8_eight_scales(const size_t size, const uint8_t *scales) {
  return size == sizeof(float16) ? f8_widen((const float16 *)scales)
                                 : f8_load((const float *)scales);
}

/* A block of numbers rounded to int8, in order. */
typedef __m256i i8x32;

/* Rounds 32 numbers; returns their scale. */
VECTOR float round_block(const float *x, i8x32 *numbers) {
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

VECTOR int sum_of(i8x32 numbers) {
  __m256i sums = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), numbers),
                                   _mm256_set1_epi16(1));
  __m128i lanes = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  lanes = _mm_add_epi32(lanes, _mm_shuffle_epi32(lanes, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(lanes, _mm_shuffle_epi32(lanes, 0xb1)));
}

VECTOR void store_in_order(int8_t *to, i8x32 numbers) {
  _mm256_storeu_si256((__m256i *)to, numbers);
}

VECTOR void store_even_odd(int8_t *even, int8_t *odd, i8x32 numbers) {
  const __m256i apart = _mm256_broadcastsi128_si256(
      _mm_set_epi8(15, 13, 11, 9, 7, 5, 3, 1, 14, 12, 10, 8, 6, 4, 2, 0));
  numbers = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(numbers, apart), 0xd8);
  _mm_storeu_si128((__m128i *)even, _mm256_castsi256_si128(numbers));
  _mm_storeu_si128((__m128i *)odd, _mm256_extracti128_si256(numbers, 1));
}
