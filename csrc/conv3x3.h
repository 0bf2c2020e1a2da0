// 3×3 convolutions of stride 1 by Winograd's F(t×t, 3×3), t = 2 or 4: shapes, and the layout of transformed weights.
#pragma once

#include <cstdint>

namespace fastperc {

// The number of channels that are computed together. I and O are multiples of it. Transformed weights have the shape
// [O / panel, (t + 2)², I, panel].
constexpr std::int64_t winograd_panel = 32;

// x [N, H, W, I] → y [N, H + 2·padding − 2, W + 2·padding − 2, O]. Either may be a slice of the channels of a larger
// map: the step from a pixel to the next is then larger than the number of channels.
struct WinogradShape {
  std::int64_t images, rows, columns, in, out, padding, tile;  // the tile is of t×t pixels of y
  std::int64_t in_step, out_step;                              // of pixels, in floats

  std::int64_t out_rows() const { return rows + 2 * padding - 2; }
  std::int64_t out_columns() const { return columns + 2 * padding - 2; }
  std::int64_t tiles_down() const { return (out_rows() + tile - 1) / tile; }
  std::int64_t tiles_across() const { return (out_columns() + tile - 1) / tile; }
  std::int64_t tiles() const { return images * tiles_down() * tiles_across(); }
};

// The strides of weight [O, I, 3, 3], in elements.
struct WeightStrides {
  std::int64_t out, in, row, column;
};

}  // namespace fastperc
