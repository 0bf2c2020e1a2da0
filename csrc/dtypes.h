// The element types of tensors, and their conversion to and from the float that the kernels compute in.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTPERC_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define FASTPERC_HD inline __attribute__((always_inline))  // also into functions for other instruction sets
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

// Kept as bits, because not every compiler has a 16-bit floating-point type.
struct Half {
  std::uint16_t bits;  // 1 sign, 5 exponent (bias 15), 10 fraction
};
struct BFloat16 {
  std::uint16_t bits;  // the upper half of a float
};

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "both types must have the same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float widen(Half x) {
  const std::uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  // Exponent and fraction, shifted to their places in a float, make 2^-112 of the value. Subnormals are included.
  const std::uint32_t scaled = bit_cast<std::uint32_t>(bit_cast<float>(rest << 13) * 0x1p112f);
  return bit_cast<float>(sign | (rest >= 0x7c00u ? 0x7f800000u | (rest << 13) : scaled));
}
inline void narrow(float x, Half& out) {  // rounds to nearest, ties to even; NaN stays NaN
  const std::uint32_t bits = bit_cast<std::uint32_t>(x), sign = bits >> 31 << 15, rest = bits & 0x7fffffffu;
  // For a subnormal, adding 0.5 leaves the rounded fraction in the lowest bits of the sum.
  const std::uint32_t subnormal = bit_cast<std::uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u;
  const std::uint32_t normal = (rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  const std::uint32_t finite = rest < (113u << 23) ? subnormal : normal;
  const std::uint32_t not_finite = rest > 0x7f800000u ? 0x7e00u : 0x7c00u;
  out.bits = static_cast<std::uint16_t>(sign | (rest >= (143u << 23) ? not_finite : finite));
}

inline float widen(BFloat16 x) { return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }
inline void narrow(float x, BFloat16& out) {  // rounds to nearest, ties to even; NaN stays NaN
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<std::uint16_t>(x == x ? rounded : 0x7fc0u);
}

#endif

FASTPERC_HD float widen(float x) { return x; }
FASTPERC_HD double widen(double x) { return x; }
FASTPERC_HD void narrow(float x, float& out) { out = x; }
FASTPERC_HD void narrow(double x, double& out) { out = x; }

// The type that sums of T are kept in.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f with a null pointer of the element type that `dtype` names.
template <typename F>
void dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32:
      return f(static_cast<float*>(nullptr));
    case DType::float64:
      return f(static_cast<double*>(nullptr));
    case DType::float16:
      return f(static_cast<Half*>(nullptr));
    case DType::bfloat16:
      return f(static_cast<BFloat16*>(nullptr));
  }
}

// The same for kernels that are not made for float64, which is left to PyTorch.
template <typename F>
void dispatch_narrow(DType dtype, F&& f) {
  dispatch(dtype, [&](auto* type) {
    if constexpr (std::is_same_v<std::remove_pointer_t<decltype(type)>, double>) {
      throw std::invalid_argument("fastperc: no kernel for float64");
    } else {
      f(type);
    }
  });
}

}  // namespace fastperc
