// 1×1 convolutions on the CPU, float32, NHWC: y = activation(x · W + bias + skip), a product of matrices.
//
// A task is a block of pixels and a range of output channels. It takes one panel of the weights after the other, and
// multiplies it by a few pixels at a time, whose sums stay in registers. Bias, skip and activation are applied when the
// sums are stored. With many pixels the threads share the pixels; with few they share the output channels, so that each
// weight is read once. Every sum is in the order of the input channels, whoever computes it.
#include "pointwise_conv.h"

#include <algorithm>

#include "conv3x3_tile.h"
#include "kernels.h"

namespace fastperc {
namespace {

using namespace winograd;

constexpr std::int64_t wide = pointwise_panel, narrow_panel = wide / 2;
constexpr std::int64_t block_floats = 5 << 15;   // of x in a block, so that they stay in the L2 cache
constexpr std::int64_t conflict = 1024;          // floats: pixels so far apart share the same lines of the L1 cache
constexpr std::int64_t most_inner = 384;         // input channels whose products are summed before the sums are stored
constexpr std::int64_t fewest_groups = 4;        // of pixels for a thread; with fewer, threads share the channels
constexpr std::int64_t blocks_for_a_thread = 4;  // where there are enough pixels

struct Convolution {
  const float *x, *weights, *bias, *skip;  // bias is filled up with zeros; skip may be null
  float* out;
  PointwiseShape shape;
  ImageStrides skip_strides;  // its channels have stride 1
  Activation activation;      // its slopes are filled up as bias is
  bool copies;                // whether the pixels of a block are copied to adjacent memory first
  std::int64_t pixels;        // in a block

  std::int64_t copy_step() const { return (shape.in + line - 1) / line * line + line; }
  std::int64_t floats() const { return pixels * (wide + (copies ? copy_step() : 0)); }
  bool skip_is_even() const {
    return skip_strides.row == skip_strides.column * shape.out_columns() &&
           skip_strides.image == skip_strides.row * shape.out_rows();
  }
  const float* skip_of(std::int64_t pixel) const {
    const std::int64_t columns = shape.out_columns(), row = pixel / columns;
    return skip + row / shape.out_rows() * skip_strides.image + row % shape.out_rows() * skip_strides.row +
           pixel % columns * skip_strides.column;
  }
};

// Some columns of a panel times the pixels of a block, for some of the input channels.
struct Step {
  const Convolution& conv;
  const float *x, *weights;
  std::int64_t x_step, inner;  // of a pixel; input channels
  std::int64_t first, count;   // pixels
  std::int64_t channel;        // the first output channel
  float* sums;                 // [count, columns], of earlier input channels
  bool is_first, is_last;      // of the steps with other input channels
};

// Stores `count` floats of x, fewer than a register holds.
template <int lanes>
FASTPERC_INLINE void store_part(const Vector<lanes>& x, float* to, std::int64_t count) {
  const float* from = reinterpret_cast<const float*>(&x);
  if constexpr (lanes > 8) {
    if (count & 8) {
      at<8>(to) = at<8>(from);
      to += 8, from += 8;
    }
  }
  if constexpr (lanes > 4) {
    if (count & 4) {
      at<4>(to) = at<4>(from);
      to += 4, from += 4;
    }
  }
  for (std::int64_t i = 0; i < count % 4; ++i) to[i] = from[i];
}

template <int lanes, int rows, int vectors>
FASTPERC_INLINE void store(const Step& step, std::int64_t first, Vector<lanes> (&sums)[rows][vectors]) {
  const Convolution& conv = step.conv;
  const std::int64_t pixel = step.first + first, out_step = conv.shape.out_step;
  const std::int64_t valid = conv.shape.out - step.channel;
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    const Vector<lanes> bias = at<lanes>(conv.bias + step.channel + v * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) sums[r][v] += bias;
  }
  if (conv.skip) {
    const bool even = conv.skip_is_even();
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const float* skip = (even ? conv.skip + (pixel + r) * conv.skip_strides.column : conv.skip_of(pixel + r));
      skip += step.channel;
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        if ((v + 1) * lanes <= valid) {
          sums[r][v] += at<lanes>(skip + v * lanes);
        } else if (v * lanes < valid) {
          float part[lanes] = {};
          std::copy(skip + v * lanes, skip + valid, part);
          sums[r][v] += at<lanes>(part);
        }
      }
    }
  }
  const auto activate_all = [&](auto&& function) FASTPERC_INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) function(sums[r][v], v);
    }
  };
  switch (conv.activation.kind) {
    case ActivationKind::none:
      break;
    case ActivationKind::relu:
      activate_all([](Vector<lanes>& x, int) FASTPERC_INLINE_LAMBDA { relu(x); });
      break;
    case ActivationKind::slopes: {
      const float* slopes = conv.activation.slopes + step.channel;
      activate_all([&](Vector<lanes>& x, int v) FASTPERC_INLINE_LAMBDA { leaky(x, at<lanes>(slopes + v * lanes)); });
      break;
    }
    case ActivationKind::relu6:
      activate_all([](Vector<lanes>& x, int) FASTPERC_INLINE_LAMBDA { relu6(x); });
      break;
  }
  float* out = conv.out + pixel * out_step + step.channel;
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      float* to = out + r * out_step + v * lanes;
      if ((v + 1) * lanes <= valid) {
        at<lanes>(to) = sums[r][v];
      } else if (v * lanes < valid) {
        store_part<lanes>(sums[r][v], to, valid - v * lanes);
      }
    }
  }
}

