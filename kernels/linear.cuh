// y[M, N] = x[M, K] · W[N, K]ᵀ + bias with W dequantized in registers, for M = 1 … 64 tokens (more in tiles of 8 * NT).
//
// The weights are the A operand of mma.m16n8k16: tokens are padded to 8, not to 16, and each weight is converted once
// for all of them. A thread loads 16 contiguous bytes of a row; in which order the MMAs meet the k of a chunk is free
// as long as x comes in the same order, so rows can be read as they are stored and weights pass through no shared
// memory. WN warps of a block have rows of their own, WK take turns along K; so do the SPLITS blocks of a cluster. x
// comes straight from L1: through shared memory, with a barrier per step, it came slower for every number of tokens
// (H100).
//
// What a format gives (int8_linear/cuda.cu, int4_linear/cuda.cu, nf4_linear/cuda.cu):
//   CHUNK            k per warp and step
//   TABLE_BYTES      of shared memory, that prepare() fills
//   struct Weights   what a kernel is given of the matrix
//   struct Piece     what a thread holds of 16 rows and one chunk
//   struct Cursor    where a thread reads: load(piece, steps ahead), advance(steps)
//   k_of_lane()      where in 64 k the 16 of a thread begin; order_activations()
//   multiply()       the MMAs of one piece and one of its parts of 64 k
//   scale_of_row()   what the sum is multiplied by in the end
//   at()             one weight as float, for the path that assumes nothing about N and K
//   ZERO_COLUMNS, UNIFORM_WARP   1 where that took fewer joules for one token (bench/variants.py)
// Macros of the build: T_BF16 (0: fp16), MT (16 rows each), NT (8 tokens each), WN, WK, DEPTH (chunks in flight per
// warp), AHEAD (parts of x in registers, 1 or 2), SPLITS, BLOCKS (per multiprocessor, at least), EVICT_FIRST (1:
// weights leave L2 first), PDL (1: weights are read before the preceding kernel has ended), PACKED (1: tiles of 16
// rows, see pack.py), TAIL (1: K is no multiple of CHUNK), SHIFT (a group has 2^SHIFT weights), PAIRS (1: of every 16
// rows the first eight are gates and the others what they open: y[M, N / 2] = silu(gate) * up), RESIDUAL (1: something
// of y's shape is added).

#include "common.cuh"

namespace {

constexpr int kRowsOfWarp = 16 * MT;
constexpr int kRows = kRowsOfWarp * WN;
constexpr int kTokens = 8 * NT;
constexpr int kThreads = 32 * WN * WK;
// From one chunk of a warp to its next, in chunks.
constexpr int kStride = SPLITS * WK;

// Weights are read once: they must push out neither x from L1 nor what the next kernel needs from L2.
INLINE Words load_streamed(const void* p) {
  Words w;
#if EVICT_FIRST
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(w.v[0]), "=r"(w.v[1]), "=r"(w.v[2]), "=r"(w.v[3])
               : "l"(p), "l"(policy));
#else
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.v[0]), "=r"(w.v[1]), "=r"(w.v[2]), "=r"(w.v[3])
               : "l"(p));
#endif
  return w;
}

// a * b + c of two pairs.
INLINE u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
#if T_BF16
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#else
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
  return d;
}

// c[16 rows, 8 tokens] += a[16 rows, 16 k] · b[16 k, 8 tokens]
INLINE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if T_BF16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace

#include FORMAT

namespace {

// A thread's x is held for 64 k at a time: two loads of 16 bytes for each 8 tokens.
constexpr int kParts = CHUNK / 64;
// A row of a warp's sums is padded, so that the eight rows of a store meet different banks.
constexpr int kPitch = kTokens + 1;
constexpr int kSumBytes = WK * WN * 16 * kPitch * 4;

// A thread's elements of x in the order of its weights: pairs for the MMAs.
struct Activations {
  u32 v[NT][8];
};

INLINE void put(Activations& a, int n, int half, Words w) {
  order_activations(w);
#pragma unroll
  for (int i = 0; i < 4; ++i) a.v[n][4 * half + i] = w.v[i];
}

// x straight from L1. What comes of columns beyond the last token is not stored. With ZERO_COLUMNS they are zero, which
// switches no transistors in the MMAs (1: by a branch, 2: by a predicate); without they are the last token once more.
struct Direct {
  const u16* rows[NT];
  int left;    // k before the end of x, from where the rows point
  int tokens;  // from the lane's first

