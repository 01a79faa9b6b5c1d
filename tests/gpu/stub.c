/* A CUDA runtime for a machine without a GPU: device memory is host memory and kernels compute
 * nothing. onnxruntime's CUDA provider partitions, allocates, binds, copies and captures with it as
 * with a GPU. It counts launches, and what is not allowed while a stream is captured. It describes
 * itself as an RTX 2080 Ti. `build_stub.py` adds the functions that only have to return success. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "driver_types.h"

typedef int Error;

/* Read by tests/gpu/stub.py, in this order. */
struct counts {
  long launches, gemms, captures, replays, allocations;
  long captured_launches, captured_gemms; /* of the last capture */
  /* Not allowed while capturing: */
  long captured_allocations, captured_frees, captured_syncs, captured_pageable_copies;
};

static struct counts counts;
static int capturing;
static long limit = -1; /* bytes of device memory that are left; -1: no limit */

static struct { const char *begin; size_t size; } pinned[4096];
static int pinned_count;

void stub_counts(struct counts *out) { *out = counts; }
void stub_reset(void) { memset(&counts, 0, sizeof counts); }
void stub_limit(long bytes) { limit = bytes; }

static void launch(long *all, long *captured) {
  ++*all;
  if (capturing) ++*captured;
}
void stub_gemm(void) { launch(&counts.gemms, &counts.captured_gemms); }

static Error allocate(void **out, size_t size) {
  counts.captured_allocations += capturing;
  *out = NULL;
  if (posix_memalign(out, 256, size ? size : 256)) return cudaErrorMemoryAllocation;
  memset(*out, 0, size);
  return cudaSuccess;
}
static Error device_memory(void **out, size_t size) {
  counts.allocations++;
  if (limit >= 0) {
    if ((long)size > limit) return cudaErrorMemoryAllocation;
    limit -= (long)size;
  }
  return allocate(out, size);
}
static Error pinned_memory(void **out, size_t size) {
  Error error = allocate(out, size);
  if (!error && pinned_count < 4096) {
    pinned[pinned_count].begin = *out;
    pinned[pinned_count++].size = size;
  }
  return error;
}
static int is_pinned(const void *at) {
  for (int i = 0; i < pinned_count; i++)
    if ((const char *)at >= pinned[i].begin && (const char *)at < pinned[i].begin + pinned[i].size) return 1;
  return 0;
}

Error cudaMalloc(void **out, size_t size) { return device_memory(out, size); }
Error cudaMallocFromPoolAsync(void **out, size_t size, void *pool, void *stream) { return device_memory(out, size); }
Error cudaMallocHost(void **out, size_t size) { return pinned_memory(out, size); }
Error cudaHostAlloc(void **out, size_t size, unsigned flags) { return pinned_memory(out, size); }
Error cudaFree(void *at) { counts.captured_frees += capturing; free(at); return 0; }
Error cudaFreeAsync(void *at, void *stream) { return cudaFree(at); }
Error cudaFreeHost(void *at) {
  for (int i = 0; i < pinned_count; i++)
    if (pinned[i].begin == at) pinned[i] = pinned[--pinned_count];
  free(at);
  return 0;
}

