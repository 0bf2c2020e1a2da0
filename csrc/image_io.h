// Images at the network's two ends: which pixel stands where beyond the border, and what a level is.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "dtypes.h"

namespace fastperc {

// An image [N, 3, H, W] in memory, strides in elements.
struct ImageStrides {
  std::int64_t image, channel, row, column;
};

// A rectangle of an image of `rows` × `columns` pixels; beyond its border lie mirrored pixels.
struct Window {
  std::int64_t rows, columns;
  std::int64_t top, left, height, width;
};

// Which of `size` pixels in a row stands at `position`, mirrored about the first and the last as often as it takes.
inline std::int64_t mirrored(std::int64_t position, std::int64_t size) {
  if (position >= 0 && position < size) return position;
  const std::int64_t period = size > 1 ? 2 * (size - 1) : 1;
  position %= period;
  if (position < 0) position += period;
  return position < size ? position : period - position;
}

// 0–1 to a level: clamped, then rounded to the nearest, ties to even. NaN becomes 0.
inline std::uint8_t to_level(float x) {
  x = x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f;
  const float shifted = x * 255.0f + 12582912.0f;  // 1.5 · 2²³, where the last place is 1
  return static_cast<std::uint8_t>(shifted - 12582912.0f);
}

inline float widen(std::uint8_t x) { return x; }
inline void narrow(float x, std::uint8_t& out) { out = to_level(x); }
inline void narrow(float x, double& out) { out = x; }

// Calls f with a null pointer of the type that `dtype` names: uint8, or one that kernels compute in.
template <typename F>
void dispatch_pixels(const std::string& dtype, F&& f) {
  if (dtype == "uint8") return f(static_cast<std::uint8_t*>(nullptr));
  dispatch(dtype_from_name(dtype), std::forward<F>(f));
}

}  // namespace fastperc
