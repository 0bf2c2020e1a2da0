// 3×3 convolutions of stride 1 on the CPU, float32, NHWC, by Winograd's F(t×t, 3×3): for t = 2 it takes 4 products for
// an output where the definition takes 9, for t = 4 it takes 2.25, loses some digits, and wastes more at the border.
//
//   a tile: (t+2)×(t+2) pixels of x at every t-th row and column     d [t+2, t+2, I]
//   its transform                                                    V = Bᵀ d B  [(t+2)², I]
//   (t+2)² products with the transformed weights U = G g Gᵀ          M = V · U   [(t+2)², O]
//   t×t pixels of the output                                         y = Aᵀ M A  [t, t, O]
//
// A task is a block of tiles, whose V stays in the L2 cache, and a range of panels of output channels, which are
// computed one after the other. So each panel of U is read once for a block. With many tiles the threads share the
// tiles; with few they share the panels too, so that each weight is read once, and transform the same tiles. Bias, skip
// and activation are applied when the pixels of a tile are stored. The number of threads does not change any sum or its
// order.
#include "conv3x3.h"

#include <algorithm>

#include "conv3x3_tile.h"
#include "kernels.h"

namespace fastperc {
namespace {

using namespace winograd;

constexpr std::int64_t group = 8;               // tiles of a block that lie together in V and in M
constexpr std::int64_t block_floats = 3 << 16;  // the size of V of a block
constexpr std::int64_t fewest_tiles = 16;       // that a block may have, even if V is larger then
constexpr std::int64_t quad = 4;                // tiles that are multiplied at once at least

constexpr std::int64_t over(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct Convolution {
  const float *x, *weights, *bias, *skip;  // transformed weights; bias [O] and skip [N, H', W', O] may be null
  float* out;
  WinogradShape shape;
  ImageStrides skip_strides;  // its channels have stride 1
  Activation activation;
  std::int64_t tiles;  // in a block, a multiple of `group`

  std::int64_t points() const { return (shape.tile + 2) * (shape.tile + 2); }
  // V [groups, I / chunk, points, group, chunk]
  std::int64_t chunk_step() const { return points() * group * chunk; }
  std::int64_t transformed_step() const { return shape.in / chunk * chunk_step(); }
  // M [groups, points, group, panel]
  std::int64_t point_step() const { return group * panel + skew; }
  std::int64_t product_step() const { return points() * point_step(); }
  std::int64_t floats() const { return tiles / group * (transformed_step() + product_step()); }
};

// Stores the pixels of a tile, made of M [(tile + 2)², step], for a panel of output channels from `first` on.
template <int lanes, int tile>
FASTPERC_INLINE void store_tile(const Convolution& conv, std::int64_t index, const float* m, std::int64_t step,
                                std::int64_t first) {
  constexpr int width = tile + 2;
  const WinogradShape& s = conv.shape;
  const Place p = place(s, index);
  const std::int64_t rows_inside = s.out_rows() - p.row, columns_inside = s.out_columns() - p.column;
  float* out = conv.out + ((p.image * s.out_rows() + p.row) * s.out_columns() + p.column) * s.out_step + first;
  const std::int64_t down = s.out_columns() * s.out_step;
  const ImageStrides& strides = conv.skip_strides;
  const float* skip =
      conv.skip ? conv.skip + p.image * strides.image + p.row * strides.row + p.column * strides.column + first
                : nullptr;
  for (std::int64_t o = 0; o < panel; o += lanes) {
    Vector<lanes> rows[tile][width], products[width], pixels[tile];
#pragma GCC unroll 6
    for (int j = 0; j < width; ++j) {
#pragma GCC unroll 6
      for (int i = 0; i < width; ++i) products[i] = at<lanes>(m + (width * i + j) * step + o);
      Transform<tile>::output(products, pixels);
#pragma GCC unroll 4
      for (int i = 0; i < tile; ++i) rows[i][j] = pixels[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < tile; ++i) {
      if (i >= rows_inside) break;
      Transform<tile>::output(rows[i], pixels);
#pragma GCC unroll 4
      for (int j = 0; j < tile; ++j) {
        if (j >= columns_inside) break;
        if (conv.bias) pixels[j] += at<lanes>(conv.bias + first + o);
        if (skip) pixels[j] += at<lanes>(skip + i * strides.row + j * strides.column + o);
        activate<lanes>(pixels[j], conv.activation, first + o);
        at<lanes>(out + i * down + j * s.out_step + o) = pixels[j];
      }
    }
  }
}

// Computes the block of `count` tiles from `first` on, for the output channels [channel, last).
template <int lanes, int rows, int vectors, int tile>
FASTPERC_INLINE void convolve(const Convolution& conv, std::int64_t first, std::int64_t count, std::int64_t channel,
                              std::int64_t last, float* transformed) {
  constexpr std::int64_t points = (tile + 2) * (tile + 2);
  const WinogradShape& s = conv.shape;
  const std::int64_t chunk_step = conv.chunk_step(), point_step = conv.point_step();
  float* products = transformed + conv.tiles / group * conv.transformed_step();
  const auto transform_of = [&](std::int64_t t) {
    return transformed + t / group * conv.transformed_step() + t % group * chunk;
  };
  for (std::int64_t t = 0; t < count; ++t) {
    transform_tile<lanes, tile>(conv.x, s, first + t, 0, s.in, transform_of(t), group * chunk, chunk_step);
  }
  for (std::int64_t t = count; t % quad; ++t) {
    for (std::int64_t i = 0; i < points * s.in / chunk; ++i) std::fill_n(transform_of(t) + i * group * chunk, chunk, 0);
  }
  for (std::int64_t o = channel; o < last; o += panel) {
    for (std::int64_t i = 0; i < points; ++i) {
      const float* weights = conv.weights + (o * points + i * panel) * s.in;
      for (std::int64_t t = 0; t < count; t += group) {
        multiply_rows<lanes, rows, vectors, panel, false, true>(
            transform_of(t) + i * group * chunk, {chunk, 1, chunk, chunk_step}, weights,
            products + t / group * conv.product_step() + i * point_step, s.in,
            std::min(group, over(count - t, quad) * quad), weights + panel * s.in + t / group * s.in * line);
      }
    }
    for (std::int64_t t = 0; t < count; ++t) {
      store_tile<lanes, tile>(conv, first + t, products + t / group * conv.product_step() + t % group * panel,
                              point_step, o);
    }
  }
}

// to [(tile + 2)², in, panel] = U of a panel of output channels.
template <int lanes, int tile>
FASTPERC_INLINE void transform_weights(const float* weight, const WeightStrides& strides, std::int64_t in, float* to) {
  constexpr int width = tile + 2;
  float taps[9][lanes][panel];
  for (std::int64_t first = 0; first < in; first += lanes) {
    const auto tap_at = [&](int tap) FASTPERC_INLINE_LAMBDA {
      return weight + tap / 3 * strides.row + tap % 3 * strides.column + first * strides.in;
    };
    if (strides.in == 1 || strides.out == 1) {  // the innermost loop goes along the smallest stride
      for (int tap = 0; tap < 9; ++tap) {
        const float* from = tap_at(tap);
        if (strides.out == 1) {
          for (std::int64_t i = 0; i < lanes; ++i) std::copy_n(from + i * strides.in, panel, taps[tap][i]);
        } else {
          for (std::int64_t o = 0; o < panel; ++o) {
            FASTPERC_PREFETCH(from + o * strides.out + lanes);
            for (std::int64_t i = 0; i < lanes; ++i) taps[tap][i][o] = from[o * strides.out + i];
          }
        }
      }
    } else {
      for (std::int64_t o = 0; o < panel; ++o) {
        for (std::int64_t i = 0; i < lanes; ++i) {
          for (int tap = 0; tap < 9; ++tap) taps[tap][i][o] = tap_at(tap)[o * strides.out + i * strides.in];
        }
      }
    }
    for (std::int64_t i = 0; i < lanes; ++i) {
      for (std::int64_t o = 0; o < panel; o += lanes) {
        Vector<lanes> rows[width][3], made[width];
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) {
          const Vector<lanes> column[3] = {at<lanes>(&taps[j][i][o]), at<lanes>(&taps[3 + j][i][o]),
                                           at<lanes>(&taps[6 + j][i][o])};
          Transform<tile>::weight(column, made);
#pragma GCC unroll 6
          for (int r = 0; r < width; ++r) rows[r][j] = made[r];
        }
#pragma GCC unroll 6
        for (int r = 0; r < width; ++r) {
          Transform<tile>::weight(rows[r], made);
#pragma GCC unroll 6
          for (int c = 0; c < width; ++c) {
            at<lanes>(to + ((width * r + c) * in + first + i) * panel + o) = made[c];
          }
        }
      }
    }
  }
}

#define FASTPERC_VERSION(attributes, lanes, rows, vectors)                                                             \
  attributes int floats_in_register() { return lanes; }                                                                \
  attributes void convolve_task(const Convolution& conv, std::int64_t first, std::int64_t count, std::int64_t channel, \
                                std::int64_t last, float* memory) {                                                    \
    if (conv.shape.tile == 2) {                                                                                        \
      convolve<lanes, rows, vectors, 2>(conv, first, count, channel, last, memory);                                    \
    } else {                                                                                                           \
      convolve<lanes, rows, vectors, 4>(conv, first, count, channel, last, memory);                                    \
    }                                                                                                                  \
  }                                                                                                                    \
  attributes void weights_panel(const float* weight, const WeightStrides& strides, std::int64_t in, float* to,         \
                                std::int64_t tile) {                                                                   \
    if (tile == 2) {                                                                                                   \
      transform_weights<lanes, 2>(weight, strides, in, to);                                                            \
    } else {                                                                                                           \
      transform_weights<lanes, 4>(weight, strides, in, to);                                                            \
    }                                                                                                                  \
  }
FASTPERC_VERSIONS(FASTPERC_VERSION)

// How the threads share a convolution: `ranges` of panels times `blocks` of quads of tiles.
struct Split {
  std::int64_t ranges, blocks;
};

// The fastest split by a rough count of cycles: of products, of reading U, of the transforms, of starting a task, and
// of the other threads waiting for the last task.
Split split(const WinogradShape& s, std::int64_t lanes, std::int64_t threads) {
  constexpr double a_product = 0.6, a_float = 0.4, a_transform = 4, a_task = 1000, waiting = 0.05;
  const std::int64_t points = (s.tile + 2) * (s.tile + 2), quads = over(s.tiles(), quad), panels = s.out / panel;
  const std::int64_t most = std::max(block_floats / (points * s.in), fewest_tiles) / quad;  // quads of a block
  Split best{1, 1};
  double least = 0;
  for (std::int64_t ranges = 1; ranges == 1 || (ranges <= threads && ranges <= panels); ranges *= 2) {
    const std::int64_t fewest_blocks = 4 * quads <= 5 * most ? 1 : over(quads, most);  // one may be a little larger
    const std::int64_t fewest_turns = over(fewest_blocks * ranges, threads);
    for (std::int64_t turns = fewest_turns; turns < fewest_turns + 4; ++turns) {
      const std::int64_t blocks = std::min(over(threads * turns, ranges), quads);
      const double tiles = over(quads, blocks) * quad, channels = over(panels, ranges) * panel;
      const double products = a_product * tiles * s.in * channels / lanes;  // for each of the points
      const double transforms = a_transform * tiles * (s.in + channels) / lanes;
      const double task = points * (products + a_float * s.in * channels + transforms) + a_task;
      const double cycles = over(ranges * blocks, threads) * task + waiting * points * products;
      if (least == 0 || cycles < least) best = {ranges, blocks}, least = cycles;
    }
  }
  return best;
}

}  // namespace

int winograd_lanes() { return floats_in_register(); }

void winograd_weights_cpu(const float* weight, float* transformed, std::int64_t in, std::int64_t out,
                          const WeightStrides& strides, std::int64_t tile, int threads) {
  const std::int64_t floats = (tile + 2) * (tile + 2) * in * panel;
  parallel_for(out / panel, threads, [&](std::int64_t p) {
    weights_panel(weight + p * panel * strides.out, strides, in, transformed + p * floats, tile);
  });
}

void winograd_conv_cpu(const float* x, const float* weights, const float* bias, const float* skip, float* out,
                       const WinogradShape& shape, const ImageStrides& skip_strides, const Activation& activation,
                       int threads) {
  const std::int64_t tiles = shape.tiles();
  if (tiles == 0) return;
  const Split parts = split(shape, floats_in_register(), threads);
  const std::int64_t quads = over(tiles, quad), panels = shape.out / panel;
  const std::int64_t most = over(over(quads, parts.blocks) * quad, group) * group;  // tiles of a block
  const Convolution conv{x, weights, bias, skip, out, shape, skip_strides, activation, most};
  take_turns(parts.blocks * parts.ranges, threads, [&](std::int64_t task) {
    const std::int64_t block = task % parts.blocks, range = task / parts.blocks;
    const std::int64_t first = block * quads / parts.blocks * quad;
    const std::int64_t last = std::min((block + 1) * quads / parts.blocks * quad, tiles);
    convolve_task(conv, first, last - first, range * panels / parts.ranges * panel,
                  (range + 1) * panels / parts.ranges * panel, scratch(conv.floats()));
  });
}

}  // namespace fastperc
