// Total variation: the layout of an image and the maths of one pixel, shared by the CPU kernel and the CUDA kernel.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"

namespace fastperc {

enum class Norm { l2, l1 };

// The shape of an image as rows of consecutive elements. The pixel to the right is `step` elements further:
//   NCHW  outer = N, inner = C, length = W,     step = 1
//   NHWC  outer = N, inner = 1, length = W * C, step = C
struct RowShape {
  std::int64_t outer, inner, rows, length, step;
};
// The strides between images, channels and rows, in elements.
struct RowStrides {
  std::int64_t outer, inner, row;
};

// The part of the loss that comes from the difference d between two neighbours.
template <Norm norm, typename A>
FASTPERC_HD A variation(A d) {
  return norm == Norm::l2 ? d * d : std::fabs(d);
}
// The derivative of variation(d), halved for l2. For l1 it is 0 at 0.
template <Norm norm, typename A>
FASTPERC_HD A slope(A d) {
  return norm == Norm::l2 ? d : A(d > A(0)) - A(d < A(0));
}

// The loss of one pixel. At the border the missing neighbour is the pixel itself, which adds nothing. Each pair of
// neighbours counts once in the loss, for its left or upper pixel, and in the gradient of both pixels.
template <Norm norm, typename A>
FASTPERC_HD A pixel_loss(A centre, A right, A below) {
  return variation<norm>(right - centre) + variation<norm>(below - centre);
}
// The gradient of one pixel, from the slopes between it and its four neighbours.
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
