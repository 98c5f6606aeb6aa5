// What stands between the products of a decoder layer, for one token of each of B sequences.
//
// Macros of the build: T_BF16 (0: fp16), PDL, HIDDEN (elements of the residual stream, a multiple of 8), HEAD (elements
// of a head: 64 or 128), GROUP (query heads of a key head, at most 16), SPLITS (blocks of a cluster that share a
// context: 1, 2, 4, 8).

#include "common.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Below every score.
#define kNothing __uint_as_float(0xff800000u)

INLINE float low_of(u32 pair) {
  return to_float(u16(pair & 0xffffu));
}

INLINE float high_of(u32 pair) {
  return to_float(u16(pair >> 16));
}

INLINE u32 pair_of(float first, float second) {
  return u32(from_float(first)) | u32(from_float(second)) << 16;
}

INLINE float sum_of_warp(float f) {
#pragma unroll
  for (int other = 16; other; other /= 2) f += __shfl_xor_sync(0xffffffffu, f, other);
  return f;
}

INLINE float max_of_warp(float f) {
#pragma unroll
  for (int other = 16; other; other /= 2) f = fmaxf(f, __shfl_xor_sync(0xffffffffu, f, other));
  return f;
}

// The sum over the threads of a block, in all of them; *parts* is shared and used once.
INLINE float sum_of_block(float f, float (&parts)[kWarps]) {
  f = sum_of_warp(f);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = f;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += parts[i];
  return sum;
}

}  // namespace

// y[b] = x[b] / sqrt(mean(x[b]²) + eps) * weight. Grid: (B).
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    rms_norm(const u16* __restrict__ x, const u16* __restrict__ weight, u16* __restrict__ y, float eps) {
  constexpr int kChunks = HIDDEN / 8, kEach = (kChunks + kThreads - 1) / kThreads;
  __shared__ float sums[kWarps];
  Words w[kEach], v[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int chunk = threadIdx.x + i * kThreads;
    if (chunk < kChunks) w[i] = load_x(weight + 8 * chunk);
  }
  wait_for_predecessor();
  let_successor_start();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int chunk = threadIdx.x + i * kThreads;
    if (chunk >= kChunks) continue;
    v[i] = load_x(x + u64(blockIdx.x) * HIDDEN + 8 * chunk);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float a = low_of(v[i].v[j]), b = high_of(v[i].v[j]);
      sum += a * a + b * b;
    }
  }
  const float scale = rsqrtf(sum_of_block(sum, sums) / HIDDEN + eps);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int chunk = threadIdx.x + i * kThreads;
    if (chunk >= kChunks) continue;
    Words out;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      out.v[j] = pair_of(low_of(v[i].v[j]) * scale * low_of(w[i].v[j]), high_of(v[i].v[j]) * scale * high_of(w[i].v[j]));
    *reinterpret_cast<uint4*>(y + u64(blockIdx.x) * HIDDEN + 8 * chunk) = make_uint4(out.v[0], out.v[1], out.v[2], out.v[3]);
  }
}

namespace {

constexpr int kTile = 128;                      // tokens that are looked at together
constexpr int kLanes = 8;                       // lanes that share a token's key
constexpr int kGroups = kThreads / kLanes;
constexpr int kEach = kTile / kGroups;          // tokens of a group of lanes
constexpr int kPieces = HEAD / (8 * kLanes);    // loads of eight elements that a lane's part of a key takes
constexpr int kPairs = HEAD / 2;                // threads that a value's elements take, two each
constexpr int kSides = kThreads / kPairs;
constexpr int kTurns = kTile / kSides;          // tokens of a thread's values

struct Shared {
  // Lane p of a key's eight meets elements 64 c + 8 p + i as query[g][c][i / 4][p][i % 4]: no two in one bank.
  float query[GROUP][kPieces][2][kLanes][4];
  float scores[GROUP][kTile];
  float shrink[GROUP], most[GROUP], total[GROUP];
  float sides[kSides][GROUP][HEAD];
  float out[GROUP][HEAD];
  // The new token's, as they go into the cache.
  u16 key[HEAD], value[HEAD];
};

// Elements i and i + HEAD / 2 of a head, turned by the angle of its place. x lies in global memory.
INLINE void turned(const u16* x, int i, float cosine, float sine, float& first, float& second) {
  const float a = to_float(x[i]), b = to_float(x[i + HEAD / 2]);
  first = a * cosine - b * sine;
  second = b * cosine + a * sine;
}

}  // namespace

