/* The inner loops, on vectors of 8 floats. Included once for each instruction set (KIND), after its
 * `pairs.h`. A token's result is bit for bit the same whatever tokens are computed beside it: each sum
 * has its own vector, accumulated and reduced in the same order in every tile. */

/* ---- Linear */

/* One row times `tokens` tokens from the `first` on. `bits`, `size` (of a scale) and `tokens` are
 * compile-time constants. */
TARGET INLINE void NAME(row)(const Matrix *m, const int bits, const size_t size, size_t row,
                             const Tokens *x, size_t first, const int tokens, float *y,
                             size_t stride) {
  const uint8_t *levels = m->levels + row * m->blocks * (BLOCK * bits / 8);
  const uint8_t *scales = m->scales + row * m->blocks * size;
  const uint8_t *zeros = m->zeros ? m->zeros + row * ((m->blocks + 1) / 2) : NULL;
  const int8_t *numbers = x->numbers + first * x->pairs * PAIR;
  const float *token_scales = x->scales + first * x->pairs * SPREAD;
  const float *sums = x->sums + first * x->padded;
  f8 total[8];
  for (int t = 0; t < tokens; t++) total[t] = f8_zero();
  for (size_t pair = 0; pair < x->pairs; pair++, levels += PAIR * bits / 8, scales += 2 * size) {
    f8 scale = f8_two_scales(size, scales);
    for (int t = 0; t < tokens; t++) {
      size_t place = t * x->pairs + pair;
      f8 both = f8_mul(scale, f8_load(token_scales + place * SPREAD));
      total[t] = f8_fma(NAME(pair)(bits, levels, numbers + place * PAIR), both, total[t]);
    }
  }
  scales = m->scales + row * m->blocks * size;
  for (size_t block = 0; block < m->blocks; block += 8) {
    f8 zero = zeros ? f8_zeros(zeros + block / 2)
                        : f8_all(bits == 4 ? 8 : NAME(ZERO8));
    f8 offset = f8_mul(f8_eight_scales(size, scales + block * size), zero);
    for (int t = 0; t < tokens; t++)
      total[t] = f8_fnma(offset, f8_load(sums + t * x->padded + block), total[t]);
  }
  for (int t = 0; t < tokens; t++) y[t * stride] = f8_sum(total[t]);
}

TARGET INLINE void NAME(rows)(const Matrix *m, const int bits, const size_t size, size_t from,
                              size_t to, const Tokens *x, float *y, size_t stride) {
  size_t t = 0;
#define TILE(tokens)                                                              \
  for (; t + tokens <= x->count; t += tokens)                                     \
    for (size_t row = from; row < to; row++)                                      \
      NAME(row)(m, bits, size, row, x, t, tokens, y + t * stride + row, stride);
  TILE(8) TILE(4) TILE(2) TILE(1)
#undef TILE
}

#define MULTIPLY(bits)                                                                         \
  TARGET static void NAME(multiply_a8_w##bits)(const Matrix *m, size_t from, size_t to,        \
                                               const Tokens *x, float *y, size_t stride) {     \
    if (m->scale_size == sizeof(float16))                                                      \
      NAME(rows)(m, bits, sizeof(float16), from, to, x, y, stride);                            \
    else                                                                                       \
      NAME(rows)(m, bits, sizeof(float), from, to, x, y, stride);                              \
  }
MULTIPLY(4)
MULTIPLY(8)
#undef MULTIPLY

/* ---- The two products of a slot */

/* `rows` rows of A times `tokens` tokens. */
TARGET INLINE void NAME(square)(const int rows, const int tokens, const float *x, const float16 *a,
                                size_t inputs, float weight, float *hidden, size_t stride) {
  f8 total[4][4];
  for (int r = 0; r < rows; r++)
    for (int t = 0; t < tokens; t++) total[r][t] = f8_zero();
  size_t i = 0;
  for (; i + 8 <= inputs; i += 8)
    for (int r = 0; r < rows; r++)
      for (int t = 0; t < tokens; t++)
        total[r][t] = f8_fma(f8_widen(a + r * inputs + i),
                                      f8_load(x + t * inputs + i), total[r][t]);
  for (int r = 0; r < rows; r++)
    for (int t = 0; t < tokens; t++) {
      float sum = f8_sum(total[r][t]);
      for (size_t j = i; j < inputs; j++) 
        sum = __builtin_fmaf(f1_widen(a[r * inputs + j]), x[t * inputs + j], sum);
      hidden[t * stride + r] = weight * sum;
    }
}

