/* An operator for onnxruntime on x86-64, of the domain `dlp_edge`; `runtime/engine/operator_graph.py` puts it
 * into a backbone's graph where this library could be built.
 *
 * Linear: x [B, S, K] times a matrix of 4 or 8 bits, whose bytes are read as the bundle has them:
 *   nothing is packed, so nothing is there twice. `means` says that the matrix has columns for
 *   the means of x's blocks behind those for x. It may have a slot, which adds (x A^T) B for each
 *   sequence's adapters: the rows of A and B are read where they lie among those of all adapters,
 *   so that another fusion is another few numbers.
 */
#include <immintrin.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "onnxruntime.h"

#include "kernels.h"

#include "quantise.h"

#define KIND avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#include "loops.h"

#define VNNI
#define KIND vnni
#define TARGET __attribute__((target("avx2,fma,f16c,avx512vl,avx512vnni")))
#include "loops.h"

enum { LINE = 64 /* bytes of the processor's caches */ };
enum { SHARES = 8, TOKENS = 32, HIDDEN = 4, MANY = 8, PARTS = 3, AXES = 4 };

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

/* An input; one that is left out has no data. */
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

/* ---- Slot ---- */

typedef struct {
  int64_t first;          /* the slot's first part among all parts of all slots */
  int64_t starts[PARTS];  /* the column of y where each part begins */
  int64_t columns[PARTS]; /* and how many columns it has */
  size_t parts;
} Slot;

typedef struct {
  const Slot *own;
  const float *x, *weights;
  const half *adapters;
  const Span *spans; /* [B, all, n] */
  float *y, *hidden; /* [B, S, N], [B, S, parts, n, most] */
  size_t all, n, most, pieces;       /* pieces: of HIDDEN rows, in `most` */
  size_t sequences, tokens, blocks;  /* B, S, and how often TOKENS fit into S */
  size_t inputs, outputs, stride;    /* K, N, and the width of hidden */
  size_t downs;                      /* tasks of slot_down */
} SlotWork;

/* Where the adapters of a sequence's part lie among spans and weights. */
static size_t fusion_of(const SlotWork *w, size_t sequence, size_t part) {
  return (sequence * w->all + w->own->first + part) * w->n;
}

/* Inputs of a slot: adapters [T], spans [B, all, n, 3], weights [B, all, n], from `index` on. */
static Status *read_slot(const Slot *own, Context *context, size_t index, const Tensor *x,
                         const int64_t size[3], SlotWork *w) {
  Tensor adapters, spans, weights;
  TRY(input(context, index, &adapters));
  TRY(input(context, index + 1, &spans));
  TRY(input(context, index + 2, &weights));
  if (adapters.rank != 1 || spans.rank != 4 || spans.size[3] != 3 || weights.rank != 3 ||
      spans.size[0] != size[0] || memcmp(spans.size, weights.size, 3 * sizeof *spans.size) ||
      spans.size[1] < own->first + (int64_t)own->parts)
    return refuse("Slot: the fusions are not of these sequences and slots");
  *w = (SlotWork){.own = own, .x = x->data, .adapters = adapters.data, .spans = spans.data,
                  .weights = weights.data, .all = spans.size[1], .n = spans.size[2],
                  .sequences = size[0], .tokens = size[1], .inputs = x->size[2],
                  .outputs = size[2]};
  w->blocks = (w->tokens + TOKENS - 1) / TOKENS;
  for (size_t part = 0; part < own->parts; part++) {
    int64_t columns = own->columns[part], all = adapters.size[0];
    if (own->starts[part] > size[2] - columns) return refuse("Slot: a part is not within y");
    for (size_t i = 0; i < w->sequences * w->n; i++) {
      Span span = w->spans[fusion_of(w, i / w->n, part) + i % w->n];
      if (span.rank < 0 || span.a < 0 || span.b < 0 || span.rank > all ||
          span.a > all - span.rank * x->size[2] || span.b > all - span.rank * columns)
        return refuse("Slot: there are no such rows");
      if ((size_t)span.rank > w->most) w->most = span.rank;
    }
  }
  w->pieces = (w->most + HIDDEN - 1) / HIDDEN;
  w->downs = w->sequences * w->blocks * own->parts * w->n * w->pieces;
  w->stride = own->parts * w->n * w->most;
  return NULL;
}

static size_t hidden_bytes(const SlotWork *w) {
  return w->sequences * w->tokens * w->stride * sizeof(float);
}