// sums [rows, vectors] += x [rows, inner] · weights [inner, pitch], for `vectors` vectors of the columns. With `ahead`,
// `next` is memory that will be read soon, a line of it for each k.
template <int lanes, int rows, int vectors, int pitch, bool ahead>
FASTPERC_INLINE void accumulate(const float* x, std::int64_t x_step, const float* weights, std::int64_t inner,
                                const float* next, Vector<lanes> (&sums)[rows][vectors]) {
  constexpr int bases = (rows + 2) / 3;  // an address reaches two more rows by the step, and by twice the step
  const float* base[bases];
#pragma GCC unroll 8
  for (int i = 0; i < bases; ++i) base[i] = x + 3 * i * x_step;
  for (std::int64_t k = 0; k < inner; ++k, weights += pitch) {
    if (ahead) FASTPERC_PREFETCH(next + k * line);
    Vector<lanes> columns[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) columns[v] = at<lanes>(weights + v * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
      const float factor = base[r / 3][r % 3 * x_step];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] += factor * columns[v];
    }
#pragma GCC unroll 8
    for (int i = 0; i < bases; ++i) {
      ++base[i];
#ifdef __GNUC__
      asm("" : "+r"(base[i]));  // keeps the addresses in as many registers
#endif
    }
  }
}

template <int lanes, int rows, int vectors, int pitch, bool ahead>
FASTPERC_INLINE void multiply_pixels(const Step& step, std::int64_t first, const float* next) {
  constexpr std::int64_t width = vectors * lanes;
  float* kept = step.sums + first * width;
  Vector<lanes> sums[rows][vectors] = {};
  if (!step.is_first) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] = at<lanes>(kept + r * width + v * lanes);
    }
  }
  accumulate<lanes, rows, vectors, pitch, ahead>(step.x + first * step.x_step, step.x_step, step.weights, step.inner,
                                                 next, sums);
  if (step.is_last) {
    store<lanes, rows, vectors>(step, first, sums);
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) at<lanes>(kept + r * width + v * lanes) = sums[r][v];
    }
  }
}

constexpr int fewer(int rows) { return rows > 6 ? 6 : rows > 4 ? 4 : rows / 2; }

// The pixels from `first` on, `rows` at a time, and the rest by fewer at a time.
template <int lanes, int rows, int vectors, int pitch>
FASTPERC_INLINE void multiply_rest(const Step& step, std::int64_t first) {
  for (; first + rows <= step.count; first += rows) {
    multiply_pixels<lanes, rows, vectors, pitch, false>(step, first, nullptr);
  }
  if constexpr (rows > 1) {
    if (first < step.count) multiply_rest<lanes, fewer(rows), vectors, pitch>(step, first);
  }
}

template <int lanes, int rows, int vectors, int pitch>
FASTPERC_INLINE void multiply_columns(Step step) {
  const float *x = step.x, *weights = step.weights;
  const std::int64_t in = step.conv.shape.in;
  for (std::int64_t k = 0; k < in; k += most_inner) {
    step.x = x + k;
    step.weights = weights + k * pitch;
    step.inner = std::min(most_inner, in - k);
    step.is_first = k == 0;
    step.is_last = k + step.inner == in;
    std::int64_t first = 0;
    for (; first < 2 * rows && first + rows <= step.count; first += rows) {  // the next panel meanwhile
      const float* next = step.weights + in * pitch + first / rows * step.inner * line;
      multiply_pixels<lanes, rows, vectors, pitch, true>(step, first, next);
    }
    multiply_rest<lanes, rows, vectors, pitch>(step, first);
  }
}

