/* What an x86-64 processor has, asked of itself: not every compiler's runtime library fills in
 * __builtin_cpu_supports (zig's does not). */
#pragma once
#include <cpuid.h>

typedef struct {
  int avx2, avx_vnni, avx512_vnni;
} Cpu;

static Cpu detect_cpu(void) {
  enum { YMM = 0x06, ZMM = 0xe6 }; /* registers that the operating system saves */
  unsigned eax, ebx, ecx, edx, saved, unused;
  Cpu cpu = {0};
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return cpu;
  if (!(ecx & bit_OSXSAVE) || !(ecx & bit_AVX) || !(ecx & bit_FMA) || !(ecx & bit_F16C)) return cpu;
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(unused) : "c"(0));
  if ((saved & YMM) != YMM || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return cpu;
  cpu.avx2 = ebx >> 5 & 1;
  int avx512 = ebx >> 16 & ebx >> 31 & 1; /* F and VL */
  cpu.avx512_vnni = cpu.avx2 && avx512 && ecx >> 11 & 1 && (saved & ZMM) == ZMM;
  cpu.avx_vnni = cpu.avx2 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax >> 4 & 1;
  return cpu;
}
