// LPIPS: the layout of two feature maps, and the formulas of one pixel.
//
// A pixel's features a and b [C] become unit vectors â = a / (‖a‖ + eps) and b̂. Their distance is Σ w (â − b̂)², w being
// the weights of the channels. With g = 2 w (â − b̂) the gradient of a is inverse · unit, where inverse = 1 / (‖a‖ +
// eps) and unit = g − â (a · g) / ‖a‖. That of b is the same with −g. Of a zero vector, which has no direction, it is
// 0.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

namespace fastperc {

constexpr double lpips_eps = 1e-10;

// The shape of feature maps [N, C, H, W], whose pixels are evenly spaced in memory.
struct FeatureShape {
  std::int64_t images, pixels, channels;  // of an image: H · W pixels
};
// Elements from one image, pixel or channel to the next.
struct FeatureStrides {
  std::int64_t image, pixel, channel;
};

// The memory of a call, by side: 0 is a, 1 is b. What is null is not read or written.
struct LpipsTensors {
  std::array<const void*, 2> features;
  std::array<FeatureStrides, 2> strides;
  const void* weight;              // [C], of the type that sums are kept in, as all that follows but the gradients
  const void* incoming;            // [N, pixels]: the gradient of the distances
  void* distances;                 // [N, pixels]
  std::array<void*, 2> gradients;  // incoming · inverse · unit; without `incoming` the unit alone
  std::array<FeatureStrides, 2> gradient_strides;
  std::array<void*, 2> inverses;  // [N, pixels]
  bool after_relu;                // whether the gradients pass a ReLU whose output the features are
};

}  // namespace fastperc