TARGET static void NAME(down_f32_f16)(const float *x, size_t count, const float16 *a, size_t rows,
                              size_t inputs, float weight, float *hidden, size_t stride) {
  for (size_t t = 0, tokens; t < count; t += tokens) {
    tokens = count - t < 4 ? 1 : 4;
    for (size_t r = 0, some; r < rows; r += some) {
      some = rows - r < 4 ? 1 : 4;
      const float *from = x + t * inputs;
      const float16 *row = a + r * inputs;
      float *to = hidden + t * stride + r;
      if (some == 4 && tokens == 4)
        NAME(square)(4, 4, from, row, inputs, weight, to, stride);
      else if (some == 4)
        NAME(square)(4, 1, from, row, inputs, weight, to, stride);
      else if (tokens == 4)
        NAME(square)(1, 4, from, row, inputs, weight, to, stride);
      else
        NAME(square)(1, 1, from, row, inputs, weight, to, stride);
    }
  }
}

/* `vectors` vectors of columns of B times `tokens` tokens. */
TARGET INLINE void NAME(strip)(const int vectors, const int tokens, const float16 *adapters,
                               const Span *spans, size_t n, size_t max_rank, size_t columns,
                               size_t column, const float *hidden, size_t stride, float *y,
                               size_t y_stride) {
  f8 total[4][4];
  for (int t = 0; t < tokens; t++)
    for (int v = 0; v < vectors; v++) total[t][v] = f8_zero();
  for (size_t i = 0; i < n; i++)
    for (int64_t r = 0; r < spans[i].rank; r++) {
      const float16 *row = adapters + spans[i].b + r * columns + column;
      for (int t = 0; t < tokens; t++) {
        f8 factor = f8_all(hidden[t * stride + i * max_rank + r]);
        for (int v = 0; v < vectors; v++)
          total[t][v] = f8_fma(f8_widen(row + v * 8), factor, total[t][v]);
      }
    }
  for (int t = 0; t < tokens; t++)
    for (int v = 0; v < vectors; v++) {
      float *to = y + t * y_stride + v * 8;
      f8_store(to, f8_add(f8_load(to), total[t][v]));
    }
}

TARGET static void NAME(up_f32_f16)(const float16 *adapters, const Span *spans, size_t n, size_t max_rank,
                            size_t columns, size_t from, size_t to, const float *hidden,
                            size_t stride, size_t count, float *y, size_t y_stride) {
  for (size_t t = 0, tokens; t < count; t += tokens) {
    tokens = count - t < 4 ? 1 : 4;
    const float *factors = hidden + t * stride;
    size_t c = from;
#define STRIP(vectors, tokens)                                                              \
  for (; c + vectors * 8 <= to; c += vectors * 8)                                           \
    NAME(strip)(vectors, tokens, adapters, spans, n, max_rank, columns, c, factors, stride, \
                y + t * y_stride + c - from, y_stride);
    if (tokens == 4) {
      STRIP(2, 4) STRIP(1, 4)
    } else {
      STRIP(4, 1) STRIP(1, 1)
    }
#undef STRIP
    for (; c < to; c++)
      for (size_t token = 0; token < tokens; token++) {
        float sum = 0;
        for (size_t i = 0; i < n; i++)
          for (int64_t r = 0; r < spans[i].rank; r++)
            sum = __builtin_fmaf(f1_widen(adapters[spans[i].b + r * columns + c]),
                                 factors[token * stride + i * max_rank + r], sum);
        y[(t + token) * y_stride + c - from] += sum;
      }
  }
}

const Kernels NAME(kernels) = {
    .name = TEXT(KIND),
    .is_supported = NAME(has),
    .quantise_f32_a8 = quantise_f32_a8,
    .multiply_a8_w4 = NAME(multiply_a8_w4),
    .multiply_a8_w8 = NAME(multiply_a8_w8),
    .down_f32_f16 = NAME(down_f32_f16),
    .up_f32_f16 = NAME(up_f32_f16),
};

#undef KIND
#undef TARGET