  INLINE Direct(const u16* x, int token0, int k, int M, int K, int lane)
      : left(K - k), tokens(M - token0 - lane / 4) {
#pragma unroll
    for (int n = 0; n < NT; ++n) rows[n] = x + u64(min(token0 + 8 * n + lane / 4, M - 1)) * K + k + k_of_lane(lane & 3);
  }

  INLINE void load(Activations& a, int ahead, int part, int t) const {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int offset = ahead * kStride * CHUNK + 64 * part + 8 * half;
        const bool column = ZERO_COLUMNS == 0 || 8 * n < tokens;
        if (TAIL) {
          Words w = {{0, 0, 0, 0}};
          if (column && offset + k_of_lane(t) < left) w = load_x(rows[n] + offset);
          put(a, n, half, w);
        } else if (ZERO_COLUMNS == 2) {
          // What was zero stays so.
          Words w;
#pragma unroll
          for (int i = 0; i < 4; ++i) w.v[i] = a.v[n][4 * half + i];
          load_x_where(column, rows[n] + offset, w);
          put(a, n, half, w);
        } else if (column) {
          put(a, n, half, load_x(rows[n] + offset));
        }
      }
    }
  }

  INLINE void advance(int steps) {
#pragma unroll
    for (int n = 0; n < NT; ++n) rows[n] += steps * kStride * CHUNK;
    left -= steps * kStride * CHUNK;
  }
};

// Of 16 rows so many make results of their own, the others belong to them.
constexpr int kShare = PAIRS ? 8 : 16;

INLINE int row_of(int i) {
  return i / kShare * 16 + i % kShare;
}

// One result: *sum* of row n, of a pair with *other* of row n + 8.
struct Results {
  const Weights& weights;
  const u16* bias;
  const u16* residual;
  u16* y;
  int N;

  INLINE float finished(int n, float sum) const {
    sum *= scale_of_row(weights, n);
    return bias ? sum + to_float(bias[n]) : sum;
  }

  INLINE void put(int token, int n, float sum, float other) const {
    float f = finished(n, sum);
#if PAIRS
    f *= finished(n + 8, other) / (1.0f + __expf(-f));
    y[u64(token) * (N / 2) + n / 16 * 8 + n % 8] = from_float(f);
#else
    if (RESIDUAL) f += to_float(residual[u64(token) * N + n]);
    y[u64(token) * N + n] = from_float(f);
#endif
  }
};

// x that comes from L1 or L2 is asked for one part ahead where there are registers for two; where it is then is known
// when compiling.
constexpr int kAhead = DEPTH * kParts % 2 == 0 ? AHEAD : 1;

}  // namespace

// Needs N >= rows; K % 16 == 0 (int8) or K % 64 == 0 (four bits); packed N % 16 == 0 and K % CHUNK == 0; x aligned
// to 16. Grid: (at most ceil(N / rows), SPLITS, ceil(M / tokens)); cluster (1, SPLITS, 1); shared memory:
// Build.shared_bytes.
extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS)
    linear(Weights weights, const u16* __restrict__ x, const u16* __restrict__ bias, const u16* __restrict__ residual,
           u16* __restrict__ y, int M, int N, int K) {
  // The table of the format, the sums of the warps, those of the block.
  extern __shared__ uint4 shared[];
  u32* const table = reinterpret_cast<u32*>(shared);
  u8* const behind = reinterpret_cast<u8*>(shared) + TABLE_BYTES;
  float (*const sums)[WN * 16][kPitch] = reinterpret_cast<float (*)[WN * 16][kPitch]>(behind);
  float (*const block_sums)[kTokens] = reinterpret_cast<float (*)[kTokens]>(behind + kSumBytes);

  const Results results = {weights, bias, residual, y, N};
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  // That all lanes of a warp have the same number the compiler cannot know: UNIFORM_WARP lets addresses stay in the
  // registers of the warp.
  const int warp = UNIFORM_WARP ? __shfl_sync(0xffffffffu, int(threadIdx.x >> 5), 0) : int(threadIdx.x >> 5);
  const int wn = warp % WN, wk = warp / WN;
  const int token0 = blockIdx.z * kTokens;
  const int tiles = (N + kRows - 1) / kRows;
  const int chunks = (K + CHUNK - 1) / CHUNK;
  const int first = int(blockIdx.y) * WK + wk;
  const int count = first < chunks ? (chunks - first + kStride - 1) / kStride : 0;

  Cursor cursors[MT];
  Piece pieces[DEPTH][MT];
  // The last tile begins earlier rather than ending later: rows that two blocks compute come out alike in both.
  const auto begin = [&](int tile) {
    const int row0 = min(tile * kRows, N - kRows);
#pragma unroll
    for (int m = 0; m < MT; ++m) cursors[m].start(weights, row0 + kRowsOfWarp * wn + 16 * m, first, K, lane);
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      if (d < count) {
#pragma unroll
        for (int m = 0; m < MT; ++m) cursors[m].load(pieces[d][m], d);
      }
    }
  };
  begin(blockIdx.x);
  prepare(weights, table);
  if (TABLE_BYTES) __syncthreads();
  wait_for_predecessor();
  let_successor_start();

  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int row0 = min(tile * kRows, N - kRows);
    float acc[MT][NT][4] = {};
    Activations ahead[kAhead] = {};
    Direct direct(x, token0, first * CHUNK, M, K, lane);
    if (kAhead == 2 && count > 0) direct.load(ahead[0], 0, 0, t);
    for (int i = 0; i < count; i += DEPTH) {
#pragma unroll
      for (int d = 0; d < DEPTH; ++d) {
        if (i + d < count) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            const int turn = d * kParts + part;
            Activations& now = ahead[turn % kAhead];
            if (kAhead == 1) {
              direct.load(now, d, part, t);
            } else if (part + 1 < kParts || i + d + 1 < count) {
              direct.load(ahead[(turn + 1) % kAhead], (turn + 1) / kParts, (turn + 1) % kParts, t);
            }
#pragma unroll
            for (int m = 0; m < MT; ++m) {
              multiply(weights, table, acc[m], pieces[d][m], part, now.v, lane);
              if (part + 1 == kParts && i + d + DEPTH < count) cursors[m].load(pieces[d][m], d + DEPTH);
            }
          }
        }
      }