/* A captured copy is replayed: from pageable memory it would read what lies there by then. */
static void watch_copy(const void *to, const void *from, int kind) {
  if (!capturing) return;
  if (kind == cudaMemcpyHostToDevice && !is_pinned(from)) counts.captured_pageable_copies++;
  if (kind == cudaMemcpyDeviceToHost && !is_pinned(to)) counts.captured_pageable_copies++;
}
Error cudaMemcpy(void *to, const void *from, size_t size, int kind) {
  counts.captured_syncs += capturing;
  memmove(to, from, size);
  return 0;
}
Error cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  watch_copy(to, from, kind);
  memmove(to, from, size);
  return 0;
}
Error cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                        int kind, void *stream) {
  watch_copy(to, from, kind);
  for (size_t row = 0; row < height; row++)
    memmove((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
  return 0;
}
Error cudaMemset(void *at, int value, size_t size) { memset(at, value, size); return 0; }
Error cudaMemsetAsync(void *at, int value, size_t size, void *stream) { memset(at, value, size); return 0; }
Error cudaMemGetInfo(size_t *free_bytes, size_t *total) {
  *total = (size_t)11 << 30;
  *free_bytes = limit >= 0 ? (size_t)limit : (size_t)10 << 30;
  return 0;
}

Error cudaGetDeviceCount(int *count) { *count = 1; return 0; }
Error cudaGetDevice(int *device) { *device = 0; return 0; }
Error cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
Error cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
Error cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 7; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 5; break;
    case cudaDevAttrMultiProcessorCount: *value = 68; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 64 << 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 64 << 10; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 1024; break;
    default: *value = 1;
  }
  return 0;
}
Error cudaGetDeviceProperties(struct cudaDeviceProp *card, int device) {
  memset(card, 0, sizeof *card);
  strcpy(card->name, "RTX 2080 Ti (stub)");
  card->major = 7;
  card->minor = 5;
  card->multiProcessorCount = 68;
  card->warpSize = 32;
  card->maxThreadsPerBlock = card->maxThreadsPerMultiProcessor = 1024;
  card->sharedMemPerBlock = 48 << 10;
  card->sharedMemPerBlockOptin = card->sharedMemPerMultiprocessor = 64 << 10;
  card->totalGlobalMem = (size_t)11 << 30;
  card->maxGridSize[0] = 2147483647;
  card->maxGridSize[1] = card->maxGridSize[2] = 65535;
  card->maxThreadsDim[0] = card->maxThreadsDim[1] = 1024;
  card->maxThreadsDim[2] = 64;
  card->regsPerBlock = card->regsPerMultiprocessor = 65536;
  card->l2CacheSize = 5632 << 10;
  card->textureAlignment = 512;
  return 0;
}

static Error handle(void **out) { static long any[8]; *out = any; return 0; }
Error cudaEventCreate(void **event) { return handle(event); }
Error cudaEventCreateWithFlags(void **event, unsigned flags) { return handle(event); }
Error cudaEventElapsedTime(float *milliseconds, void *from, void *to) { *milliseconds = 1; return 0; }
Error cudaStreamCreate(void **stream) { return handle(stream); }
Error cudaStreamCreateWithFlags(void **stream, unsigned flags) { return handle(stream); }
Error cudaMemPoolCreate(void **pool, const void *properties) { return handle(pool); }
Error cudaMemPoolGetAttribute(void *pool, int attribute, void *value) { *(uint64_t *)value = 0; return 0; }
Error cudaStreamSynchronize(void *stream) { counts.captured_syncs += capturing; return 0; }
Error cudaDeviceSynchronize(void) { counts.captured_syncs += capturing; return 0; }
Error cudaEventSynchronize(void *event) { counts.captured_syncs += capturing; return 0; }
Error cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data) { function(data); return 0; }

Error cudaStreamBeginCapture(void *stream, int mode) {
  capturing = 1;
  counts.captures++;
  counts.captured_launches = counts.captured_gemms = 0;
  return 0;
}
Error cudaStreamEndCapture(void *stream, void **graph) { capturing = 0; return handle(graph); }
Error cudaStreamIsCapturing(void *stream, int *status) { *status = capturing; return 0; }
Error cudaGraphInstantiate(void **executable, void *graph, unsigned long long flags) { return handle(executable); }
Error cudaGraphLaunch(void *executable, void *stream) { counts.replays++; return 0; }

static Error launched(void) { launch(&counts.launches, &counts.captured_launches); return 0; }
Error cudaLaunchKernel(const void *function) { return launched(); }
Error __cudaLaunchKernel(const void *function) { return launched(); }
Error cudaLaunchKernelExC(const void *config, const void *function, void **arguments) { return launched(); }
Error cudaLaunchCooperativeKernel(const void *function) { return launched(); }

Error cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *at) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = is_pinned(at) ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  attributes->devicePointer = (void *)at;
  return 0;
}
Error cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  return 0;
}
Error cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) { *blocks = 1; return 0; }
Error cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) { *blocks = 1; return 0; }
const char *cudaGetErrorName(Error error) { return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "stub"; }
const char *cudaGetErrorString(Error error) { return error == cudaErrorMemoryAllocation ? "out of memory" : "stub"; }

void **__cudaRegisterFatBinary(void *binary) { static void *any[4]; return any; }
Error __cudaPopCallConfiguration(void *grid, void *block, size_t *shared, void **stream) {
  memset(grid, 0, 12);
  memset(block, 0, 12);
  *shared = 0;
  *stream = NULL;
  return 0;
}
Error __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return 0; }
