/* Two operators for onnxruntime on x86-64, of the domain `dlp_edge`; `runtime/native_graph.py` puts
 * them into a backbone's graph where this library could be built.
 *
 * Linear: x [B, S, K] times a matrix of 4 or 8 bits, whose bytes are read as the bundle has them:
 *   nothing is packed, so nothing is there twice. `means` says that the matrix has columns for
 *   the means of x's blocks behind those for x.
 * Slot: y [B, S, N] + (x A^T) B for each sequence's adapters. The rows of A and B are read where
 *   they lie among those of all adapters, so that another fusion is another few numbers.
 */
#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#include "onnxruntime.h"

#include "kernels.h"

#include "quantise.h"

#define KIND avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "loops.h"

#define VNNI
#define KIND vnni
#define TARGET __attribute__((target("avx2,fma,avx512vl,avx512vnni")))
#include "loops.h"

enum { LINE = 64 /* bytes of the processor's caches */ };
enum { SHARES = 16, TOKENS = 32, COLUMNS = 256, HIDDEN = 4, PARTS = 3, AXES = 4 };
enum { ALONE = 16384 }; /* multiplications of a slot that two threads would not do faster */

static Interface ort;
static const Kernels *kernels;

typedef struct {
  void *data;
  int64_t size[AXES]; /* 1 behind the last axis */
  size_t rank;
} Tensor;

static Status *describe(const Value *value, Tensor *tensor) {
  Shape *shape;
  Status *status = tensor_shape(value, &shape);
  if (status) return status;
  status = shape_rank(shape, &tensor->rank);
  for (size_t i = 0; i < AXES; i++) tensor->size[i] = 1;
  if (!status && tensor->rank <= AXES) status = shape_sizes(shape, tensor->size, tensor->rank);
  release_shape(shape);
  return status ? status : tensor_data((Value *)value, &tensor->data);
}

/* An input; one that is left out has no data and rank 0. */
static Status *input(const Context *context, size_t index, Tensor *tensor) {
  const Value *value = NULL;
  Status *status = context_input(context, index, &value);
  *tensor = (Tensor){0};
  return status || !value ? status : describe(value, tensor);
}

static Status *output(Context *context, const int64_t *size, float **data) {
  Value *value;
  Status *status = context_output(context, 0, size, 3, &value);
  return status ? status : tensor_data(value, (void **)data);
}

static Status *refuse(const char *why) { return create_status(INVALID_ARGUMENT, why); }
static Status *no_memory(void) { return create_status(FAIL, "Failed to allocate memory"); }

#define TRY(expression)                 \
  do {                                  \
    Status *status_ = (expression);     \
    if (status_) return status_;        \
  } while (0)

/* Where the attribute is left out, the number stays as it is. */
static void attribute(const KernelInfo *info, const char *name, int64_t *number) {
  Status *status = attribute_int(info, name, number);
  if (status) release_status(status);
}

static size_t round_up(size_t number, size_t step) { return (number + step - 1) / step * step; }

/* ---- Linear ---- */

typedef struct {
  int64_t bits, means;
} Linear;

typedef struct {
  const float *x;
  size_t inputs; /* K */
  int bits, means;
  Matrix matrix;
  Matrix last; /* the last rows once more, where loops may read on behind them */
  size_t safe; /* rows that are not among the last */
  size_t share; /* rows of a task */
  Tokens tokens;
  float *y;
} LinearWork;

static void quantise_token(void *work, size_t token) {
  const LinearWork *w = work;
  quantise(w->x + token * w->inputs, w->inputs, w->means, w->matrix.blocks, w->bits, &w->tokens,
           token);
}

static void multiply_rows(void *work, size_t task) {
  const LinearWork *w = work;
  size_t from = task * w->share, to = from + w->share, rows = w->matrix.rows;
  if (to > w->safe) to = w->safe;
  if (from < to)
    kernels->multiply(&w->matrix, w->bits, from, to, &w->tokens, w->y, rows);
  else
    kernels->multiply(&w->last, w->bits, 0, w->last.rows, &w->tokens, w->y + w->safe, rows);
}

