/* Vectors of 8 floats (x86-64 with AVX2 and FMA). */
#define KIND avx2
#define TARGET __attribute__((target("avx2,fma")))
#define WIDTH 8
#define VECTOR __m256
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define SET(number) _mm256_set1_ps(number)
#define ADD(a, b) _mm256_add_ps(a, b)
#define MULTIPLY(a, b) _mm256_mul_ps(a, b)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)   /* c + a b */
#define FNMA(a, b, c) _mm256_fnmadd_ps(a, b, c) /* c - a b */

TARGET INLINE float sum_avx2(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

/* Products of a pair of blocks: lanes 0 to 3 belong to the first one, the rest to the second. */
TARGET INLINE __m256 dot4_avx2(const uint8_t *levels, const int8_t *x) {
  __m256i both = _mm256_loadu_si256((const __m256i *)levels), low = _mm256_set1_epi8(15);
  __m256i even = _mm256_and_si256(both, low);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
  __m256i products = _mm256_add_epi16(
      _mm256_maddubs_epi16(even, _mm256_loadu_si256((const __m256i *)x)),
      _mm256_maddubs_epi16(odd, _mm256_loadu_si256((const __m256i *)(x + BLOCK))));
  return _mm256_cvtepi32_ps(_mm256_madd_epi16(products, _mm256_set1_epi16(1)));
}
TARGET INLINE __m256 spread4_avx2(const float *two) {
  return _mm256_set_m128(_mm_set1_ps(two[1]), _mm_set1_ps(two[0]));
}
TARGET INLINE __m256 scales4_avx2(const float *spread) { return _mm256_loadu_ps(spread); }

/* 128 is taken off the levels, so that the sums of two products fit 16 bits. */
TARGET INLINE __m256i dot8_block_avx2(const uint8_t *levels, const int8_t *x) {
  __m256i signs = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)levels),
                                   _mm256_set1_epi8((char)128));
  __m256i numbers = _mm256_loadu_si256((const __m256i *)x);
  __m256i products =
      _mm256_maddubs_epi16(_mm256_abs_epi8(signs), _mm256_sign_epi8(numbers, signs));
  return _mm256_madd_epi16(products, _mm256_set1_epi16(1));
}
TARGET INLINE __m256 dot8_avx2(const uint8_t *levels, const int8_t *x) {
  __m256i first = dot8_block_avx2(levels, x), second = dot8_block_avx2(levels + BLOCK, x + BLOCK);
  return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_permute2x128_si256(first, second, 0x20),
                                             _mm256_permute2x128_si256(first, second, 0x31)));
}
TARGET INLINE __m256 spread8_avx2(const float *two) { return spread4_avx2(two); }
TARGET INLINE __m256 scales8_avx2(const float *spread) { return scales4_avx2(spread); }
enum { ZERO8_avx2 = 0 };

/* The zero points of 8 blocks, from 4 bytes. */
TARGET INLINE __m256 zeros_avx2(const uint8_t *zeros) {
  __m128i bytes = _mm_loadu_si32(zeros), low = _mm_set1_epi8(15);
  __m128i even = _mm_and_si128(bytes, low);
  __m128i odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), low);
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd)));
}

#include "loops.h"
