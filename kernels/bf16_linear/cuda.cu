// Rows of bf16 (or fp16, whatever x is): what is not quantized, with the same epilogues and the same early loads.

#define CHUNK 64
#define TABLE_BYTES 0

#define ZERO_COLUMNS 0
#define UNIFORM_WARP 0

namespace {

struct Weights {
  const u16* rows;    // [N, K]
  const void* unused;
};

struct Piece {
  Words rows[2][2];
};

struct Cursor {
  const u16* rows[2];
  int left;

  INLINE void start(const Weights& w, int row, int chunk, int K, int lane) {
    rows[0] = w.rows + u64(row + lane / 4) * K + chunk * CHUNK + 16 * (lane & 3);
    rows[1] = rows[0] + 8 * u64(K);
    left = K - chunk * CHUNK - 16 * (lane & 3);
  }

  INLINE void load(Piece& piece, int ahead) const {
    const int offset = ahead * kStride * CHUNK;
    if (TAIL && offset >= left) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      piece.rows[i][0] = load_streamed(rows[i] + offset);
      piece.rows[i][1] = load_streamed(rows[i] + offset + 8);
    }
  }

  INLINE void advance(int steps) {
    const int offset = steps * kStride * CHUNK;
    rows[0] += offset;
    rows[1] += offset;
    left -= offset;
  }
};

INLINE void prepare(const Weights&, u32*) {}

INLINE int k_of_lane(int t) {
  return 16 * t;
}

INLINE void order_activations(Words&) {}

INLINE void multiply(const Weights&, const u32*, float (&acc)[NT][4], const Piece& piece, int, const u32 (&x)[NT][8],
                     int) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const Words &low = piece.rows[0][j / 2], &high = piece.rows[1][j / 2];
    const int i = 2 * (j % 2);
#pragma unroll
    for (int n = 0; n < NT; ++n)
      mma(acc[n], low.v[i], high.v[i], low.v[i + 1], high.v[i + 1], x[n][2 * j], x[n][2 * j + 1]);
  }
}

INLINE float scale_of_row(const Weights&, int) {
  return 1.0f;
}

INLINE float at(const Weights& w, int n, int k, int K) {
  return to_float(w.rows[u64(n) * K + k]);
}

}  // namespace
