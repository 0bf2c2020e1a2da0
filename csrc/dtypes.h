// The element types of a tensor, and how each becomes the float that arithmetic is done in.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTPERC_HD __host__ __device__ __forceinline__
#else
#define FASTPERC_HD inline
#endif

namespace fastperc {

enum class DType { float32, float64, float16, bfloat16 };

inline DType dtype_from_name(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "float64") return DType::float64;
  if (name == "float16") return DType::float16;
  if (name == "bfloat16") return DType::bfloat16;
  throw std::invalid_argument("fastperc: no kernel for dtype " + name);
}

#ifdef __CUDACC__

using Half = __half;
using BFloat16 = __nv_bfloat16;

__device__ __forceinline__ float widen(Half x) { return __half2float(x); }
__device__ __forceinline__ float widen(BFloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float x, Half& out) { out = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, BFloat16& out) { out = __float2bfloat16_rn(x); }

#else

using Half = _Float16;
struct BFloat16 {
  std::uint16_t bits;
};

inline float widen(Half x) { return static_cast<float>(x); }
inline float widen(BFloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline void narrow(float x, Half& out) { out = static_cast<Half>(x); }
inline void narrow(float x, BFloat16& out) {  // to nearest, ties to even; NaN stays NaN
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<std::uint16_t>(x == x ? rounded : 0x7fc0u);
}

#endif

FASTPERC_HD float widen(float x) { return x; }
FASTPERC_HD double widen(double x) { return x; }
FASTPERC_HD void narrow(float x, float& out) { out = x; }
FASTPERC_HD void narrow(double x, double& out) { out = x; }

// Calls f with a null pointer of the element type that `dtype` names.
template <typename F>
void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(static_cast<float*>(nullptr));
    case DType::float64: return f(static_cast<double*>(nullptr));
    case DType::float16: return f(static_cast<Half*>(nullptr));
    case DType::bfloat16: return f(static_cast<BFloat16*>(nullptr));
  }
}

}  // namespace fastperc
