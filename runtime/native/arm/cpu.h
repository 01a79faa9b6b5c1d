/* What an ARM64 processor has beside NEON, which all of them have. */
#pragma once

#if defined(__linux__)
#include <sys/auxv.h>

static int detect_dotprod(void) {
  enum { HWCAP_DOTPROD = 1 << 20 };
  return (getauxval(AT_HWCAP) & HWCAP_DOTPROD) != 0;
}
#elif defined(_WIN32)
__declspec(dllimport) int __stdcall IsProcessorFeaturePresent(unsigned long feature);

static int detect_dotprod(void) {
  enum { PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE = 43 };
  return IsProcessorFeaturePresent(PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE);
}
#elif defined(__APPLE__)
#include <sys/sysctl.h>

static int detect_dotprod(void) {
  int found = 0;
  size_t size = sizeof found;
  return !sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, NULL, 0) && found;
}
#else
static int detect_dotprod(void) { return 0; }
#endif
