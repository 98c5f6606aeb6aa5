// How a token is chosen from what the head gives: the largest logit of all, or of a shortlist. Part of cuda.cu.

namespace {

// Floats in the order of their keys, all above 0.
INLINE u32 order_of(float f) {
  const u32 bits = __float_as_uint(f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

INLINE float of_order(u32 order) {
  return __uint_as_float(order & 0x80000000u ? order ^ 0x80000000u : ~order);
}

// The larger the logit the larger its key; of equal ones the first has the largest.
INLINE u64 key_of(float logit, int index) {
  return u64(order_of(logit)) << 32 | (0xffffffffu - u32(index));
}

// How far a logit that int8 rows gave may be from that of their bf16 or fp16: half a step of each code, what 16 bits of
// the result lose, the sums in fp32. *scale* is the largest magnitude of the row, *sum* that of all |x|.
INLINE float error_of(float rough, float scale, float sum) {
  constexpr float kStep = 1.0f / 254.0f + HIDDEN * 0x1p-24f;
  return 1.0001f * kStep * scale * sum + 0x1p-8f * fabsf(rough) + 1e-6f;
}

}  // namespace

// best[b] = the largest of logits[b], its order in the upper half, the least index of those in the lower, inverted.
// Grid: (blocks, B); best is 0 before.
extern "C" __global__ void __launch_bounds__(kThreads) largest(const u16* __restrict__ logits, u64* best, int V) {
  wait_for_predecessor();
  let_successor_start();
  u64 most = 0;
  const u16* row = logits + u64(blockIdx.y) * V;
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < V; i += gridDim.x * kThreads) {
    const u64 key = key_of(to_float(row[i]), i);
    if (key > most) most = key;
  }
#pragma unroll
  for (int other = 16; other; other /= 2) {
    const u64 key = __shfl_xor_sync(0xffffffffu, most, other);
    if (key > most) most = key;
  }
  if (threadIdx.x % 32 == 0) atomicMax(best + blockIdx.y, most);
}

// What the largest logit of x[b] is at least, by logits that int8 rows gave. sums[b] = the sum of |x[b]|; low[b] = the
// order of that bound. Grid: (blocks, B); low is 0 before.
extern "C" __global__ void __launch_bounds__(kThreads)
    shortlist_bound(const u16* __restrict__ x, const u16* __restrict__ rough, const float* __restrict__ scales,
                    float* __restrict__ sums, u32* low, int V) {
  __shared__ float parts[kWarps];
  wait_for_predecessor();
  let_successor_start();
  const int b = blockIdx.y;
  float sum = 0;
  for (int chunk = threadIdx.x; chunk < HIDDEN / 8; chunk += kThreads) {
    const Words w = load_x(x + u64(b) * HIDDEN + 8 * chunk);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += fabsf(low_of(w.v[i])) + fabsf(high_of(w.v[i]));
  }
  sum = sum_of_block(sum, parts);
  if (blockIdx.x == 0 && threadIdx.x == 0) sums[b] = sum;
  float most = kNothing;
  for (int v = blockIdx.x * kThreads + threadIdx.x; v < V; v += gridDim.x * kThreads) {
    const float logit = to_float(rough[u64(b) * V + v]);
    // fmaxf passes over NaN: where all are, low stays 0 and every row is looked at.
    most = fmaxf(most, logit - error_of(logit, scales[v], sum));
  }
  most = max_of_warp(most);
  if (threadIdx.x % 32 == 0 && most > kNothing) atomicMax(low + b, order_of(most));
}

// best[b] = the key of the largest of x[b] · rows, which are read where their int8 logit does not rule them out.
// Grid: (blocks, B); best is 0 before.
extern "C" __global__ void __launch_bounds__(kThreads)
    shortlist_largest(const u16* __restrict__ x, const u16* __restrict__ rough, const float* __restrict__ scales,
                      const u16* __restrict__ rows, const float* sums, const u32* low, u64* best, int V) {
  wait_for_predecessor();
  let_successor_start();
  const int b = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float sum = sums[b], bound = of_order(low[b]);
  u64 most = 0;
  for (int first = 32 * (blockIdx.x * kWarps + warp); first < V; first += 32 * kWarps * gridDim.x) {
    const int v = first + lane;
    bool there = false;
    if (v < V) {
      const float logit = to_float(rough[u64(b) * V + v]);
      // Not ruled out, also where one of both is no number.
      there = !(logit + error_of(logit, scales[v], sum) < bound);
    }
    for (u32 left = __ballot_sync(0xffffffffu, there); left; left &= left - 1) {
      const int row = first + __ffs(left) - 1;
      float dot = 0;
#pragma unroll 4
      for (int chunk = lane; chunk < HIDDEN / 8; chunk += 32) {
        const Words w = load_x(rows + u64(row) * HIDDEN + 8 * chunk), a = load_x(x + u64(b) * HIDDEN + 8 * chunk);
#pragma unroll
        for (int i = 0; i < 4; ++i) dot += low_of(w.v[i]) * low_of(a.v[i]) + high_of(w.v[i]) * high_of(a.v[i]);
      }
      const u64 key = key_of(sum_of_warp(dot), row);
      if (key > most) most = key;
    }
  }
  if (lane == 0 && most) atomicMax(best + b, most);
}

// Take the largest as the next token: note it at its place in tokens [B, T], go on by one place, and begin the next
// step with its embedding. low (of a shortlist, or nothing) begins anew. Grid: (B).
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    next_token(u64* best, int* position, long long* tokens, const u16* __restrict__ embedding, u16* __restrict__ hidden,
               u32* low, int T) {
  wait_for_predecessor();
  let_successor_start();
  const int b = blockIdx.x, place = position[b] + 1;
  const u32 token = 0xffffffffu - u32(best[b] & 0xffffffffu);
  __syncthreads();
  if (threadIdx.x == 0) {
    best[b] = 0;
    if (low) low[b] = 0;
    position[b] = place;
    if (place < T) tokens[u64(b) * T + place] = token;
  }
  for (int chunk = threadIdx.x; chunk < HIDDEN / 8; chunk += kThreads) {
    const Words w = load_x(embedding + u64(token) * HIDDEN + 8 * chunk);
    *reinterpret_cast<uint4*>(hidden + u64(b) * HIDDEN + 8 * chunk) = make_uint4(w.v[0], w.v[1], w.v[2], w.v[3]);
  }
}
