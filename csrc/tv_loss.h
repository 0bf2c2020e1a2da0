// Total variation: what the CPU and the CUDA kernel share, the layout of an image and the maths of one difference.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"

namespace fastperc {

enum class Norm { l2, l1 };

// An image as rows of consecutive elements, in which the pixel to the right is `step` elements on:
//   NCHW  outer = N, inner = C, length = W,     step = 1
//   NHWC  outer = N, inner = 1, length = W * C, step = C
struct RowShape {
  std::int64_t outer, inner, rows, length, step;
};
// Strides in elements between images, channels and rows.
struct RowStrides {
  std::int64_t outer, inner, row;
};

// What a difference d between two neighbours adds to the loss.
template <Norm norm, typename A>
FASTPERC_HD A variation(A d) {
  return norm == Norm::l2 ? d * d : std::fabs(d);
}
// The derivative of that, halved for l2. |d|' is 0 at 0.
template <Norm norm, typename A>
FASTPERC_HD A slope(A d) {
  return norm == Norm::l2 ? d : A(d > A(0)) - A(d < A(0));
}

// One pixel and its neighbours; beyond the border a neighbour is the pixel itself, which adds nothing. Each pair is
// counted once in the loss, by its left or upper pixel; both pixels of a pair feel it in the gradient.
template <Norm norm, typename A>
FASTPERC_HD A pixel_loss(A centre, A right, A below) {
  return variation<norm>(right - centre) + variation<norm>(below - centre);
}
// From the slopes of the differences, each of a pixel and the one before it.
template <Norm norm, typename A>
FASTPERC_HD A pixel_grad(A left, A right, A above, A below) {
  const A sum = (left - right) + (above - below);
  return norm == Norm::l2 ? A(2) * sum : sum;
}
template <Norm norm, typename A>
FASTPERC_HD A pixel_grad(A centre, A left, A right, A above, A below) {
  return pixel_grad<norm, A>(slope<norm>(centre - left), slope<norm>(right - centre), slope<norm>(centre - above),
                             slope<norm>(below - centre));
}

}  // namespace fastperc