// Attention of one new token for each sequence b over its context in a cache of T places, the token's own key and value
// put there first. qkv [B, (GROUP + 2) * heads, HEAD]: queries, keys, values; keys and values [B, heads, T, HEAD];
// position[b] is the new token's place, start[b] the first one that is no padding. *turn* [HEAD / 2] are the angles of
// one step, *scaling* what they multiply (YaRN), *scale* the scores'. y [B, GROUP * heads, HEAD].
// Grid: (SPLITS, heads, B), cluster (SPLITS, 1, 1); shared memory: sizeof(Shared).
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention(const u16* __restrict__ qkv, u16* keys, u16* values, const int* __restrict__ position,
              const int* __restrict__ start, const float* __restrict__ turn, float scaling, float scale,
              u16* __restrict__ y, int T) {
  extern __shared__ uint4 memory[];
  Shared& own = *reinterpret_cast<Shared*>(memory);
  const int rank = blockIdx.x, head = blockIdx.y, heads = gridDim.y, b = blockIdx.z;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  keys += (u64(b) * heads + head) * T * HEAD;
  values += (u64(b) * heads + head) * T * HEAD;
  // The predecessor writes qkv alone; where the token stands, and the context before it, were there long before.
  const int place = position[b], first = start[b], count = place + 1 - first;
  const int each = (count + SPLITS - 1) / SPLITS;
  const int begin = first + rank * each, end = min(begin + each, place + 1);
  const int part = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int two = threadIdx.x % kPairs, side = threadIdx.x / kPairs;
  Words k[kEach][kPieces];
  u32 v[kTurns];
  const auto fetch = [&](int tile) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int at = tile + group + kGroups * e;
      if (at < min(end, place)) {
#pragma unroll
        for (int c = 0; c < kPieces; ++c) k[e][c] = load_x(keys + u64(at) * HEAD + 64 * c + 8 * part);
      }
    }
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int at = tile + side + kSides * i;
      v[i] = at < min(end, place) ? *reinterpret_cast<const volatile u32*>(values + u64(at) * HEAD + 2 * two) : 0;
    }
  };
  fetch(begin);
  if (threadIdx.x < GROUP) own.most[threadIdx.x] = kNothing, own.total[threadIdx.x] = 0;
  wait_for_predecessor();
  let_successor_start();

  const u16* row = qkv + u64(b) * (GROUP + 2) * heads * HEAD;
  const auto angle = [&](int i, float& sine, float& cosine) {
    sincospif(float(place - first) * turn[i] * 0.318309886f, &sine, &cosine);
    sine *= scaling;
    cosine *= scaling;
  };
  for (int o = threadIdx.x; o < GROUP * (HEAD / 2); o += kThreads) {
    const int g = o / (HEAD / 2), i = o % (HEAD / 2);
    float sine, cosine, pair[2];
    angle(i, sine, cosine);
    turned(row + (head * GROUP + g) * HEAD, i, cosine, sine, pair[0], pair[1]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = i + h * (HEAD / 2);
      // Scores in powers of two.
      own.query[g][at / 64][at / 4 % 2][at / 8 % 8][at % 4] = pair[h] * scale * 1.44269504f;
    }
  }
  if (end == place + 1 && begin < end && threadIdx.x < HEAD / 2) {
    const u16 *key = row + (GROUP * heads + head) * HEAD, *value = key + heads * HEAD;
    const int i = threadIdx.x, h = i + HEAD / 2;
    float sine, cosine, one, other;
    angle(i, sine, cosine);
    turned(key, i, cosine, sine, one, other);
    own.key[i] = keys[u64(place) * HEAD + i] = from_float(one);
    own.key[h] = keys[u64(place) * HEAD + h] = from_float(other);
    own.value[i] = values[u64(place) * HEAD + i] = value[i];
    own.value[h] = values[u64(place) * HEAD + h] = value[h];
  }
  __syncthreads();

  float sums[GROUP][2] = {};
  for (int tile = begin; tile < end; tile += kTile) {
    if (tile > begin) fetch(tile);
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int j = group + kGroups * e, at = tile + j;
      float dots[GROUP] = {};
      if (at < end) {
#pragma unroll
        for (int c = 0; c < kPieces; ++c) {
          const Words now = at == place ? *reinterpret_cast<const Words*>(own.key + 64 * c + 8 * part) : k[e][c];
#pragma unroll
          for (int g = 0; g < GROUP; ++g) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float4 q = *reinterpret_cast<const float4*>(own.query[g][c][h][part]);
              dots[g] += low_of(now.v[2 * h]) * q.x + high_of(now.v[2 * h]) * q.y;
              dots[g] += low_of(now.v[2 * h + 1]) * q.z + high_of(now.v[2 * h + 1]) * q.w;
            }
          }
        }
      }
