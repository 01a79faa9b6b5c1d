/* The loops, in terms of one processor's vectors; included once for each. What is computed for a
 * token is the same bit for bit whatever tokens are computed beside it: each sum has its own
 * vector, filled and added up in the same order in every tile. */
#define JOIN2(name, kind) name##_##kind
#define JOIN(name, kind) JOIN2(name, kind)
#define NAME(name) JOIN(name, KIND)

enum { NAME(TILE) = 8 }; /* tokens that are multiplied at once */

/* Rows of `bits` bits times `tokens` tokens, both known to the compiler. */
TARGET INLINE void NAME(tile)(const Matrix *m, const int bits, size_t row, const Tokens *x,
                              size_t first, const int tokens, float *y, size_t stride) {
  const uint8_t *levels = m->levels + row * m->blocks * (BLOCK * bits / 8);
  const float *scales = m->scales + row * m->blocks;
  const uint8_t *zeros = m->zeros ? m->zeros + row * ((m->blocks + 1) / 2) : NULL;
  const int8_t *numbers = x->numbers + first * x->pairs * PAIR;
  const float *token_scales = x->scales + first * x->pairs * SPREAD;
  const float *sums = x->sums + first * x->padded;
  VECTOR total[NAME(TILE)];
  for (int t = 0; t < tokens; t++) total[t] = SET(0);
  for (size_t pair = 0; pair < x->pairs; pair++, levels += PAIR * bits / 8) {
    const float *two = scales + 2 * pair;
    VECTOR scale = bits == 4 ? NAME(spread4)(two) : NAME(spread8)(two);
    for (int t = 0; t < tokens; t++) {
      size_t place = t * x->pairs + pair;
      const float *own = token_scales + place * SPREAD;
      VECTOR dot = bits == 4 ? NAME(dot4)(levels, numbers + place * PAIR)
                             : NAME(dot8)(levels, numbers + place * PAIR);
      VECTOR both = MULTIPLY(scale, bits == 4 ? NAME(scales4)(own) : NAME(scales8)(own));
      total[t] = FMA(dot, both, total[t]);
    }
  }
  const float constant = bits == 4 ? 8 : NAME(ZERO8);
  for (size_t block = 0; block < m->blocks; block += WIDTH) {
    VECTOR zero = zeros ? NAME(zeros)(zeros + block / 2) : SET(constant);
    VECTOR offset = MULTIPLY(LOAD(scales + block), zero);
    for (int t = 0; t < tokens; t++)
      total[t] = FNMA(offset, LOAD(sums + t * x->padded + block), total[t]);
  }
  for (int t = 0; t < tokens; t++) y[t * stride] = NAME(sum)(total[t]);
}

TARGET INLINE void NAME(rows)(const Matrix *m, const int bits, size_t from, size_t to,
                              const Tokens *x, size_t first, size_t count, float *y,
                              size_t stride) {
  size_t t = 0;
  for (; t + NAME(TILE) <= count; t += NAME(TILE))
    for (size_t row = from; row < to; row++)
      NAME(tile)(m, bits, row, x, first + t, NAME(TILE), y + t * stride + row, stride);
  for (; t < count; t++)
    for (size_t row = from; row < to; row++)
      NAME(tile)(m, bits, row, x, first + t, 1, y + t * stride + row, stride);
}

TARGET static void NAME(multiply)(const Matrix *m, int bits, size_t from, size_t to,
                                  const Tokens *x, size_t first, size_t count, float *y,
                                  size_t stride) {
  if (bits == 4)
    NAME(rows)(m, 4, from, to, x, first, count, y, stride);
  else
    NAME(rows)(m, 8, from, to, x, first, count, y, stride);
}

/* `rows` rows of A times `tokens` tokens. */
TARGET INLINE void NAME(square)(const int rows, const int tokens, const float *x, size_t x_stride,
                                const float *a, size_t inputs, float weight, float *hidden,
                                size_t stride) {
  VECTOR total[4][4];
  for (int r = 0; r < rows; r++)
    for (int t = 0; t < tokens; t++) total[r][t] = SET(0);
  size_t i = 0;
  for (; i + WIDTH <= inputs; i += WIDTH)
    for (int r = 0; r < rows; r++)
      for (int t = 0; t < tokens; t++)
        total[r][t] = FMA(LOAD(a + r * inputs + i), LOAD(x + t * x_stride + i), total[r][t]);
  for (int r = 0; r < rows; r++)
    for (int t = 0; t < tokens; t++) {
      float sum = NAME(sum)(total[r][t]);
      for (size_t j = i; j < inputs; j++) sum += a[r * inputs + j] * x[t * x_stride + j];
      hidden[t * stride + r] = weight * sum;
    }
}

