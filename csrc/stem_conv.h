// Convolutions from few channels, as of a picture: shapes, and the layout of packed weights.
#pragma once

#include <cstdint>

namespace fastperc {

// The number of output channels that are computed together. Packed weights are the panels [k · k · I, panel] one after
// the other; the last one is half as wide where that is enough. Columns beyond the last channel are zeros.
constexpr std::int64_t stem_panel = 32;

// x [N, H, W, I] → y [N, H', W', O]. Either may be a slice of the channels of a larger map: the step from a pixel to
// the next is then larger than the number of channels.
struct StemShape {
  std::int64_t images, rows, columns, in, out, kernel, stride;
  std::int64_t left, top;  // zeros beyond the border
  std::int64_t out_rows, out_columns;
  std::int64_t in_step, out_step;  // of pixels, in floats

  // The pixels that a row of y is made of, zeros included.
  std::int64_t wide_columns() const { return (out_columns - 1) * stride + kernel; }
};

}  // namespace fastperc
