// 9×9 convolutions from and to RGB on the CPU, float32, NHWC, by Winograd's F(3×3, 3×3): 25 products for an output
// where the definition takes 81. A 9×9 kernel is made of 3×3 blocks of 3×3 taps. A tile of x has 5×5 pixels and begins
// at every third row and column, so block (i, j) of an output tile reads the tile i below it and j to its right, and
// each tile is transformed once:
//
//   V[I, J] = Bᵀ d B of tile (I, J)                   [25, C]
//   M[I, J] = Σ over i, j of V[I+i, J+j] · U[i, j]    [25, O]
//   y = Aᵀ M A                                        [3, 3, O]
//
// From RGB, the sum over j and the three channels is one product, of 9 adjacent numbers of V. To RGB, three columns
// would leave most of a register empty, so the blocks are columns too: a product has 27, and M is the sum of nine of
// its places. A thread takes a strip of tiles at a time, whose V or products stay in its L2 cache.
#include <algorithm>
#include <type_traits>

#include "conv3x3_tile.h"
#include "kernels.h"
#include "rgb_conv.h"

namespace fastperc {
namespace {

using namespace winograd;

constexpr std::int64_t tile = 3, width = tile + 2, points = width * width, blocks = 3, rgb = 3;
constexpr std::int64_t stem_rows = 8, head_rows = 24, most_columns = 30;  // tiles in a strip, at most
constexpr std::int64_t together = 4;  // the rows of a product are padded to a multiple of this

constexpr std::int64_t divided_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Tiles of the output.
struct Strip {
  std::int64_t image, row, column, rows, columns;
};

// How the output is cut into strips.
struct Strips {
  std::int64_t tiles_down, tiles_across, rows, columns;

