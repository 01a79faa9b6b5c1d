/* A custom operator for onnxruntime, in the domain `dlp_edge`. Where this library could
 * be built, `operator_graph.py` puts it into the backbone's graph.
 *
 * Linear: x [B, S, K] times a matrix of 4 or 8 bits. The matrix is read in the bundle's layout,
 *   without repacking, so it is in memory once. `means` says that the matrix has columns for the
 *   means of x's blocks after those for x. An optional slot adds (x A^T) B for each sequence's
 *   adapters. It reads the rows of A and B in place in the array of all adapters, so that switching
 *   to another fusion changes only a few offsets and weights.
 */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#ifdef _WIN32
__declspec(dllimport) int __stdcall SwitchToThread(void);
#define yield_thread SwitchToThread
#else
#include <sched.h>
#define yield_thread sched_yield
#endif

#include "onnxruntime.h"

#include "kernels.h"

/* Tells the processor that a thread waits for another. */
#if defined(__x86_64__)
#define pause_thread() __builtin_ia32_pause()
#else
#define pause_thread() __asm__ volatile("yield")
#endif

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum {
  CACHE_LINE = 64,
  SHARES = 8,       /* tasks that a matrix's rows are split into */
  TOKENS = 32,      /* tokens of a task of slot_down */
  HIDDEN = 4,       /* and its rows of A */
  MANY_TOKENS = 8,  /* from here on threads share the rounding of tokens */
  MAX_PARTS = 3,    /* of a slot */
  MAX_RANK = 4,     /* of a tensor */
  SPINS = 64        /* pauses before a waiting thread yields */
};

#define MAX_HIDDEN 1e15 /* numbers between a slot's two products */

static OrtApi ort;
static const Kernels *kernels;

typedef struct {
  void *data;
  int64_t size[MAX_RANK]; /* 1 after the last axis */
  size_t rank;
  int type;
} Tensor;

static OrtStatus *describe(const OrtValue *value, Tensor *tensor) {
  OrtTensorTypeAndShapeInfo *shape;
  OrtStatus *status = GetTensorTypeAndShape(value, &shape);
  if (status) return status;
  status = GetTensorElementType(shape, &tensor->type);
  if (!status) status = GetDimensionsCount(shape, &tensor->rank);
  for (size_t i = 0; i < MAX_RANK; i++) tensor->size[i] = 1;
  if (!status && tensor->rank <= MAX_RANK)
    status = GetDimensions(shape, tensor->size, tensor->rank);
  ReleaseTensorTypeAndShapeInfo(shape);
  return status ? status : GetTensorMutableData((OrtValue *)value, &tensor->data);
}

/* An input; an omitted one has no data. */
static OrtStatus *input(const OrtKernelContext *context, size_t index, Tensor *tensor) {
  const OrtValue *value = NULL;
  OrtStatus *status = KernelContext_GetInput(context, index, &value);
  *tensor = (Tensor){0};
  return status || !value ? status : describe(value, tensor);
}

static OrtStatus *output(OrtKernelContext *context, const int64_t *size, float **data) {
  OrtValue *value;
  OrtStatus *status = KernelContext_GetOutput(context, 0, size, 3, &value);
  return status ? status : GetTensorMutableData(value, (void **)data);
}

static OrtStatus *refuse(const char *why) { return CreateStatus(INVALID_ARGUMENT, why); }
static OrtStatus *no_memory(void) { return CreateStatus(FAIL, "Failed to allocate memory"); }

#define TRY(expression)                \
  do {                                 \
    OrtStatus *status_ = (expression); \
    if (status_) return status_;       \
  } while (0)

/* Leaves the number as it is where the node lacks the attribute. */
static void attribute(const OrtKernelInfo *info, const char *name, int64_t *number) {
  OrtStatus *status = KernelInfoGetAttribute_int64(info, name, number);
  if (status) ReleaseStatus(status);
}

static size_t round_up(size_t number, size_t step) { return (number + step - 1) / step * step; }

/* ---- Slot ---- */

typedef struct {
  int64_t first_part;         /* index of the slot's first part among those of all slots */
  int64_t starts[MAX_PARTS];  /* the column of y where each part begins */
  int64_t columns[MAX_PARTS]; /* and its number of columns */
  size_t parts;
} Slot;

