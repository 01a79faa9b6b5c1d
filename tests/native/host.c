/* A program in C that runs the cases of `dump_cases.py` on an onnxruntime library: the operator where
 * there is no Python.
 *
 *   host ONNXRUNTIME OPERATORS FOLDER     exit code 1 if an output differs by more than its case allows
 *
 * Functions of the C API have the index that runtime/native/onnxruntime.h explains. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _WIN32
#include <windows.h>
typedef wchar_t PathChar;
static void *library(const char *path) { return (void *)LoadLibraryA(path); }
static void *symbol(void *from, const char *name) { return (void *)GetProcAddress(from, name); }
#else
#include <dlfcn.h>
typedef char PathChar;
static void *library(const char *path) { return dlopen(path, RTLD_NOW); }
static void *symbol(void *from, const char *name) { return dlsym(from, name); }
#endif

enum { API_VERSION = 18, MAX_INPUTS = 16, MAX_RANK = 8, LONGEST_PATH = 1000 };

typedef void *const *Api;
typedef struct {
  Api (*get_api)(uint32_t version);
  const char *(*get_version)(void);
} ApiBase;

static Api ort;
static FILE *cases;
#define CALL(index, ...) ((void *(*)(__VA_ARGS__))ort[index])

static void stop(const char *what, const char *why) {
  printf("%s: %s\n", what, why);
  exit(2);
}

static void check(void *status, const char *what) {
  if (status) stop(what, ((const char *(*)(void *))ort[2])(status));
}

static int64_t read_number(void) {
  int64_t number;
  if (fread(&number, sizeof number, 1, cases) != 1) stop("cases", "too short");
  return number;
}

/* Bytes that are preceded by their number, with a zero after them. */
static void *read_bytes(int64_t *count) {
  *count = read_number();
  char *bytes = calloc(1, *count + 1);
  if (!bytes || (*count && fread(bytes, *count, 1, cases) != 1)) stop("cases", "too short");
  return bytes;
}

static void *open_session(void *environment, const char *operators, const char *model) {
  void *options, *handle, *session;
  PathChar path[LONGEST_PATH] = {0};
  for (size_t i = 0; model[i]; i++) path[i] = model[i];
  check(CALL(10, void **)(&options), "CreateSessionOptions");
  check(CALL(24, void *, int)(options, 2), "SetIntraOpNumThreads");
  check(CALL(29, void *, const char *, void **)(options, operators, &handle), operators);
  check(CALL(7, void *, const PathChar *, void *, void **)(environment, path, options, &session), model);
  return session;
}

static void *read_tensor(void *memory) {
  void *value;
  int64_t shape[MAX_RANK], type = read_number(), rank = read_number(), count;
  if (rank > MAX_RANK) stop("cases", "a tensor has too many axes");
  for (int64_t i = 0; i < rank; i++) shape[i] = read_number();
  void *data = read_bytes(&count);
  check(CALL(49, void *, void *, size_t, const int64_t *, size_t, int, void **)(
            memory, data, count, shape, rank, (int)type, &value),
        "CreateTensorWithDataAsOrtValue");
  return value;
}

/* Runs the next case; returns its largest difference, and counts numbers that are not equal. */
static double run_case(void *environment, void *memory, const char *operators, const char *folder,
                       int64_t *unequal, double *allowed) {
  char model[LONGEST_PATH], *names[MAX_INPUTS];
  void *values[MAX_INPUTS], *found = NULL;
  int64_t count;
  snprintf(model, sizeof model, "%s/%s", folder, (char *)read_bytes(&count));
  void *session = open_session(environment, operators, model);
  int64_t inputs = read_number();
  if (inputs > MAX_INPUTS) stop("cases", "too many inputs");
  for (int64_t i = 0; i < inputs; i++) {
    names[i] = read_bytes(&count);
    values[i] = read_tensor(memory);
  }
  const char *output = read_bytes(&count);
  check(CALL(9, void *, void *, char **, void **, size_t, const char **, size_t, void **)(
            session, NULL, names, values, inputs, &output, 1, &found),
        model);
  float *y, *expected;
  check(CALL(51, void *, void **)(found, (void **)&y), "GetTensorMutableData");
  *allowed = (double)read_number() / 1e9;
  expected = read_bytes(&count);
  double largest = 0;
  *unequal = 0;
  for (int64_t i = 0; i < count / (int64_t)sizeof *y; i++) {
    double difference = y[i] > expected[i] ? y[i] - expected[i] : expected[i] - y[i];
    *unequal += memcmp(y + i, expected + i, sizeof *y) != 0;
    if (!(difference <= largest)) largest = difference;
  }
  return largest;
}

int main(int argc, char **argv) {
  if (argc != 4) stop("host", "needs ONNXRUNTIME OPERATORS FOLDER");
  void *onnxruntime = library(argv[1]), *own = library(argv[2]), *environment, *memory;
  if (!onnxruntime || !own) stop("host", "a library does not load");
  ApiBase *base = ((ApiBase * (*)(void)) symbol(onnxruntime, "OrtGetApiBase"))();
  const char *kernels = ((const char *(*)(void))symbol(own, "ChosenKernels"))();
  printf("onnxruntime %s, %s kernels\n", base->get_version(), kernels ? kernels : "no");
  ort = base->get_api(API_VERSION);
  check(CALL(3, int, const char *, void **)(3, "host", &environment), "CreateEnv");
  check(CALL(69, int, int, void **)(1, 0, &memory), "CreateCpuMemoryInfo");
  char path[LONGEST_PATH];
  snprintf(path, sizeof path, "%s/cases", argv[3]);
  cases = fopen(path, "rb");
  if (!cases) stop(path, "is not there");
  int64_t count = read_number(), failed = 0, exact = 0, unequal;
  for (int64_t i = 0; i < count; i++) {
    double allowed, difference = run_case(environment, memory, argv[2], argv[3], &unequal, &allowed);
    exact += !unequal;
    if (difference <= allowed) continue;
    failed++;
    printf("case %d: %d numbers differ, by up to %g\n", (int)i, (int)unequal, difference);
  }
  printf("%d cases, %d bit for bit, %d failed\n", (int)count, (int)exact, (int)failed);
  return failed != 0;
}