  Strips(const RGBConvShape& s, std::int64_t most_rows) {
    tiles_down = divided_up(s.out_rows, tile), tiles_across = divided_up(s.out_columns, tile);
    rows = divided_up(tiles_down, divided_up(tiles_down, most_rows));
    columns = divided_up(tiles_across, divided_up(tiles_across, most_columns));
  }
  std::int64_t down() const { return divided_up(tiles_down, rows); }
  std::int64_t across() const { return divided_up(tiles_across, columns); }
  Strip strip(std::int64_t i) const {
    const std::int64_t row = i / across() % down() * rows, column = i % across() * columns;
    return {i / across() / down(), row, column, std::min(rows, tiles_down - row),
            std::min(columns, tiles_across - column)};
  }
};

// to [5, step] = Bᵀ of five rows, of the floats from `first` on; a row that is null has zeros.
template <int lanes>
FASTPERC_INLINE void transform_rows(const float* const (&rows)[width], std::int64_t first, float* to,
                                    std::int64_t step) {
  const Vector<lanes> zero = {};
  Vector<lanes> d[width], v[width];
#pragma GCC unroll 5
  for (int i = 0; i < width; ++i) d[i] = rows[i] ? at<lanes>(rows[i] + first) : zero;
  Transform<tile>::input(d, v);
#pragma GCC unroll 5
  for (int i = 0; i < width; ++i) at<lanes>(to + i * step) = v[i];
}

// to [5, step] = Bᵀ of five rows of x [rows, columns, in], for the pixels of `tiles` tiles from (row, column) on.
template <int lanes>
FASTPERC_INLINE void transform_down(const float* x, const RGBConvShape& s, std::int64_t row, std::int64_t column,
                                    std::int64_t tiles, float* to, std::int64_t step) {
  const float* rows[width];  // null beyond a border of zeros
  for (std::int64_t i = 0; i < width; ++i) {
    const std::int64_t position = tile * row - s.top + i;
    const bool zero = !s.reflect && (position < 0 || position >= s.rows);
    rows[i] = zero ? nullptr : x + reflected(position, s.rows) * s.columns * s.in;
  }
  for (std::int64_t pixel = 0, run; pixel < tile * tiles + 2; pixel += run) {
    std::int64_t position = tile * column - s.left + pixel;
    float* place = to + pixel * s.in;
    const bool inside = position >= 0 && position < s.columns;
    run = inside ? std::min(s.columns - position, tile * tiles + 2 - pixel) : 1;
    if (!inside && !s.reflect) {
      for (std::int64_t i = 0; i < width; ++i) std::fill_n(place + i * step, s.in, 0.0f);
      continue;
    }
    position = reflected(position, s.columns);
    std::int64_t i = 0;
    for (; i + lanes <= run * s.in; i += lanes) transform_rows<lanes>(rows, position * s.in + i, place + i, step);
    for (; i < run * s.in; ++i) transform_rows<1>(rows, position * s.in + i, place + i, step);
  }
}

// to [25, step] = V [tiles, in] of a row of tiles, made of Bᵀ of its pixels. With fewer than `lanes` channels, up to
// lanes − 1 floats after those of the last tile are overwritten.
template <int lanes>
FASTPERC_INLINE void transform_across(const float* from, std::int64_t from_step, std::int64_t in, std::int64_t tiles,
                                      float* to, std::int64_t step) {
  for (std::int64_t i = 0; i < width; ++i) {
    for (std::int64_t t = 0; t < tiles; ++t) {
      for (std::int64_t c = 0; c < in; c += lanes) {
        Vector<lanes> d[width], v[width];
#pragma GCC unroll 5
        for (int j = 0; j < width; ++j) d[j] = at<lanes>(from + i * from_step + (tile * t + j) * in + c);
        Transform<tile>::input(d, v);
#pragma GCC unroll 5
        for (int j = 0; j < width; ++j) at<lanes>(to + (width * i + j) * step + t * in + c) = v[j];
      }
    }
  }
}

// y [3, 3] = Aᵀ M A, with element (i, j) of M at m + (5·i + j) · step.
template <int lanes>
FASTPERC_INLINE void transform_products(const float* m, std::int64_t step, Vector<lanes> (&y)[tile][tile]) {
  Vector<lanes> rows[tile][width], from[width], made[tile];
#pragma GCC unroll 5
  for (int j = 0; j < width; ++j) {
#pragma GCC unroll 5
    for (int i = 0; i < width; ++i) from[i] = at<lanes>(m + (width * i + j) * step);
    Transform<tile>::output(from, made);
#pragma GCC unroll 3
    for (int i = 0; i < tile; ++i) rows[i][j] = made[i];
  }
#pragma GCC unroll 3
  for (int i = 0; i < tile; ++i) Transform<tile>::output(rows[i], y[i]);
}

struct Stem {
  const float *x, *weights, *bias;
  float* out;
  RGBConvShape shape;
  bool relu;
};

// The sizes of the scratch memory of a strip, in floats.
struct Sizes {
  std::int64_t columns;                // tiles of V in a row of them
  std::int64_t pixels_step;            // between the five rows of Bᵀ d
  std::int64_t step, row_step;         // between points, and between rows of tiles, of V
  std::int64_t product_step, product;  // between points of the products of a row of tiles; of all points
  std::int64_t transformed, total;     // V, and all

