// CUDA C++ on the host, thread by thread: what the kernels use of it, for tests without a GPU.
//
// A block's threads are coroutines that take turns at barriers, shuffles and MMAs, so a block runs in one order only:
// what a race does here says nothing, what arithmetic and indices do is what a GPU does, to within rounding.

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct Place {
  unsigned x = 0, y = 0, z = 0;
};

using std::max;
using std::min;

namespace host {

constexpr std::size_t kStack = 256 * 1024;

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  Place index;
  bool ended = false;
  // How often it has met the block's barrier, and its warp.
  unsigned barriers = 0, meetings = 0;
};

// What the lanes of a warp lay out for one another. Nobody comes to the next meeting but one before all have left this.
struct Warp {
  unsigned arrived[2] = {0, 0};
  unsigned char slots[2][32][64];
};

inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline ucontext_t scheduler;
inline Thread* now = nullptr;
inline Place block, grid, size;
inline unsigned waiting = 0, met = 0;
inline const std::function<void()>* body = nullptr;

inline void give_way() { swapcontext(&now->context, &scheduler); }

inline void entry() {
  (*body)();
  now->ended = true;
  give_way();
}

inline void barrier() {
  const unsigned mine = ++now->barriers;
  if (++waiting == threads.size()) {
    waiting = 0;
    met = mine;
  }
  while (met < mine) give_way();
}

// Lay *value* out and return what all 32 lanes have laid out; all lanes of the warp must come.
template <class T>
std::vector<T> met_in_warp(const T& value) {
  static_assert(sizeof(T) <= 64);
  Warp& warp = warps[now->index.x / 32];
  const unsigned side = now->meetings % 2, round = now->meetings / 2 + 1;
  std::memcpy(warp.slots[side][now->index.x % 32], &value, sizeof(T));
  ++warp.arrived[side];
  ++now->meetings;
  while (warp.arrived[side] < 32 * round) give_way();
  std::vector<T> found(32);
  for (int lane = 0; lane < 32; ++lane) std::memcpy(&found[lane], warp.slots[side][lane], sizeof(T));
  return found;
}

inline void run(Place blocks, unsigned count, const std::function<void()>& kernel) {
  grid = blocks;
  size = {count, 1, 1};
  body = &kernel;
  for (block.z = 0; block.z < grid.z; ++block.z)
    for (block.y = 0; block.y < grid.y; ++block.y)
      for (block.x = 0; block.x < grid.x; ++block.x) {
        threads.resize(count);
        warps.assign((count + 31) / 32, Warp{});
        waiting = met = 0;
        for (unsigned i = 0; i < count; ++i) {
          Thread& one = threads[i];
          one.index = {i, 0, 0};
          one.ended = false;
          one.barriers = one.meetings = 0;
          getcontext(&one.context);
          one.context.uc_stack.ss_sp = one.stack.data();
          one.context.uc_stack.ss_size = one.stack.size();
          one.context.uc_link = nullptr;
          makecontext(&one.context, entry, 0);
        }
        for (bool any = true; any;) {
          any = false;
          for (Thread& one : threads) {
            if (one.ended) continue;
            any = true;
            now = &one;
            swapcontext(&scheduler, &one.context);
          }
        }
      }
}

// The arguments come as the driver's cuLaunchKernel takes them: pointers to each.
template <class... P, std::size_t... I>
void call(void (*kernel)(P...), Place blocks, unsigned count, void** arguments, std::index_sequence<I...>) {
  run(blocks, count, [&] { kernel(*static_cast<std::remove_reference_t<P>*>(arguments[I])...); });
}

template <class... P>
void call(void (*kernel)(P...), Place blocks, unsigned count, void** arguments) {
  call(kernel, blocks, count, arguments, std::index_sequence_for<P...>());
}

inline float widened(std::uint16_t bits, bool bf16) {
  if (bf16) return std::bit_cast<float>(std::uint32_t(bits) << 16);
  return float(std::bit_cast<_Float16>(bits));
}

inline std::uint16_t rounded(double f, bool bf16) {
  if (!bf16) return std::bit_cast<std::uint16_t>(_Float16(f));
  const float narrow = float(f);
  const auto bits = std::bit_cast<std::uint32_t>(narrow);
  if (std::isnan(narrow)) return std::uint16_t(bits >> 16 | 0x40);
  return std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline std::uint32_t fma2(std::uint32_t a, std::uint32_t b, std::uint32_t c, bool bf16) {
  std::uint32_t found = 0;
  for (int half = 0; half < 32; half += 16) {
    const auto of = [&](std::uint32_t pair) { return double(widened(std::uint16_t(pair >> half), bf16)); };
    found |= std::uint32_t(rounded(of(a) * of(b) + of(c), bf16)) << half;
  }
  return found;
}

// c[16, 8] += a[16, 16] · b[16, 8], the fragments where PTX has them for mma.m16n8k16.
inline void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], bool bf16) {
  struct Fragments {
    std::uint32_t a[4], b[2];
  } mine;
  std::copy(a, a + 4, mine.a);
  std::copy(b, b + 2, mine.b);
  const auto all = met_in_warp(mine);
  const int lane = now->index.x % 32, row = lane / 4, column = 2 * (lane % 4);
  for (int i = 0; i < 4; ++i) {
    double sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int pair = k / 2 % 4, shift = 16 * (k % 2);
      const auto& of_row = all[4 * row + pair];
      const auto& of_column = all[4 * (column + i % 2) + pair];
      sum += double(widened(std::uint16_t(of_row.a[i / 2 + 2 * (k / 8)] >> shift), bf16)) *
             widened(std::uint16_t(of_column.b[k / 8] >> shift), bf16);
    }
    c[i] += float(sum);
  }
}

}  // namespace host

#define threadIdx (host::now->index)
#define blockIdx host::block
#define gridDim host::grid

inline void __syncthreads() { host::barrier(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int other) {
  return host::met_in_warp(value)[(threadIdx.x % 32) ^ other];
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return host::met_in_warp(value)[lane % 32];
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned found = 0;
  const auto votes = host::met_in_warp(char(vote));
  for (int lane = 0; lane < 32; ++lane) found |= unsigned(votes[lane] != 0) << lane;
  return found;
}

template <class T>
T atomicMax(T* at, T value) {
  const T before = *at;
  *at = max(before, value);
  return before;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}

inline int __ffs(unsigned bits) { return __builtin_ffs(int(bits)); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float f) { return std::bit_cast<unsigned>(f); }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float rsqrtf(float f) { return 1.0f / std::sqrt(f); }
inline float __expf(float f) { return std::exp(f); }
inline std::size_t __cvta_generic_to_shared(const void* p) { return reinterpret_cast<std::size_t>(p); }

inline void sincospif(float x, float* sine, float* cosine) {
  *sine = float(std::sin(M_PI * double(x)));
  *cosine = float(std::cos(M_PI * double(x)));
}

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const std::uint64_t both = std::uint64_t(b) << 32 | a;
  unsigned found = 0;
  for (int i = 0; i < 4; ++i) found |= unsigned(both >> (8 * (selector >> 4 * i & 7)) & 0xff) << 8 * i;
  return found;
}

// Dynamic shared memory, by the names that the kernels give it.
inline uint4 memory[16384], shared[16384];
