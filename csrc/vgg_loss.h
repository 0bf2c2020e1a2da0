// ReLU and 2×2 max pooling of a frozen network: what the backward needs of them, in a bit or a byte.
#pragma once

#include <cstdint>

namespace fastperc {

// Activations as the convolutions leave them, NHWC and dense.
struct ImageShape {
  std::int64_t images, rows, columns, channels;
  std::int64_t pooled_rows() const { return rows / 2; }
  std::int64_t pooled_columns() const { return columns / 2; }
};

// Which of a 2×2 window's pixels is its maximum: 2 · row + column, or none where nothing in it is positive.
constexpr std::uint8_t no_winner = 4;

}  // namespace fastperc