/* Inputs of Linear: x, levels, scales, zeros. */
static Status *read_linear(const Linear *own, Context *context, LinearWork *w, int64_t size[3]) {
  Tensor x, levels, scales, zeros;
  TRY(input(context, 0, &x));
  TRY(input(context, 1, &levels));
  TRY(input(context, 2, &scales));
  TRY(input(context, 3, &zeros));
  int64_t rows = levels.size[0], blocks = levels.size[1];
  int64_t inputs = x.size[2], groups = (inputs + BLOCK - 1) / BLOCK;
  int64_t wanted = own->means ? groups + (groups + BLOCK - 1) / BLOCK : groups;
  int64_t halves = rows * ((blocks + 1) / 2);
  if (x.rank != 3 || levels.rank != 3) return refuse("Linear: x or levels has not three axes");
  if (blocks != wanted || (own->means && inputs % BLOCK))
    return refuse("Linear: the matrix has another width than x");
  if (levels.size[2] != BLOCK * own->bits / 8) return refuse("Linear: the levels have other bits");
  if (scales.rank > 2 || scales.size[0] * scales.size[1] != rows * blocks)
    return refuse("Linear: there is not one scale for each block");
  if (zeros.rank > 2 || (zeros.rank && (own->bits != 4 || zeros.size[0] * zeros.size[1] != halves)))
    return refuse("Linear: there is not one zero for each block");
  *w = (LinearWork){.x = x.data, .inputs = inputs, .bits = own->bits, .means = own->means};
  w->matrix = (Matrix){levels.data, scales.data, zeros.data, rows, blocks};
  w->tokens.count = x.size[0] * x.size[1];
  w->tokens.pairs = (blocks + 1) / 2;
  w->tokens.padded = round_up(blocks, OVERREAD);
  size[0] = x.size[0], size[1] = x.size[1], size[2] = rows;
  return NULL;
}

/* A copy of the rows behind which loops would read over the end of a matrix, with room. */
static void copy_last(LinearWork *w, uint8_t *room) {
  const Matrix *m = &w->matrix;
  size_t count = m->rows - w->safe, row = m->blocks * BLOCK * w->bits / 8, half = (m->blocks + 1) / 2;
  float *scales = (float *)room;
  uint8_t *levels = (uint8_t *)(scales + count * m->blocks + OVERREAD);
  uint8_t *zeros = levels + count * row + PAIR;
  memcpy(scales, m->scales + w->safe * m->blocks, count * m->blocks * sizeof *scales);
  memset(scales + count * m->blocks, 0, OVERREAD * sizeof *scales);
  memcpy(levels, m->levels + w->safe * row, count * row);
  if (m->zeros) memcpy(zeros, m->zeros + w->safe * half, count * half);
  w->last = (Matrix){levels, scales, m->zeros ? zeros : NULL, count, m->blocks};
}

static Status *linear_compute(void *kernel, Context *context) {
  LinearWork w;
  int64_t size[3];
  TRY(read_linear(kernel, context, &w, size));
  TRY(output(context, size, &w.y));
  if (!w.tokens.count || !w.matrix.rows) return NULL;
  size_t last = OVERREAD / w.matrix.blocks + 1;
  w.safe = w.matrix.rows > last ? w.matrix.rows - last : 0;
  last = w.matrix.rows - w.safe;
  size_t numbers = w.tokens.count * w.tokens.pairs * PAIR;
  size_t scales = w.tokens.count * w.tokens.pairs * SPREAD * sizeof(float);
  size_t sums = w.tokens.count * w.tokens.padded * sizeof(float);
  size_t spare = (last * w.matrix.blocks + OVERREAD) * (BLOCK + 2 * sizeof(float)) + 2 * PAIR;
  uint8_t *block = malloc(LINE + numbers + scales + sums + spare);
  if (!block) return no_memory();
  uint8_t *room = block + LINE - (uintptr_t)block % LINE;
  w.tokens.numbers = (int8_t *)room;
  w.tokens.scales = (float *)(room + numbers);
  w.tokens.sums = (float *)(room + numbers + scales);
  copy_last(&w, room + numbers + scales + sums);
  Status *status = NULL;
  if (w.tokens.count < 8)
    for (size_t token = 0; token < w.tokens.count; token++) quantise_token(&w, token);
  else
    status = parallel_for(context, quantise_token, w.tokens.count, 0, &w);
  w.share = w.safe / SHARES + 1;
  size_t tasks = (w.safe + w.share - 1) / w.share + 1;
  if (!status) status = parallel_for(context, multiply_rows, tasks, 0, &w);
  free(block);
  return status;
}