typedef struct {
  const Slot *slot;
  const float *x, *weights;
  const float16 *adapters;
  const Span *spans; /* [B, all, n] */
  float *y, *hidden;                /* [B, S, N], [B, S, parts, n, max_rank] */
  size_t all, n, max_rank, pieces;  /* pieces: of HIDDEN rows, in max_rank */
  size_t sequences, tokens, blocks; /* B, S, and the number of blocks of TOKENS in S */
  size_t inputs, outputs, stride;   /* K, N, and the width of hidden */
  size_t down_tasks;                /* tasks of slot_down */
} SlotWork;

/* Index into spans and weights of the first adapter of a sequence's part. */
static size_t fusion_of(const SlotWork *w, size_t sequence, size_t part) {
  return (sequence * w->all + w->slot->first_part + part) * w->n;
}

/* Whether `rank` rows of `width` numbers from `begin` on lie within `count` numbers. */
static int within(int64_t begin, int64_t rank, int64_t width, int64_t count) {
  return begin >= 0 && rank >= 0 && (!width || rank <= count / width) &&
         begin <= count - rank * width;
}

/* Inputs of a slot: adapters [T], spans [B, all, n, 3], weights [B, all, n], from `index` on. */
static OrtStatus *read_slot(const Slot *slot, const OrtKernelContext *context, size_t index,
                            const Tensor *x, const int64_t size[3], SlotWork *w) {
  Tensor adapters, spans, weights;
  TRY(input(context, index, &adapters));
  TRY(input(context, index + 1, &spans));
  TRY(input(context, index + 2, &weights));
  if (adapters.rank != 1 || spans.rank != 4 || spans.size[3] != 3 || weights.rank != 3 ||
      spans.size[0] != size[0] || memcmp(spans.size, weights.size, 3 * sizeof *spans.size) ||
      slot->first_part > spans.size[1] - (int64_t)slot->parts)
    return refuse("Slot: spans and weights do not match the sequences and slots");
  *w = (SlotWork){.slot = slot, .x = x->data, .adapters = adapters.data, .spans = spans.data,
                  .weights = weights.data, .all = spans.size[1], .n = spans.size[2],
                  .sequences = size[0], .tokens = size[1], .inputs = x->size[2],
                  .outputs = size[2]};
  w->blocks = (w->tokens + TOKENS - 1) / TOKENS;
  for (size_t part = 0; part < slot->parts; part++) {
    int64_t columns = slot->columns[part];
    if (slot->starts[part] > size[2] - columns) return refuse("Slot: a part is not within y");
    for (size_t i = 0; i < w->sequences * w->n; i++) {
      Span span = w->spans[fusion_of(w, i / w->n, part) + i % w->n];
      if (!within(span.a, span.rank, x->size[2], adapters.size[0]) ||
          !within(span.b, span.rank, columns, adapters.size[0]))
        return refuse("Slot: a span is not within the adapters");
      if ((size_t)span.rank > w->max_rank) w->max_rank = span.rank;
    }
  }
  /* An impossible size is refused before it overflows. */
  if ((double)w->sequences * w->tokens * slot->parts * w->n * w->max_rank > MAX_HIDDEN)
    return no_memory();
  w->pieces = (w->max_rank + HIDDEN - 1) / HIDDEN;
  w->down_tasks = w->sequences * w->blocks * slot->parts * w->n * w->pieces;
  w->stride = slot->parts * w->n * w->max_rank;
  return NULL;
}

static size_t hidden_bytes(const SlotWork *w) {
  return w->sequences * w->tokens * w->stride * sizeof(float);
}

/* hidden = weight * x A^T, for up to HIDDEN rows of one adapter's A and up to TOKENS tokens. */
static void slot_down(void *work, size_t task) {
  const SlotWork *w = work;
  size_t from = task % w->pieces * HIDDEN, adapter = task / w->pieces % w->n;
  task /= w->pieces * w->n;
  size_t parts = w->slot->parts, part = task % parts, block = task / parts % w->blocks * TOKENS;
  size_t sequence = task / parts / w->blocks, at = fusion_of(w, sequence, part) + adapter;
  Span span = w->spans[at];
  if (from >= (size_t)span.rank) return;
  size_t rows = span.rank - from, tokens = w->tokens - block, first = sequence * w->tokens + block;
  size_t column = (part * w->n + adapter) * w->max_rank + from;
  kernels->down_f32_f16(w->x + first * w->inputs, tokens < TOKENS ? tokens : TOKENS,
                w->adapters + span.a + from * w->inputs, rows < HIDDEN ? rows : HIDDEN, w->inputs,
                w->weights[at], w->hidden + first * w->stride + column, w->stride);
}

