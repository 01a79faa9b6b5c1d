/* Compares the kernels of every instruction set that this processor has with the reference in plain
 * C, bit for bit, on random matrices and tokens.
 *
 *   tiles FIRST_SEED SEEDS    prints each set's name and its number of cases; exit code 1 if one differs
 */
#include <stdio.h>
#include <stdlib.h>

#include "reference.h"

static uint64_t state;

/* A random number below `limit` (splitmix64). */
static size_t below(size_t limit) {
  uint64_t z = state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return (z ^ z >> 31) % limit;
}
static float number(void) { return ((int)below(20001) - 10000) / 5000.0f; }
static float16 half_number(void) { return (float16)(below(2) << 15 | (10 + below(6)) << 10 | below(1024)); }

static void *room(size_t bytes) {
  void *found = calloc(1, bytes + 64);
  if (!found) exit(2);
  return found;
}

static void *random_bytes(size_t count) {
  uint8_t *bytes = room(count);
  for (size_t i = 0; i < count; i++) bytes[i] = (uint8_t)below(256);
  return bytes;
}

static float *random_floats(size_t count, float size) {
  float *numbers = room(count * sizeof *numbers);
  for (size_t i = 0; i < count; i++) numbers[i] = number() * size;
  return numbers;
}

static float16 *random_halves(size_t count) {
  float16 *numbers = room(count * sizeof *numbers);
  for (size_t i = 0; i < count; i++) numbers[i] = half_number();
  return numbers;
}

static int equal(const char *set, const char *what, const void *a, const void *b, size_t bytes) {
  if (!memcmp(a, b, bytes)) return 1;
  printf("%s: %s differs from the reference\n", set, what);
  return 0;
}

static Tokens make_tokens(size_t count, size_t blocks) {
  size_t pairs = (blocks + 1) / 2, padded = (blocks + OVERREAD - 1) / OVERREAD * OVERREAD;
  return (Tokens){room(count * pairs * PAIR), room(count * pairs * SPREAD * sizeof(float)),
                  room(count * padded * sizeof(float)), count, pairs, padded};
}

static void free_tokens(Tokens *tokens) {
  free(tokens->numbers), free(tokens->scales), free(tokens->sums);
}

static int check_multiply(const Kernels *set) {
  static const size_t counts[] = {1, 2, 3, 4, 7, 8, 9, 15, 37};
  int bits = below(2) ? 4 : 8, means = bits == 4 && below(3) == 0, same = 1;
  size_t rows = 1 + below(40), groups = 1 + below(40), count = counts[below(9)];
  size_t blocks = groups + (means ? (groups + BLOCK - 1) / BLOCK : 0);
  size_t inputs = groups * BLOCK - (means ? 0 : below(BLOCK));
  float *x = random_floats(count * inputs, 3);
  Tokens found = make_tokens(count, blocks), expected = make_tokens(count, blocks);
  for (size_t token = 0; token < count; token++) {
    set->quantise_f32_a8(x + token * inputs, inputs, means, blocks, bits, &found, token);
    reference_quantise(x + token * inputs, inputs, means, blocks, bits, &expected, token);
  }
  same &= equal(set->name, "a token's numbers", found.numbers, expected.numbers,
                count * found.pairs * PAIR);
  same &= equal(set->name, "a token's scale", found.scales, expected.scales,
                count * found.pairs * SPREAD * sizeof(float));
  same &= equal(set->name, "a token's sum", found.sums, expected.sums,
                count * found.padded * sizeof(float));

  size_t cells = rows * blocks + OVERREAD;
  size_t scale_size = below(2) ? sizeof(float) : sizeof(float16);
  uint8_t *levels = random_bytes(cells * BLOCK), *zeros = random_bytes(cells);
  void *scales = scale_size == 4 ? (void *)random_floats(cells, 0.1f) : random_halves(cells);
  Matrix m = {levels, scales, bits == 4 && below(2) ? zeros : NULL, rows, blocks, scale_size};
  size_t from = below(rows), to = from + 1 + below(rows - from);
  float *y = room(count * rows * sizeof *y), *wanted = room(count * rows * sizeof *y);
  Multiply *multiply = bits == 4 ? set->multiply_a8_w4 : set->multiply_a8_w8;
  multiply(&m, from, to, &found, y, rows);
  int shift = strstr(set->name, "vnni") ? 0 : 128;
  for (size_t token = 0; token < count; token++)
    for (size_t row = from; row < to; row++)
      wanted[token * rows + row] = reference_dot(&m, bits, row, &found, token, shift);
  same &= equal(set->name, bits == 4 ? "multiply_a8_w4" : "multiply_a8_w8", y, wanted,
                count * rows * sizeof *y);
  free_tokens(&found), free_tokens(&expected);
  free(x), free(levels), free(zeros), free(scales), free(y), free(wanted);
  return same;
}

static int check_slot(const Kernels *set) {
  size_t count = 1 + below(9), inputs = 1 + below(70), rows = 1 + below(9), columns = 1 + below(90);
  size_t n = 1 + below(3), max_rank = 9, stride = n * max_rank, from = below(columns);
  size_t to = from + 1 + below(columns - from), width = to - from;
  int same = 1;
  Span spans[3];
  for (size_t i = 0; i < n; i++) spans[i] = (Span){0, below(50), below(max_rank + 1)};
  float *x = random_floats(count * inputs, 1), weight = number();
  float16 *adapters = random_halves(max_rank * (inputs + columns) + 50);
  float *hidden = room(count * stride * sizeof *hidden), *wanted = room(count * stride * sizeof *x);
  set->down_f32_f16(x, count, adapters, rows, inputs, weight, hidden, stride);
  for (size_t token = 0; token < count; token++)
    for (size_t r = 0; r < rows; r++)
      wanted[token * stride + r] =
          reference_down(x + token * inputs, adapters + r * inputs, inputs, weight);
  same &= equal(set->name, "down_f32_f16", hidden, wanted, count * stride * sizeof *hidden);

  float *factors = random_floats(count * stride, 1), *y = random_floats(count * width, 1);
  float *sums = room(count * width * sizeof *sums);
  for (size_t token = 0; token < count; token++)
    for (size_t c = 0; c < width; c++)
      sums[token * width + c] = y[token * width + c] + reference_up(adapters, spans, n, max_rank,
                                                                    columns, from + c,
                                                                    factors + token * stride);
  set->up_f32_f16(adapters, spans, n, max_rank, columns, from, to, factors, stride, count, y, width);
  same &= equal(set->name, "up_f32_f16", y, sums, count * width * sizeof *y);
  free(x), free(adapters), free(hidden), free(wanted), free(factors), free(y), free(sums);
  return same;
}

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  uint64_t first = strtoull(argv[1], NULL, 10), seeds = strtoull(argv[2], NULL, 10);
  int same = 1;
  for (const Kernels *const *set = kernel_sets; *set; set++) {
    if (!(*set)->is_supported()) continue;
    for (uint64_t seed = first; seed < first + seeds; seed++) {
      state = seed;
      same &= check_multiply(*set) & check_slot(*set);
    }
    printf("%s %d\n", (*set)->name, (int)seeds);
  }
  return !same;
}