static Status *linear_create(const Operator *op, Interface api, const KernelInfo *info, void **kernel) {
  (void)op, (void)api;
  Linear *own = calloc(1, sizeof *own);
  if (!own) return no_memory();
  attribute(info, "bits", &own->bits);
  attribute(info, "means", &own->means);
  *kernel = own;
  if (own->bits == 4 || own->bits == 8) return NULL;
  free(own);
  return refuse("Linear: a matrix has 4 or 8 bits");
}

/* ---- Slot ---- */

typedef struct {
  int64_t first;          /* the slot's first part among all parts of all slots */
  int64_t starts[PARTS];  /* the column of y where each part begins */
  int64_t columns[PARTS]; /* and how many columns it has */
  size_t parts;
} Slot;

typedef struct {
  const Slot *own;
  const float *x, *adapters, *weights;
  const Span *spans; /* [B, all, n] */
  float *y, *hidden; /* [B, S, N], [B, S, parts, n, most] */
  size_t all, n, most, pieces; /* pieces: of HIDDEN rows, in `most` */
  size_t tokens, blocks;       /* S, and how often TOKENS fit into it */
  size_t inputs, y_stride, stride;
} SlotWork;

/* Tokens [first, first + count) of all, and the adapters that one part has for them. */
typedef struct {
  size_t part, first, count;
  const Span *spans;
  const float *weights;
} Place;

static Place place_of(const SlotWork *w, size_t group) {
  size_t part = group % w->own->parts, block = group / w->own->parts % w->blocks;
  size_t sequence = group / w->own->parts / w->blocks, from = block * TOKENS;
  size_t left = w->tokens - from, fusion = (sequence * w->all + w->own->first + part) * w->n;
  return (Place){part, sequence * w->tokens + from, left < TOKENS ? left : TOKENS,
                 w->spans + fusion, w->weights + fusion};
}

static void slot_down(void *work, size_t task) {
  const SlotWork *w = work;
  size_t from = task % w->pieces * HIDDEN, adapter = task / w->pieces % w->n;
  Place at = place_of(w, task / w->pieces / w->n);
  Span span = at.spans[adapter];
  if (from >= (size_t)span.rank) return;
  size_t left = span.rank - from, column = (at.part * w->n + adapter) * w->most + from;
  kernels->down(w->x + at.first * w->inputs, at.count,
                w->adapters + span.a + from * w->inputs, left < HIDDEN ? left : HIDDEN, w->inputs,
                at.weights[adapter], w->hidden + at.first * w->stride + column, w->stride);
}

static void slot_up(void *work, size_t task) {
  const SlotWork *w = work;
  size_t chunks = (w->y_stride + COLUMNS - 1) / COLUMNS, from = task % chunks * COLUMNS;
  Place at = place_of(w, task / chunks);
  size_t columns = w->own->columns[at.part], to = from + COLUMNS;
  if (from >= columns) return;
  kernels->up(w->adapters, at.spans, w->n, w->most, columns, from, to < columns ? to : columns,
              w->hidden + at.first * w->stride + at.part * w->n * w->most, w->stride, at.count,
              w->y + at.first * w->y_stride + w->own->starts[at.part] + from, w->y_stride);
}

