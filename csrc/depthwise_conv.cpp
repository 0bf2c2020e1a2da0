// Depthwise convolutions on the CPU, float32, NHWC: y = activation(conv(x) + bias + skip), each channel by itself.
//
// A task is a block of rows of y and a range of channels. It takes the channels a register at a time: the rows of x
// that a row of y needs then stay in the L1 cache until the next row of y has been computed too. The sums of a few
// adjacent pixels stay in registers; each vector of x is loaded once for a row of the kernel, and multiplied by all
// taps that need it. Every sum is in the order of the taps, whoever computes it.
#include "depthwise_conv.h"

#include <algorithm>

#include "conv_epilogue.h"
#include "kernels.h"

namespace fastperc {
namespace {

using namespace winograd;

constexpr std::int64_t panel = depthwise_panel;
constexpr std::int64_t block_floats = 1 << 17;   // of x in a block, so that they stay in the L2 cache
constexpr std::int64_t blocks_for_a_thread = 4;  // where there are enough rows
constexpr std::int64_t fewest_floats = 1 << 14;  // of y in a task: a thread's turn takes time
constexpr int pixels_at_once = 7;                // whose sums are in registers

struct Convolution {
  const float *x, *weights, *bias, *skip;  // bias is filled up with zeros; skip may be null
  float* out;
  DepthwiseShape shape;
  ImageStrides skip_strides;  // its channels have stride 1
  Activation activation;      // its slopes are filled up as bias is
};

// Some rows of y of an image, and the channels of a register.
struct Part {
  const Convolution& conv;
  std::int64_t image, first_row, last_row;  // rows of y
  std::int64_t channel;
  // The channels of x: `rows` has the row `first_in_row` of x.
  const float* rows;
  std::int64_t first_in_row, row_step, step;

