/* What a decode step needs between its products, on CUDA: for models/cuda_kernels.py, which has each kernel compiled by
 * itself, with its name as NAME, its type as TYPE and its sizes as macros. No header is included: parsing CUDA's own
 * takes longer than all else. MLX hands over integers only, so a float comes as its bits.
 */
#if TYPE == 16 /* bfloat16 */
struct number { unsigned short bits; };
__device__ inline float wide(number x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ inline number narrow(float x) {
  const unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {(unsigned short)(bits >> 16 | 0x40u)};
  return {(unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
#elif TYPE == 15 /* float16 */
struct number { unsigned short bits; };
__device__ inline float wide(number x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ inline number narrow(float x) {
  number y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
#else
typedef float number;
__device__ inline float wide(number x) { return x; }
__device__ inline number narrow(float x) { return x; }
#endif

struct alignas(8 * sizeof(number)) eight { number x[8]; };

__device__ inline eight eight_at(const number* from) { return *(const eight*)from; }

__device__ inline float sum_of_warp(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

#define LOWEST (-1e30f) /* below any score, and its power of two is 0 beside any other's */
#define THREADS 256

#ifdef ATTENTION
/* Attention of one query a row to the first lengths[row] tokens of its row. A block of threads: one row, the G query
 * heads of one key head, one of gridDim.y splits of the row's tokens. LANES threads share a token, each thread eight
 * numbers of it. The softmax runs along with the sums, and splits are merged by MERGE (flash decoding: Dao et al., 2023).
 *
 * queries and, without SPLITS, out [R, K * G, D]; keys, values [R, K, capacity, D]; with SPLITS, sums [R, K * G, splits,
 * D], and of each the highest score and the sum of the weights, tops [R, K * G, splits, 2].
 */
extern "C" __global__ void NAME(const number* queries, const number* keys, const number* values, const int* lengths,
#ifdef SPLITS
                                float* sums, float* tops,
#else
                                number* out,
#endif
                                int kv_heads, int capacity, int scale_bits) {
  constexpr int LANES = D / 8, SLOTS = THREADS / LANES, AT_ONCE = 4, WARPS = THREADS / 32;
  const float scale = __int_as_float(scale_bits);
  const int row = blockIdx.x / kv_heads, kv_head = blockIdx.x % kv_heads, splits = gridDim.y;
  const int slot = threadIdx.x / LANES, lane = threadIdx.x % LANES, warp = threadIdx.x / 32;
  const int length = lengths[row];
  const int chunk = max(64, ((length + splits - 1) / splits + 63) / 64 * 64);
  const int begin = blockIdx.y * chunk, end = min(begin + chunk, length);
  const long long first_head = ((long long)row * kv_heads + kv_head) * G;
#ifdef SPLITS
  if (begin >= end) {
    if (threadIdx.x < G) {
      tops[((first_head + threadIdx.x) * splits + blockIdx.y) * 2] = LOWEST;
      tops[((first_head + threadIdx.x) * splits + blockIdx.y) * 2 + 1] = 0.0f;
    }
    return;
  }
#endif
  const number* own_keys = keys + ((long long)row * kv_heads + kv_head) * capacity * D + lane * 8;
  const number* own_values = values + ((long long)row * kv_heads + kv_head) * capacity * D + lane * 8;
  float query[G][8], sum[G][8], top[G], total[G];
  for (int g = 0; g < G; g++) {
    const eight own = eight_at(queries + (first_head + g) * D + lane * 8);
    top[g] = LOWEST, total[g] = 0.0f;
    for (int i = 0; i < 8; i++) query[g][i] = wide(own.x[i]) * scale * 1.4426950408889634f, sum[g][i] = 0.0f;
  }
  for (int base = begin; base < end; base += SLOTS * AT_ONCE) {
    eight key[AT_ONCE], value[AT_ONCE];
    float score[AT_ONCE][G];
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      const int t = base + u * SLOTS + slot;
      if (t < end) {
        key[u] = eight_at(own_keys + (long long)t * D);
        value[u] = eight_at(own_values + (long long)t * D);
      } else { /* what lies there may be no number at all */
        for (int i = 0; i < 8; i++) key[u].x[i] = value[u].x[i] = narrow(0.0f);
      }
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; u++) {
      const bool is_there = base + u * SLOTS + slot < end;
#pragma unroll
      for (int g = 0; g < G; g++) {
        float dot = 0.0f;
        for (int i = 0; i < 8; i++) dot += query[g][i] * wide(key[u].x[i]);
        for (int step = LANES / 2; step > 0; step /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, step);
        score[u][g] = is_there ? dot : __int_as_float(0xff800000); /* minus infinity */
      }
    }
#pragma unroll
    for (int g = 0; g < G; g++) {
      float above = top[g];
      for (int u = 0; u < AT_ONCE; u++) above = fmaxf(above, score[u][g]);
      const float shrink = exp2f(top[g] - above);
      top[g] = above;
      total[g] *= shrink;
      for (int i = 0; i < 8; i++) sum[g][i] *= shrink;
#pragma unroll
      for (int u = 0; u < AT_ONCE; u++) {
        const float weight = exp2f(score[u][g] - above);
        total[g] += weight;
        for (int i = 0; i < 8; i++) sum[g][i] += weight * wide(value[u].x[i]);
      }
    }
  }
  /* Slots of a warp, then the warps. */
  __shared__ float warp_top[WARPS][G], warp_total[WARPS][G], warp_sum[WARPS][G][D];
  for (int g = 0; g < G; g++) {
    for (int step = LANES; step < 32; step *= 2) {
      const float other_top = __shfl_xor_sync(0xffffffffu, top[g], step);
      const float other_total = __shfl_xor_sync(0xffffffffu, total[g], step);
      const float above = fmaxf(top[g], other_top);
      const float mine = exp2f(top[g] - above), theirs = exp2f(other_top - above);
      total[g] = total[g] * mine + other_total * theirs;
      for (int i = 0; i < 8; i++)
        sum[g][i] = sum[g][i] * mine + __shfl_xor_sync(0xffffffffu, sum[g][i], step) * theirs;
      top[g] = above;
    }
    if (threadIdx.x % 32 < LANES) {
      for (int i = 0; i < 8; i++) warp_sum[warp][g][lane * 8 + i] = sum[g][i];
      if (lane == 0) warp_top[warp][g] = top[g], warp_total[warp][g] = total[g];
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < G * D; at += THREADS) {
    const int g = at / D, d = at % D;
    float above = LOWEST, all = 0.0f, whole = 0.0f;
    for (int w = 0; w < WARPS; w++) above = fmaxf(above, warp_top[w][g]);
    for (int w = 0; w < WARPS; w++) {
      const float weight = exp2f(warp_top[w][g] - above);
      all += warp_total[w][g] * weight;
      whole += warp_sum[w][g][d] * weight;
    }
#ifdef SPLITS
    const long long place = (first_head + g) * splits + blockIdx.y;
    sums[place * D + d] = whole;
    if (d == 0) tops[place * 2] = above, tops[place * 2 + 1] = all;
#else
    out[(first_head + g) * D + d] = narrow(whole / all);
#endif
  }
}
#endif

#ifdef MERGE
/* ATTENTION's splits put together. A block: one row's head; a thread: one of its D numbers. */
extern "C" __global__ void NAME(const float* sums, const float* tops, number* out, int splits) {
  const int d = threadIdx.x;
  const long long first = (long long)blockIdx.x * splits;
  float above = LOWEST, all = 0.0f, whole = 0.0f;
  for (int s = 0; s < splits; s++) above = fmaxf(above, tops[(first + s) * 2]);
  for (int s = 0; s < splits; s++) {
    const float total = tops[(first + s) * 2 + 1];
    if (total == 0.0f) continue; /* nothing was written for it */
    const float weight = exp2f(tops[(first + s) * 2] - above);
    all += total * weight;
    whole += sums[(first + s) * D + d] * weight;
  }
  out[(long long)blockIdx.x * D + d] = narrow(whole / all);
}
#endif

#ifdef TURN
/* Of the product heads [T, HEADS + 2 * KV_HEADS, D]: queries and keys normed (with NORMS) and turned to their positions,
 * values as they are, each in an array of its own. A warp: one head of one token. Numbers i and i + D / 2 are turned
 * together; a lane has those with i mod 32 = lane.
 */
extern "C" __global__ void NAME(const number* heads, const int* positions, const float* frequencies,
#ifdef NORMS
                                const number* query_norm, const number* key_norm,
#endif
                                number* queries, number* keys, number* values, int num_tokens, int eps_bits) {
  constexpr int HALF = D / 2, PAIRS = HALF / 32, ALL = HEADS + 2 * KV_HEADS;
  const int at = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int token = at / ALL, head = at % ALL;
  if (token >= num_tokens) return;
  const number* own = heads + (long long)at * D;
  float low[PAIRS], high[PAIRS];
  for (int i = 0; i < PAIRS; i++) low[i] = wide(own[lane + 32 * i]), high[i] = wide(own[lane + 32 * i + HALF]);
  if (head < HEADS + KV_HEADS) {
#ifdef NORMS
    float squares = 0.0f;
    for (int i = 0; i < PAIRS; i++) squares += low[i] * low[i] + high[i] * high[i];
    const float factor = rsqrtf(sum_of_warp(squares) / D + __int_as_float(eps_bits));
    const number* weight = head < HEADS ? query_norm : key_norm;
    for (int i = 0; i < PAIRS; i++) { /* rounded as a norm by itself would be */
      low[i] = wide(narrow(low[i] * factor * wide(weight[lane + 32 * i])));
      high[i] = wide(narrow(high[i] * factor * wide(weight[lane + 32 * i + HALF])));
    }
#endif
    for (int i = 0; i < PAIRS; i++) {
      float sine, cosine;
      sincosf((float)positions[token] * frequencies[lane + 32 * i], &sine, &cosine);
      const float x = low[i], y = high[i];
      low[i] = x * cosine - y * sine, high[i] = x * sine + y * cosine;
    }
  }
  number* to = head < HEADS ? queries + ((long long)token * HEADS + head) * D
               : head < HEADS + KV_HEADS ? keys + ((long long)token * KV_HEADS + head - HEADS) * D
               : values + ((long long)token * KV_HEADS + head - HEADS - KV_HEADS) * D;
  for (int i = 0; i < PAIRS; i++) to[lane + 32 * i] = narrow(low[i]), to[lane + 32 * i + HALF] = narrow(high[i]);
}
#endif

#ifdef SWIGLU
/* Of both [T, 2 * width], gate and up: silu(gate) * up [T, width]. A thread: eight numbers. */
extern "C" __global__ void NAME(const number* both, number* out, int num_tokens, int width) {
  const long long at = ((long long)blockIdx.x * THREADS + threadIdx.x) * 8;
  if (at >= (long long)num_tokens * width) return;
  const long long row = at / width, column = at % width;
  const eight gate = eight_at(both + row * 2 * width + column);
  eight up = eight_at(both + row * 2 * width + width + column);
  for (int i = 0; i < 8; i++) {
    const float x = wide(gate.x[i]);
    up.x[i] = narrow(wide(narrow(x / (1.0f + expf(-x)))) * wide(up.x[i]));
  }
  *(eight*)(out + at) = up;
}
#endif

#ifdef ADD_NORM
/* x + y, and its RMS norm times weight; all [T, width] but weight [width]. A block: one token. */
extern "C" __global__ void NAME(const number* x, const number* y, const number* weight, number* total, number* normed,
                                int width, int eps_bits) {
  const long long first = (long long)blockIdx.x * width;
  float squares = 0.0f;
  for (int i = threadIdx.x * 8; i < width; i += THREADS * 8) {
    eight a = eight_at(x + first + i);
    const eight b = eight_at(y + first + i);
    for (int j = 0; j < 8; j++) {
      a.x[j] = narrow(wide(a.x[j]) + wide(b.x[j]));
      squares += wide(a.x[j]) * wide(a.x[j]);
    }
    *(eight*)(total + first + i) = a;
  }
  __shared__ float parts[THREADS / 32];
  squares = sum_of_warp(squares);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = squares;
  __syncthreads();
  float all = 0.0f;
  for (int w = 0; w < THREADS / 32; w++) all += parts[w];
  const float factor = rsqrtf(all / width + __int_as_float(eps_bits));
  for (int i = threadIdx.x * 8; i < width; i += THREADS * 8) { /* what this thread itself has written */
    eight a = eight_at(total + first + i);
    const eight w = eight_at(weight + i);
    for (int j = 0; j < 8; j++) a.x[j] = narrow(wide(a.x[j]) * factor * wide(w.x[j]));
    *(eight*)(normed + first + i) = a;
  }
}
#endif
