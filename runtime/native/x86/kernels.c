/* The kernels for x86-64. Both sets with VNNI give the same results, bit for bit. They differ from
 * AVX2's with 8 bits, in the last digits: these take the zero point off before multiplying. */
#if defined(__x86_64__)
#include "cpu.h"
#include "vectors.h"
#define ANY_TARGET __attribute__((target("avx2,fma,f16c")))
#include "../quantise.h"

static int has_avx2(void) { return detect_cpu().avx2; }
static int has_avx_vnni(void) { return detect_cpu().avx_vnni; }
static int has_avx512_vnni(void) { return detect_cpu().avx512_vnni; }

#define KIND avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#include "pairs.h"
#include "../loops.h"

#define KIND avx_vnni
#define TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#define DPBUSD _mm256_dpbusd_avx_epi32
#include "pairs.h"
#include "../loops.h"

#define KIND avx512_vnni
#define TARGET __attribute__((target("avx2,fma,f16c,avx512vl,avx512vnni")))
#define DPBUSD _mm256_dpbusd_epi32
#include "pairs.h"
#include "../loops.h"
#endif
