/* The two few-row kernels for one instruction set; included once for each, with ISA, TARGET, LANES, NT_COLS
 * and NN_VECS defined.
 *
 * Generic vectors: the compiler turns them into AVX-512, AVX2, SSE or NEON. A tile holds its sums in registers. Each
 * element of C is a chain of additions from k = 0 upwards, in one vector a block of K (nt) or in one lane (nn).
 */
#define VEC TILE_NAME(vec, ISA)
#define LOAD TILE_NAME(load, ISA)
#define STORE TILE_NAME(store, ISA)
#define SUM TILE_NAME(sum, ISA)
#define QUARTER TILE_NAME(quarter, ISA)
#define SUMS TILE_NAME(sums, ISA)
#define PUT TILE_NAME(put, ISA)
#define NT_TILE TILE_NAME(nt_tile, ISA)
#define NN_TILE TILE_NAME(nn_tile, ISA)
#define INLINE static inline __attribute__((always_inline)) TARGET

typedef float VEC __attribute__((vector_size(4 * LANES)));

INLINE VEC LOAD(const float *p) {
  VEC v;
  memcpy(&v, p, sizeof v);
  return v;
}

INLINE void STORE(float *p, VEC v) { memcpy(p, &v, sizeof v); }

/* Four partial sums of a vector's lanes: its halves added until four lanes are left. */
INLINE quad QUARTER(VEC v) {
  quad parts[LANES / 4];
  memcpy(parts, &v, sizeof v);
  for (int width = LANES / 8; width > 0; width /= 2)
    for (int i = 0; i < width; i++) parts[i] += parts[i + width];
  return parts[0];
}

INLINE float SUM(VEC v) {
  quad q = QUARTER(v);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

/* SUM of four vectors at once, in the same order. */
INLINE quad SUMS(const VEC *v) {
  quad a = QUARTER(v[0]), b = QUARTER(v[1]), c = QUARTER(v[2]), d = QUARTER(v[3]);
  quad ab = SHUFFLE(a, b, 0, 1, 4, 5) + SHUFFLE(a, b, 2, 3, 6, 7);
  quad cd = SHUFFLE(c, d, 0, 1, 4, 5) + SHUFFLE(c, d, 2, 3, 6, 7);
  return SHUFFLE(ab, cd, 0, 2, 4, 6) + SHUFFLE(ab, cd, 1, 3, 5, 7);
}

/* The sum of the block of K that begins at k0. beta 0 must not read C, which may hold NaN. */
INLINE void PUT(const product *p, ptrdiff_t row, ptrdiff_t col, float sum, ptrdiff_t k0) {
  float *c = p->c + row * p->ldc + col;
  if (k0 > 0)
    *c += p->alpha * sum;
  else
    *c = p->beta == 0 ? p->alpha * sum : p->alpha * sum + p->beta * *c;
}

/* C[row..row+rows, col..col+cols] with B transposed, over the block of K that begins at k0. */
INLINE void NT_TILE(const product *p, ptrdiff_t row, ptrdiff_t col, ptrdiff_t k0, const int rows, const int cols,
                    const int is_first) {
  const float *a = p->a + row * p->lda, *b = p->b + col * p->ldb;
  ptrdiff_t k = k0, end = k0 + K_BLOCK < p->k ? k0 + K_BLOCK : p->k;
  VEC acc[4][NT_COLS];
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < cols; j++) acc[i][j] = (VEC){0};
  for (; k + LANES <= end; k += LANES) {
    VEC x[4];
    for (int i = 0; i < rows; i++) x[i] = LOAD(a + i * p->lda + k);
    for (int j = 0; j < cols; j++) {
      const float *from = b + j * p->ldb + k;
      VEC w = LOAD(from);
      /* The first rows meet new weights: ask for later columns', which the hardware does not foresee. */
      if (is_first) {
        __builtin_prefetch(from + 4 * cols * p->ldb, 0, 2);
        __builtin_prefetch(from + cols * p->ldb);
      }
      for (int i = 0; i < rows; i++) acc[i][j] += x[i] * w;
    }
  }
  for (int i = 0; i < rows; i++) {
    float sums[NT_COLS < 4 ? 4 : NT_COLS];
    if (cols == 4) {
      quad four = SUMS(acc[i]);
      memcpy(sums, &four, sizeof four);
    } else {
      for (int j = 0; j < cols; j++) sums[j] = SUM(acc[i][j]);
    }
    for (int j = 0; j < cols; j++) {
      for (ptrdiff_t t = k; t < end; t++) sums[j] += a[i * p->lda + t] * b[j * p->ldb + t];
      PUT(p, row + i, col + j, sums[j], k0);
    }
  }
}