/* Inputs of Slot: y, x, adapters [T], spans [B, all, n, 3], weights [B, all, n]. */
static Status *read_slot(const Slot *own, Context *context, SlotWork *w, Tensor *y) {
  Tensor x, adapters, spans, weights;
  TRY(input(context, 0, y));
  TRY(input(context, 1, &x));
  TRY(input(context, 2, &adapters));
  TRY(input(context, 3, &spans));
  TRY(input(context, 4, &weights));
  if (y->rank != 3 || x.rank != 3 || x.size[0] != y->size[0] || x.size[1] != y->size[1])
    return refuse("Slot: x and y are not of the same tokens");
  if (adapters.rank != 1 || spans.rank != 4 || spans.size[3] != 3 || weights.rank != 3 ||
      spans.size[0] != y->size[0] || memcmp(spans.size, weights.size, 3 * sizeof *spans.size) ||
      spans.size[1] < own->first + (int64_t)own->parts)
    return refuse("Slot: the fusions are not of these sequences and slots");
  *w = (SlotWork){.own = own, .x = x.data, .adapters = adapters.data, .spans = spans.data,
                  .weights = weights.data, .all = spans.size[1], .n = spans.size[2],
                  .tokens = y->size[1], .inputs = x.size[2], .y_stride = y->size[2]};
  w->blocks = (w->tokens + TOKENS - 1) / TOKENS;
  size_t groups = y->size[0] * w->blocks * own->parts;
  for (size_t group = 0; group < groups; group++) {
    Place at = place_of(w, group);
    int64_t columns = own->columns[at.part];
    if (own->starts[at.part] > y->size[2] - columns) return refuse("Slot: a part is not within y");
    for (size_t i = 0; i < w->n; i++) {
      Span span = at.spans[i];
      if (span.rank < 0 || span.a < 0 || span.b < 0 || span.rank > adapters.size[0] ||
          span.a > adapters.size[0] - span.rank * x.size[2] ||
          span.b > adapters.size[0] - span.rank * columns)
        return refuse("Slot: there are no such rows");
      if ((size_t)span.rank > w->most) w->most = span.rank;
    }
  }
  return NULL;
}

static Status *slot_compute(void *kernel, Context *context) {
  const Slot *own = kernel;
  SlotWork w;
  Tensor y;
  TRY(read_slot(own, context, &w, &y));
  TRY(output(context, y.size, &w.y));
  size_t sequences = y.size[0], count = sequences * w.tokens;
  if (w.y != y.data) memcpy(w.y, y.data, count * w.y_stride * sizeof *w.y);
  if (!w.most || !count) return NULL;
  w.pieces = (w.most + HIDDEN - 1) / HIDDEN;
  w.stride = own->parts * w.n * w.most;
  w.hidden = malloc(count * w.stride * sizeof *w.hidden);
  if (!w.hidden) return no_memory();
  size_t groups = sequences * w.blocks * own->parts;
  size_t downs = groups * w.n * w.pieces;
  size_t ups = groups * ((w.y_stride + COLUMNS - 1) / COLUMNS);
  Status *status = NULL;
  if (count * w.n * w.most * (w.inputs + w.y_stride) < ALONE) {
    for (size_t task = 0; task < downs; task++) slot_down(&w, task);
    for (size_t task = 0; task < ups; task++) slot_up(&w, task);
  } else {
    status = parallel_for(context, slot_down, downs, 0, &w);
    if (!status) status = parallel_for(context, slot_up, ups, 0, &w);
  }
  free(w.hidden);
  return status;
}

