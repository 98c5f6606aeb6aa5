// NF4 (or any other 16 values) as bitsandbytes stores it: the matrix flat in blocks of 2^SHIFT, even k in the high
// nibble; W = code[nibble] * absmax[block]. NESTED: absmax[block] = table[bytes[block]] * absmax[block / 256] + offset.

// Two values for each byte of codes, once per lane: 32 lanes look up 64 weights without meeting in a bank. Then the
// 256 values of the nested scales.
#define TABLE_BYTES (256 * 32 * 4 + 256 * 4 * NESTED)

namespace {

struct Weights {
  const u8* codes;      // [N * K / 2], packed: [N / 16, K / 128, 2, 32 lanes, 16]
  const float* code;    // [16]
  const float* absmax;  // [N * K / 2^SHIFT], packed: [N / 16, K / 128, 8, 2, 2]; nested: one for 256 blocks
  const u8* bytes;      // nested: [N * K / 2^SHIFT]
  const float* table;   // nested: [256]
  const float* offset;  // nested: one value; on the device, so that nobody waits for it
};

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
  return Scale{__ldg(w.absmax + (block >> 8)), __ldg(w.bytes + block)};
#else
  return __ldg(w.absmax + block);
#endif
}

struct ScaleCursor {
#if PACKED
  const float4* p;

  INLINE void start(const Weights& w, u64 index) { p = reinterpret_cast<const float4*>(w.absmax + index); }
  INLINE void load(Scale (&scales)[4], int ahead) const {
    const float4 v = __ldg(p + ahead / 4);
    scales[0] = v.x;
    scales[1] = v.y;
    scales[2] = v.z;
    scales[3] = v.w;
  }
  INLINE void advance(int by) { p += by / 4; }
#elif SHIFT <= 7 && !NESTED
  // Every chunk begins with a block.
  const float* p;

  INLINE void start(const Weights& w, u64 index) { p = w.absmax + (index >> SHIFT); }
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

constexpr int kNested = 256 * 32;

INLINE void prepare(const Weights& w, u32* table) {
  for (int byte = threadIdx.x; byte < 256; byte += kThreads) {
    const u32 pair =
        from_float(kUp * __ldg(w.code + (byte >> 4))) | u32(from_float(kUp * __ldg(w.code + (byte & 15)))) << 16;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      reinterpret_cast<uint4*>(table)[8 * byte + ((i + byte) & 7)] = make_uint4(pair, pair, pair, pair);
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
      // 128 bytes for each byte of codes: its place is the byte times 128.
      const u32 shifted = i == 0 ? q << 7 : q >> (8 * i - 7);
      pairs[i] = *reinterpret_cast<const u32*>(reinterpret_cast<const u8*>(table) + ((shifted & 0x7f80u) | lane_bytes));
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