/* A block of rows over a block of K stays in cache while the columns stream by. */
TARGET static void TILE_NAME(nt, ISA)(const product *p, ptrdiff_t n_begin, ptrdiff_t n_end) {
  for (ptrdiff_t block = 0; block < p->m; block += ROW_BLOCK)
    for (ptrdiff_t k0 = 0; k0 < p->k; k0 += K_BLOCK) {
      ptrdiff_t end = block + ROW_BLOCK < p->m ? block + ROW_BLOCK : p->m;
      for (ptrdiff_t col = n_begin; col < n_end; col += NT_COLS) {
        ptrdiff_t row = block;
        if (col + NT_COLS <= n_end) {
          if (row + 4 <= end) NT_TILE(p, row, col, k0, 4, NT_COLS, 1), row += 4;
          for (; row + 4 <= end; row += 4) NT_TILE(p, row, col, k0, 4, NT_COLS, 0);
          if (end - row == 3) NT_TILE(p, row, col, k0, 3, NT_COLS, 1), row = end;
          if (end - row == 2) NT_TILE(p, row, col, k0, 2, NT_COLS, 1), row = end;
          if (end - row == 1) NT_TILE(p, row, col, k0, 1, NT_COLS, 1), row = end;
        }
        for (; row < end; row++)
          for (ptrdiff_t j = col; j < n_end; j++) NT_TILE(p, row, j, k0, 1, 1, 0);
      }
    }
}

/* C[row..row+rows, col..col+vecs*LANES] with B as it lies: each row of B scaled by an element of A. */
INLINE void NN_TILE(const product *p, ptrdiff_t row, ptrdiff_t col, const int rows, const int vecs) {
  const float *a = p->a + row * p->lda, *b = p->b + col;
  VEC acc[4][8];
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < vecs; j++) acc[i][j] = (VEC){0};
  for (ptrdiff_t k = 0; k < p->k; k++) {
    VEC w[8];
    for (int j = 0; j < vecs; j++) w[j] = LOAD(b + k * p->ldb + j * LANES);
    for (int i = 0; i < rows; i++) {
      float x = a[i * p->lda + k];
      for (int j = 0; j < vecs; j++) acc[i][j] += x * w[j];
    }
  }
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < vecs; j++) {
      float *c = p->c + (row + i) * p->ldc + col + j * LANES;
      VEC sum = p->alpha * acc[i][j];
      STORE(c, p->beta == 0 ? sum : sum + p->beta * LOAD(c));
    }
}

/* A panel of columns stays in cache while the rows go by. */
TARGET static void TILE_NAME(nn, ISA)(const product *p, ptrdiff_t n_begin, ptrdiff_t n_end) {
  ptrdiff_t col = n_begin;
  for (; col + 8 * LANES <= n_end && p->m < 4; col += 8 * LANES)
    for (ptrdiff_t row = 0; row < p->m; row++) NN_TILE(p, row, col, 1, 8);
  for (; col + NN_VECS * LANES <= n_end; col += NN_VECS * LANES) {
    ptrdiff_t row = 0;
    for (; row + 4 <= p->m; row += 4) NN_TILE(p, row, col, 4, NN_VECS);
    for (; row + 2 <= p->m; row += 2) NN_TILE(p, row, col, 2, NN_VECS);
    for (; row < p->m; row++) NN_TILE(p, row, col, 1, NN_VECS);
  }
  for (; col + LANES <= n_end; col += LANES) {
    ptrdiff_t row = 0;
    for (; row + 4 <= p->m; row += 4) NN_TILE(p, row, col, 4, 1);
    for (; row < p->m; row++) NN_TILE(p, row, col, 1, 1);
  }
  /* Columns that fill no vector. */
  for (; col < n_end; col++)
    for (ptrdiff_t row = 0; row < p->m; row++) {
      float sum = 0;
      for (ptrdiff_t k = 0; k < p->k; k++) sum += p->a[row * p->lda + k] * p->b[k * p->ldb + col];
      PUT(p, row, col, sum, 0);
    }
}

/* The same as nt for sums so short that adding up a vector's lanes costs more than the sum: a panel of B is turned, and
 * then its columns lie as nn wants them. Turning costs what some ten rows do. */
TARGET static void TILE_NAME(turned, ISA)(const product *p, ptrdiff_t n_begin, ptrdiff_t n_end) {
  enum { WIDTH = NN_VECS * LANES };
  float panel[SHORT_K * WIDTH] __attribute__((aligned(64)));
  for (ptrdiff_t col = n_begin; col < n_end; col += WIDTH) {
    ptrdiff_t width = col + WIDTH < n_end ? WIDTH : n_end - col;
    for (ptrdiff_t j = 0; j < width; j++)
      for (ptrdiff_t k = 0; k < p->k; k++) panel[k * WIDTH + j] = p->b[(col + j) * p->ldb + k];
    product part = {p->m, width, p->k, p->lda, WIDTH, p->ldc, p->alpha, p->beta, p->a, panel, p->c + col};
    TILE_NAME(nn, ISA)(&part, 0, width);
  }
}

#undef VEC
#undef LOAD
#undef STORE
#undef SUM
#undef QUARTER
#undef SUMS
#undef PUT
#undef NT_TILE
#undef NN_TILE
#undef INLINE
#undef ISA
#undef TARGET
#undef LANES
#undef NT_COLS
#undef NN_VECS
