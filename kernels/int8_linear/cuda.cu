// LLM.int8 rows as bitsandbytes stores them: W[n, k] = CB[n, k] * SCB[n] / 127. Packed: signs and magnitudes.

#define CHUNK 64
#define TABLE_BYTES 0

#define ZERO_COLUMNS (NT == 1)
#define UNIFORM_WARP 0

namespace {

struct Weights {
  const s8* codes;      // [N, K], packed: [N / 16, K / 64, 2, 32 lanes, 16], see pack.py
  const float* scales;  // [N], the largest magnitude of each row
};

struct Piece {
  Words rows[2];
};

struct Cursor {
  const s8* rows[2];
  int left;

  INLINE void start(const Weights& w, int row, int chunk, int K, int lane) {
#if PACKED
    rows[0] = w.codes + (u64(row / 16) * (K / CHUNK) + chunk) * 1024 + 16 * lane;
    rows[1] = rows[0] + 512;
#else
    rows[0] = w.codes + u64(row + lane / 4) * K + chunk * CHUNK + 16 * (lane & 3);
    rows[1] = rows[0] + 8 * u64(K);
    left = K - chunk * CHUNK - 16 * (lane & 3);
#endif
  }

  INLINE void load(Piece& piece, int ahead) const {
    const int offset = ahead * kStride * (PACKED ? 1024 : CHUNK);
    if (TAIL && offset >= left) return;
    piece.rows[0] = load_streamed(rows[0] + offset);
    piece.rows[1] = load_streamed(rows[1] + offset);
  }

  INLINE void advance(int steps) {
    const int offset = steps * kStride * (PACKED ? 1024 : CHUNK);
    rows[0] += offset;
    rows[1] += offset;
    left -= offset;
  }
};

INLINE void prepare(const Weights&, u32*) {}

INLINE int k_of_lane(int t) {
  return 16 * t;
}

// What the MMAs are given of a packed weight w is w / 2^133 in bf16, w / 2^24 in fp16. With x 2^64 times as large, sums
// of bf16 stay far from the smallest floats (and x may be as large as 2^63).
INLINE void order_activations(Words& w) {
#if PACKED && T_BF16
#pragma unroll
  for (int i = 0; i < 4; ++i) w.v[i] = fma2(w.v[i], 0x5f805f80u, 0x80008000u);
#endif
}

// Four signed bytes to two pairs, exactly.
INLINE void convert(u32 q, u32& first, u32& second) {
#if PACKED
  // A sign and seven bits at the low end are a denormal number in either type, and MMAs take those as they are.
  first = q & 0x807f807fu;
  second = __byte_perm(q, q, 0x2103) & 0x807f807fu;
#elif T_BF16
  // Byte b under the exponent of 128 reads 128 + (b & 127); its sign bit alone reads 128 or 256. The difference is b.
  const u32 low = __byte_perm(q, 0x43434343u, 0x4140), high = __byte_perm(q, 0x43434343u, 0x4342);
  first = fma2(low & 0xff80ff80u, 0xbf80bf80u, low & 0xff7fff7fu);
  second = fma2(high & 0xff80ff80u, 0xbf80bf80u, high & 0xff7fff7fu);
#else
  // b + 128 under the exponent of 1024, less 1152.
  q ^= 0x80808080u;
  first = fma2(__byte_perm(q, 0x64646464u, 0x4140), 0x3c003c00u, 0xe480e480u);
  second = fma2(__byte_perm(q, 0x64646464u, 0x4342), 0x3c003c00u, 0xe480e480u);
#endif
}

INLINE void multiply(const Weights&, const u32*, float (&acc)[NT][4], const Piece& piece, int, const u32 (&x)[NT][8],
                     int) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    u32 a0, a1, a2, a3;
    convert(piece.rows[0].v[j], a0, a2);
    convert(piece.rows[1].v[j], a1, a3);
#pragma unroll
    for (int n = 0; n < NT; ++n) mma(acc[n], a0, a1, a2, a3, x[n][2 * j], x[n][2 * j + 1]);
  }
}

INLINE float scale_of_row(const Weights& w, int n) {
  constexpr float kUnit = PACKED ? (T_BF16 ? 0x1p69f : 0x1p24f) : 1.0f;
  return w.scales[n] * (kUnit / 127.0f);
}

INLINE float at(const Weights& w, int n, int k, int K) {
  return float(w.codes[u64(n) * K + k]);
}

}  // namespace
