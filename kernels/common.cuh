// What all kernels share: types, the element type T_BF16 (0: fp16), programmatic dependent launch (PDL), what SPLITS
// blocks of a cluster tell each other.

typedef unsigned char u8;
typedef signed char s8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define INLINE __device__ __forceinline__

namespace {

INLINE void wait_for_predecessor() {
#if PDL && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

INLINE void let_successor_start() {
#if PDL && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

INLINE float fp16_to_float(u16 bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}

INLINE float to_float(u16 bits) {
#if T_BF16
  return __uint_as_float(u32(bits) << 16);
#else
  return fp16_to_float(bits);
#endif
}

// The lower or upper half of a word, bf16 or fp16.
INLINE float half_of(u32 word, int upper, bool bf16) {
  if (bf16) return __uint_as_float(upper ? word & 0xffff0000u : word << 16);
  return fp16_to_float(u16(upper ? word >> 16 : word));
}

INLINE u16 from_float(float f) {
  u16 bits;
#if T_BF16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
#endif
  return bits;
}

struct Words {
  u32 v[4];
};

// Not ld.global.nc: with PDL the preceding kernel may still be writing x while this one runs.
INLINE Words load_x(const u16* p) {
  Words w;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.v[0]), "=r"(w.v[1]), "=r"(w.v[2]), "=r"(w.v[3])
               : "l"(p)
               : "memory");
  return w;
}

// The same where *there*, else w stays as it is. A predicate: an if becomes a branch, and what is loaded ahead of its use
// then comes just before it.
INLINE void load_x_where(bool there, const u16* p, Words& w) {
  asm volatile("{\n.reg .pred there;\nsetp.ne.u32 there, %5, 0;\n@there ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
               : "+r"(w.v[0]), "+r"(w.v[1]), "+r"(w.v[2]), "+r"(w.v[3])
               : "l"(p), "r"(u32(there))
               : "memory");
}

INLINE u32 shared_address(const void* p) {
  return u32(__cvta_generic_to_shared(p));
}

INLINE float of_block(const float* p, int rank) {
  float f;
#if SPLITS > 1
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(p)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(f) : "r"(there));
#else
  f = *p;
#endif
  return f;
}

// All of a cluster, or of the block where it is alone.
INLINE void sync_cluster() {
#if SPLITS > 1
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

}  // namespace