  // The taps of the kernel's rows that lie inside x.
  std::int64_t first_tap(std::int64_t row) const {
    return std::max<std::int64_t>(0, conv.shape.top - row * conv.shape.stride);
  }
  std::int64_t last_tap(std::int64_t row) const {
    return std::min(conv.shape.kernel, conv.shape.rows + conv.shape.top - row * conv.shape.stride);
  }
};

// `count` pixels of a row of y from `column` on. With `border`, some of the pixels of x may lie outside.
template <int lanes, int kernel, int stride, int count, bool border>
FASTPERC_INLINE void convolve_pixels(const Part& part, std::int64_t row, std::int64_t column) {
  const Convolution& conv = part.conv;
  const DepthwiseShape& s = conv.shape;
  const std::int64_t in_column = column * stride - s.left, in_row = row * stride - s.top - part.first_in_row;
  const float* weights = conv.weights + part.channel / panel * panel * kernel * kernel + part.channel % panel;
  Vector<lanes> sums[count][1];
#pragma GCC unroll 16
  for (int p = 0; p < count; ++p) sums[p][0] = at<lanes>(conv.bias + part.channel);
  const std::int64_t last = part.last_tap(row);
  for (std::int64_t i = part.first_tap(row); i < last; ++i) {
    const float* x = part.rows + (in_row + i) * part.row_step + in_column * part.step;
    Vector<lanes> taps[kernel];
#pragma GCC unroll 8
    for (int j = 0; j < kernel; ++j) taps[j] = at<lanes>(weights + (i * kernel + j) * panel);
#pragma GCC unroll 32
    for (int c = 0; c < (count - 1) * stride + kernel; ++c) {
      if (border && (in_column + c < 0 || in_column + c >= s.columns)) continue;
      const Vector<lanes> pixel = at<lanes>(x + c * part.step);
#pragma GCC unroll 8
      for (int j = 0; j < kernel; ++j) {
        const int to = (c - j) / stride;
        if (c >= j && (c - j) % stride == 0 && to < count) sums[to][0] += pixel * taps[j];
      }
    }
  }
  const ImageStrides& k = conv.skip_strides;
  const float* skip =
      conv.skip ? conv.skip + part.image * k.image + row * k.row + column * k.column + part.channel : nullptr;
  float* out = conv.out + ((part.image * s.out_rows + row) * s.out_columns + column) * s.out_step + part.channel;
  finish<lanes, count, 1>(sums, skip, k.column, out, s.out_step, conv.activation, part.channel,
                          s.channels - part.channel);
}

// The pixels of a row from `column` on, `count` at a time, and the rest by fewer at a time.
template <int lanes, int kernel, int stride, int count>
FASTPERC_INLINE void convolve_row(const Part& part, std::int64_t row, std::int64_t column) {
  const DepthwiseShape& s = part.conv.shape;
  for (; column + count <= s.out_columns; column += count) {
    const std::int64_t in_column = column * stride - s.left;
    if (count < pixels_at_once || in_column < 0 || in_column + (count - 1) * stride + kernel > s.columns) {
      convolve_pixels<lanes, kernel, stride, count, true>(part, row, column);
    } else {
      convolve_pixels<lanes, kernel, stride, count, false>(part, row, column);
    }
  }
  if constexpr (count > 1) {
    if (column < s.out_columns) convolve_row<lanes, kernel, stride, count == 7 ? 4 : count / 2>(part, row, column);
  }
}

template <int lanes, int kernel, int stride>
FASTPERC_INLINE void convolve_part(const Part& part) {
  for (std::int64_t row = part.first_row; row < part.last_row; ++row) {
    convolve_row<lanes, kernel, stride, pixels_at_once>(part, row, 0);
  }
}

// Copies the last channels of x, fewer than a register holds, to `to` [rows, columns, lanes].
template <int lanes>
FASTPERC_INLINE void copy_part(const float* x, const DepthwiseShape& s, std::int64_t first, std::int64_t last,
                               std::int64_t count, float* to) {
  for (std::int64_t pixel = first * s.columns; pixel < last * s.columns; ++pixel, to += lanes) {
    std::fill(std::copy_n(x + pixel * s.in_step, count, to), to + lanes, 0.0f);
  }
}

// Computes the rows [first, last) of y of an image, and the panels [panels, last_panel).
template <int lanes>
FASTPERC_INLINE void convolve(const Convolution& conv, std::int64_t image, std::int64_t first, std::int64_t last,
                              std::int64_t first_panel, std::int64_t last_panel) {
  const DepthwiseShape& s = conv.shape;
  const std::int64_t first_in = std::clamp<std::int64_t>(first * s.stride - s.top, 0, s.rows);
  const std::int64_t last_in = std::clamp((last - 1) * s.stride - s.top + s.kernel, first_in, s.rows);
  const std::int64_t last_channel = std::min(last_panel * panel, s.channels);
  for (std::int64_t channel = first_panel * panel; channel < last_channel; channel += lanes) {
    const float* x = conv.x + image * s.rows * s.columns * s.in_step + channel;
    Part part{conv, image, first, last, channel, x, 0, s.columns * s.in_step, s.in_step};
    if (channel + lanes > s.channels) {
      float* copy = scratch((last_in - first_in) * s.columns * lanes);
      copy_part<lanes>(x, s, first_in, last_in, s.channels - channel, copy);
      part.rows = copy, part.first_in_row = first_in, part.row_step = s.columns * lanes, part.step = lanes;
    }
    switch (s.kernel * 4 + s.stride) {
      case 3 * 4 + 1:
        convolve_part<lanes, 3, 1>(part);
        break;
      case 3 * 4 + 2:
        convolve_part<lanes, 3, 2>(part);
        break;
      case 5 * 4 + 1:
        convolve_part<lanes, 5, 1>(part);
        break;
      case 5 * 4 + 2:
        convolve_part<lanes, 5, 2>(part);
        break;
      case 7 * 4 + 1:
        convolve_part<lanes, 7, 1>(part);
        break;
      case 7 * 4 + 2:
        convolve_part<lanes, 7, 2>(part);
        break;
    }
  }
}

#define FASTPERC_VERSION(attributes, lanes, rows, vectors)                                                          \
  attributes void convolve_task(const Convolution& conv, std::int64_t image, std::int64_t first, std::int64_t last, \
                                std::int64_t first_panel, std::int64_t last_panel) {                                \
    convolve<lanes>(conv, image, first, last, first_panel, last_panel);                                             \
  }
FASTPERC_VERSIONS(FASTPERC_VERSION)

constexpr std::int64_t over(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

void depthwise_conv_cpu(const float* x, const float* weights, const float* bias, const float* skip, float* out,
                        const DepthwiseShape& shape, const ImageStrides& skip_strides, const Activation& activation,
                        int threads) {
  const Convolution conv{x, weights, bias, skip, out, shape, skip_strides, activation};
  const std::int64_t row_floats = shape.columns * shape.channels * shape.stride, panels = shape.panels();
  const std::int64_t floats = shape.out_rows * shape.out_columns * shape.channels;
  if (shape.images * floats == 0) return;
  std::int64_t blocks = over(shape.out_rows, std::max<std::int64_t>(block_floats / row_floats, 1)), ranges = 1;
  if (threads > 1) {
    const std::int64_t wanted =
        std::clamp(shape.images * floats / fewest_floats, std::int64_t{threads}, blocks_for_a_thread * threads);
    if (over(shape.out_rows, 2) >= over(wanted, shape.images)) {
      blocks = std::max(blocks, over(wanted, shape.images));
    } else {
      ranges = std::min(panels, over(wanted, shape.images * blocks));
    }
  }
  blocks = std::min(blocks, shape.out_rows);
  take_turns(shape.images * blocks * ranges, threads, [&](std::int64_t task) {
    const std::int64_t range = task % ranges, block = task / ranges % blocks;
    convolve_task(conv, task / ranges / blocks, block * shape.out_rows / blocks, (block + 1) * shape.out_rows / blocks,
                  range * panels / ranges, (range + 1) * panels / ranges);
  });
}

}  // namespace fastperc