#pragma unroll
      for (int m = 0; m < MT; ++m) cursors[m].advance(DEPTH);
      direct.advance(DEPTH);
    }

    // What the next tile needs is on its way while this one is summed up.
    if (tile + int(gridDim.x) < tiles) begin(tile + gridDim.x);

#pragma unroll
    for (int m = 0; m < MT; ++m) {
      // All have left the sums before.
      __syncthreads();
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[wk][16 * wn + g + 8 * (i / 2)][8 * n + 2 * t + i % 2] = acc[m][n][i];
      }
      __syncthreads();
      const auto summed = [&](int row, int token) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WK; ++w) sum += sums[w][row][token];
        return sum;
      };
      const int count = SPLITS > 1 ? WN * 16 : WN * kShare;
      for (int o = threadIdx.x; o < count * kTokens; o += kThreads) {
        const int row = SPLITS > 1 ? o % count : row_of(o % count), token = o / count;
        if (token0 + token >= M) break;
        const float sum = summed(row, token);
        const int inner = row / 16 * kRowsOfWarp + 16 * m + row % 16;
        if (SPLITS > 1) {
          block_sums[inner][token] = sum;
        } else {
          results.put(token0 + token, row0 + inner, sum, PAIRS ? summed(row + 8, token) : 0);
        }
      }
    }
    if (SPLITS > 1) {
      sync_cluster();
      // Each block of the cluster finishes its share of the rows, always in the same order.
      constexpr int kCount = kRows / 16 * kShare;
      for (int o = threadIdx.x + int(blockIdx.y) * kThreads; o < kCount * kTokens; o += kThreads * SPLITS) {
        const int row = row_of(o % kCount), token = o / kCount;
        if (token0 + token >= M) break;
        float sum = 0, other = 0;
#pragma unroll
        for (int r = 0; r < SPLITS; ++r) {
          sum += of_block(&block_sums[row][token], r);
          if (PAIRS) other += of_block(&block_sums[row + 8][token], r);
        }
        results.put(token0 + token, row0 + row, sum, other);
      }
      // Nobody goes on while another still reads its sums.
      sync_cluster();
    }
  }
}

#if !PACKED && !PAIRS
// Any N and K, any alignment: a warp per row, scalar loads. Grid: (ceil(N / warps), M).
extern "C" __global__ void __launch_bounds__(kThreads)
    linear_any(Weights weights, const u16* __restrict__ x, const u16* __restrict__ bias,
               const u16* __restrict__ residual, u16* __restrict__ y, int M, int N, int K) {
  wait_for_predecessor();
  let_successor_start();
  const int n = blockIdx.x * WN * WK + (threadIdx.x >> 5), lane = threadIdx.x & 31, token = blockIdx.y;
  if (n >= N) return;
  float sum = 0;
  for (int k = lane; k < K; k += 32) sum += at(weights, n, k, K) * to_float(x[u64(token) * K + k]);
#pragma unroll
  for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
  if (lane == 0) Results{weights, bias, residual, y, N}.put(token, n, sum, 0);
}
#endif