/* y += hidden B, for columns [from, to) of y. */
static void slot_up(const SlotWork *w, size_t from, size_t to) {
  for (size_t part = 0; part < w->slot->parts; part++) {
    size_t start = w->slot->starts[part], stop = start + w->slot->columns[part];
    size_t low = from > start ? from : start, high = to < stop ? to : stop;
    for (size_t sequence = 0; low < high && sequence < w->sequences; sequence++)
      kernels->up_f32_f16(w->adapters, w->spans + fusion_of(w, sequence, part), w->n, w->max_rank,
                  w->slot->columns[part], low - start, high - start,
                  w->hidden + sequence * w->tokens * w->stride + part * w->n * w->max_rank,
                  w->stride, w->tokens, w->y + sequence * w->tokens * w->outputs + low, w->outputs);
  }
}

static OrtStatus *read_slot_attributes(const OrtKernelInfo *info, Slot *slot) {
  size_t count = slot->parts = MAX_PARTS;
  attribute(info, "first", &slot->first_part);
  TRY(KernelInfoGetAttributeArray_int64(info, "starts", slot->starts, &slot->parts));
  TRY(KernelInfoGetAttributeArray_int64(info, "columns", slot->columns, &count));
  int fits = slot->first_part >= 0 && count == slot->parts;
  for (size_t part = 0; part < MAX_PARTS; part++)
    fits = fits && slot->starts[part] >= 0 && slot->columns[part] >= 0;
  return fits ? NULL : refuse("Slot: its attributes contradict each other");
}

/* ---- Linear ---- */

typedef struct {
  int64_t bits, means, has_slot;
  Slot slot;
} Linear;

typedef struct {
  const float *x;
  size_t inputs; /* K */
  int bits, means;
  Multiply *multiply;
  Matrix matrix;
  Matrix tail;  /* a copy of the last rows with room for the loops to read past their end */
  size_t safe;  /* rows before the tail */
  size_t share; /* rows of a task */
  Tokens tokens;
  float *y;
  SlotWork slot;
  atomic_size_t claimed, done; /* counts of slot_down's tasks */
} LinearWork;

static void quantise_token(void *work, size_t token) {
  const LinearWork *w = work;
  kernels->quantise_f32_a8(w->x + token * w->inputs, w->inputs, w->means, w->matrix.blocks, w->bits,
                           &w->tokens, token);
}

/* Waits until all tasks of slot_down are done. Each has been claimed by a thread, so the wait is
 * short; but that thread may need this processor to finish. */
static void wait_for_downs(LinearWork *w) {
  for (int spins = 0; atomic_load_explicit(&w->done, memory_order_acquire) < w->slot.down_tasks;)
    if (++spins % SPINS)
      pause_thread();
    else
      yield_thread();
}

/* Multiplies some rows of the matrix, which gives columns of y, and adds the slot's part of these.
 * The slot's first product is computed along the way by whichever threads arrive first: another
 * parallel loop would take longer than a small slot does. */
static void multiply_rows(void *work, size_t task) {
  LinearWork *w = work;
  size_t from = task * w->share, to = from + w->share, rows = w->matrix.rows, down;
  while ((down = atomic_fetch_add(&w->claimed, 1)) < w->slot.down_tasks) {
    slot_down(&w->slot, down);
    atomic_fetch_add_explicit(&w->done, 1, memory_order_release);
  }
  if (to > w->safe) to = w->safe;
  if (from < to) {
    w->multiply(&w->matrix, from, to, &w->tokens, w->y, rows);
  } else {
    from = w->safe, to = rows;
    w->multiply(&w->tail, 0, w->tail.rows, &w->tokens, w->y + from, rows);
  }
  if (!w->slot.max_rank) return;
  wait_for_downs(w);
  slot_up(&w->slot, from, to);
}