/* hidden = x A^T, weighed: some rows of one adapter's A for some tokens. */
static void slot_down(void *work, size_t task) {
  const SlotWork *w = work;
  size_t from = task % w->pieces * HIDDEN, adapter = task / w->pieces % w->n;
  task /= w->pieces * w->n;
  size_t part = task % w->own->parts, block = task / w->own->parts % w->blocks * TOKENS;
  size_t sequence = task / w->own->parts / w->blocks, at = fusion_of(w, sequence, part) + adapter;
  Span span = w->spans[at];
  if (from >= (size_t)span.rank) return;
  size_t rows = span.rank - from, tokens = w->tokens - block, first = sequence * w->tokens + block;
  size_t column = (part * w->n + adapter) * w->most + from;
  kernels->down(w->x + first * w->inputs, tokens < TOKENS ? tokens : TOKENS,
                w->adapters + span.a + from * w->inputs, rows < HIDDEN ? rows : HIDDEN, w->inputs,
                w->weights[at], w->hidden + first * w->stride + column, w->stride);
}

/* y += hidden B for the columns [from, to) of y. */
static void slot_up(const SlotWork *w, size_t from, size_t to) {
  for (size_t part = 0; part < w->own->parts; part++) {
    size_t start = w->own->starts[part], stop = start + w->own->columns[part];
    size_t low = from > start ? from : start, high = to < stop ? to : stop;
    for (size_t sequence = 0; low < high && sequence < w->sequences; sequence++)
      kernels->up(w->adapters, w->spans + fusion_of(w, sequence, part), w->n, w->most,
                  w->own->columns[part], low - start, high - start,
                  w->hidden + sequence * w->tokens * w->stride + part * w->n * w->most, w->stride,
                  w->tokens, w->y + sequence * w->tokens * w->outputs + low, w->outputs);
  }
}

static Status *read_slot_attributes(const KernelInfo *info, Slot *own) {
  size_t count = own->parts = PARTS;
  attribute(info, "first", &own->first);
  TRY(attribute_ints(info, "starts", own->starts, &own->parts));
  TRY(attribute_ints(info, "columns", own->columns, &count));
  int fits = own->first >= 0 && count == own->parts;
  for (size_t part = 0; part < PARTS; part++)
    fits = fits && own->starts[part] >= 0 && own->columns[part] >= 0;
  return fits ? NULL : refuse("Slot: its attributes do not fit each other");
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
  Matrix matrix;
  Matrix last;  /* the last rows once more, where loops may read on behind them */
  size_t safe;  /* rows that are not among the last */
  size_t share; /* rows of a task */
  Tokens tokens;
  float *y;
  SlotWork slot;
  atomic_size_t claimed, done; /* tasks of slot_down */
} LinearWork;

static void quantise_token(void *work, size_t token) {
  const LinearWork *w = work;
  quantise(w->x + token * w->inputs, w->inputs, w->means, w->matrix.blocks, w->bits, &w->tokens,
           token);
}

/* Some rows of the matrix, which are columns of y, and what the slot adds to these. The slot's first
 * half is done on the way, by whoever comes first: a second round of all threads would take longer
 * than a small slot does. Nobody waits for work that nobody has begun. */
static void multiply_rows(void *work, size_t task) {
  LinearWork *w = work;
  size_t from = task * w->share, to = from + w->share, rows = w->matrix.rows, down;
  while ((down = atomic_fetch_add(&w->claimed, 1)) < w->slot.downs) {
    slot_down(&w->slot, down);
    atomic_fetch_add_explicit(&w->done, 1, memory_order_release);
  }
  if (to > w->safe) to = w->safe;
  if (from < to) {
    kernels->multiply(&w->matrix, w->bits, from, to, &w->tokens, w->y, rows);
  } else {
    from = w->safe, to = rows;
    kernels->multiply(&w->last, w->bits, 0, w->last.rows, &w->tokens, w->y + from, rows);
  }
  if (!w->slot.most) return;
  while (atomic_load_explicit(&w->done, memory_order_acquire) < w->slot.downs) _mm_pause();
  slot_up(&w->slot, from, to);
}

