/* Vectors of 8 floats as two of NEON's. Lanes are filled and added up in the same order as AVX2's,
 * so that the results are the same, bit for bit. */
#pragma once
#include <arm_neon.h>
#include <string.h>

#include "../kernels.h"

#define VECTOR __attribute__((always_inline)) static inline

typedef struct {
  float32x4_t low, high;
} f8;

VECTOR f8 f8_all(float x) { return (f8){vdupq_n_f32(x), vdupq_n_f32(x)}; }
VECTOR f8 f8_zero(void) { return f8_all(0); }
VECTOR f8 f8_load(const float *x) { return (f8){vld1q_f32(x), vld1q_f32(x + 4)}; }
VECTOR void f8_store(float *to, f8 x) { vst1q_f32(to, x.low), vst1q_f32(to + 4, x.high); }
VECTOR f8 f8_add(f8 a, f8 b) { return (f8){vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
VECTOR f8 f8_mul(f8 a, f8 b) { return (f8){vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
/* c + a b and c - a b, rounded once */
VECTOR f8 f8_fma(f8 a, f8 b, f8 c) {
  return (f8){vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
VECTOR f8 f8_fnma(f8 a, f8 b, f8 c) {
  return (f8){vfmsq_f32(c.low, a.low, b.low), vfmsq_f32(c.high, a.high, b.high)};
}
VECTOR float f8_sum(f8 v) {
  float32x4_t lanes = vaddq_f32(v.low, v.high);
  float32x2_t two = vadd_f32(vget_low_f32(lanes), vget_high_f32(lanes));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
VECTOR f8 f8_widen(const float16 *x) {
  float16x8_t numbers = vreinterpretq_f16_u16(vld1q_u16(x));
  return (f8){vcvt_f32_f16(vget_low_f16(numbers)), vcvt_high_f32_f16(numbers)};
}
VECTOR float f1_widen(float16 x) {
  return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(x))), 0);
}

/* The zero points of 8 blocks, from 4 bytes. */
VECTOR f8 f8_zeros(const uint8_t *zeros) {
  uint32_t four;
  memcpy(&four, zeros, sizeof four);
  uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(four));
  uint8x8_t apart = vzip1_u8(vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8(bytes, 4));
  uint16x8_t wide = vmovl_u8(apart);
  return (f8){vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide))), vcvtq_f32_u32(vmovl_high_u16(wide))};
}

/* The scales of two blocks, of `size` bytes, each in four lanes. */
VECTOR f8 f8_two_scales(const size_t size, const uint8_t *scales) {
  if (size == sizeof(float16)) {
    float16 two[2];
    memcpy(two, scales, sizeof two);
    return (f8){vdupq_n_f32(f1_widen(two[0])), vdupq_n_f32(f1_widen(two[1]))};
  }
  float two[2];
  memcpy(two, scales, sizeof two);
  return (f8){vdupq_n_f32(two[0]), vdupq_n_f32(two[1])};
}

/* The scales of 8 blocks. */
VECTOR f8 f8_eight_scales(const size_t size, const uint8_t *scales) {
  return size == sizeof(float16) ? f8_widen((const float16 *)scales)
                                 : f8_load((const float *)scales);
}

/* A block of numbers rounded to int8, in order. */
typedef int8x16x2_t i8x32;

/* Rounds 32 numbers; returns their scale. */
VECTOR float round_block(const float *x, i8x32 *numbers) {
  /* Compared as integers, so that NaN counts as the largest. */
  const uint32x4_t magnitude = vdupq_n_u32(0x7fffffff);
  uint32x4_t largest = vdupq_n_u32(0);
  float32x4_t part[8];
  for (int i = 0; i < 8; i++) {
    part[i] = vld1q_f32(x + 4 * i);
    largest = vmaxq_u32(largest, vandq_u32(vreinterpretq_u32_f32(part[i]), magnitude));
  }
  uint32_t bits = vmaxvq_u32(largest);
  float most;
  memcpy(&most, &bits, sizeof most);
  float32x4_t factor = vdupq_n_f32(most > 0 ? 127 / most : 0);
  int16x8_t whole[4];
  for (int i = 0; i < 4; i++)
    whole[i] = vqmovn_high_s32(vqmovn_s32(vcvtnq_s32_f32(vmulq_f32(part[2 * i], factor))),
                               vcvtnq_s32_f32(vmulq_f32(part[2 * i + 1], factor)));
  numbers->val[0] = vqmovn_high_s16(vqmovn_s16(whole[0]), whole[1]);
  numbers->val[1] = vqmovn_high_s16(vqmovn_s16(whole[2]), whole[3]);
  return most / 127;
}

VECTOR int sum_of(i8x32 numbers) {
  return vaddlvq_s16(vpadalq_s8(vpaddlq_s8(numbers.val[0]), numbers.val[1]));
}

VECTOR void store_in_order(int8_t *to, i8x32 numbers) {
  vst1q_s8(to, numbers.val[0]), vst1q_s8(to + 16, numbers.val[1]);
}

VECTOR void store_even_odd(int8_t *even, int8_t *odd, i8x32 numbers) {
  vst1q_s8(even, vuzp1q_s8(numbers.val[0], numbers.val[1]));
  vst1q_s8(odd, vuzp2q_s8(numbers.val[0], numbers.val[1]));
}
