/* cblas_sgemm, cblas_dgemm and cblas_cgemm for MLX's CPU backend on Linux, in the place of the reference BLAS it links.
 *
 * Products with few rows, which decoding consists of, are computed here (gemm_kernel.h): OpenBLAS packs the weights anew
 * at every call, while these kernels stream them once. Everything else is forwarded to an OpenBLAS whose functions
 * Python hands over (vllm_mlx/blas.py), with 32-bit or 64-bit integers.
 *
 * The kernels sum each element of the result in one fixed order, whatever the number of rows and threads: a row's
 * result does not depend on the rows computed beside it.
 */
#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };

typedef void (*gemm32)(int, int, int, int, int, int, float, const float *, int, const float *, int, float, float *, int);
typedef void (*gemm64)(int, int, int, int64_t, int64_t, int64_t, float, const float *, int64_t, const float *, int64_t,
                       float, float *, int64_t);
typedef void (*dgemm32)(int, int, int, int, int, int, double, const double *, int, const double *, int, double,
                        double *, int);
typedef void (*dgemm64)(int, int, int, int64_t, int64_t, int64_t, double, const double *, int64_t, const double *,
                        int64_t, double, double *, int64_t);
typedef void (*cgemm32)(int, int, int, int, int, int, const void *, const void *, int, const void *, int, const void *,
                        void *, int);
typedef void (*cgemm64)(int, int, int, int64_t, int64_t, int64_t, const void *, const void *, int64_t, const void *,
                        int64_t, const void *, void *, int64_t);

/* One product C = alpha * A B + beta * C, row-major; B is [N, K] when b_trans, else [K, N]. */
typedef struct {
  ptrdiff_t m, n, k, lda, ldb, ldc;
  float alpha, beta;
  const float *a, *b;
  float *c;
} product;

typedef void (*kernel)(const product *, ptrdiff_t n_begin, ptrdiff_t n_end);

/* Row operations (row_kernel.h). They come as products C = alpha * A B + beta * C whose alpha is one of these numbers,
 * which no product is ever scaled by: a BLAS call is the one place where MLX lets foreign code work on its arrays in its
 * turn. What is named besides C's rows is an operand; A has one column but for softmax, B has one row.
 */
#define ROW_SOFTMAX 0x1.fffff2p127f /* if A has two columns: of C's columns from A's first until before its second */
#define ROW_EXP 0x1.fffff4p127f
#define ROW_SWIGLU 0x1.fffff6p127f   /* of one column, by A */
#define ROW_RMS_NORM 0x1.fffff8p127f /* times B; epsilon is beta */
#define ROW_ROPE 0x1.fffffap127f     /* by positions A and frequencies B, whose last element is their number */
#define ROW_ARGMAX 0x1.fffffcp127f   /* of A's rows; C has one column */

typedef struct {
  void (*softmax)(float *row, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t width);
  void (*exponentials)(float *x, ptrdiff_t count);
  void (*swiglu)(float *gate, const float *up, ptrdiff_t count);
  void (*rms_norm)(float *row, const float *weight, ptrdiff_t width, float eps);
  void (*rope)(float *row, const float *frequency, ptrdiff_t half, float position);
  ptrdiff_t (*argmax)(const float *row, ptrdiff_t width);
} row_kernels;

/* 64 rows by 1024 floats are 256 KiB: within the second-level cache of any machine since 2010. */
enum { ROW_BLOCK = 64, K_BLOCK = 1024 };
/* Sums of up to SHORT_K products (a head's) are taken of a turned panel, from so many rows on that turning pays. */
enum { SHORT_K = 128, LEAST_TURNED = 16 };

typedef float quad __attribute__((vector_size(16)));
typedef int32_t quad_index __attribute__((vector_size(16)));
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (quad_index){i, j, k, l})
#endif

#define TILE_NAME_(name, isa) name##_##isa
#define TILE_NAME(name, isa) TILE_NAME_(name, isa)

#if defined(__x86_64__)
#define ISA avx512
#define TARGET __attribute__((target("avx512f,avx512vl,avx512dq,fma")))
#define LANES 16
#define NT_COLS 4
#define NN_VECS 4
#include "row_kernel.h"
#include "gemm_kernel.h"
#define ISA avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 8
#define NT_COLS 2
#define NN_VECS 2
#include "row_kernel.h"
#include "gemm_kernel.h"
#endif
#define ISA plain
#define TARGET
#define LANES 4
#define NT_COLS 2
#define NN_VECS 2
#include "row_kernel.h"
#include "gemm_kernel.h"

