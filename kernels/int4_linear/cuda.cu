// int4 in groups along K: W[n, k] = (code[n, k] - 8) * scale[n, k / group], even k in the low nibble.

#define TABLE_BYTES 0

#define ZERO_COLUMNS (NT == 1)
#define UNIFORM_WARP (NT == 1)

namespace {

struct Weights {
  const u8* codes;    // [N, K / 2], packed: [N / 16, K / 128, 2, 32 lanes, 16]
  const u16* scales;  // [N, K / group] in the type of the activations, packed: [N / 16, K / 128, 8, 2, 2]
};

typedef u16 Scale;

#if PACKED
struct Scales {
  uint2 v;

  INLINE float at(int i) const { return half_of(i < 2 ? v.x : v.y, i % 2, T_BF16); }
};
#endif

struct ScaleCursor {
#if PACKED
  const u16* p;

  INLINE void start(const Weights& w, u64 index) { p = w.scales + index; }
  INLINE void load(Scales& scales, int ahead) const { scales.v = __ldg(reinterpret_cast<const uint2*>(p + ahead)); }
  INLINE void advance(int by) { p += by; }
#elif SHIFT <= 7
  // Every chunk begins with a group.
  const u16* p;

  INLINE void start(const Weights& w, u64 index) { p = w.scales + (index >> SHIFT); }
  INLINE void load(Scale& scale, int ahead) const { scale = __ldg(p + (ahead >> SHIFT)); }
  INLINE void advance(int by) { p += by >> SHIFT; }
#else
  const u16* p;
  u64 index;

  INLINE void start(const Weights& w, u64 from) {
    p = w.scales;
    index = from;
  }
  INLINE void load(Scale& scale, int ahead) const { scale = __ldg(p + ((index + ahead) >> SHIFT)); }
  INLINE void advance(int by) { index += by; }
#endif
};

constexpr float kOfRow = 1.0f;

}  // namespace

#include "four_bits.cuh"

namespace {

INLINE void prepare(const Weights&, u32*) {}

// Nibbles are taken from both halves of a word at once: (0, 4), (1, 5), (2, 6), (3, 7); packed, those are neighbours.
INLINE void order_activations(Words& w) {
#if !PACKED
  const Words x = w;
  w.v[0] = __byte_perm(x.v[0], x.v[2], 0x5410);
  w.v[1] = __byte_perm(x.v[0], x.v[2], 0x7632);
  w.v[2] = __byte_perm(x.v[1], x.v[3], 0x5410);
  w.v[3] = __byte_perm(x.v[1], x.v[3], 0x7632);
#endif
}

struct Convert {
  INLINE void operator()(u32 q, u32 (&pairs)[4]) const {
    // A code under the exponent of 128 (fp16: 1024), less 136 (1032): exact.
    constexpr u32 kBase = T_BF16 ? 0x43004300u : 0x64006400u;
    constexpr u32 kOne = T_BF16 ? 0x3f803f80u : 0x3c003c00u;
    constexpr u32 kMiddle = T_BF16 ? 0xc308c308u : 0xe408e408u;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u32 pair;
      // (q & mask) | base in one instruction, which the compiler does not find.
      asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(pair) : "r"(q >> (4 * i)), "n"(0x000f000f), "r"(kBase));
      pairs[i] = fma2(pair, kOne, kMiddle);
    }
  }
};

struct Value {
  INLINE float operator()(Scale scale) const { return to_float(scale); }
};

INLINE void multiply(const Weights&, const u32*, float (&acc)[NT][4], const Piece& piece, int part,
                     const u32 (&x)[NT][8], int lane) {
  multiply_groups(acc, piece, part, x, lane, Convert(), Value());
}

INLINE float at(const Weights& w, int n, int k, int K) {
  const int code = (w.codes[(u64(n) * K + k) / 2] >> (4 * (k & 1))) & 15;
  return float(code - 8) * to_float(w.scales[(u64(n) * K + k) >> SHIFT]);
}

}  // namespace