/* Inputs of Linear: x, levels, scales, zeros, and those of read_slot if it has one. */
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
  if (!inputs || blocks != wanted || (own->means && inputs % BLOCK))
    return refuse("Linear: the matrix has another width than x");
  if (levels.size[2] != BLOCK * own->bits / 8) return refuse("Linear: the levels have other bits");
  if (scales.rank != 2 || scales.size[0] * scales.size[1] != rows * blocks)
    return refuse("Linear: there is not one scale for each block");
  if (zeros.data &&
      (own->bits != 4 || zeros.rank != 2 || zeros.size[0] * zeros.size[1] != halves))
    return refuse("Linear: there is not one zero for each block");
  *w = (LinearWork){.x = x.data, .inputs = inputs, .bits = own->bits, .means = own->means};
  w->matrix = (Matrix){levels.data, scales.data, zeros.data, rows, blocks};
  w->tokens.count = x.size[0] * x.size[1];
  w->tokens.pairs = (blocks + 1) / 2;
  w->tokens.padded = round_up(blocks, OVERREAD);
  size[0] = x.size[0], size[1] = x.size[1], size[2] = rows;
  return own->has_slot ? read_slot(&own->slot, context, 4, &x, size, &w->slot) : NULL;
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
  size_t sums = w.tokens.count * w.tokens.padded * sizeof(float), hidden = hidden_bytes(&w.slot);
  size_t spare = (last * w.matrix.blocks + OVERREAD) * (BLOCK + 2 * sizeof(float)) + 2 * PAIR;
  uint8_t *room = malloc(LINE + numbers + scales + sums + hidden + spare);
  if (!room) return no_memory();
  uint8_t *at = room + LINE - (uintptr_t)room % LINE;
  w.tokens.numbers = (int8_t *)at;
  w.tokens.scales = (float *)(at += numbers);
  w.tokens.sums = (float *)(at += scales);
  w.slot.hidden = (float *)(at += sums);
  copy_last(&w, at + hidden);
  w.slot.y = w.y;
  w.share = round_up(w.safe / SHARES + 1, 32);
  Status *status = NULL;
  if (w.tokens.count >= MANY)
    status = parallel_for(context, quantise_token, w.tokens.count, 0, &w);
  else
    for (size_t token = 0; token < w.tokens.count; token++) quantise_token(&w, token);
  size_t tasks = (w.safe + w.share - 1) / w.share + 1;
  if (!status) status = parallel_for(context, multiply_rows, tasks, 0, &w);
  free(room);
  return status;
}

static Status *linear_create(const Operator *op, Interface api, const KernelInfo *info, void **kernel) {
  (void)op, (void)api;
  Linear *own = calloc(1, sizeof *own);
  if (!own) return no_memory();
  attribute(info, "bits", &own->bits);
  attribute(info, "means", &own->means);
  attribute(info, "slot", &own->has_slot);
  Status *status = own->has_slot ? read_slot_attributes(info, &own->slot) : NULL;
  if (!status && own->bits != 4 && own->bits != 8) status = refuse("Linear: a matrix has 4 or 8 bits");
  if (status) free(own);
  *kernel = status ? NULL : own;
  return status;
}

/* ---- What onnxruntime asks about it ---- */

static const char *name(const Operator *op) { return (void)op, "Linear"; }
static const char *provider(const Operator *op) { return (void)op, "CPUExecutionProvider"; }
static size_t inputs(const Operator *op) { return (void)op, 7; }
static size_t outputs(const Operator *op) { return (void)op, 1; }
static int input_type(const Operator *op, size_t i) {
  static const int types[] = {FLOAT, UINT8, FLOAT, UINT8, FLOAT16, INT64, FLOAT};
  return (void)op, types[i];
}
static int output_type(const Operator *op, size_t i) { return (void)op, (void)i, FLOAT; }
static int is_optional(const Operator *op, size_t i) { return (void)op, i > 2; }
static int never(const Operator *op, size_t i) { return (void)op, (void)i, 0; }
static int none(const Operator *op) { return (void)op, 0; }
static int first_version(const Operator *op) { return (void)op, 1; }
static int last_version(const Operator *op) { return (void)op, INT32_MAX; }
static size_t nowhere(int **inputs, int **outputs) { return (void)inputs, (void)outputs, 0; }
static void release(int *inputs, int *outputs) { (void)inputs, (void)outputs; }

static const Operator linear = {
    .version = INTERFACE_VERSION,
    .name = name,
    .provider = provider,
    .input_type = input_type,
    .input_count = inputs,
    .output_type = output_type,
    .output_count = outputs,
    .destroy = free,
    .input_is_optional = is_optional,
    .output_is_optional = never,
    .input_memory = never,
    .variadic = {none, none, none, none},
    .create = linear_create,
    .compute = linear_compute,
    .first_version = first_version,
    .last_version = last_version,
    .in_place = nowhere,
    .release_in_place = release,
    .aliases = nowhere,
    .release_aliases = release,
};

/* The best that the processor has, or what the environment asks for (see the tests). */
static Status *choose_kernels(void) {
  const char *asked = getenv("DLP_EDGE_OPERATORS");
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
    return refuse("dlp_edge's operator needs a processor with AVX2");
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
  TRY(add_to_domain(domain, &linear));
  return add_domain(options, domain);
}

/* setuptools builds this as a module of Python's and exports its beginning, on Windows by name;
 * nobody imports it. */
void *PyInit__operators(void) { return NULL; }
