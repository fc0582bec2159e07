/* Row operations for one instruction set; included once for each, with ISA, TARGET and LANES defined.
 *
 * MLX's CPU backend computes e**x, sines and the like an element at a time, in 12 to 20 ns, and composes norms and
 * rotary positions of many passes; these do a vector at a time.
 * A row's result depends on that row alone, and its sums run in one fixed order from its first visible column.
 */
#define VEC TILE_NAME(rvec, ISA)
#define BITS TILE_NAME(rbits, ISA)
#define DOUBLES TILE_NAME(rdoubles, ISA)
#define LOAD TILE_NAME(rload, ISA)
#define LOAD_SOME TILE_NAME(rload_some, ISA)
#define STORE_SOME TILE_NAME(rstore_some, ISA)
#define CHOOSE TILE_NAME(rchoose, ISA)
#define EXP TILE_NAME(rexp, ISA)
#define INLINE static inline __attribute__((always_inline)) TARGET

typedef float VEC __attribute__((vector_size(4 * LANES)));
typedef int32_t BITS __attribute__((vector_size(4 * LANES)));
typedef double DOUBLES __attribute__((vector_size(8 * LANES)));

INLINE VEC LOAD(const float *p) {
  VEC v;
  memcpy(&v, p, sizeof v);
  return v;
}

/* The first `count` lanes from `p`, `fill` in the others. */
INLINE VEC LOAD_SOME(const float *p, ptrdiff_t count, float fill) {
  if (count >= LANES) return LOAD(p);
  float lanes[LANES];
  for (int i = 0; i < LANES; i++) lanes[i] = fill;
  memcpy(lanes, p, (size_t)count * sizeof(float));
  return LOAD(lanes);
}

INLINE void STORE_SOME(float *p, VEC v, ptrdiff_t count) {
  memcpy(p, &v, (size_t)(count < LANES ? count : LANES) * sizeof(float));
}

INLINE VEC CHOOSE(BITS where, VEC a, VEC b) { return (VEC)(((BITS)a & where) | ((BITS)b & ~where)); }

/* e**x within 2 units in the last place; 0 below -87.3, infinity above 88.7, NaN of NaN.
 * x = n ln 2 + r; e**r is a polynomial (Taylor's, of degree 6, on |r| <= 0.35), 2**n goes into the exponent bits. */
INLINE VEC EXP(VEC x) {
  const VEC zero = {0}, least = zero - 87.3f, most = zero + 88.7f;
  BITS is_zero = x < least, is_infinite = x > most;
  VEC y = CHOOSE(is_zero, least, CHOOSE(is_infinite, most, x));
  VEC shifted = y * 1.44269504f + 12582912.0f; /* 1.5 * 2**23: the nearest integer is in the low bits */
  VEC n = shifted - 12582912.0f;
  VEC r = y - n * 0.693145751953125f - n * 1.42860682e-6f;
  VEC p = r * 1.38888889e-3f + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  /* n reaches 128, whose power of two alone has no float: half of it at a time. */
  BITS whole = (BITS)shifted - 0x4b400000, half = whole >> 1;
  VEC power = p * (VEC)((half + 127) << 23) * (VEC)((whole - half + 127) << 23);
  return CHOOSE(is_zero, zero, CHOOSE(is_infinite, zero + INFINITY, power));
}

/* Softmax of columns [begin, end) of one row, in place; what lies outside becomes 0. */
TARGET static void TILE_NAME(softmax, ISA)(float *row, ptrdiff_t begin, ptrdiff_t end, ptrdiff_t width) {
  memset(row, 0, (size_t)begin * sizeof(float));
  memset(row + end, 0, (size_t)(width - end) * sizeof(float));
  const VEC zero = {0};
  VEC top = zero - INFINITY, sum = zero;
  for (ptrdiff_t i = begin; i < end; i += LANES) {
    VEC x = LOAD_SOME(row + i, end - i, -INFINITY);
    top = CHOOSE(x > top, x, top);
  }
  float most = -INFINITY, total = 0;
  for (int i = 0; i < LANES; i++) most = top[i] > most ? top[i] : most;
  if (most == -INFINITY) most = 0; /* nothing is visible, or all is NaN */
  for (ptrdiff_t i = begin; i < end; i += LANES) {
    VEC power = EXP(LOAD_SOME(row + i, end - i, -INFINITY) - most);
    STORE_SOME(row + i, power, end - i);
    sum += power;
  }
  for (int i = 0; i < LANES; i++) total += sum[i];
  float scale = total == 0 ? 0 : 1 / total;
  for (ptrdiff_t i = begin; i < end; i += LANES)
    STORE_SOME(row + i, LOAD_SOME(row + i, end - i, 0) * scale, end - i);
}