// Computes `count` pixels from `first` on, and the halves of panels [half, last).
template <int lanes, int rows, int vectors>
FASTPERC_INLINE void convolve(const Convolution& conv, std::int64_t first, std::int64_t count, std::int64_t half,
                              std::int64_t last, float* sums) {
  const PointwiseShape& s = conv.shape;
  const float* x = conv.x + first * s.in_step;
  std::int64_t x_step = s.in_step;
  if (conv.copies) {
    float* copy = sums + conv.pixels * wide;
    const std::int64_t columns = s.out_columns(), rows_of_image = s.out_rows();
    x_step = conv.copy_step();
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t row = (first + i) / columns, column = (first + i) % columns;
      const std::int64_t image = row / rows_of_image, in_row = row % rows_of_image * s.stride;
      const float* from = conv.x + ((image * s.rows + in_row) * s.columns + column * s.stride) * s.in_step;
      std::copy_n(from, s.in, copy + i * x_step);
    }
    x = copy;
  }
  const std::int64_t halves = s.packed_out() / narrow_panel;
  while (half < last) {
    const std::int64_t channel = half * narrow_panel, panel_channel = channel / wide * wide;
    const bool is_narrow = panel_channel / narrow_panel + 1 == halves;
    const std::int64_t width = !is_narrow && half % 2 == 0 && half + 1 < last ? wide : narrow_panel;
    for (std::int64_t o = 0; o < width; o += lanes * vectors) {
      const float* weights = conv.weights + panel_channel * s.in + channel - panel_channel + o;
      const Step step{conv, x, weights, x_step, 0, first, count, channel + o, sums, true, true};
      constexpr int fewest = std::min<int>(vectors, narrow_panel / lanes);
      if (is_narrow) {
        multiply_columns<lanes, rows, fewest, narrow_panel>(step);
      } else if (width == narrow_panel) {
        multiply_columns<lanes, rows, fewest, wide>(step);
      } else {
        multiply_columns<lanes, rows, vectors, wide>(step);
      }
    }
    half += width / narrow_panel;
  }
}

// With 14 pixels and 32 registers GCC copies and spills the sums.
constexpr int rows_at_once(int lanes) { return lanes == 16 ? 12 : lanes == 8 ? 6 : 4; }

#define FASTPERC_VERSION(attributes, lanes, rows, vectors)                                                          \
  attributes std::int64_t group_of_pixels() { return rows_at_once(lanes); }                                         \
  attributes void convolve_task(const Convolution& conv, std::int64_t first, std::int64_t count, std::int64_t half, \
                                std::int64_t last, float* sums) {                                                   \
    convolve<lanes, rows_at_once(lanes), vectors>(conv, first, count, half, last, sums);                            \
  }
FASTPERC_VERSIONS(FASTPERC_VERSION)

constexpr std::int64_t over(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

void pointwise_conv_cpu(const float* x, const float* weights, const float* bias, const float* skip, float* out,
                        const PointwiseShape& shape, const ImageStrides& skip_strides, const Activation& activation,
                        int threads) {
  const std::int64_t pixels = shape.pixels(), halves = shape.packed_out() / narrow_panel, group = group_of_pixels();
  if (pixels == 0 || halves == 0) return;
  const bool copies = shape.stride > 1 || (shape.in_step % conflict == 0 && shape.in > line);
  Convolution conv{x, weights, bias, skip, out, shape, skip_strides, activation, copies, 0};
  const std::int64_t groups = over(pixels, group);
  const std::int64_t most =
      std::max<std::int64_t>(block_floats / shape.in / group, fewest_groups);  // groups in a block
  std::int64_t blocks, ranges = 1;
  if (threads == 1 || groups >= fewest_groups * threads) {
    const std::int64_t turns = std::min(blocks_for_a_thread, groups / threads / fewest_groups);
    blocks = std::max(over(groups, most), threads == 1 ? 1 : threads * std::max<std::int64_t>(turns, 1));
  } else {
    blocks = over(groups, most);
    ranges = std::min<std::int64_t>(threads, halves);
  }
  conv.pixels = over(groups, blocks) * group;
  blocks = over(pixels, conv.pixels);
  take_turns(blocks * ranges, threads, [&](std::int64_t task) {
    const std::int64_t first = task / ranges * conv.pixels, range = task % ranges;
    convolve_task(conv, first, std::min(conv.pixels, pixels - first), range * halves / ranges,
                  (range + 1) * halves / ranges, scratch(conv.floats()));
  });
}

}  // namespace fastperc
