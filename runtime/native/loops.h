/* The inner loops, on vectors of 8 floats. Included once for each instruction set (KIND): `avx2`,
 * and `vnni`, which multiplies and adds bytes in one instruction. A token's result is bit for bit the
 * same whatever tokens are computed beside it: each sum has its own vector, accumulated and reduced
 * in the same order in every tile. */
#define JOIN2(name, kind) name##_##kind
#define JOIN(name, kind) JOIN2(name, kind)
#define NAME(name) JOIN(name, KIND)

TARGET INLINE float NAME(sum)(__m256 v) {
  __m128 lanes = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  lanes = _mm_add_ps(lanes, _mm_movehl_ps(lanes, lanes));
  return _mm_cvtss_f32(_mm_add_ss(lanes, _mm_movehdup_ps(lanes)));
}

/* ---- A pair of the matrix's blocks times the token's; lanes 0 to 3 are the first block's. */

#ifdef VNNI
enum { NAME(ZERO8) = 128 };

TARGET INLINE __m256i NAME(block8)(__m256i levels, __m256i x) {
  return _mm256_dpbusd_epi32(_mm256_setzero_si256(), levels, x);
}
TARGET INLINE __m256i NAME(pair4)(__m256i even, __m256i odd, __m256i x, __m256i y) {
  return _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(_mm256_setzero_si256(), even, x), odd, y);
}
#else
enum { NAME(ZERO8) = 0 };

/* The levels are shifted by 128, so that the sum of two products fits 16 bits. */
TARGET INLINE __m256i NAME(block8)(__m256i levels, __m256i x) {
  __m256i number = _mm256_xor_si256(levels, _mm256_set1_epi8((char)128));
  __m256i two = _mm256_maddubs_epi16(_mm256_abs_epi8(number), _mm256_sign_epi8(x, number));
  return _mm256_madd_epi16(two, _mm256_set1_epi16(1));
}
TARGET INLINE __m256i NAME(pair4)(__m256i even, __m256i odd, __m256i x, __m256i y) {
  __m256i two = _mm256_add_epi16(_mm256_maddubs_epi16(even, x), _mm256_maddubs_epi16(odd, y));
  return _mm256_madd_epi16(two, _mm256_set1_epi16(1));
}
#endif

TARGET INLINE __m256 NAME(pair)(const int bits, const uint8_t *levels, const int8_t *x) {
  const __m256i *from = (const __m256i *)levels, *with = (const __m256i *)x;
  __m256i packed = _mm256_loadu_si256(from);
  __m256i x0 = _mm256_loadu_si256(with), x1 = _mm256_loadu_si256(with + 1);
  if (bits == 4) {
    const __m256i low = _mm256_set1_epi8(15);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low);
    return _mm256_cvtepi32_ps(NAME(pair4)(_mm256_and_si256(packed, low), odd, x0, x1));
  }
  __m256i a = NAME(block8)(packed, x0), b = NAME(block8)(_mm256_loadu_si256(from + 1), x1);
  return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20),
                                             _mm256_permute2x128_si256(a, b, 0x31)));
}

/* The zero points of 8 blocks, from 4 bytes. */
TARGET INLINE __m256 NAME(zeros)(const uint8_t *zeros) {
  __m128i bytes = _mm_loadu_si32(zeros), low = _mm_set1_epi8(15);
  __m128i even = _mm_and_si128(bytes, low);
  __m128i odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), low);
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd)));
}

