// Convolutions on the CPU, float32, NHWC: y = activation(Σ over the taps x · W + bias + skip), products of matrices.
//
// A task is a block of pixels and a range of output channels. It takes some pixels at a time, and multiplies them by
// one panel of the weights after the other; a few pixels times a panel is computed in registers, all taps and input
// channels at once. The pixels that a tap reads are found by pointers, those outside the image point to zeros. So a 1×1
// convolution is one with a single tap. Bias, skip and activation are applied when the sums are stored.
//
// With many pixels the threads share the pixels; with few they share the output channels, so that each weight is read
// once. Every sum is in the order of the taps and input channels, whoever computes it.
#include "pointwise_conv.h"

#include <algorithm>

#include "conv3x3_tile.h"
#include "kernels.h"

namespace fastperc {
namespace {

using namespace winograd;

constexpr std::int64_t x_floats = 5 << 15;       // of x that stay in the L2 cache
constexpr std::int64_t weight_floats = 1 << 17;  // of weights that stay there
constexpr std::int64_t most_inner = 1024;        // rows of a panel by which all pixels are multiplied at once
constexpr std::int64_t fewest_groups = 4;        // of pixels that a panel is multiplied by before the next one is
constexpr std::int64_t distance = 64;            // rows of a panel that are fetched ahead while it is read first

constexpr std::int64_t over(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The sums that are computed together are of `rows` pixels and `vectors` registers.
constexpr int most_vectors(int lanes) { return lanes == 16 ? 4 : 2; }
constexpr int rows_at_once(int lanes, int vectors) {
  if (lanes == 16) return vectors == 4 ? 6 : 8;
  return lanes == 8 && vectors == 2 ? 6 : 8 / vectors;
}

struct Convolution {
  const float *x, *weights, *bias, *skip;  // bias is filled up with zeros; skip may be null
  float* out;
  PointwiseShape shape;
  ImageStrides skip_strides;  // its channels have stride 1
  Activation activation;      // its slopes are filled up as bias is
  std::int64_t tile;          // pixels that a panel is multiplied by before the next one is

  std::int64_t inner() const { return shape.taps() * shape.in; }
  std::int64_t zeros() const { return over(shape.in, line) * line; }
  // Zeros; sums for each pixel of a tile; a pointer for each of its taps and pixels.
  std::int64_t floats(std::int64_t panel) const {
    constexpr std::int64_t pointer = sizeof(const float*) / sizeof(float);
    return zeros() + tile * (panel + shape.taps() * pointer);
  }
  bool skip_is_even() const {
    return skip_strides.row == skip_strides.column * shape.out_columns &&
           skip_strides.image == skip_strides.row * shape.out_rows;
  }
  const float* skip_of(std::int64_t pixel) const {
    const std::int64_t row = pixel / shape.out_columns;
    return skip + row / shape.out_rows * skip_strides.image + row % shape.out_rows * skip_strides.row +
           pixel % shape.out_columns * skip_strides.column;
  }
};

// A panel times the pixels of a tile.
struct Step {
  const Convolution& conv;
  const float* weights;
  const float* const* pixels;  // [taps, tile]
  std::int64_t first, count;   // pixels
  std::int64_t channel;        // the first output channel
  float* sums;                 // [tile, panel]
};

// Rows of a panel: some taps with all input channels, or a tap with some of them.
struct Part {
  std::int64_t tap, taps, channel, channels;
  bool is_first, is_last;
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

// Stores the sums [rows, vectors · lanes] of the pixels from `first` on. All channels of a `whole` panel are valid.
template <int lanes, int vectors, bool whole, typename F>
FASTPERC_INLINE void store_activated(const Step& step, std::int64_t first, std::int64_t rows, const float* sums,
                                     F&& activate) {
  const Convolution& conv = step.conv;
  const std::int64_t valid = conv.shape.out - step.channel;
  const bool even = conv.skip && conv.skip_is_even();
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t pixel = step.first + first + r;
    float* out = conv.out + pixel * conv.shape.out_step + step.channel;
    const float* skip = nullptr;
    if (conv.skip) skip = (even ? conv.skip + pixel * conv.skip_strides.column : conv.skip_of(pixel)) + step.channel;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const std::int64_t left = valid - v * lanes;
      Vector<lanes> sum = at<lanes>(sums + (r * vectors + v) * lanes) + at<lanes>(conv.bias + step.channel + v * lanes);
      if (skip && (whole || left >= lanes)) {
        sum += at<lanes>(skip + v * lanes);
      } else if (skip) {
        float part[lanes] = {};
        std::copy_n(skip + v * lanes, left, part);
        sum += at<lanes>(part);
      }
      activate(sum, v);
      if (whole || left >= lanes) {
        at<lanes>(out + v * lanes) = sum;
      } else {
        store_part<lanes>(sum, out + v * lanes, left);
      }
    }
  }
}

template <int lanes, int vectors, typename F>
FASTPERC_INLINE void store_panel(const Step& step, std::int64_t first, std::int64_t rows, const float* sums,
                                 F&& activate) {
  if (step.channel + vectors * lanes <= step.conv.shape.out) {
    store_activated<lanes, vectors, true>(step, first, rows, sums, activate);
  } else {
    store_activated<lanes, vectors, false>(step, first, rows, sums, activate);
  }
}

template <int lanes, int vectors>
FASTPERC_INLINE void store(const Step& step, std::int64_t first, std::int64_t rows, const float* sums) {
  using V = Vector<lanes>;
  const float* slopes = step.conv.activation.slopes + step.channel;
  switch (step.conv.activation.kind) {
    case ActivationKind::none:
      return store_panel<lanes, vectors>(step, first, rows, sums, [](V&, int) FASTPERC_INLINE_LAMBDA {});
    case ActivationKind::relu:
      return store_panel<lanes, vectors>(step, first, rows, sums, [](V& x, int) FASTPERC_INLINE_LAMBDA { relu(x); });
    case ActivationKind::relu6:
      return store_panel<lanes, vectors>(step, first, rows, sums, [](V& x, int) FASTPERC_INLINE_LAMBDA { relu6(x); });
    case ActivationKind::slopes:
      return store_panel<lanes, vectors>(step, first, rows, sums, [&](V& x, int v) FASTPERC_INLINE_LAMBDA {
        leaky(x, at<lanes>(slopes + v * lanes));
      });
  }
}

// Fetches the memory that `store` will read and write, while the sums are computed.
template <int lanes, int vectors>
FASTPERC_INLINE void prefetch_output(const Step& step, std::int64_t first, std::int64_t rows) {
  const Convolution& conv = step.conv;
  const bool with_skip = conv.skip && conv.skip_is_even();
  for (std::int64_t pixel = step.first + first; pixel < step.first + first + rows; ++pixel) {
    const float* out = conv.out + pixel * conv.shape.out_step + step.channel;
    const float* skip = conv.skip + (with_skip ? pixel * conv.skip_strides.column + step.channel : 0);
    for (int o = 0; o < vectors * lanes; o += line) {
      FASTPERC_PREFETCH(out + o);
      if (with_skip) FASTPERC_PREFETCH(skip + o);
    }
  }
}

// sums [rows, vectors · lanes] += the products of `rows` pixels from `first` on with a part of the panel. `next` is
// memory that will be read soon, `ahead` lines of it for each row of the part.
template <int lanes, int rows, int vectors, int ahead>
FASTPERC_INLINE void multiply(const Step& step, const Part& part, const float* weights, std::int64_t first,
                              const float* next, float* sums) {
  const float* const* pixels = step.pixels + part.tap * step.conv.tile + first;
  Vector<lanes> kept[rows][vectors] = {};
  if (!part.is_first) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) kept[r][v] = at<lanes>(sums + (r * vectors + v) * lanes);
    }
  }
  for (std::int64_t tap = 0; tap < part.taps; ++tap, pixels += step.conv.tile) {
    const float* x[rows];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) x[r] = pixels[r] + part.channel;
    for (std::int64_t k = 0; k < part.channels; ++k, weights += vectors * lanes) {
#pragma GCC unroll 4
      for (int i = 0; i < ahead; ++i) FASTPERC_PREFETCH(next + i * line);
      next += ahead * line;
      Vector<lanes> columns[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) columns[v] = at<lanes>(weights + v * lanes);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
        const Vector<lanes> factor = x[r][k] - Vector<lanes>{};
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) kept[r][v] += factor * columns[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) at<lanes>(sums + (r * vectors + v) * lanes) = kept[r][v];
  }
}

