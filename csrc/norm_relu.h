// The mean of a norm, and the scale and shift that it made of its statistics and parameters.
#pragma once

#include <cstdint>

namespace fastperc {

struct NormPointers {
  const float *mean, *scale, *shift;  // [N, C] each: out = x · scale + shift

  NormPointers of_image(std::int64_t image, std::int64_t channels) const {
    return {mean + image * channels, scale + image * channels, shift + image * channels};
  }
};

}  // namespace fastperc
