// The convolutions at the ends of a network: their shapes, and the last step, from the last one's output to a picture.
#pragma once

#include <cstdint>

#include "image_io.h"
#include "parallel.h"

namespace fastperc {

enum class Output { tanh, linear, plain };  // of a network: 150·tanh around mid-grey, 0…255, or left as it is

// The shape of the products of a k×k convolution with 3 filters: [rows, columns, k, 3], dense, summed over the filters'
// rows and the input channels. Pixel x of a row of the picture is the sum of products[x - left + dx, dx] over dx.
struct HeadShape {
  std::int64_t rows, columns, kernel;
  std::int64_t left, width;  // the padding on the left, and the width of the picture
  bool reflect;              // whether the border reflects the columns; otherwise it is zeros
};

// The shape of a 9×9 convolution from or to RGB, x [images, rows, columns, in] → [images, out_rows, out_columns, out].
struct RGBConvShape {
  std::int64_t images, rows, columns, in;
  std::int64_t out_rows, out_columns, out;
  std::int64_t left, top;  // padding; that on the other sides follows from the sizes
  bool reflect;            // whether the border reflects x; otherwise it is zeros
};

// The pictures that a network makes.
struct PictureShape {
  std::int64_t images, rows, columns;
};

// tanh with an error of 2 · 10⁻⁷, in arithmetic that compilers vectorise: x·p(x²)/q(x²). x is clamped to where a float
// rounds tanh to ±1.
FASTPERC_HD float tanh_of(float x) {
  x = x > 7.90531110763549805f ? 7.90531110763549805f : (x < -7.90531110763549805f ? -7.90531110763549805f : x);
  const float s = x * x;
  float p = -2.76076847742355e-16f;
  p = p * s + 2.00018790482477e-13f;
  p = p * s - 8.60467152213735e-11f;
  p = p * s + 5.12229709037114e-08f;
  p = p * s + 1.48572235717979e-05f;
  p = p * s + 6.37261928875436e-04f;
  p = p * s + 4.89352455891786e-03f;
  float q = 1.19825839466702e-06f;
  q = q * s + 1.18534705686654e-04f;
  q = q * s + 2.26843463243900e-03f;
  q = q * s + 4.89352518554385e-03f;
  return x * p / q;
}

// Converts the output of the last convolution to 0–1, unless it is plain.
FASTPERC_HD float to_image_range(float x, Output output) {
  if (output == Output::plain) return x;
  return output == Output::tanh ? 0.5f + 150.0f / 255.0f * tanh_of(x) : x / 255.0f;
}

FASTPERC_INLINE void to_image_range(float* x, std::int64_t count, Output output) {
  if (output == Output::plain) return;
  for (std::int64_t i = 0; i < count; ++i) x[i] = to_image_range(x[i], output);
}

// Stores pixels [count, 3] as a row of a picture.
template <typename Out>
void store_row(const float* pixels, std::int64_t count, Out* out, const ImageStrides& strides) {
  for (int o = 0; o < 3; ++o) {
    for (std::int64_t x = 0; x < count; ++x) narrow(pixels[x * 3 + o], out[x * strides.column + o * strides.channel]);
  }
}

}  // namespace fastperc
