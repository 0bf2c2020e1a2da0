// 1×1 convolutions: shapes, and the layout of packed weights.
#pragma once

#include <cstdint>

namespace fastperc {

// The number of output channels that are computed together. Packed weights are the panels [I, panel] one after the
// other; the last one is half as wide where that is enough. Columns beyond the last channel are zeros.
constexpr std::int64_t pointwise_panel = 32;

// x [N, H, W, I] → y [N, H', W', O] by every `stride`-th pixel of every `stride`-th row. Either may be a slice of the
// channels of a larger map: the step from a pixel to the next is then larger than the number of channels.
struct PointwiseShape {
  std::int64_t images, rows, columns, in, out, stride;
  std::int64_t in_step, out_step;  // of pixels, in floats

  std::int64_t out_rows() const { return (rows - 1) / stride + 1; }
  std::int64_t out_columns() const { return (columns - 1) / stride + 1; }
  std::int64_t pixels() const { return images * out_rows() * out_columns(); }
  // O, filled up to half a panel.
  std::int64_t packed_out() const {
    return (out + pointwise_panel / 2 - 1) / (pointwise_panel / 2) * (pointwise_panel / 2);
  }
};

}  // namespace fastperc
