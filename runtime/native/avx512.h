/* Vectors of 16 floats (x86-64 with AVX-512 and VNNI). */
#define KIND avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")))
#define WIDTH 16
#define VECTOR __m512
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define SET(number) _mm512_set1_ps(number)
#define ADD(a, b) _mm512_add_ps(a, b)
#define MULTIPLY(a, b) _mm512_mul_ps(a, b)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)   /* c + a b */
#define FNMA(a, b, c) _mm512_fnmadd_ps(a, b, c) /* c - a b */

TARGET INLINE float sum_avx512(__m512 v) { return _mm512_reduce_add_ps(v); }

TARGET INLINE __m512 dot_avx512(__m512i levels, const int8_t *x) {
  return _mm512_cvtepi32_ps(
      _mm512_dpbusd_epi32(_mm512_setzero_si512(), levels, _mm512_loadu_si512(x)));
}
/* Two floats in turn, in all lanes. */
TARGET INLINE __m512 twice_avx512(const float *two) {
  return _mm512_castpd_ps(_mm512_set1_pd(*(const unaligned_double *)two));
}

/* Products of a pair of blocks: in each half lanes 0 to 3 belong to the first one. */
TARGET INLINE __m512 dot4_avx512(const uint8_t *levels, const int8_t *x) {
  __m256i both = _mm256_loadu_si256((const __m256i *)levels);
  __m512i wide = _mm512_inserti64x4(_mm512_castsi256_si512(both), _mm256_srli_epi16(both, 4), 1);
  return dot_avx512(_mm512_and_si512(wide, _mm512_set1_epi8(15)), x);
}
TARGET INLINE __m512 spread4_avx512(const float *two) {
  const __m512i order = _mm512_set_epi32(1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0);
  return _mm512_permutevar_ps(twice_avx512(two), order);
}
TARGET INLINE __m512 scales4_avx512(const float *spread) {
  return _mm512_broadcast_f32x8(_mm256_loadu_ps(spread));
}

/* The first half belongs to the first block. */
TARGET INLINE __m512 dot8_avx512(const uint8_t *levels, const int8_t *x) {
  return dot_avx512(_mm512_loadu_si512(levels), x);
}
TARGET INLINE __m512 spread8_avx512(const float *two) {
  const __m512i order = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  return _mm512_permutevar_ps(twice_avx512(two), order);
}
TARGET INLINE __m512 scales8_avx512(const float *spread) {
  const __m512i order = _mm512_set_epi32(7, 6, 5, 4, 7, 6, 5, 4, 3, 2, 1, 0, 3, 2, 1, 0);
  return _mm512_permutexvar_ps(order, _mm512_castps256_ps512(_mm256_loadu_ps(spread)));
}
enum { ZERO8_avx512 = 128 };

/* The zero points of 16 blocks, from 8 bytes. */
TARGET INLINE __m512 zeros_avx512(const uint8_t *zeros) {
  __m128i bytes = _mm_loadl_epi64((const __m128i *)zeros), low = _mm_set1_epi8(15);
  __m128i even = _mm_and_si128(bytes, low);
  __m128i odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), low);
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd)));
}

#include "loops.h"