// The rest of a tile: `count` pixels, at most `rows`. Returns how many of them it has computed.
template <int lanes, int rows, int vectors>
FASTPERC_INLINE std::int64_t multiply_rest(const Step& step, const Part& part, const float* weights, std::int64_t first,
                                           std::int64_t count, float* sums) {
  constexpr int fewer = rows > 6 ? 6 : rows > 4 ? 4 : rows / 2;
  if constexpr (rows > 1) {
    if (count < rows) return multiply_rest<lanes, fewer, vectors>(step, part, weights, first, count, sums);
  }
  multiply<lanes, rows, vectors, 0>(step, part, weights, first, nullptr, sums);
  return rows;
}

// Multiplies all pixels of a tile by a part of the panel, and stores them after the last part. A `cold` part is fetched
// while it is read first. With `ahead`, the next one is fetched meanwhile.
template <int lanes, int vectors>
FASTPERC_INLINE void multiply_part(const Step& step, const Part& part, const float* weights, bool cold, bool ahead) {
  constexpr int rows = rows_at_once(lanes, vectors), width = vectors * lanes;
  const std::int64_t inner = part.taps * part.channels;
  const bool is_whole = part.is_first && part.is_last;
  const float* next = weights + inner * width;
  std::int64_t lines = ahead ? over(width, line) : 0;
  for (std::int64_t first = 0, done; first < step.count; first += done) {
    float* sums = step.sums + (is_whole ? 0 : first * width);
    done = std::min<std::int64_t>(rows, step.count - first);
    if (part.is_last) prefetch_output<lanes, vectors>(step, first, done);
    if (done == rows && cold && first == 0) {
      constexpr int all_lines = over(width, line);
      multiply<lanes, rows, vectors, all_lines>(step, part, weights, first, weights + distance * width, sums);
    } else if (done == rows && lines > 0) {
      multiply<lanes, rows, vectors, 1>(step, part, weights, first, next, sums);
      next += inner * line;
      --lines;
    } else {
      done = multiply_rest<lanes, rows, vectors>(step, part, weights, first, done, sums);
    }
    if (part.is_last) store<lanes, vectors>(step, first, done, sums);
  }
}

