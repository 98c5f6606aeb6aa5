// What int4 and NF4 share: a thread's 16 bytes hold 32 codes of a row, four threads 128, two groups of 64.
// A format gives before: struct Weights with codes, struct ScaleCursor, kOfRow; typedef Scale, or packed struct Scales.

#define CHUNK 128

namespace {

// The scales that a thread loads of 16 rows and 128 k. Stored in rows: one, of row (lane / 4) + 8 * (lane & 1) and
// group (lane & 3) / 2, for its neighbours too. Packed: all four that it needs, [row half][group], as they are stored:
// converted where they are loaded they would have to be waited for there.
#if PACKED
struct Piece {
  Words rows[2];
  Scales scales;
};
#else
struct Piece {
  Words rows[2];
  Scale scale;
};
#endif

// Scales of a row and chunk, where a group is at most half of it; a wider one is looked up by its number.
struct Cursor {
  const u8* rows[2];
  ScaleCursor scales;
  int left;

  INLINE void start(const Weights& w, int row, int chunk, int K, int lane) {
#if PACKED
    rows[0] = w.codes + (u64(row / 16) * (K / CHUNK) + chunk) * 1024 + 16 * lane;
    rows[1] = rows[0] + 512;
    scales.start(w, ((u64(row / 16) * (K / CHUNK) + chunk) * 8 + lane / 4) * 4);
#else
    rows[0] = w.codes + (u64(row + lane / 4) * K + chunk * CHUNK + 32 * (lane & 3)) / 2;
    rows[1] = rows[0] + 4 * u64(K);
    // Of a last half chunk the group that is there.
    const int k = min(chunk * CHUNK + 64 * ((lane & 3) >> 1), TAIL ? K - 64 : K);
    scales.start(w, u64(row + lane / 4 + 8 * (lane & 1)) * K + k);
    left = K - chunk * CHUNK - 32 * (lane & 3);
#endif
  }

  INLINE void load(Piece& piece, int ahead) const {
    const int offset = ahead * kStride * (PACKED ? 1024 : CHUNK / 2);
    if (!TAIL || 2 * offset < left) {
      piece.rows[0] = load_streamed(rows[0] + offset);
      piece.rows[1] = load_streamed(rows[1] + offset);
    }
#if PACKED
    scales.load(piece.scales, ahead * kStride * 32);
#else
    // The second group of a half chunk has no scale of its own, and no x.
    const bool there = !TAIL || 2 * offset < left + 32 * (threadIdx.x & 3) - 64 * ((threadIdx.x & 3) >> 1);
    scales.load(piece.scale, there ? ahead * kStride * CHUNK : 0);
#endif
  }

  INLINE void advance(int steps) {
    const int offset = steps * kStride * (PACKED ? 1024 : CHUNK / 2);
    rows[0] += offset;
    rows[1] += offset;
    scales.advance(steps * kStride * (PACKED ? 32 : CHUNK));
    left -= steps * kStride * CHUNK;
  }
};

// Where in a group the codes of a thread begin; stored in rows, after the exchange.
INLINE int k_of_lane(int t) {
  return PACKED ? 16 * t : 32 * (t & 1) + 16 * (t >> 1);
}

// Sixteen codes of one group: without the exchange an MMA would mix groups that have different scales.
INLINE void codes_of(const Words& w, int group, int lane, u32 (&codes)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    codes[i] = w.v[2 * group + i];
#if !PACKED
    // Of the first group lanes 0 and 1 (of four) hold all codes, of the second lanes 2 and 3.
    const u32 theirs = __shfl_xor_sync(0xffffffffu, w.v[2 - 2 * group + i], 2);
    codes[i] = (lane & 2) / 2 == group ? codes[i] : theirs;
#endif
  }
}

// convert() gives the pairs of a word of codes in the order of order_activations; value() the float of a Scale.
template <class Convert, class Value>
INLINE void multiply_groups(float (&acc)[NT][4], const Piece& piece, int group, const u32 (&x)[NT][8], int lane,
                            Convert convert, Value value) {
  u32 upper[2], lower[2];
  codes_of(piece.rows[0], group, lane, upper);
  codes_of(piece.rows[1], group, lane, lower);
  float c[NT][4] = {};
#pragma unroll
  for (int word = 0; word < 2; ++word) {
    u32 a[4], b[4];
    convert(upper[word], a);
    convert(lower[word], b);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int n = 0; n < NT; ++n)
        mma(c[n], a[2 * j], b[2 * j], a[2 * j + 1], b[2 * j + 1], x[n][4 * word + 2 * j], x[n][4 * word + 2 * j + 1]);
    }
  }
#if PACKED
  const float first = piece.scales.at(group), second = piece.scales.at(2 + group);
#else
  const float mine = value(piece.scale);
  const float first = __shfl_sync(0xffffffffu, mine, (lane & 28) + 2 * group);
  const float second = __shfl_sync(0xffffffffu, mine, (lane & 28) + 2 * group + 1);
#endif
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    acc[n][0] += first * c[n][0];
    acc[n][1] += first * c[n][1];
    acc[n][2] += second * c[n][2];
    acc[n][3] += second * c[n][3];
  }
}

INLINE float scale_of_row(const Weights&, int) {
  return kOfRow;
}

}  // namespace
