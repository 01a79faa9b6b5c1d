/* A pair of the matrix's blocks times the token's; lanes 0 to 3 are the first block's. Included once
 * for each instruction set; DPBUSD is its instruction that multiplies and adds bytes, if it has one. */
#ifdef DPBUSD
enum { NAME(ZERO8) = 128 };

TARGET INLINE __m256i NAME(block8)(__m256i levels, __m256i x) {
  return DPBUSD(_mm256_setzero_si256(), levels, x);
}
TARGET INLINE __m256i NAME(pair4)(__m256i even, __m256i odd, __m256i x, __m256i y) {
  return DPBUSD(DPBUSD(_mm256_setzero_si256(), even, x), odd, y);
}
#else
enum { NAME(ZERO8) = 0 };

/* The levels are shifted by 128, so that the sum of two products fits 16 bits. */
TARGET INLINE __m256i NAME(block8)(__m256i levels, __m256i x) {
  __m256i number = _mm256_xor_si256(levels, _mm256_set1_epi8((char)128));
  __m256i two = _mm256_maddubs_epi16(_mm256_abs_epi8(number), _mm256_sign_epi8(x, number));
  return _mm256_madd_epi16(two, _mm256_set1_epi16(1));
}
TARGET INLINE __m256i NAME(pair4)(__m256i even, __m256i odd, __m256i x, __m256i y) {
  __m256i two = _mm256_add_epi16(_mm256_maddubs_epi16(even, x), _mm256_maddubs_epi16(odd, y));
  return _mm256_madd_epi16(two, _mm256_set1_epi16(1));
}
#endif

TARGET INLINE f8 NAME(pair)(const int bits, const uint8_t *levels, const int8_t *x) {
  const __m256i *from = (const __m256i *)levels, *with = (const __m256i *)x;
  __m256i packed = _mm256_loadu_si256(from);
  __m256i x0 = _mm256_loadu_si256(with), x1 = _mm256_loadu_si256(with + 1);
  if (bits == 4) {
    const __m256i low = _mm256_set1_epi8(15);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low);
    return _mm256_cvtepi32_ps(NAME(pair4)(_mm256_and_si256(packed, low), odd, x0, x1));
  }
  __m256i a = NAME(block8)(packed, x0), b = NAME(block8)(_mm256_loadu_si256(from + 1), x1);
  return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20),
                                             _mm256_permute2x128_si256(a, b, 0x31)));
}
#undef DPBUSD
