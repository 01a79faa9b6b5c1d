/* The data that the inner loops work on, and the table of them: one for each kind of processor. */
#pragma once
#include <stddef.h>
#include <stdint.h>

enum {
  BLOCK = 32,     /* weights that share a scale */
  PAIR = 2 * BLOCK, /* the loops take two blocks at a time */
  SPREAD = 8,
  OVERREAD = 16 /* blocks that loops may read behind a row */
};

/* A matrix [rows, blocks * BLOCK] of whole numbers of 4 or 8 bits, as MatMulNBits has it: a weight
 * is scale * (level - zero). Two levels of 4 bits lie in a byte, the even one low; so do two zeros. */
typedef struct {
  const uint8_t *levels; /* [rows, blocks, BLOCK * bits / 8] */
  const float *scales;   /* [rows, blocks] */
  const uint8_t *zeros;  /* [rows, ceil(blocks / 2)], or NULL: 8 (4 bits) or 128 (8 bits) */
  size_t rows, blocks;
} Matrix;

/* Tokens [count, blocks * BLOCK], each block rounded to int8 with a scale of its own. A block's
 * numbers lie as the matrix's levels come out of their bytes: for 4 bits a pair of blocks is the
 * even numbers of both, then the odd ones. */
typedef struct {
  int8_t *numbers; /* [count, pairs, PAIR] */
  float *scales;   /* [count, pairs, SPREAD]: four times that of the first block, of the second */
  float *sums;     /* [count, padded]: the sum of a block's numbers, times its scale */
  size_t count, pairs, padded;
} Tokens;

/* One adapter's rows for one part of a slot: A [rank, inputs] and B [rank, columns] begin at these
 * places among the adapters' numbers. */
typedef struct {
  int64_t a, b, rank;
} Span;

typedef struct {
  /* y [count, ..]: columns [from, to) = the rows [from, to) of a matrix times all tokens */
  void (*multiply)(const Matrix *, int bits, size_t from, size_t to, const Tokens *, float *y,
                   size_t stride);
  /* hidden [count, ..] = weight * x [count, inputs] A^T for `rows` rows of A */
  void (*down)(const float *x, size_t count, const float *a, size_t rows, size_t inputs,
               float weight, float *hidden, size_t stride);
  /* y [count, ..] += hidden B for the columns [from, to) of B; y begins at the first of them. An
   * adapter's part of hidden begins at a multiple of `most`. */
  void (*up)(const float *adapters, const Span *spans, size_t n, size_t most, size_t columns,
             size_t from, size_t to, const float *hidden, size_t stride, size_t count, float *y,
             size_t y_stride);
} Kernels;

#define INLINE __attribute__((always_inline)) static inline