#pragma unroll
      for (int g = 0; g < GROUP; ++g) {
#pragma unroll
        for (int other = kLanes / 2; other; other /= 2) dots[g] += __shfl_xor_sync(0xffffffffu, dots[g], other);
        if (part == 0) own.scores[g][j] = at < end ? dots[g] : kNothing;
      }
    }
    __syncthreads();
    for (int g = warp; g < GROUP; g += kWarps) {
      float score[kTile / 32], most = own.most[g], total = 0;
      const float before = most;
#pragma unroll
      for (int i = 0; i < kTile / 32; ++i) {
        score[i] = own.scores[g][lane + 32 * i];
        most = fmaxf(most, score[i]);
      }
      most = max_of_warp(most);
#pragma unroll
      for (int i = 0; i < kTile / 32; ++i) {
        score[i] = exp2f(score[i] - most);
        total += score[i];
        own.scores[g][lane + 32 * i] = score[i];
      }
      total = sum_of_warp(total);
      if (lane == 0) {
        const float shrink = exp2f(before - most);
        own.shrink[g] = shrink;
        own.total[g] = own.total[g] * shrink + total;
        own.most[g] = most;
      }
    }
    __syncthreads();
#pragma unroll
    for (int g = 0; g < GROUP; ++g) sums[g][0] *= own.shrink[g], sums[g][1] *= own.shrink[g];
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int j = side + kSides * i;
      if (tile + j >= end) break;
      const u32 now = tile + j == place ? *reinterpret_cast<const u32*>(own.value + 2 * two) : v[i];
#pragma unroll
      for (int g = 0; g < GROUP; ++g) {
        sums[g][0] += own.scores[g][j] * low_of(now);
        sums[g][1] += own.scores[g][j] * high_of(now);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int g = 0; g < GROUP; ++g) own.sides[side][g][2 * two] = sums[g][0], own.sides[side][g][2 * two + 1] = sums[g][1];
  __syncthreads();
  for (int o = threadIdx.x; o < GROUP * HEAD; o += kThreads) {
    float sum = 0;
#pragma unroll
    for (int s = 0; s < kSides; ++s) sum += own.sides[s][o / HEAD][o % HEAD];
    own.out[o / HEAD][o % HEAD] = sum;
  }
  sync_cluster();
  // Every block of the cluster finishes its share of the elements.
  for (int o = threadIdx.x + rank * kThreads; o < GROUP * HEAD; o += kThreads * SPLITS) {
    const int g = o / HEAD, i = o % HEAD;
    float most = kNothing, sum = 0, total = 0;
#pragma unroll
    for (int r = 0; r < SPLITS; ++r) most = fmaxf(most, of_block(&own.most[g], r));
#pragma unroll
    for (int r = 0; r < SPLITS; ++r) {
      const float weight = exp2f(of_block(&own.most[g], r) - most);
      sum += weight * of_block(&own.out[g][i], r);
      total += weight * of_block(&own.total[g], r);
    }
    y[(u64(b) * heads * GROUP + head * GROUP + g) * HEAD + i] = from_float(sum / total);
  }
  // Nobody leaves while another still reads from it.
  sync_cluster();
}

#include "decode_layer/choose.cu"
