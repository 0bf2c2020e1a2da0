// ReLU and 2×2 max pooling of a frozen network: the mask and the winners that the backward needs.
#pragma once

#include <cstdint>

namespace fastperc {

// The shape of activations, NHWC and dense.
struct ImageShape {
  std::int64_t images, rows, columns, channels;
  std::int64_t pooled_rows() const { return rows / 2; }
  std::int64_t pooled_columns() const { return columns / 2; }
};

// A winner is the pixel of a 2×2 window that is its maximum: 2 · row + column, or no_winner where no pixel is positive.
constexpr std::uint8_t no_winner = 4;

}  // namespace fastperc