#define ROW_KERNELS(isa) \
  (row_kernels) { softmax_##isa, exponentials_##isa, swiglu_##isa, rms_norm_##isa, rope_##isa, argmax_##isa }

static struct {
  void *sgemm, *dgemm, *cgemm;
  int is_64bit;
  ptrdiff_t max_rows; /* products with more rows are forwarded */
  int threads;
  kernel nt, nn, turned;
  int is_invariant; /* a row's sums may not depend on how many rows there are */
  row_kernels rows;
} config;

/* ---- a pool of threads that share the columns of one product ---- */

enum { MAX_THREADS = 64 };
static const double WORK_PER_THREAD = 2e6; /* multiplications below which another thread costs more than it brings */

static struct {
  pthread_mutex_t lock, one_product;
  pthread_cond_t start, done;
  int started, busy;
  uint64_t turn;
  int parts;
  kernel run;
  const product *p;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .one_product = PTHREAD_MUTEX_INITIALIZER,
          .start = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};

static void run_part(kernel run, const product *p, int part, int parts) {
  ptrdiff_t step = ((p->n + parts - 1) / parts + 31) / 32 * 32; /* whole tiles, so that no part ends inside a vector */
  ptrdiff_t begin = part * step, end = begin + step < p->n ? begin + step : p->n;
  if (begin < end) run(p, begin, end);
}

static void *worker(void *argument) {
  int index = (int)(intptr_t)argument;
  uint64_t seen = 0;
  pthread_mutex_lock(&pool.lock);
  for (;;) {
    while (pool.turn == seen) pthread_cond_wait(&pool.start, &pool.lock);
    seen = pool.turn;
    if (index >= pool.parts) continue;
    kernel run = pool.run;
    const product *p = pool.p;
    int parts = pool.parts;
    pthread_mutex_unlock(&pool.lock);
    run_part(run, p, index, parts);
    pthread_mutex_lock(&pool.lock);
    if (--pool.busy == 0) pthread_cond_signal(&pool.done);
  }
  return NULL;
}

/* A forked child has none of the threads. */
static void forget_threads(void) {
  pthread_mutex_init(&pool.lock, NULL);
  pthread_mutex_init(&pool.one_product, NULL);
  pool.started = pool.busy = 0;
  pool.turn = 0;
}

static void run_shared(kernel run, const product *p) {
  int parts = config.threads < MAX_THREADS ? config.threads : MAX_THREADS;
  double useful = (double)p->m * (double)p->n * (double)p->k / WORK_PER_THREAD;
  if (useful < parts) parts = useful < 1 ? 1 : (int)useful;
  if (parts == 1 || pthread_mutex_trylock(&pool.one_product) != 0) {
    run(p, 0, p->n);
    return;
  }
  pthread_mutex_lock(&pool.lock);
  while (pool.started < parts - 1) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)(pool.started + 1)) != 0) break;
    pthread_detach(thread);
    pool.started++;
  }
  if (pool.started < parts - 1) parts = pool.started + 1;
  pool.run = run;
  pool.p = p;
  pool.parts = parts;
  pool.busy = parts - 1;
  pool.turn++;
  if (parts > 1) pthread_cond_broadcast(&pool.start);
  pthread_mutex_unlock(&pool.lock);
  run_part(run, p, 0, parts);
  pthread_mutex_lock(&pool.lock);
  while (pool.busy > 0) pthread_cond_wait(&pool.done, &pool.lock);
  pthread_mutex_unlock(&pool.lock);
  pthread_mutex_unlock(&pool.one_product);
}

/* Which instruction set the kernels use: 0 plain, 1 AVX2, 2 AVX-512; `limit` caps it (for tests). */
int vllm_mlx_gemm_configure(void *sgemm, void *dgemm, void *cgemm, int is_64bit, int64_t max_rows, int threads,
                            int limit) {
  int level = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) level = 1;
  if (level && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    level = 2;
#endif
  if (limit < level) level = limit;
  static int is_watching_forks;
  if (!is_watching_forks) is_watching_forks = pthread_atfork(NULL, NULL, forget_threads) == 0;
  config.sgemm = sgemm;
  config.dgemm = dgemm;
  config.cgemm = cgemm;
  config.is_64bit = is_64bit;
  config.max_rows = max_rows;
  config.threads = threads < 1 ? 1 : threads;
  config.nt = nt_plain;
  config.nn = nn_plain;
  config.turned = turned_plain;
  config.is_invariant = max_rows > INT32_MAX;
  config.rows = ROW_KERNELS(plain);
#if defined(__x86_64__)
  if (level == 1) {
    config.nt = nt_avx2, config.nn = nn_avx2, config.turned = turned_avx2;
    config.rows = ROW_KERNELS(avx2);
  }
  if (level == 2) {
    config.nt = nt_avx512, config.nn = nn_avx512, config.turned = turned_avx512;
    config.rows = ROW_KERNELS(avx512);
  }
#endif
  return level;
}