static Status *slot_create(const Operator *op, Interface api, const KernelInfo *info, void **kernel) {
  (void)op, (void)api;
  Slot *own = calloc(1, sizeof *own);
  if (!own) return no_memory();
  size_t count = own->parts = PARTS;
  attribute(info, "first", &own->first);
  Status *status = attribute_ints(info, "starts", own->starts, &own->parts);
  if (!status) status = attribute_ints(info, "columns", own->columns, &count);
  int fits = own->first >= 0 && count == own->parts;
  for (size_t part = 0; part < PARTS; part++)
    fits = fits && own->starts[part] >= 0 && own->columns[part] >= 0;
  if (!status && !fits) status = refuse("Slot: its attributes do not fit each other");
  if (status) free(own);
  *kernel = status ? NULL : own;
  return status;
}

/* ---- What onnxruntime asks about them ---- */

static const char *linear_name(const Operator *op) { return (void)op, "Linear"; }
static const char *slot_name(const Operator *op) { return (void)op, "Slot"; }
static const char *provider(const Operator *op) { return (void)op, "CPUExecutionProvider"; }
static size_t linear_inputs(const Operator *op) { return (void)op, 4; }
static size_t slot_inputs(const Operator *op) { return (void)op, 5; }
static size_t outputs(const Operator *op) { return (void)op, 1; }
static int linear_type(const Operator *op, size_t i) { return (void)op, i % 2 ? UINT8 : FLOAT; }
static int slot_type(const Operator *op, size_t i) { return (void)op, i == 3 ? INT64 : FLOAT; }
static int output_type(const Operator *op, size_t i) { return (void)op, (void)i, FLOAT; }
static int linear_optional(const Operator *op, size_t i) { return (void)op, i > 2; }
static int never(const Operator *op, size_t i) { return (void)op, (void)i, 0; }
static int none(const Operator *op) { return (void)op, 0; }
static int first_version(const Operator *op) { return (void)op, 1; }
static int last_version(const Operator *op) { return (void)op, INT32_MAX; }
static size_t nowhere(int **inputs, int **outputs) { return (void)inputs, (void)outputs, 0; }

/* A slot may write over y. */
static size_t over_first(int **inputs, int **outputs) {
  *inputs = calloc(1, sizeof **inputs);
  *outputs = calloc(1, sizeof **outputs);
  return *inputs && *outputs;
}
static void release(int *inputs, int *outputs) { free(inputs), free(outputs); }

#define slot_optional never
#define OPERATOR(kind, place)                                                                    \
  {                                                                                              \
    .version = INTERFACE_VERSION, .name = kind##_name, .provider = provider,                     \
    .input_type = kind##_type, .input_count = kind##_inputs, .output_type = output_type,         \
    .output_count = outputs, .destroy = free, .input_is_optional = kind##_optional,              \
    .output_is_optional = never, .input_memory = never, .variadic = {none, none, none, none},    \
    .create = kind##_create, .compute = kind##_compute, .first_version = first_version,          \
    .last_version = last_version, .in_place = place, .release_in_place = release,                \
    .aliases = nowhere, .release_aliases = release                                               \
  }
static const Operator operators[] = {OPERATOR(linear, nowhere), OPERATOR(slot, over_first)};

/* The best that the processor has, or what the environment asks for (see the tests). */
static Status *choose_kernels(void) {
  const char *asked = getenv("DLP_EDGE_OPERATORS");
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
    return refuse("dlp_edge's operators need a processor with AVX2");
  int vnni = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl");
  kernels = vnni && !(asked && !strcmp(asked, "avx2")) ? &kernels_vnni : &kernels_avx2;
  return NULL;
}

/* Called by onnxruntime when the library is registered with the options of a session. */
#ifdef _WIN32
__declspec(dllexport)
#endif
Status *RegisterCustomOps(void *options, const InterfaceBase *base) {
  void *domain;
  ort = base->get(INTERFACE_VERSION);
  TRY(choose_kernels());
  TRY(create_domain("dlp_edge", &domain));
  for (size_t i = 0; i < sizeof operators / sizeof *operators; i++)
    TRY(add_to_domain(domain, &operators[i]));
  return add_domain(options, domain);
}

/* setuptools builds this as a module of Python's and exports its beginning, on Windows by name;
 * nobody imports it. */
void *PyInit__operators(void) { return NULL; }
