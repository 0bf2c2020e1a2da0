// Images at the two ends of a network: reflected borders, and the conversion to 8-bit levels.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "dtypes.h"

namespace fastperc {

// The strides of an image [N, 3, H, W], in elements.
struct ImageStrides {
  std::int64_t image, channel, row, column;
};

// A rectangle of an image of `rows` × `columns` pixels. It may reach past the border, where the image is reflected.
struct Window {
  std::int64_t rows, columns;
  std::int64_t top, left, height, width;
};

// The index, in a row of `size` pixels, of the pixel at `position`. The row is reflected about its first and last
// pixel, as often as needed.
FASTPERC_HD std::int64_t reflected(std::int64_t position, std::int64_t size) {
  if (position >= 0 && position < size) return position;
  const std::int64_t period = size > 1 ? 2 * (size - 1) : 1;
  position %= period;
  if (position < 0) position += period;
  return position < size ? position : period - position;
}

// The level 0–255 of a value 0–1: clamped, then rounded to the nearest, ties to even. NaN becomes 0.
FASTPERC_HD std::uint8_t to_level(float x) {
  x = x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f;
  const float shifted = x * 255.0f + 12582912.0f;  // 1.5 · 2²³, where neighbouring floats differ by 1
  return static_cast<std::uint8_t>(shifted - 12582912.0f);
}

FASTPERC_HD float widen(std::uint8_t x) { return x; }
FASTPERC_HD void narrow(float x, std::uint8_t& out) { out = to_level(x); }
FASTPERC_HD void narrow(float x, double& out) { out = x; }

// What a network sees of a value of an image.
FASTPERC_HD float to_input(float x, float scale, float shift) { return x * scale + shift; }

// Calls f with a null pointer of the type that `dtype` names: uint8 or a floating-point type.
template <typename F>
void dispatch_pixels(const std::string& dtype, F&& f) {
  if (dtype == "uint8") return f(static_cast<std::uint8_t*>(nullptr));
  dispatch(dtype_from_name(dtype), std::forward<F>(f));
}

}  // namespace fastperc
