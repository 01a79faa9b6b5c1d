/* NVIDIA's driver library for a machine without a GPU: one RTX 2080 Ti. The variables that start with
 * STUB_ change what it says. */
#include <stdlib.h>
#include <string.h>

struct memory { unsigned long long total, available, used; };

int nvmlInit_v2(void) { return getenv("STUB_NO_DRIVER") ? 9 : 0; } /* driver not loaded */
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = device; return 0; }
int nvmlDeviceGetName(void *device, char *name, unsigned size) { strncpy(name, "RTX 2080 Ti (stub)", size); return 0; }
int nvmlDeviceGetMemoryInfo(void *device, struct memory *memory) {
  const char *free_bytes = getenv("STUB_FREE_BYTES");
  memory->total = 11ull << 30;
  memory->available = free_bytes ? strtoull(free_bytes, NULL, 10) : 10ull << 30;
  memory->used = memory->total - memory->available;
  return 0;
}
int nvmlSystemGetDriverVersion(char *version, unsigned size) { strncpy(version, "580.65.06", size); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) {
  const char *cuda = getenv("STUB_CUDA_VERSION");
  *version = cuda ? atoi(cuda) : 13000;
  return 0;
}
int nvmlDeviceGetMaxClockInfo(void *device, int kind, unsigned *megahertz) { *megahertz = 7000; return 0; }
int nvmlDeviceGetMemoryBusWidth(void *device, unsigned *bits) { *bits = 352; return 0; }