/* Inputs of Linear: x, levels, scales, zeros, and those of its slot if it has one. */
static OrtStatus *read_linear(const Linear *linear, const OrtKernelContext *context, LinearWork *w,
                              int64_t size[3]) {
  Tensor x, levels, scales, zeros;
  TRY(input(context, 0, &x));
  TRY(input(context, 1, &levels));
  TRY(input(context, 2, &scales));
  TRY(input(context, 3, &zeros));
  int64_t rows = levels.size[0], blocks = levels.size[1], inputs = x.size[2];
  int64_t groups = inputs / BLOCK + (inputs % BLOCK != 0);
  int64_t expected = linear->means ? groups + (groups + BLOCK - 1) / BLOCK : groups;
  if (x.rank != 3 || levels.rank != 3) return refuse("Linear: x and levels must have three axes");
  if (!inputs || blocks != expected || (linear->means && inputs % BLOCK))
    return refuse("Linear: the matrix and x differ in width");
  if (levels.size[2] != BLOCK * linear->bits / 8)
    return refuse("Linear: the levels have another number of bits");
  if (scales.rank != 2 || scales.size[0] * scales.size[1] != rows * blocks)
    return refuse("Linear: there must be one scale for each block");
  if (scales.type != FLOAT && scales.type != FLOAT16)
    return refuse("Linear: the scales must be float or float16");
  if (zeros.data && (linear->bits != 4 || zeros.rank != 2 ||
                     zeros.size[0] * zeros.size[1] != rows * ((blocks + 1) / 2)))
    return refuse("Linear: there must be one zero for each block of 4 bits");
  *w = (LinearWork){.x = x.data, .inputs = inputs, .bits = linear->bits, .means = linear->means};
  w->multiply = w->bits == 4 ? kernels->multiply_a8_w4 : kernels->multiply_a8_w8;
  size_t scale_size = scales.type == FLOAT16 ? sizeof(float16) : sizeof(float);
  w->matrix = (Matrix){levels.data, scales.data, zeros.data, rows, blocks, scale_size};
  w->tokens.count = x.size[0] * x.size[1];
  w->tokens.pairs = (blocks + 1) / 2;
  w->tokens.padded = round_up(blocks, OVERREAD);
  size[0] = x.size[0], size[1] = x.size[1], size[2] = rows;
  return linear->has_slot ? read_slot(&linear->slot, context, 4, &x, size, &w->slot) : NULL;
}

/* Copies the rows past which the loops would read beyond the end of the matrix. */
static void copy_tail(LinearWork *w, uint8_t *room) {
  const Matrix *m = &w->matrix;
  size_t count = m->rows - w->safe, row = m->blocks * BLOCK * w->bits / 8;
  size_t row_zeros = (m->blocks + 1) / 2;
  size_t row_scales = m->blocks * m->scale_size;
  uint8_t *scales = room, *levels = scales + count * row_scales + OVERREAD * m->scale_size;
  uint8_t *zeros = levels + count * row + PAIR;
  memcpy(scales, m->scales + w->safe * row_scales, count * row_scales);
  memset(scales + count * row_scales, 0, OVERREAD * m->scale_size);
  memcpy(levels, m->levels + w->safe * row, count * row);
  if (m->zeros) memcpy(zeros, m->zeros + w->safe * row_zeros, count * row_zeros);
  w->tail = (Matrix){levels, scales, m->zeros ? zeros : NULL, count, m->blocks, m->scale_size};
}

static OrtStatus *linear_compute(void *kernel, OrtKernelContext *context) {
  LinearWork w;
  int64_t size[3];
  TRY(read_linear(kernel, context, &w, size));
  TRY(output(context, size, &w.y));
  if (!w.tokens.count || !w.matrix.rows) return NULL;
  size_t tail_rows = OVERREAD / w.matrix.blocks + 1;
  if (tail_rows > w.matrix.rows) tail_rows = w.matrix.rows;
  w.safe = w.matrix.rows - tail_rows;
  size_t numbers = w.tokens.count * w.tokens.pairs * PAIR;
  size_t scales = w.tokens.count * w.tokens.pairs * SPREAD * sizeof(float);
  size_t sums = w.tokens.count * w.tokens.padded * sizeof(float), hidden = hidden_bytes(&w.slot);
  size_t tail = (tail_rows * w.matrix.blocks + OVERREAD) * (BLOCK + 2 * sizeof(float)) + 2 * PAIR;
  uint8_t *room = malloc(CACHE_LINE + numbers + scales + sums + hidden + tail);
  if (!room) return no_memory();
  uint8_t *at = room + CACHE_LINE - (uintptr_t)room % CACHE_LINE;
  w.tokens.numbers = (int8_t *)at;
  w.tokens.scales = (float *)(at += numbers);
  w.tokens.sums = (float *)(at += scales);
  w.slot.hidden = (float *)(at += sums);
  copy_tail(&w, at + hidden);
  w.slot.y = w.y;
  w.share = round_up(w.safe / SHARES + 1, 32);
  OrtStatus *status = NULL;
  if (w.tokens.count >= MANY_TOKENS)
    status = KernelContext_ParallelFor(context, quantise_token, w.tokens.count, 0, &w);
  else
    for (size_t token = 0; token < w.tokens.count; token++) quantise_token(&w, token);
  size_t tasks = (w.safe + w.share - 1) / w.share + 1;
  if (!status) status = KernelContext_ParallelFor(context, multiply_rows, tasks, 0, &w);
  free(room);
  return status;
}

