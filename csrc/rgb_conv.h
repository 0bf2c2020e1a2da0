// The last step of the last convolution: from partial products to a picture.
#pragma once

#include <cstdint>

#include "image_io.h"

namespace fastperc {

enum class Output { tanh, linear };  // of a network: 150·tanh around mid-grey, or 0…255

// The shape of the products of a k×k convolution with 3 filters: [rows, columns, k, 3], dense, summed over the filters'
// rows and the input channels. Pixel x of a row of the picture is the sum of products[x - left + dx, dx] over dx.
struct HeadShape {
  std::int64_t rows, columns, kernel;
  std::int64_t left, width;  // the padding on the left, and the width of the picture
  bool reflect;              // whether the border reflects the columns; otherwise it is zeros
};

// tanh with an error of 2 · 10⁻⁷, in arithmetic that compilers vectorise: x·p(x²)/q(x²). x is clamped to where a float
// rounds tanh to ±1.
inline float tanh_of(float x) {
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

// Converts the output of the last convolution to 0–1.
inline float to_image_range(float x, Output output) {
  return output == Output::tanh ? 0.5f + 150.0f / 255.0f * tanh_of(x) : x / 255.0f;
}

}  // namespace fastperc
