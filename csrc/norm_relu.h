// Norms and the activation after them: what the CPU kernels and the CUDA kernels share, for an element and for a
// channel.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "dtypes.h"

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
  const float* slopes;  // [C]; null unless the kind is `slopes`
  float slope = 0;      // of all channels, on a GPU where `slopes` is null
};

// Activations [N, C, H, W] on a GPU, dense in NCHW or NHWC.
struct NormShape {
  std::int64_t images, channels, rows, columns;
  bool channels_last;
  bool batch;  // whether all images have one norm, or each has its own

  std::int64_t norms() const { return batch ? 1 : images; }
  unsigned norm_images() const { return batch ? static_cast<unsigned>(images) : 1; }  // of a norm
  std::int64_t norm_step() const { return batch ? 0 : channels; }  // from the factors of an image to those of the next
};

struct NormPointers {
  const float *mean, *scale, *shift;  // [N, C] each: out = x · scale + shift; on a GPU (x − mean) · scale + shift

  NormPointers of_image(std::int64_t image, std::int64_t channels) const {
    return {mean + image * channels, scale + image * channels, shift + image * channels};
  }
};

// Statistics of each channel of each image: mean and Σ (x − mean)² [N, 2, C] of `counts` [C] values. If `count_step` is
// 0, the first count is that of all channels.
struct Statistics {
  const double *mean_m2, *counts;
  std::int64_t count_step;

  FASTPERC_HD double count(std::int64_t c) const { return counts[c * count_step]; }
  FASTPERC_HD double mean(std::int64_t image, std::int64_t c, std::int64_t channels) const {
    return mean_m2[image * 2 * channels + c];
  }
  // One over the standard deviation.
  FASTPERC_HD double inverse(std::int64_t image, std::int64_t c, std::int64_t channels, double eps) const {
    return 1 / std::sqrt(mean_m2[(image * 2 + 1) * channels + c] / count(c) + eps);
  }
};

struct NormParameters {
  const float *weight, *bias;  // [C] each, may be null
  double eps;

  FASTPERC_HD double weight_of(std::int64_t c) const { return weight ? weight[c] : 1.0; }
};

// What the backward of an activation after a skip needs beside the rest. Both are null if there is no skip.
struct GradientExtras {
  const void* y;  // the output [N, H, W, C], whose sign is that of x · scale + shift + skip
  void* masked;   // receives the gradient before the activation [N, H, W, C], which is that of the skip
};

// An element. The kind is a constant on the CPU.

// The activation of x.
FASTPERC_HD float activate(ActivationKind kind, float x, float slope) {
  if (kind == ActivationKind::relu) return x < 0 ? 0.0f : x;  // NaN stays NaN
  if (kind == ActivationKind::slopes) return x > 0 ? x : x * slope;
  if (kind == ActivationKind::relu6) return x < 0 ? 0.0f : x > 6 ? 6.0f : x;
  return x;
}

// The gradient before the activation, from that after it. `z` is the value before it or, unless slopes may be
// negative, the value after it.
FASTPERC_HD float before(ActivationKind kind, float grad, float z, float slope) {
  if (kind == ActivationKind::relu) return z <= 0 ? 0.0f : grad;
  if (kind == ActivationKind::slopes) return z > 0 ? grad : grad * slope;
  if (kind == ActivationKind::relu6) return z <= 0 || z >= 6 ? 0.0f : grad;
  return grad;
}

// What an element adds to the gradient of its channel's slope, from the gradient after the activation.
FASTPERC_HD float slope_gradient(float grad, float z) { return z > 0 ? 0.0f : grad * z; }

// The gradient of a norm's input x, from the gradient g before the activation and the channel's factors.
FASTPERC_HD float input_gradient(float g, float x, float mean, float of_grad, float of_x, float constant) {
  return g * of_grad + (x - mean) * of_x + constant;
}

// A channel. Each of these structs is a function of i = image · C + channel, or of the channel.

// norm [3, N, C] = mean, scale and shift of a norm with these statistics: out = x · scale + shift or, if it is
// `centred`, (x − mean) · scale + shift, which keeps the digits of an x far from zero.
struct NormFromStatistics {
  Statistics of;
  NormParameters parameters;
  float* norm;
  std::int64_t images, channels;
  bool centred;

  FASTPERC_HD void operator()(std::int64_t i) const {
    const std::int64_t image = i / channels, c = i % channels, step = images * channels;
    const double mean = of.mean(image, c, channels);
    const double factor = of.inverse(image, c, channels, parameters.eps) * parameters.weight_of(c);
    norm[i] = static_cast<float>(mean);
    norm[step + i] = static_cast<float>(factor);
    const double subtracted = centred ? mean - norm[i] : mean;
    norm[2 * step + i] = static_cast<float>((parameters.bias ? parameters.bias[c] : 0.0) - subtracted * factor);
  }
};

// Moves the running mean and variance [C] of a batch norm by `share` towards those of the statistics.
struct RunningStatistics {
  Statistics of;
  double share;
  float *mean, *variance;
  std::int64_t channels;

  FASTPERC_HD void operator()(std::int64_t c) const {
    const double count = of.count(c);
    if (count <= 0) return;
    const double unbiased = of.mean_m2[channels + c] / (count > 2 ? count - 1 : 1.0);
    mean[c] = static_cast<float>(mean[c] + share * (of.mean(0, c, channels) - mean[c]));
    variance[c] = static_cast<float>(variance[c] + share * (unbiased - variance[c]));
  }
};

// factors [N, 3, C] = what input_gradient() needs, from sums [N, rows, C].
struct GradientFactors {
  Statistics of;
  NormParameters parameters;
  const double* sums;
  std::int64_t rows;
  float* factors;
  std::int64_t channels;

  FASTPERC_HD void operator()(std::int64_t i) const {
    const std::int64_t image = i / channels, c = i % channels;
    const double *total = sums + image * rows * channels, *product = total + channels;
    const double inverse = of.inverse(image, c, channels, parameters.eps), count = of.count(c);
    const double scale = inverse * parameters.weight_of(c), mean = of.mean(image, c, channels);
    const double of_x = -scale * inverse * inverse * product[c] / count;
    float* to = factors + image * 3 * channels + c;
    to[0] = static_cast<float>(scale);
    to[channels] = static_cast<float>(of_x);
    to[2 * channels] = static_cast<float>(-scale * total[c] / count - of_x * (mean - static_cast<float>(mean)));
  }
};

// gradients [rows, C] of weight, bias and slopes, from sums [N, rows, C]; rows is 2, or 3 with slopes.
struct ParameterGradients {
  Statistics of;
  double eps;
  const double* sums;
  std::int64_t rows;
  float* gradients;
  std::int64_t images, channels;

  FASTPERC_HD void operator()(std::int64_t c) const {
    double weight = 0, bias = 0, slope = 0;
    for (std::int64_t image = 0; image < images; ++image) {
      const double* total = sums + image * rows * channels + c;
      weight += total[channels] * of.inverse(image, c, channels, eps);
      bias += total[0];
      if (rows == 3) slope += total[2 * channels];
    }
    gradients[c] = static_cast<float>(weight);
    gradients[channels + c] = static_cast<float>(bias);
    if (rows == 3) gradients[2 * channels + c] = static_cast<float>(slope);
  }
};

// Σ g · (x − mean) of a channel, from the product and Σ g with a mean that was rounded to float32.
FASTPERC_HD double with_exact_mean(double product, double total, double mean, float rounded) {
  return product - (mean - rounded) * total;
}

}  // namespace fastperc