/* ---- row operations ---- */

static ptrdiff_t clamped(float column, ptrdiff_t least, ptrdiff_t most) {
  ptrdiff_t at = (ptrdiff_t)column;
  return at < least ? least : at > most ? most : at;
}

/* Whether the product stood for a row operation. `step_row` and `step_col` lead through A, which may lie transposed;
 * B's one row may lie as a column of one, which is the same. */
static int row_operation(const product *p, ptrdiff_t step_row, ptrdiff_t step_col) {
  if (p->alpha == ROW_SWIGLU && p->n == 1 && p->ldc == 1 && step_row == 1) {
    config.rows.swiglu(p->c, p->a, p->m);
    return 1;
  }
  for (ptrdiff_t i = 0; i < p->m; i++) {
    float *row = p->c + i * p->ldc;
    const float *argument = p->a + i * step_row;
    if (p->alpha == ROW_SOFTMAX) {
      ptrdiff_t begin = p->k == 2 ? clamped(argument[0], 0, p->n) : 0;
      ptrdiff_t end = p->k == 2 ? clamped(argument[step_col], begin, p->n) : p->n;
      config.rows.softmax(row, begin, end, p->n);
    } else if (p->alpha == ROW_EXP) {
      config.rows.exponentials(row, p->n);
    } else if (p->alpha == ROW_SWIGLU) {
      config.rows.swiglu(row, argument, 1);
    } else if (p->alpha == ROW_RMS_NORM) {
      config.rows.rms_norm(row, p->b, p->n, p->beta);
    } else if (p->alpha == ROW_ROPE) {
      config.rows.rope(row, p->b, clamped(p->b[p->n - 1], 0, p->n / 2), *argument);
    } else if (p->alpha == ROW_ARGMAX && step_col == 1) {
      *row = (float)config.rows.argmax(argument, p->k);
    } else {
      return 0;
    }
  }
  return 1;
}

/* ---- the three functions MLX calls ---- */

static int is_turned(int m, int n, int k) {
  return config.max_rows > 0 && !config.is_invariant && n > 0 && k > 0 && k <= SHORT_K && m >= LEAST_TURNED && m >= k / 4;
}

void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                 const float *b, int ldb, float beta, float *c, int ldc) {
  if (alpha >= ROW_SOFTMAX && order == ROW_MAJOR && config.max_rows > 0) {
    product p = {m, n, k, lda, ldb, ldc, alpha, beta, a, b, c};
    if (row_operation(&p, trans_a == TRANS ? 1 : lda, trans_a == TRANS ? lda : 1)) return;
  }
  if (order == ROW_MAJOR && trans_a == NO_TRANS && trans_b == TRANS && is_turned(m, n, k)) {
    product p = {m, n, k, lda, ldb, ldc, alpha, beta, a, b, c};
    run_shared(config.turned, &p);
    return;
  }
  if (order == ROW_MAJOR && trans_a == NO_TRANS && m <= config.max_rows && m > 0 && n > 0 && k > 0 &&
      (trans_b == TRANS || trans_b == NO_TRANS)) {
    product p = {m, n, k, lda, ldb, ldc, alpha, beta, a, b, c};
    run_shared(trans_b == TRANS ? config.nt : config.nn, &p);
    return;
  }
  if (config.is_64bit)
    ((gemm64)config.sgemm)(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  else
    ((gemm32)config.sgemm)(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void cblas_dgemm(int order, int trans_a, int trans_b, int m, int n, int k, double alpha, const double *a, int lda,
                 const double *b, int ldb, double beta, double *c, int ldc) {
  if (config.is_64bit)
    ((dgemm64)config.dgemm)(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  else
    ((dgemm32)config.dgemm)(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

void cblas_cgemm(int order, int trans_a, int trans_b, int m, int n, int k, const void *alpha, const void *a, int lda,
                 const void *b, int ldb, const void *beta, void *c, int ldc) {
  if (config.is_64bit)
    ((cgemm64)config.cgemm)(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  else
    ((cgemm32)config.cgemm)(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
