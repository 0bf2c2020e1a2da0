// Convolutions from few channels on the CPU, float32, NHWC: y = activation(conv(x) + bias + skip).
//
// A task is a block of rows of y. The rows of x that a row of y is made of are copied with their border of zeros; then
// the pixels under a row of the kernel are adjacent numbers, and a convolution is a product of matrices whose left
// factor overlaps itself. The sums of a few pixels stay in registers. Every sum is in the order of the taps.
#include "stem_conv.h"

#include <algorithm>

#include "conv_epilogue.h"
#include "kernels.h"

namespace fastperc {
namespace {

using namespace winograd;

constexpr std::int64_t wide = stem_panel, narrow_panel = wide / 2;
constexpr std::int64_t blocks_for_a_thread = 4;  // where there are enough rows

struct Convolution {
  const float *x, *weights, *bias, *skip;  // bias is filled up with zeros; skip may be null
  float* out;
  StemShape shape;
  ImageStrides skip_strides;  // its channels have stride 1
  Activation activation;      // its slopes are filled up as bias is

  std::int64_t row_floats() const { return (shape.wide_columns() * shape.in + line - 1) / line * line; }
};

// Some channels of a row of y.
struct Part {
  const Convolution& conv;
  const float* x;  // [k, row_floats], with the border
  const float* weights;
  std::int64_t image, row, channel;
};

// y of `pixels` pixels from `column` on, for `vectors` vectors of channels. `adjacent` is k · I, or 0 for any.
template <int lanes, int pixels, int vectors, int pitch, int adjacent>
FASTPERC_INLINE void convolve_pixels(const Part& part, std::int64_t column) {
  const Convolution& conv = part.conv;
  const StemShape& s = conv.shape;
  const std::int64_t step = s.stride * s.in, inner = s.kernel * s.in;
  constexpr int bases = (pixels + 2) / 3;  // an address reaches two more pixels by the step, and by twice the step
  Vector<lanes> sums[pixels][vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
#pragma GCC unroll 16
    for (int p = 0; p < pixels; ++p) sums[p][v] = at<lanes>(conv.bias + part.channel + v * lanes);
  }
  const float* weights = part.weights;
  for (std::int64_t i = 0; i < s.kernel; ++i) {
    const float* base[bases];
#pragma GCC unroll 8
    for (int b = 0; b < bases; ++b) base[b] = part.x + i * conv.row_floats() + (column + 3 * b) * step;
    const auto add = [&](std::int64_t k) FASTPERC_INLINE_LAMBDA {
      Vector<lanes> columns[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) columns[v] = at<lanes>(weights + v * lanes);
#pragma GCC unroll 16
      for (int p = 0; p < pixels; ++p) {
        const float factor = base[p / 3][p % 3 * step + k];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[p][v] += factor * columns[v];
      }
      weights += pitch;
    };
    if constexpr (adjacent) {
#pragma GCC unroll 16
      for (int k = 0; k < adjacent; ++k) add(k);
    } else {
      for (std::int64_t k = 0; k < inner; ++k) {
        add(0);
#pragma GCC unroll 8
        for (int b = 0; b < bases; ++b) {
          ++base[b];
#ifdef __GNUC__
          asm("" : "+r"(base[b]));  // keeps the addresses in as many registers
#endif
        }
      }
    }
  }
  const ImageStrides& k = conv.skip_strides;
  const float* skip =
      conv.skip ? conv.skip + part.image * k.image + part.row * k.row + column * k.column + part.channel : nullptr;
  float* out = conv.out + ((part.image * s.out_rows + part.row) * s.out_columns + column) * s.out_step + part.channel;
  finish<lanes, pixels, vectors>(sums, skip, k.column, out, s.out_step, conv.activation, part.channel,
                                 s.out - part.channel);
}

constexpr int fewer(int pixels) { return pixels > 6 ? 6 : pixels > 4 ? 4 : pixels / 2; }

// The pixels of a row from `column` on, `pixels` at a time, and the rest by fewer at a time.
template <int lanes, int pixels, int vectors, int pitch>
FASTPERC_INLINE void convolve_row(const Part& part, std::int64_t column) {
  const std::int64_t columns = part.conv.shape.out_columns;
  if (part.conv.shape.kernel * part.conv.shape.in == 9) {
    for (; column + pixels <= columns; column += pixels) {
      convolve_pixels<lanes, pixels, vectors, pitch, 9>(part, column);
    }
  }
  for (; column + pixels <= columns; column += pixels) convolve_pixels<lanes, pixels, vectors, pitch, 0>(part, column);
  if constexpr (pixels > 1) {
    if (column < columns) convolve_row<lanes, fewer(pixels), vectors, pitch>(part, column);
  }
}

// Copies the rows of x that the row `row` of y of an image is made of, with their border.
FASTPERC_INLINE void copy_rows(const Convolution& conv, std::int64_t image, std::int64_t row, float* to) {
  const StemShape& s = conv.shape;
  const std::int64_t columns = std::clamp<std::int64_t>(s.wide_columns() - s.left, 0, s.columns);  // that are read
  const std::int64_t zeros = std::min(s.left, s.wide_columns()) * s.in;
  for (std::int64_t i = 0; i < s.kernel; ++i, to += conv.row_floats()) {
    const std::int64_t in_row = row * s.stride - s.top + i;
    float* end = to + s.wide_columns() * s.in;
    if (in_row < 0 || in_row >= s.rows) {
      std::fill(to, end, 0.0f);
      continue;
    }
    const float* from = conv.x + (image * s.rows + in_row) * s.columns * s.in_step;
    float* pixels = to + zeros;
    std::fill(to, pixels, 0.0f);
    if (s.in_step == s.in) {
      pixels = std::copy_n(from, columns * s.in, pixels);
    } else {
      for (std::int64_t c = 0; c < columns; ++c) pixels = std::copy_n(from + c * s.in_step, s.in, pixels);
    }
    std::fill(pixels, end, 0.0f);
  }
}

// Computes the row `row` of y of an image.
template <int lanes, int pixels, int vectors>
FASTPERC_INLINE void convolve(const Convolution& conv, std::int64_t image, std::int64_t row, float* rows) {
  const StemShape& s = conv.shape;
  const std::int64_t taps = s.kernel * s.kernel * s.in;
  copy_rows(conv, image, row, rows);
  for (std::int64_t channel = 0; channel < s.out; channel += wide) {
    const float* weights = conv.weights + channel * taps;
    constexpr int fewest = std::min<int>(vectors, narrow_panel / lanes);
    if (s.out - channel > narrow_panel) {
      for (std::int64_t o = 0; o < wide; o += lanes * vectors) {
        convolve_row<lanes, pixels, vectors, wide>(Part{conv, rows, weights + o, image, row, channel + o}, 0);
      }
    } else {
      for (std::int64_t o = 0; o < narrow_panel; o += lanes * fewest) {
        convolve_row<lanes, pixels, fewest, narrow_panel>(Part{conv, rows, weights + o, image, row, channel + o}, 0);
      }
    }
  }
}

constexpr int pixels_at_once(int lanes) { return lanes == 16 ? 12 : lanes == 8 ? 6 : 4; }

#define FASTPERC_VERSION(attributes, lanes, rows, vectors)                                                          \
  attributes void convolve_rows(const Convolution& conv, std::int64_t first, std::int64_t last, float* rows_of_x) { \
    const std::int64_t count = conv.shape.out_rows;                                                                 \
    for (std::int64_t row = first; row < last; ++row) {                                                             \
      convolve<lanes, pixels_at_once(lanes), vectors>(conv, row / count, row % count, rows_of_x);                   \
    }                                                                                                               \
  }
FASTPERC_VERSIONS(FASTPERC_VERSION)

}  // namespace

void stem_conv_cpu(const float* x, const float* weights, const float* bias, const float* skip, float* out,
                   const StemShape& shape, const ImageStrides& skip_strides, const Activation& activation,
                   int threads) {
  const Convolution conv{x, weights, bias, skip, out, shape, skip_strides, activation};
  const std::int64_t rows = shape.images * shape.out_rows;
  if (rows * shape.out_columns * shape.out == 0) return;
  const std::int64_t blocks = threads == 1 ? 1 : std::min(rows, blocks_for_a_thread * threads);
  take_turns(blocks, threads, [&](std::int64_t block) {
    convolve_rows(conv, block * rows / blocks, (block + 1) * rows / blocks, scratch(shape.kernel * conv.row_floats()));
  });
}

}  // namespace fastperc
