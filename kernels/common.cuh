// What all kernels share: types, the element type T_BF16 (0: fp16), programmatic dependent launch (PDL).

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

INLINE float to_float(u16 bits) {
#if T_BF16
  return __uint_as_float(u32(bits) << 16);
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
#endif
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

}  // namespace