/* x = e**x */
TARGET static void TILE_NAME(exponentials, ISA)(float *x, ptrdiff_t count) {
  for (ptrdiff_t i = 0; i < count; i += LANES) STORE_SOME(x + i, EXP(LOAD_SOME(x + i, count - i, 0)), count - i);
}

/* gate = gate * sigmoid(gate) * up */
TARGET static void TILE_NAME(swiglu, ISA)(float *gate, const float *up, ptrdiff_t count) {
  for (ptrdiff_t i = 0; i < count; i += LANES) {
    VEC x = LOAD_SOME(gate + i, count - i, 0);
    STORE_SOME(gate + i, x / (EXP(-x) + 1.0f) * LOAD_SOME(up + i, count - i, 0), count - i);
  }
}

/* The place of the first largest number; -1 if there is one that is none, or infinite. */
TARGET static ptrdiff_t TILE_NAME(argmax, ISA)(const float *row, ptrdiff_t width) {
  VEC top = (VEC){0} - INFINITY;
  BITS where = {0}, here = {0}, is_broken = {0};
  for (int i = 0; i < LANES; i++) here[i] = i;
  for (ptrdiff_t i = 0; i < width; i += LANES, here += LANES) {
    VEC x = LOAD_SOME(row + i, width - i, -INFINITY);
    BITS is_larger = x > top;
    is_broken |= ~(x < INFINITY);
    top = CHOOSE(is_larger, x, top);
    where = (here & is_larger) | (where & ~is_larger);
  }
  int best = 0, any_broken = 0;
  for (int i = 0; i < LANES; i++) {
    any_broken |= is_broken[i];
    if (top[i] > top[best] || (top[i] == top[best] && where[i] < where[best])) best = i;
  }
  return any_broken ? -1 : where[best];
}

/* row = row / sqrt(mean of squares + eps) * weight */
TARGET static void TILE_NAME(rms_norm, ISA)(float *row, const float *weight, ptrdiff_t width, float eps) {
  VEC squares = {0};
  for (ptrdiff_t i = 0; i < width; i += LANES) {
    VEC x = LOAD_SOME(row + i, width - i, 0);
    squares += x * x;
  }
  float total = 0;
  for (int i = 0; i < LANES; i++) total += squares[i];
  float scale = 1 / sqrtf(total / (float)width + eps);
  for (ptrdiff_t i = 0; i < width; i += LANES)
    STORE_SOME(row + i, LOAD_SOME(row + i, width - i, 0) * scale * LOAD_SOME(weight + i, width - i, 0), width - i);
}

/* Turns the pairs (row[i], row[i + half]) by position * frequency[i]. The angle is reduced in double precision, so that a
 * position of a million turns by as exact an angle as a small one; then Taylor's polynomials on |r| <= pi / 4. */
TARGET static void TILE_NAME(rope, ISA)(float *row, const float *frequency, ptrdiff_t half, float position) {
  const VEC zero = {0};
  for (ptrdiff_t i = 0; i < half; i += LANES) {
    VEC angle = LOAD_SOME(frequency + i, half - i, 0) * position;
    DOUBLES exact = __builtin_convertvector(angle, DOUBLES);
    DOUBLES turns = exact * 0.63661977236758134308 + 6755399441055744.0; /* 1.5 * 2**52: to the nearest integer */
    DOUBLES whole = turns - 6755399441055744.0;
    VEC r = __builtin_convertvector(exact - whole * 1.57079632679489661923, VEC);
    BITS quadrant = __builtin_convertvector(whole, BITS) & 3;
    VEC q = r * r;
    VEC sine = r + r * q * (-1.66666667e-1f + q * (8.33333333e-3f + q * (-1.98412698e-4f + q * 2.75573192e-6f)));
    VEC cosine = 1.0f - q * (0.5f - q * (4.16666667e-2f - q * (1.38888889e-3f - q * 2.48015873e-5f)));
    BITS is_swapped = (quadrant & 1) == 1;
    VEC s = CHOOSE(is_swapped, cosine, sine), c = CHOOSE(is_swapped, sine, cosine);
    s = CHOOSE(quadrant >= 2, zero - s, s);
    c = CHOOSE((quadrant == 1) | (quadrant == 2), zero - c, c);
    VEC x = LOAD_SOME(row + i, half - i, 0), y = LOAD_SOME(row + half + i, half - i, 0);
    STORE_SOME(row + i, x * c - y * s, half - i);
    STORE_SOME(row + half + i, y * c + x * s, half - i);
  }
}

#undef VEC
#undef BITS
#undef DOUBLES
#undef LOAD
#undef LOAD_SOME
#undef STORE_SOME
#undef CHOOSE
#undef EXP
#undef INLINE
