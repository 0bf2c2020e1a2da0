// Convolutions as products of matrices: shapes, and the layout of packed weights.
#pragma once

#include <cstdint>

namespace fastperc {

// x [N, H, W, I] → y [N, H', W', O], with a kernel of `kernel_rows` × `kernel_columns` taps, and zeros on the left and
// at the top. On the right and at the bottom there are as many zeros as y needs. Either map may be a slice of the
// channels of a larger one: the step from a pixel to the next is then larger than the number of channels.
struct PointwiseShape {
  std::int64_t images, rows, columns, in, out, stride;
  std::int64_t in_step, out_step;  // of pixels, in floats
  std::int64_t out_rows, out_columns, kernel_rows, kernel_columns, left, top, dilation;

  std::int64_t pixels() const { return images * out_rows * out_columns; }
  std::int64_t taps() const { return kernel_rows * kernel_columns; }
};

// Packed weights are panels [taps · I, panel] one after the other. A panel has the output channels that are computed
// together, of `vectors` registers of `lanes`. The last one has as many registers as are needed, and columns beyond the
// last channel are zeros. A last panel of one register would be slow: it takes one from the panel before it.
struct PointwisePanels {
  int lanes, vectors;

  std::int64_t vectors_of(std::int64_t channels) const { return (channels + lanes - 1) / lanes; }
  // The registers of the first panel of the `left` that are still to come.
  constexpr std::int64_t width(std::int64_t left) const {
    if (vectors > 2 && left == vectors + 1) return vectors - 1;
    return left < vectors ? left : vectors;
  }
  // The first register of a panel, of `all` registers; at least `all` for the panel after the last one.
  std::int64_t start(std::int64_t panel, std::int64_t all) const {
    const std::int64_t first = panel * vectors;
    return first > 0 && first + 1 == all && vectors > 2 ? first - 1 : first;
  }
};

}  // namespace fastperc
