/* The instruction sets there are, and which one runs. */
#include "kernels.h"

#include <string.h>

#if defined(__x86_64__)
extern const Kernels kernels_avx512_vnni, kernels_avx_vnni, kernels_avx2;
const Kernels *const kernel_sets[] = {&kernels_avx512_vnni, &kernels_avx_vnni, &kernels_avx2, NULL};
#elif defined(__aarch64__)
extern const Kernels kernels_dotprod, kernels_neon;
const Kernels *const kernel_sets[] = {&kernels_dotprod, &kernels_neon, NULL};
#else
#error "there are no kernels for this architecture"
#endif

const Kernels *choose_kernels(const char *asked) {
  int best = !asked || !strcmp(asked, "best");
  for (const Kernels *const *set = kernel_sets; *set; set++)
    if ((best || !strcmp(asked, (*set)->name)) && (*set)->is_supported()) return *set;
  return NULL;
}