static OrtStatus *linear_create(const OrtCustomOp *op, OrtApi api, const OrtKernelInfo *info,
                                void **kernel) {
  (void)op, (void)api;
  Linear *linear = calloc(1, sizeof *linear);
  if (!linear) return no_memory();
  attribute(info, "bits", &linear->bits);
  attribute(info, "means", &linear->means);
  attribute(info, "slot", &linear->has_slot);
  OrtStatus *status = linear->has_slot ? read_slot_attributes(info, &linear->slot) : NULL;
  if (!status && linear->bits != 4 && linear->bits != 8)
    status = refuse("Linear: a matrix has 4 or 8 bits");
  if (!status && (linear->means & ~1 || linear->has_slot & ~1))
    status = refuse("Linear: means and slot are 0 or 1");
  if (status) free(linear);
  *kernel = status ? NULL : linear;
  return status;
}

/* ---- Registration ---- */

static const char *name(const OrtCustomOp *op) { return (void)op, "Linear"; }
static const char *provider(const OrtCustomOp *op) { return (void)op, "CPUExecutionProvider"; }
static size_t inputs(const OrtCustomOp *op) { return (void)op, 7; }
static size_t outputs(const OrtCustomOp *op) { return (void)op, 1; }
static int input_type(const OrtCustomOp *op, size_t i) {
  static const int types[] = {FLOAT, UINT8, ANY, UINT8, FLOAT16, INT64, FLOAT};
  return (void)op, types[i];
}
static int output_type(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, FLOAT; }
static int is_optional(const OrtCustomOp *op, size_t i) { return (void)op, i > 2; }
static int never(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, 0; }
static int none(const OrtCustomOp *op) { return (void)op, 0; }
static int start_version(const OrtCustomOp *op) { return (void)op, 1; }
static int end_version(const OrtCustomOp *op) { return (void)op, INT32_MAX; }
static size_t nowhere(int **inputs, int **outputs) { return (void)inputs, (void)outputs, 0; }
static void release(int *inputs, int *outputs) { (void)inputs, (void)outputs; }

static const OrtCustomOp linear_operator = {
    .version = API_VERSION,
    .GetName = name,
    .GetExecutionProviderType = provider,
    .GetInputType = input_type,
    .GetInputTypeCount = inputs,
    .GetOutputType = output_type,
    .GetOutputTypeCount = outputs,
    .KernelDestroy = free,
    .GetInputCharacteristic = is_optional,
    .GetOutputCharacteristic = never,
    .GetInputMemoryType = never,
    .GetVariadic = {none, none, none, none},
    .CreateKernelV2 = linear_create,
    .KernelComputeV2 = linear_compute,
    .GetStartVersion = start_version,
    .GetEndVersion = end_version,
    .GetMayInplace = nowhere,
    .ReleaseMayInplace = release,
    .GetAliasMap = nowhere,
    .ReleaseAliasMap = release,
};

/* The name of the kernels that sessions registered now run on, or NULL. The environment may ask for
 * some (see the tests). */
EXPORT const char *ChosenKernels(void) {
  const Kernels *chosen = choose_kernels(getenv("DLP_EDGE_OPERATORS"));
  return chosen ? chosen->name : NULL;
}

/* onnxruntime calls this when the library is registered with a session's options. */
EXPORT OrtStatus *RegisterCustomOps(void *options, const OrtApiBase *base) {
  void *domain;
  if (!base) return NULL; /* nobody to report to */
  OrtApi api = base->GetApi(API_VERSION);
  if (!api) { /* every onnxruntime has version 1 */
    api = base->GetApi(1);
    const char *why = "dlp_edge's operator needs onnxruntime 1.18 or later";
    return api ? CreateStatusOf(api)(FAIL, why) : NULL;
  }
  ort = api;
  kernels = choose_kernels(getenv("DLP_EDGE_OPERATORS"));
  if (!kernels) return refuse("this processor lacks the instructions of dlp_edge's kernels");
  TRY(CreateCustomOpDomain("dlp_edge", &domain));
  TRY(CustomOpDomain_Add(domain, &linear_operator));
  return AddCustomOpDomain(options, domain);
}
