// 3×3 convolutions of stride 1 by Winograd's F(2×2, 3×3): what a launcher is told, and how transformed weights lie.
#pragma once

#include <cstdint>

namespace fastperc {

// Channels that are computed together; those of an image are multiples of it. Transformed weights are
// [O / panel, 16, I, panel].
constexpr std::int64_t winograd_panel = 32;

// x [N, H, W, I] → y [N, H + 2·padding − 2, W + 2·padding − 2, O].
struct WinogradShape {
  std::int64_t images, rows, columns, in, out, padding;

  std::int64_t out_rows() const { return rows + 2 * padding - 2; }
  std::int64_t out_columns() const { return columns + 2 * padding - 2; }
  std::int64_t tiles_down() const { return (out_rows() + 1) / 2; }
  std::int64_t tiles_across() const { return (out_columns() + 1) / 2; }
  std::int64_t tiles() const { return images * tiles_down() * tiles_across(); }
};

// Strides in elements of weight [O, I, 3, 3].
struct WeightStrides {
  std::int64_t out, in, row, column;
};

}  // namespace fastperc
