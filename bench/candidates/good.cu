// llmkern: kernel=gemv format=int8 rows=4 tokens=1 threads=256
// Two warps per row and every load of a warp's share in flight at once; x in L1.

#ifndef STEP
#define STEP 1024
#endif
#ifndef WRITES
#define WRITES 1
#endif

__device__ float dot16(uint4 w, const T* x) {
  const signed char* codes = reinterpret_cast<const signed char*>(&w);
  const uint4 a = *reinterpret_cast<const uint4*>(x), b = *reinterpret_cast<const uint4*>(x + 8);
  const T* first = reinterpret_cast<const T*>(&a);
  const T* second = reinterpret_cast<const T*>(&b);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    sum = fmaf(float(codes[i]), float(first[i]), sum);
    sum = fmaf(float(codes[8 + i]), float(second[i]), sum);
  }
  return sum;
}

extern "C" __global__ void gemv(const signed char* codes, const float* scales, const T* x, const T* bias, T* y, int M,
                                int N, int K) {
  const int lane = threadIdx.x % 32, half = threadIdx.x / 32 % 2, n = blockIdx.x * 4 + threadIdx.x / 64, m = blockIdx.y;
  __shared__ float other[4];
  float sum = 0;
  if (n < N && K % 16 == 0) {
    const signed char* row = codes + size_t(n) * K;
#pragma unroll 4
    for (int k = (half * 32 + lane) * 16; k < K; k += STEP)
      sum += dot16(__ldcs(reinterpret_cast<const uint4*>(row + k)), x + size_t(m) * K + k);
  } else if (n < N) {
    for (int k = half * 32 + lane; k < K; k += 64) sum += float(codes[size_t(n) * K + k]) * float(x[size_t(m) * K + k]);
  }
  for (int i = 16; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
  if (half == 1 && lane == 0) other[threadIdx.x / 64] = sum;
  __syncthreads();
  if (n < N && half == 0 && lane == 0 && n % WRITES == 0)
    y[size_t(m) * N + n] = T((sum + other[threadIdx.x / 64]) * scales[n] / 127.0f + (bias ? float(bias[n]) : 0.0f));
}
