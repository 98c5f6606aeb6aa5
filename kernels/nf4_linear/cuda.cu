// NF4 (or any other 16 values) as bitsandbytes stores it: the matrix flat in blocks of 2^SHIFT, even k in the high
// nibble; W = code[nibble] * absmax[block]. NESTED: absmax[block] = table[bytes[block]] * absmax[block / 256] + offset.

// Two values for each byte of codes, once per lane: 32 lanes look up 64 weights without meeting in a bank. WIDE: a
// byte's values begin 256 bytes from the last one's, not 128, so that one permutation of bytes makes their address.
// Then the 256 values of the nested scales.
#define ROW_WORDS (WIDE ? 64 : 32)
#define TABLE_BYTES (256 * ROW_WORDS * 4 + 256 * 4 * NESTED)

#define ZERO_COLUMNS (NT == 1)
#define UNIFORM_WARP (NT == 1)

namespace {

struct Weights {
  const u8* codes;      // [N * K / 2], packed: [N / 16, K / 128, 2, 32 lanes, 16]
  const float* code;    // [16]
  const void* absmax;   // fp32 [N * K / 2^SHIFT]; nested: one for 256 blocks; packed: [N / 16, K / 128, 8, 2, 2], SCALES
  const u8* bytes;      // nested: [N * K / 2^SHIFT]
  const float* table;   // nested: [256]
  const float* offset;  // nested: one value; on the device, so that nobody waits for it
};

INLINE float absmax_at(const Weights& w, u64 index) {
  return __ldg(static_cast<const float*>(w.absmax) + index);
}

#if NESTED
struct Scale {
  float absmax;
  u8 byte;
};
#else
typedef float Scale;
#endif

INLINE Scale scale_at(const Weights& w, u64 block) {
#if NESTED
  return Scale{absmax_at(w, block >> 8), __ldg(w.bytes + block)};
#else
  return absmax_at(w, block);
#endif
}

#if PACKED
// Four scales: fp32, or where these say the same bf16 (SCALES 1) or fp16 (2).
#if SCALES
typedef uint2 FourScales;
#else
typedef float4 FourScales;
#endif

struct Scales {
  FourScales v;

  INLINE float at(int i) const {
#if SCALES
    return half_of(i < 2 ? v.x : v.y, i % 2, SCALES == 1);
#else
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
#endif
  }
};
#endif

struct ScaleCursor {
#if PACKED
  const FourScales* p;

  INLINE void start(const Weights& w, u64 index) { p = static_cast<const FourScales*>(w.absmax) + index / 4; }
  INLINE void load(Scales& scales, int ahead) const { scales.v = __ldg(p + ahead / 4); }
  INLINE void advance(int by) { p += by / 4; }
#elif SHIFT <= 7 && !NESTED
  // Every chunk begins with a block.
  const float* p;

  INLINE void start(const Weights& w, u64 index) { p = static_cast<const float*>(w.absmax) + (index >> SHIFT); }
  INLINE void load(Scale& scale, int ahead) const { scale = __ldg(p + (ahead >> SHIFT)); }
  INLINE void advance(int by) { p += by >> SHIFT; }
#else
  Weights weights;
  u64 index;

  INLINE void start(const Weights& w, u64 from) {
    weights = w;
    index = from;
  }
  INLINE void load(Scale& scale, int ahead) const { scale = scale_at(weights, (index + ahead) >> SHIFT); }
  INLINE void advance(int by) { index += by; }
#endif
};

// NF4's values times this round to bf16 with 0.6 times the error (root mean square 0.063 % instead of 0.106 %); what it
// is too much, a row's sum loses in the end.
constexpr float kUp = 1.437f, kOfRow = 1.0f / kUp;

}  // namespace

#include "four_bits.cuh"

namespace {

constexpr int kNested = 256 * ROW_WORDS;

INLINE void prepare(const Weights& w, u32* table) {
  for (int byte = threadIdx.x; byte < 256; byte += kThreads) {
    const u32 pair =
        from_float(kUp * __ldg(w.code + (byte >> 4))) | u32(from_float(kUp * __ldg(w.code + (byte & 15)))) << 16;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      reinterpret_cast<uint4*>(table)[ROW_WORDS / 4 * byte + ((i + byte) & 7)] = make_uint4(pair, pair, pair, pair);
#if NESTED
    table[kNested + byte] = __float_as_uint(__ldg(w.table + byte));
#endif
  }
}

INLINE void order_activations(Words&) {}

struct Convert {
  const u32* table;
  u32 lane_bytes;

  INLINE void operator()(u32 q, u32 (&pairs)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if WIDE
      // The place of a byte of codes is the byte times 256, that of the lane below.
      const u32 place = __byte_perm(q, lane_bytes, 0x5504u | u32(i) << 4);
#else
      const u32 place = ((i == 0 ? q << 7 : q >> (8 * i - 7)) & 0x7f80u) | lane_bytes;
#endif
      pairs[i] = *reinterpret_cast<const u32*>(reinterpret_cast<const u8*>(table) + place);
    }
  }
};

struct Value {
  const Weights& weights;
  const u32* table;

  INLINE float operator()(const Scale& scale) const {
#if NESTED
    return fmaf(__uint_as_float(table[kNested + scale.byte]), scale.absmax, __ldg(weights.offset));
#else
    return scale;
#endif
  }
};

INLINE void multiply(const Weights& weights, const u32* table, float (&acc)[NT][4], const Piece& piece, int part,
                     const u32 (&x)[NT][8], int lane) {
  multiply_groups(acc, piece, part, x, lane, Convert{table, 4u * lane}, Value{weights, table});
}

INLINE float at(const Weights& w, int n, int k, int K) {
  const u64 flat = u64(n) * K + k;
  const int nibble = (w.codes[flat / 2] >> (4 * (1 - int(flat & 1)))) & 15;
  const Scale scale = scale_at(w, flat >> SHIFT);
#if NESTED
  return kUp * __ldg(w.code + nibble) * fmaf(__ldg(w.table + scale.byte), scale.absmax, __ldg(w.offset));
#else
  return kUp * __ldg(w.code + nibble) * scale;
#endif
}

}  // namespace
