/* The kernels for ARM64. Both sets give the results of AVX2's, bit for bit. */
#if defined(__aarch64__)
#include "vectors.h"

#include "cpu.h"
#define ANY_TARGET
#include "../quantise.h"

static int has_dotprod(void) { return detect_dotprod(); }
static int has_neon(void) { return 1; }

#define KIND neon
#define TARGET
#include "pairs.h"
#include "../loops.h"

#define KIND dotprod
#if defined(__clang__)
#define TARGET __attribute__((target("dotprod")))
#else
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#define DOT vdotq_s32
#include "pairs.h"
#include "../loops.h"
#endif