TARGET static void NAME(down)(const float *x, size_t x_stride, size_t count, const float *a,
                              size_t rows, size_t inputs, float weight, float *hidden,
                              size_t stride) {
  for (size_t t = 0, tokens; t < count; t += tokens, x += tokens * x_stride) {
    tokens = count - t < 4 ? 1 : 4;
    for (size_t r = 0, some; r < rows; r += some) {
      some = rows - r < 4 ? 1 : 4;
      float *to = hidden + t * stride + r;
      if (some == 4 && tokens == 4)
        NAME(square)(4, 4, x, x_stride, a + r * inputs, inputs, weight, to, stride);
      else if (some == 4)
        NAME(square)(4, 1, x, x_stride, a + r * inputs, inputs, weight, to, stride);
      else if (tokens == 4)
        NAME(square)(1, 4, x, x_stride, a + r * inputs, inputs, weight, to, stride);
      else
        NAME(square)(1, 1, x, x_stride, a + r * inputs, inputs, weight, to, stride);
    }
  }
}

/* `vectors` vectors of columns for `tokens` tokens. */
TARGET INLINE void NAME(strip)(const int vectors, const int tokens, const float *adapters,
                               const Span *spans, size_t n, size_t most, size_t columns,
                               size_t column, const float *hidden, size_t stride, float *y,
                               size_t y_stride) {
  VECTOR total[4][4];
  for (int t = 0; t < tokens; t++)
    for (int v = 0; v < vectors; v++) total[t][v] = SET(0);
  for (size_t i = 0; i < n; i++)
    for (int64_t r = 0; r < spans[i].rank; r++) {
      const float *row = adapters + spans[i].b + r * columns + column;
      for (int t = 0; t < tokens; t++) {
        VECTOR factor = SET(hidden[t * stride + i * most + r]);
        for (int v = 0; v < vectors; v++)
          total[t][v] = FMA(LOAD(row + v * WIDTH), factor, total[t][v]);
      }
    }
  for (int t = 0; t < tokens; t++)
    for (int v = 0; v < vectors; v++) {
      float *to = y + t * y_stride + v * WIDTH;
      STORE(to, ADD(LOAD(to), total[t][v]));
    }
}

TARGET static void NAME(up)(const float *adapters, const Span *spans, size_t n, size_t most,
                            size_t columns, size_t from, size_t to, const float *hidden,
                            size_t stride, size_t count, float *y, size_t y_stride) {
  for (size_t t = 0, tokens; t < count; t += tokens) {
    tokens = count - t < 4 ? 1 : 4;
    const float *own = hidden + t * stride;
    size_t c = from;
#define STRIP(vectors, tokens)                                                              \
  for (; c + vectors * WIDTH <= to; c += vectors * WIDTH)                                   \
    NAME(strip)(vectors, tokens, adapters, spans, n, most, columns, c, own, stride,         \
                y + t * y_stride + c - from, y_stride);
    if (tokens == 4) {
      STRIP(4, 4) STRIP(1, 4)
    } else {
      STRIP(4, 1) STRIP(1, 1)
    }
#undef STRIP
    for (; c < to; c++)
      for (size_t token = 0; token < tokens; token++) {
        float sum = 0;
        for (size_t i = 0; i < n; i++)
          for (int64_t r = 0; r < spans[i].rank; r++)
            sum += adapters[spans[i].b + r * columns + c] * own[token * stride + i * most + r];
        y[(t + token) * y_stride + c - from] += sum;
      }
  }
}

static const Kernels NAME(kernels) = {NAME(multiply), NAME(down), NAME(up)};

#undef JOIN2
#undef JOIN
#undef NAME
#undef KIND
#undef TARGET
#undef WIDTH
#undef VECTOR
#undef LOAD
#undef STORE
#undef SET
#undef ADD
#undef MULTIPLY
#undef FMA
#undef FNMA
