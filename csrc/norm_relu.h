// The mean of a norm, and the scale and shift that it made of its statistics and parameters; the activation after it.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastperc {

// An activation that a pass computes by itself. `slopes` multiplies what is not positive by a slope of the channel.
enum class ActivationKind { none, relu, slopes, relu6 };

inline ActivationKind activation_from_name(const std::string& name) {
  if (name == "none") return ActivationKind::none;
  if (name == "relu") return ActivationKind::relu;
  if (name == "slopes") return ActivationKind::slopes;
  if (name == "relu6") return ActivationKind::relu6;
  throw std::invalid_argument("fastperc: no kernel for activation " + name);
}

struct Activation {
  ActivationKind kind;
  const float* slopes;  // [C], null unless the kind is `slopes`
};

struct NormPointers {
  const float *mean, *scale, *shift;  // [N, C] each: out = x · scale + shift

  NormPointers of_image(std::int64_t image, std::int64_t channels) const {
    return {mean + image * channels, scale + image * channels, shift + image * channels};
  }
};

// Statistics of each channel of each image: mean and Σ (x − mean)² [N, 2, C] of `counts` [C] values. If `count_step` is
// 0, the first count is that of all channels.
struct Statistics {
  const double *mean_m2, *counts;
  std::int64_t count_step;

  double count(std::int64_t c) const { return counts[c * count_step]; }
  double mean(std::int64_t image, std::int64_t c, std::int64_t channels) const {
    return mean_m2[image * 2 * channels + c];
  }
  // One over the standard deviation.
  double inverse(std::int64_t image, std::int64_t c, std::int64_t channels, double eps) const {
    return 1 / std::sqrt(mean_m2[(image * 2 + 1) * channels + c] / count(c) + eps);
  }
};

struct NormParameters {
  const float *weight, *bias;  // [C] each, may be null
  double eps;

  double weight_of(std::int64_t c) const { return weight ? weight[c] : 1.0; }
};

// What the backward of an activation after a skip needs beside the rest. Both are null if there is no skip.
struct GradientExtras {
  const void* y;  // the output [N, H, W, C], whose sign is that of x · scale + shift + skip
  void* masked;   // receives the gradient before the activation [N, H, W, C], which is that of the skip
};

}  // namespace fastperc