/* The scales of two blocks, each in four lanes, and those of 8 blocks. */
TARGET INLINE __m256 NAME(two_scales)(const size_t size, const uint8_t *scales) {
  const __m256i spread = _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0);
  __m128 two = size == sizeof(float16) ? _mm_cvtph_ps(_mm_loadu_si32(scales))
                                       : _mm_castsi128_ps(_mm_loadu_si64(scales));
  return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(two), spread);
}
TARGET INLINE __m256 NAME(eight_scales)(const size_t size, const uint8_t *scales) {
  return size == sizeof(float16) ? _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)scales))
                                 : _mm256_loadu_ps((const float *)scales);
}

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
  __m256 total[8];
  for (int t = 0; t < tokens; t++) total[t] = _mm256_setzero_ps();
  for (size_t pair = 0; pair < x->pairs; pair++, levels += PAIR * bits / 8, scales += 2 * size) {
    __m256 scale = NAME(two_scales)(size, scales);
    for (int t = 0; t < tokens; t++) {
      size_t place = t * x->pairs + pair;
      __m256 both = _mm256_mul_ps(scale, _mm256_loadu_ps(token_scales + place * SPREAD));
      total[t] = _mm256_fmadd_ps(NAME(pair)(bits, levels, numbers + place * PAIR), both, total[t]);
    }
  }
  scales = m->scales + row * m->blocks * size;
  for (size_t block = 0; block < m->blocks; block += 8) {
    __m256 zero = zeros ? NAME(zeros)(zeros + block / 2)
                        : _mm256_set1_ps(bits == 4 ? 8 : NAME(ZERO8));
    __m256 offset = _mm256_mul_ps(NAME(eight_scales)(size, scales + block * size), zero);
    for (int t = 0; t < tokens; t++)
      total[t] = _mm256_fnmadd_ps(offset, _mm256_loadu_ps(sums + t * x->padded + block), total[t]);
  }
  for (int t = 0; t < tokens; t++) y[t * stride] = NAME(sum)(total[t]);
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

TARGET static void NAME(multiply)(const Matrix *m, int bits, size_t from, size_t to,
                                  const Tokens *x, float *y, size_t stride) {
  const size_t single = sizeof(float), half = sizeof(float16);
  if (bits == 4 && m->scale_size == half)
    NAME(rows)(m, 4, half, from, to, x, y, stride);
  else if (bits == 4)
    NAME(rows)(m, 4, single, from, to, x, y, stride);
  else if (m->scale_size == half)
    NAME(rows)(m, 8, half, from, to, x, y, stride);
  else
    NAME(rows)(m, 8, single, from, to, x, y, stride);
}

/* ---- The two products of a slot */

TARGET INLINE __m256 NAME(widen)(const float16 *from) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
}

/* `rows` rows of A times `tokens` tokens. */
TARGET INLINE void NAME(square)(const int rows, const int tokens, const float *x, const float16 *a,
                                size_t inputs, float weight, float *hidden, size_t stride) {
  __m256 total[4][4];
  for (int r = 0; r < rows; r++)
    for (int t = 0; t < tokens; t++) total[r][t] = _mm256_setzero_ps();
  size_t i = 0;
  for (; i + 8 <= inputs; i += 8)
    for (int r = 0; r < rows; r++)
      for (int t = 0; t < tokens; t++)
        total[r][t] = _mm256_fmadd_ps(NAME(widen)(a + r * inputs + i),
                                      _mm256_loadu_ps(x + t * inputs + i), total[r][t]);
  for (int r = 0; r < rows; r++)
    for (int t = 0; t < tokens; t++) {
      float sum = NAME(sum)(total[r][t]);
      for (size_t j = i; j < inputs; j++) sum += _cvtsh_ss(a[r * inputs + j]) * x[t * inputs + j];
      hidden[t * stride + r] = weight * sum;
    }
}

TARGET static void NAME(down)(const float *x, size_t count, const float16 *a, size_t rows,
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
  __m256 total[4][4];
  for (int t = 0; t < tokens; t++)
    for (int v = 0; v < vectors; v++) total[t][v] = _mm256_setzero_ps();
  for (size_t i = 0; i < n; i++)
    for (int64_t r = 0; r < spans[i].rank; r++) {
      const float16 *row = adapters + spans[i].b + r * columns + column;
      for (int t = 0; t < tokens; t++) {
        __m256 factor = _mm256_set1_ps(hidden[t * stride + i * max_rank + r]);
        for (int v = 0; v < vectors; v++)
          total[t][v] = _mm256_fmadd_ps(NAME(widen)(row + v * 8), factor, total[t][v]);
      }
    }
  for (int t = 0; t < tokens; t++)
    for (int v = 0; v < vectors; v++) {
      float *to = y + t * y_stride + v * 8;
      _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), total[t][v]));
    }
}

TARGET static void NAME(up)(const float16 *adapters, const Span *spans, size_t n, size_t max_rank,
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
            sum += _cvtsh_ss(adapters[spans[i].b + r * columns + c]) *
                   factors[token * stride + i * max_rank + r];
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
