// Depthwise convolutions: shapes, and the layout of packed weights.
#pragma once

#include <cstdint>

namespace fastperc {

// Packed weights have the shape [C / panel, k · k, panel]. Channels beyond the last are zeros.
constexpr std::int64_t depthwise_panel = 16;

// x [N, H, W, C] → y [N, H', W', C], each channel convolved by itself. Either may be a slice of the channels of a
// larger map: the step from a pixel to the next is then larger than the number of channels.
struct DepthwiseShape {
  std::int64_t images, rows, columns, channels, kernel, stride;
  std::int64_t left, top;  // zeros beyond the border, as many as the kernel is wide at most
  std::int64_t out_rows, out_columns;
  std::int64_t in_step, out_step;  // of pixels, in floats

  std::int64_t panels() const { return (channels + depthwise_panel - 1) / depthwise_panel; }
};

}  // namespace fastperc