template <int lanes, int vectors>
FASTPERC_INLINE void multiply_panel(const Step& step, bool cold, bool ahead) {
  const std::int64_t taps = step.conv.shape.taps(), in = step.conv.shape.in;
  const std::int64_t most_taps = std::max<std::int64_t>(most_inner / in, 1);
  const std::int64_t most_channels = over(in, over(in, most_inner));
  const float* weights = step.weights;
  for (std::int64_t tap = 0; tap < taps; tap += most_taps) {
    for (std::int64_t k = 0; k < in; k += most_channels) {
      Part part{tap, std::min(most_taps, taps - tap), k, std::min(most_channels, in - k), tap == 0 && k == 0, false};
      part.is_last = tap + part.taps == taps && k + part.channels == in;
      multiply_part<lanes, vectors>(step, part, weights, cold && part.is_first, ahead || !part.is_last);
      weights += part.taps * part.channels * vectors * lanes;
    }
  }
}

// pixels [taps, tile] = where each tap reads x for `count` pixels from `first` on; `zeros` outside the image.
inline void find_pixels(const Convolution& conv, std::int64_t first, std::int64_t count, const float* zeros,
                        const float** pixels) {
  const PointwiseShape& s = conv.shape;
  std::int64_t out_row = first / s.out_columns, left = first % s.out_columns * s.stride - s.left;
  std::int64_t image = out_row / s.out_rows, top = out_row % s.out_rows * s.stride - s.top;
  const std::int64_t end_left = s.out_columns * s.stride - s.left, end_top = s.out_rows * s.stride - s.top;
  for (std::int64_t i = 0; i < count; ++i) {
    const float** to = pixels + i;
    for (std::int64_t r = 0, row = top; r < s.kernel_rows; ++r, row += s.dilation) {
      const float* from = conv.x + (image * s.rows + row) * s.columns * s.in_step;
      for (std::int64_t c = 0, column = left; c < s.kernel_columns; ++c, column += s.dilation, to += conv.tile) {
        const bool inside = row >= 0 && row < s.rows && column >= 0 && column < s.columns;
        *to = inside ? from + column * s.in_step : zeros;
      }
    }
    if ((left += s.stride) < end_left) continue;
    left = -s.left;
    if ((top += s.stride) < end_top) continue;
    top = -s.top;
    ++image;
  }
}

