/* A pair of the matrix's blocks times the token's; `low` is the first block's. Included once for each
 * instruction set; DOT is its instruction that multiplies and adds bytes, if it has one. */
#ifdef DOT
TARGET INLINE int32x4_t NAME(dot)(int32x4_t sum, int8x16_t a, int8x16_t b) {
  return DOT(sum, a, b);
}
#else
TARGET INLINE int32x4_t NAME(dot)(int32x4_t sum, int8x16_t a, int8x16_t b) {
  int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}
#endif
enum { NAME(ZERO8) = 0 }; /* the levels are shifted by 128, as by AVX2's */

TARGET INLINE int8x16_t NAME(shifted)(const uint8_t *levels) {
  return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(levels), vdupq_n_u8(128)));
}

TARGET INLINE f8 NAME(pair)(const int bits, const uint8_t *levels, const int8_t *x) {
  int32x4_t a = vdupq_n_s32(0), b = a;
  if (bits == 4) {
    uint8x16_t first = vld1q_u8(levels), second = vld1q_u8(levels + 16), low = vdupq_n_u8(15);
    a = NAME(dot)(a, vreinterpretq_s8_u8(vandq_u8(first, low)), vld1q_s8(x));
    b = NAME(dot)(b, vreinterpretq_s8_u8(vandq_u8(second, low)), vld1q_s8(x + 16));
    a = NAME(dot)(a, vreinterpretq_s8_u8(vshrq_n_u8(first, 4)), vld1q_s8(x + 32));
    b = NAME(dot)(b, vreinterpretq_s8_u8(vshrq_n_u8(second, 4)), vld1q_s8(x + 48));
  } else {
    a = NAME(dot)(a, NAME(shifted)(levels), vld1q_s8(x));
    a = NAME(dot)(a, NAME(shifted)(levels + 16), vld1q_s8(x + 16));
    b = NAME(dot)(b, NAME(shifted)(levels + 32), vld1q_s8(x + 32));
    b = NAME(dot)(b, NAME(shifted)(levels + 48), vld1q_s8(x + 48));
  }
  return (f8){vcvtq_f32_s32(a), vcvtq_f32_s32(b)};
}
#undef DOT