  Sizes(std::int64_t in, std::int64_t columns, std::int64_t rows, std::int64_t product_rows, std::int64_t pitch)
      : columns(columns) {
    pixels_step = (tile * columns + 2) * in + skew;
    step = columns * in + skew;
    row_step = points * step;
    product_step = columns * pitch + skew;
    product = points * product_step;
    transformed = rows * row_step;
    total = transformed + width * pixels_step + product_rows * product;
  }
};

// V of a row of tiles, the first of which are those of `strip`. `pixels` is scratch memory.
template <int lanes, int channel_lanes>
FASTPERC_INLINE void transform_row(const float* x, const RGBConvShape& s, const Strip& strip, std::int64_t row,
                                   const Sizes& sizes, float* transformed, float* pixels) {
  const float* image = x + strip.image * s.rows * s.columns * s.in;
  transform_down<lanes>(image, s, row, strip.column, sizes.columns, pixels, sizes.pixels_step);
  transform_across<channel_lanes>(pixels, sizes.pixels_step, s.in, sizes.columns, transformed, sizes.step);
}

Sizes stem_sizes(const Strips& strips, std::int64_t pitch) {
  const std::int64_t columns = divided_up(strips.columns, together) * together;
  return {rgb, columns + blocks - 1, strips.rows + blocks - 1, 1, pitch};
}

template <int lanes, int rows, int vectors, int pitch>
FASTPERC_INLINE void stem_strip(const Stem& stem, const Strip& strip, const Sizes& sizes, float* transformed) {
  constexpr int few = lanes < 4 ? lanes : 4;
  constexpr std::int64_t inner = blocks * blocks * rgb;
  const RGBConvShape& s = stem.shape;
  float *pixels = transformed + sizes.transformed, *products = pixels + width * sizes.pixels_step;
  for (std::int64_t r = 0; r < strip.rows + blocks - 1; ++r) {
    transform_row<lanes, few>(stem.x, s, strip, strip.row + r, sizes, transformed + r * sizes.row_step, pixels);
  }
  for (std::int64_t r = 0; r < strip.rows; ++r) {
    const std::int64_t row = tile * (strip.row + r), rows_inside = s.out_rows - row;
    for (std::int64_t o = 0; o < s.out; o += pitch) {
      for (std::int64_t i = 0; i < points; ++i) {
        multiply_rows<lanes, rows, vectors, pitch, false, false>(
            transformed + r * sizes.row_step + i * sizes.step, {rgb, 1, blocks * rgb, sizes.row_step},
            stem.weights + (o * points + i * pitch) * inner, products + i * sizes.product_step, inner,
            sizes.columns - (blocks - 1));
      }
      for (std::int64_t t = 0; t < strip.columns; ++t) {
        const std::int64_t column = tile * (strip.column + t), columns_inside = s.out_columns - column;
        float* out = stem.out + ((strip.image * s.out_rows + row) * s.out_columns + column) * s.out + o;
        for (std::int64_t c = 0; c < pitch; c += lanes) {
          Vector<lanes> y[tile][tile];
          transform_products<lanes>(products + t * pitch + c, sizes.product_step, y);
#pragma GCC unroll 3
          for (int i = 0; i < tile; ++i) {
            if (i >= rows_inside) break;
#pragma GCC unroll 3
            for (int j = 0; j < tile; ++j) {
              if (j >= columns_inside) break;
              y[i][j] += at<lanes>(stem.bias + o + c);
              if (stem.relu) relu(y[i][j]);
              at<lanes>(out + (i * s.out_columns + j) * s.out + c) = y[i][j];
            }
          }
        }
      }
    }
  }
}

struct Head {
  const float *x, *weights, *bias;
  RGBConvShape shape;
  Output output;
};

Sizes head_sizes(const RGBConvShape& s, const Strips& strips) {
  const std::int64_t columns = divided_up(strips.columns + blocks - 1, together) * together;
  return {s.in, columns, 1, blocks, panel};
}

// acc [3·rows, acc_step] = the rows of the picture of a strip, [columns, 3] each.
template <int lanes, int rows, int vectors>
FASTPERC_INLINE void head_strip(const Head& head, const Strip& strip, const Sizes& sizes, float* transformed,
                                float* acc, std::int64_t acc_step) {
  constexpr int few = lanes < 4 ? lanes : 4;  // a register of the three colours of a pixel
  const RGBConvShape& s = head.shape;
  float *pixels = transformed + sizes.transformed, *products = pixels + width * sizes.pixels_step;
  for (std::int64_t r = 0; r < strip.rows + blocks - 1; ++r) {
    transform_row<lanes, lanes>(head.x, s, strip, strip.row + r, sizes, transformed, pixels);
    for (std::int64_t i = 0; i < points; ++i) {
      multiply_rows<lanes, rows, vectors, panel, false, false>(
          transformed + i * sizes.step, {s.in, 1, s.in, 0}, head.weights + i * s.in * panel,
          products + r % blocks * sizes.product + i * sizes.product_step, s.in, sizes.columns);
    }
    const std::int64_t first = r - (blocks - 1);  // the row of the output that is complete
    if (first < 0) continue;
    for (std::int64_t t = 0; t < strip.columns; ++t) {
      for (int c = 0; c < rgb; c += few) {
        float m[points][few];
        const float* places[blocks][blocks];  // of the blocks' products, for the first point
        for (std::int64_t i = 0; i < blocks; ++i) {
          for (std::int64_t j = 0; j < blocks; ++j) {
            places[i][j] =
                products + (first + i) % blocks * sizes.product + (t + j) * panel + (blocks * i + j) * rgb + c;
          }
        }
        for (int i = 0; i < points; ++i) {
          Vector<few> sum = {};
#pragma GCC unroll 9
          for (int j = 0; j < blocks * blocks; ++j) {
            sum += at<few>(places[j / blocks][j % blocks] + i * sizes.product_step);
          }
          at<few>(m[i]) = sum;
        }
        Vector<few> y[tile][tile];
        transform_products<few>(m[0], few, y);
        for (int i = 0; i < tile; ++i) {
          for (int j = 0; j < tile; ++j) {
            float* to = acc + (tile * first + i) * acc_step + (tile * t + j) * rgb + c;
            at<few>(to) = y[i][j] + at<few>(head.bias + c);
          }
        }
      }
    }
  }
  for (std::int64_t r = 0; r < tile * strip.rows; ++r) {
    to_image_range(acc + r * acc_step, tile * strip.columns * rgb, head.output);
  }
}

#define FASTPERC_VERSION(attributes, lanes, rows, vectors)                                                           \
  attributes void stem_strip_of(const Stem& stem, const Strip& strip, const Sizes& sizes, float* floats) {           \
    if (stem.shape.out % panel == 0) {                                                                               \
      stem_strip<lanes, rows, vectors, panel>(stem, strip, sizes, floats);                                           \
    } else {                                                                                                         \
      stem_strip<lanes, rows, vectors, panel / 2>(stem, strip, sizes, floats);                                       \
    }                                                                                                                \
  }                                                                                                                  \
  attributes void head_strip_of(const Head& head, const Strip& strip, const Sizes& sizes, float* floats, float* acc, \
                                std::int64_t acc_step) {                                                             \
    head_strip<lanes, rows, vectors>(head, strip, sizes, floats, acc, acc_step);                                     \
  }
FASTPERC_VERSIONS(FASTPERC_VERSION)

}  // namespace

void rgb_conv_stem_winograd_cpu(const float* x, const float* weights, const float* bias, float* out,
                                const RGBConvShape& shape, bool relu, int threads) {
  const Strips strips(shape, stem_rows);
  const Sizes sizes = stem_sizes(strips, shape.out % panel ? panel / 2 : panel);
  const Stem stem{x, weights, bias, out, shape, relu};
  take_turns(shape.images * strips.down() * strips.across(), threads,
             [&](std::int64_t i) { stem_strip_of(stem, strips.strip(i), sizes, scratch(sizes.total)); });
}

void rgb_conv_head_winograd_cpu(const float* x, const float* weights, const float* bias, void* out,
                                const std::string& out_dtype, Output output, const RGBConvShape& shape,
                                const ImageStrides& out_strides, int threads) {
  const Strips strips(shape, head_rows);
  const Sizes sizes = head_sizes(shape, strips);
  const float four[4] = {bias[0], bias[1], bias[2], 0};
  const Head head{x, weights, four, shape, output};
  const std::int64_t acc_step = tile * strips.columns * rgb + skew;
  dispatch_pixels(out_dtype, [&](auto* type) {
    using Out = std::remove_pointer_t<decltype(type)>;
    take_turns(shape.images * strips.down() * strips.across(), threads, [&](std::int64_t i) {
      const Strip strip = strips.strip(i);
      float* floats = scratch(sizes.total + tile * strips.rows * acc_step);
      float* acc = floats + sizes.total;
      head_strip_of(head, strip, sizes, floats, acc, acc_step);
      const std::int64_t row = tile * strip.row, column = tile * strip.column;
      const std::int64_t columns = std::min(tile * strip.columns, shape.out_columns - column);
      for (std::int64_t r = 0; r < std::min(tile * strip.rows, shape.out_rows - row); ++r) {
        Out* to = static_cast<Out*>(out) + strip.image * out_strides.image + (row + r) * out_strides.row +
                  column * out_strides.column;
        store_row(acc + r * acc_step, columns, to, out_strides);
      }
    });
  });
}

}  // namespace fastperc