// Computes `count` pixels from `first` on, and the channels [channel, last).
template <int lanes>
FASTPERC_INLINE void convolve(const Convolution& conv, std::int64_t first, std::int64_t count, std::int64_t channel,
                              std::int64_t last, float* memory) {
  constexpr PointwisePanels panels{lanes, most_vectors(lanes)};
  const std::int64_t inner = conv.inner(), vectors = panels.vectors_of(conv.shape.out);
  float *zeros = memory, *sums = zeros + conv.zeros();
  const auto pixels = reinterpret_cast<const float**>(sums + conv.tile * panels.vectors * lanes);
  std::fill_n(zeros, conv.shape.in, 0.0f);
  for (std::int64_t done = 0; done < count; done += conv.tile) {
    const std::int64_t pixels_now = std::min(conv.tile, count - done);
    find_pixels(conv, first + done, pixels_now, zeros, pixels);
    for (std::int64_t o = channel; o < last;) {
      const std::int64_t width = panels.width(vectors - o / lanes), next = o + width * lanes;
      const Step step{conv, conv.weights + o * inner, pixels, first + done, pixels_now, o, sums};
      const bool is_first = done == 0, cold = is_first && o == channel, ahead = is_first && next < last;
      if (width == 1) multiply_panel<lanes, 1>(step, cold, ahead);
      if (width == 2) multiply_panel<lanes, 2>(step, cold, ahead);
      if constexpr (panels.vectors > 2) {
        if (width == 3) multiply_panel<lanes, 3>(step, cold, ahead);
        if (width == 4) multiply_panel<lanes, 4>(step, cold, ahead);
      }
      o = next;
    }
  }
}

#define FASTPERC_VERSION(attributes, lanes, rows, vectors)                                                             \
  attributes PointwisePanels panels_here() { return {lanes, most_vectors(lanes)}; }                                    \
  attributes int group_of_pixels() { return rows_at_once(lanes, most_vectors(lanes)); }                                \
  attributes void convolve_task(const Convolution& conv, std::int64_t first, std::int64_t count, std::int64_t channel, \
                                std::int64_t last, float* memory) {                                                    \
    convolve<lanes>(conv, first, count, channel, last, memory);                                                        \
  }
FASTPERC_VERSIONS(FASTPERC_VERSION)

// How the threads share a convolution: `ranges` of panels times `blocks` of groups of pixels.
struct Split {
  std::int64_t ranges, blocks;
};

// The fastest split by a rough count of cycles: of products, of reading x and weights, of starting a task, and of the
// other threads waiting for the last task.
Split split(const PointwiseShape& s, const PointwisePanels& layout, std::int64_t group, std::int64_t threads) {
  constexpr double a_product = 0.5, a_float = 0.4, a_task = 300, waiting = 0.05;
  const std::int64_t vectors = layout.vectors_of(s.out), panels = over(vectors, layout.vectors);
  const std::int64_t groups = over(s.pixels(), group);
  Split best{1, 1};
  double least = 0;
  for (std::int64_t r = 1; r == 1 || (r <= 4 * threads && r < 2 * panels); r *= 2) {
    for (std::int64_t turns = 1; turns <= 4; ++turns) {
      const std::int64_t ranges = std::min(r, panels), blocks = std::min(over(threads * turns, ranges), groups);
      const double pixels = over(groups, blocks) * group;
      const double width = std::min(over(panels, ranges) * layout.vectors, vectors);
      // For each tap and input channel.
      const double products = a_product * pixels * width;
      const double reads = a_float * (width * layout.lanes + pixels / s.taps());
      const double task = products + reads + a_task / (s.taps() * s.in);
      const double cycles = over(ranges * blocks, threads) * task + waiting * products;
      if (least == 0 || cycles < least) best = {ranges, blocks}, least = cycles;
    }
  }
  return best;
}

}  // namespace

PointwisePanels pointwise_panels() { return panels_here(); }

void pointwise_conv_cpu(const float* x, const float* weights, const float* bias, const float* skip, float* out,
                        const PointwiseShape& shape, const ImageStrides& skip_strides, const Activation& activation,
                        int threads) {
  const std::int64_t pixels = shape.pixels(), group = group_of_pixels();
  if (pixels == 0 || shape.out == 0) return;
  const PointwisePanels layout = panels_here();
  const std::int64_t vectors = layout.vectors_of(shape.out), panels = over(vectors, layout.vectors);
  const Split parts = split(shape, layout, group, threads);
  const std::int64_t block = over(over(pixels, group), parts.blocks) * group, blocks = over(pixels, block);
  Convolution conv{x, weights, bias, skip, out, shape, skip_strides, activation, 0};
  const bool weights_stay = shape.out / parts.ranges * conv.inner() <= weight_floats;
  const std::int64_t most = weights_stay ? fewest_groups : std::max(x_floats / shape.in / group, fewest_groups);
  conv.tile = std::min(block, most * group);
  const auto start = [&](std::int64_t range) {  // the first channel of a range
    return std::min(layout.start(range * panels / parts.ranges, vectors), vectors) * layout.lanes;
  };
  take_turns(blocks * parts.ranges, threads, [&](std::int64_t task) {
    const std::int64_t first = task / parts.ranges * block, range = task % parts.ranges;
    convolve_task(conv, first, std::min(block, pixels - first), start(range), start(range + 1),
                  scratch(conv.floats(layout.lanes * layout.vectors)));
  });
}

}  // namespace fastperc
