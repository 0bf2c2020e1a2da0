// 3×3 convolutions of stride 1 on the CPU, float32, NHWC, by Winograd's F(2×2, 3×3): 16 products where the definition
// has 36.
//
//   a tile, 4×4 pixels of x at every second row and column     d [4, 4, I]
//   its transform                                              V = Bᵀ d B  [16, I]
//   with the weights' transform U = G g Gᵀ, 16 products        M = V · U   [16, O]
//   four pixels of the output                                  y = Aᵀ M A  [2, 2, O]
//
// A thread takes a block of tiles at a time, whose V stays in its L2 cache, and runs through the outputs by panels: the
// part of U that a panel needs is read once a block. The weights' gradient is the same backwards, 16 products summed
// over tiles: dU = Σ Vᵀ · (A dy Aᵀ), dg = Gᵀ dU G. Every number is the same sum in the same order whatever the threads.
#include "winograd.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "kernels.h"
#include "parallel.h"

namespace fastperc {
namespace {

constexpr std::int64_t panel = winograd_panel, points = 16;
constexpr std::int64_t tiles_together = 4;      // the tiles of a block are padded to a multiple of it
constexpr std::int64_t block_floats = 3 << 16;  // of a block's V
constexpr std::int64_t fewest_tiles = 16;       // to a block, or U is read too often
constexpr std::int64_t skew = 16;               // or what lies powers of two apart would share lines of the cache

// As many floats as a register holds.
template <int lanes>
struct Register {
#ifdef __GNUC__
  typedef float Vector __attribute__((vector_size(lanes * sizeof(float)), aligned(sizeof(float)), may_alias));
#else
  static_assert(lanes == 1, "this compiler has no vectors");
  typedef float Vector;
#endif
};
template <int lanes>
using Vector = typename Register<lanes>::Vector;

template <typename Vector>
FASTPERC_INLINE void relu(Vector& x) {
  const Vector zero = {};
  x = x < zero ? zero : x;  // NaN stays
}
template <int lanes>
FASTPERC_INLINE const Vector<lanes>& at(const float* p) {
  return *reinterpret_cast<const Vector<lanes>*>(p);
}
template <int lanes>
FASTPERC_INLINE Vector<lanes>& at(float* p) {
  return *reinterpret_cast<Vector<lanes>*>(p);
}

// What a thread computes with, kept from one call to the next.
float* scratch(std::int64_t floats) {
  static thread_local std::unique_ptr<float[]> kept;
  static thread_local std::int64_t size = 0;
  constexpr std::int64_t line = 64;  // bytes
  if (floats + line > size) kept.reset(new float[size = floats + line]);
  const auto address = reinterpret_cast<std::uintptr_t>(kept.get());
  return reinterpret_cast<float*>((address + line - 1) / line * line);
}

// f(task) for every task, on threads that take one after the other.
template <typename F>
void take_turns(std::int64_t tasks, int threads, F&& f) {
  std::atomic<std::int64_t> next{0};
  parallel_for(std::min<std::int64_t>(threads, tasks), threads, [&](std::int64_t) {
    for (std::int64_t task; (task = next++) < tasks;) f(task);
  });
}

struct Place {
  std::int64_t image, row, column;  // of a tile's first output
};
FASTPERC_INLINE Place place(const WinogradShape& s, std::int64_t tile) {
  const std::int64_t across = s.tiles_across(), down = s.tiles_down();
  return {tile / across / down, tile / across % down * 2, tile % across * 2};
}

// to [16, step] = V of a tile, for `channels` of them from `first` on.
template <int lanes>
FASTPERC_INLINE void transform_tile(const float* x, const WinogradShape& s, std::int64_t tile, std::int64_t first,
                                    std::int64_t channels, float* to, std::int64_t step) {
  const Place p = place(s, tile);
  const float* pixels[points];  // null beyond the border
  for (std::int64_t i = 0; i < points; ++i) {
    const std::int64_t row = p.row - s.padding + i / 4, column = p.column - s.padding + i % 4;
    const bool inside = row >= 0 && row < s.rows && column >= 0 && column < s.columns;
    pixels[i] = inside ? x + ((p.image * s.rows + row) * s.columns + column) * s.in + first : nullptr;
  }
  const Vector<lanes> zero = {};
  for (std::int64_t c = 0; c < channels; c += lanes) {
    Vector<lanes> rows[4][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vector<lanes> d0 = pixels[j] ? at<lanes>(pixels[j] + c) : zero,
                          d1 = pixels[4 + j] ? at<lanes>(pixels[4 + j] + c) : zero;
      const Vector<lanes> d2 = pixels[8 + j] ? at<lanes>(pixels[8 + j] + c) : zero,
                          d3 = pixels[12 + j] ? at<lanes>(pixels[12 + j] + c) : zero;
      rows[0][j] = d0 - d2;
      rows[1][j] = d1 + d2;
      rows[2][j] = d2 - d1;
      rows[3][j] = d1 - d3;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* row = to + 4 * i * step + c;
      at<lanes>(row) = rows[i][0] - rows[i][2];
      at<lanes>(row + step) = rows[i][1] + rows[i][2];
      at<lanes>(row + 2 * step) = rows[i][2] - rows[i][1];
      at<lanes>(row + 3 * step) = rows[i][1] - rows[i][3];
    }
  }
}

// c [rows, panel] = or += a [rows, inner] · b [inner, panel], of which some rows and vectors of a row fit the
// registers; a's element (r, k) is at r · row_step + k · inner_step.
template <int lanes, int rows, int vectors, bool add>
FASTPERC_INLINE void multiply(const float* a, std::int64_t row_step, std::int64_t inner_step, const float* b, float* c,
                              std::int64_t inner) {
  Vector<lanes> sums[rows][vectors] = {};
  for (std::int64_t k = 0; k < inner; ++k) {
    Vector<lanes> beside[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) beside[v] = at<lanes>(b + k * panel + v * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] += a[r * row_step + k * inner_step] * beside[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      Vector<lanes>& to = at<lanes>(c + r * panel + v * lanes);
      to = add ? to + sums[r][v] : sums[r][v];
    }
  }
}

// The same for `count` rows, a multiple of 4.
template <int lanes, int rows, int vectors, bool add>
FASTPERC_INLINE void multiply_rows(const float* a, std::int64_t row_step, std::int64_t inner_step, const float* b,
                                   float* c, std::int64_t inner, std::int64_t count) {
  static_assert(rows % 4 == 0, "what is left is done by fours");
  for (std::int64_t o = 0; o < panel; o += vectors * lanes) {
    std::int64_t r = 0;
    for (; r + rows <= count; r += rows) {
      multiply<lanes, rows, vectors, add>(a + r * row_step, row_step, inner_step, b + o, c + r * panel + o, inner);
    }
    for (; r < count; r += 4) {
      multiply<lanes, 4, vectors, add>(a + r * row_step, row_step, inner_step, b + o, c + r * panel + o, inner);
    }
  }
}

struct Convolution {
  const float *x, *weights, *bias;  // weights are transformed; bias [O], or null
  float* out;
  WinogradShape shape;
  bool relu;
  std::int64_t tiles;  // of a block

  std::int64_t padded() const { return (tiles + tiles_together - 1) / tiles_together * tiles_together; }
  std::int64_t pitch() const { return shape.in + skew; }  // from tile to tile in V; the next two from point to point
  std::int64_t transformed_step() const { return padded() * pitch() + skew; }
  std::int64_t product_step() const { return padded() * panel + skew; }
};

// The four pixels that M of a tile [16, step] makes, for a panel of outputs from `first` on.
template <int lanes>
FASTPERC_INLINE void store_tile(const Convolution& conv, std::int64_t tile, const float* m, std::int64_t step,
                                std::int64_t first) {
  const WinogradShape& s = conv.shape;
  const Place p = place(s, tile);
  const bool below = p.row + 1 < s.out_rows(), beside = p.column + 1 < s.out_columns();
  float* out = conv.out + ((p.image * s.out_rows() + p.row) * s.out_columns() + p.column) * s.out + first;
  const std::int64_t down = s.out_columns() * s.out;
  for (std::int64_t o = 0; o < panel; o += lanes) {
    Vector<lanes> rows[2][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vector<lanes> m0 = at<lanes>(m + j * step + o), m1 = at<lanes>(m + (4 + j) * step + o);
      const Vector<lanes> m2 = at<lanes>(m + (8 + j) * step + o), m3 = at<lanes>(m + (12 + j) * step + o);
      rows[0][j] = m0 + m1 + m2;
      rows[1][j] = m1 - m2 - m3;
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      Vector<lanes> left = rows[i][0] + rows[i][1] + rows[i][2], right = rows[i][1] - rows[i][2] - rows[i][3];
      if (conv.bias) {
        left += at<lanes>(conv.bias + first + o);
        right += at<lanes>(conv.bias + first + o);
      }
      if (conv.relu) {
        relu(left);
        relu(right);
      }
      if (i == 0 || below) {
        at<lanes>(out + i * down + o) = left;
        if (beside) at<lanes>(out + i * down + s.out + o) = right;
      }
    }
  }
}

// The block of `count` tiles from `first` on.
template <int lanes, int rows, int vectors>
FASTPERC_INLINE void convolve(const Convolution& conv, std::int64_t first, std::int64_t count, float* transformed,
                              float* products) {
  const WinogradShape& s = conv.shape;
  const std::int64_t pitch = conv.pitch(), padded = conv.padded();
  const std::int64_t transformed_step = conv.transformed_step(), product_step = conv.product_step();
  for (std::int64_t t = 0; t < count; ++t) {
    transform_tile<lanes>(conv.x, s, first + t, 0, s.in, transformed + t * pitch, transformed_step);
  }
  for (std::int64_t t = count; t < padded; ++t) {
    for (std::int64_t i = 0; i < points; ++i) {
      float* tile = transformed + i * transformed_step + t * pitch;
      std::fill(tile, tile + s.in, 0.0f);
    }
  }
  for (std::int64_t o = 0; o < s.out; o += panel) {
    for (std::int64_t i = 0; i < points; ++i) {
      multiply_rows<lanes, rows, vectors, false>(transformed + i * transformed_step, pitch, 1,
                                                 conv.weights + (o * points + i * panel) * s.in,
                                                 products + i * product_step, s.in, padded);
    }
    for (std::int64_t t = 0; t < count; ++t) store_tile<lanes>(conv, first + t, products + t * panel, product_step, o);
  }
}

// to [16, in, panel] = U of a panel of outputs.
template <int lanes>
FASTPERC_INLINE void transform_weights(const float* weight, const WeightStrides& strides, std::int64_t in, float* to) {
  float taps[9][lanes][panel];
  for (std::int64_t first = 0; first < in; first += lanes) {
    for (int tap = 0; tap < 9; ++tap) {
      const float* from = weight + tap / 3 * strides.row + tap % 3 * strides.column + first * strides.in;
      for (std::int64_t o = 0; o < panel; ++o) {
        for (std::int64_t i = 0; i < lanes; ++i) taps[tap][i][o] = from[o * strides.out + i * strides.in];
      }
    }
    for (std::int64_t i = 0; i < lanes; ++i) {
      for (std::int64_t o = 0; o < panel; o += lanes) {
        Vector<lanes> rows[4][3];
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) {
          const Vector<lanes> g0 = at<lanes>(&taps[j][i][o]), g1 = at<lanes>(&taps[3 + j][i][o]),
                              g2 = at<lanes>(&taps[6 + j][i][o]);
          rows[0][j] = g0;
          rows[1][j] = 0.5f * (g0 + g1 + g2);
          rows[2][j] = 0.5f * (g0 - g1 + g2);
          rows[3][j] = g2;
        }
        const std::int64_t step = in * panel;
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          float* row = to + 4 * r * step + (first + i) * panel + o;
          at<lanes>(row) = rows[r][0];
          at<lanes>(row + step) = 0.5f * (rows[r][0] + rows[r][1] + rows[r][2]);
          at<lanes>(row + 2 * step) = 0.5f * (rows[r][0] - rows[r][1] + rows[r][2]);
          at<lanes>(row + 3 * step) = rows[r][2];
        }
      }
    }
  }
}

// A panel of inputs by a panel of outputs, in which a chunk of tiles is added up.
struct Partial {
  float products[points][panel][panel];  // dU
  float bias[panel];
};

struct WeightGradient {
  const float *x, *grad;
  WinogradShape shape;
  std::int64_t first, count;         // tiles
  std::int64_t first_in, first_out;  // channels
};

// to [16, step] = A dy Aᵀ of a tile, for a panel of outputs.
template <int lanes>
FASTPERC_INLINE void transform_gradient(const WeightGradient& of, std::int64_t tile, float* to, std::int64_t step) {
  const WinogradShape& s = of.shape;
  const Place p = place(s, tile);
  const bool below = p.row + 1 < s.out_rows(), beside = p.column + 1 < s.out_columns();
  const float* from = of.grad + ((p.image * s.out_rows() + p.row) * s.out_columns() + p.column) * s.out + of.first_out;
  const std::int64_t down = s.out_columns() * s.out;
  const Vector<lanes> zero = {};
  for (std::int64_t o = 0; o < panel; o += lanes) {
    const Vector<lanes> y[2][2] = {
        {at<lanes>(from + o), beside ? at<lanes>(from + s.out + o) : zero},
        {below ? at<lanes>(from + down + o) : zero, below && beside ? at<lanes>(from + down + s.out + o) : zero}};
    Vector<lanes> rows[4][2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      rows[0][j] = y[0][j];
      rows[1][j] = y[0][j] + y[1][j];
      rows[2][j] = y[0][j] - y[1][j];
      rows[3][j] = zero - y[1][j];
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* row = to + 4 * i * step + o;
      at<lanes>(row) = rows[i][0];
      at<lanes>(row + step) = rows[i][0] + rows[i][1];
      at<lanes>(row + 2 * step) = rows[i][0] - rows[i][1];
      at<lanes>(row + 3 * step) = zero - rows[i][1];
    }
  }
}

constexpr std::int64_t gradient_tiles = 32;  // transformed, and summed, at a time
constexpr std::int64_t gradient_step = gradient_tiles * panel + skew;

template <int lanes, int rows, int vectors>
FASTPERC_INLINE void add_up(const WeightGradient& of, Partial& partial, float* transformed) {
  constexpr std::int64_t step = gradient_step;
  float* gradients = transformed + points * step;
  std::fill(&partial.products[0][0][0], &partial.products[0][0][0] + points * panel * panel, 0.0f);
  std::fill(partial.bias, partial.bias + panel, 0.0f);
  for (std::int64_t done = 0; done < of.count; done += gradient_tiles) {
    const std::int64_t count = std::min(gradient_tiles, of.count - done);
    for (std::int64_t t = 0; t < count; ++t) {
      transform_tile<lanes>(of.x, of.shape, of.first + done + t, of.first_in, panel, transformed + t * panel, step);
      transform_gradient<lanes>(of, of.first + done + t, gradients + t * panel, step);
    }
    for (std::int64_t i = 0; i < points; ++i) {
      multiply_rows<lanes, rows, vectors, true>(transformed + i * step, 1, panel, gradients + i * step,
                                                &partial.products[i][0][0], count, panel);
    }
    const float* all_four = gradients + 5 * step;  // the sums of the tiles' pixels
    for (std::int64_t o = 0; o < panel; o += lanes) {
      Vector<lanes> sum = {};
      for (std::int64_t t = 0; t < count; ++t) sum += at<lanes>(all_four + t * panel + o);
      at<lanes>(partial.bias + o) += sum;
    }
  }
}

// weight, of a panel of inputs by a panel of outputs, = Gᵀ dU G.
template <int lanes>
FASTPERC_INLINE void finish_weights(const Partial& sum, float* weight, const WeightStrides& strides) {
  for (std::int64_t i = 0; i < panel; ++i) {
    for (std::int64_t o = 0; o < panel; o += lanes) {
      Vector<lanes> rows[3][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vector<lanes> u0 = at<lanes>(&sum.products[j][i][o]), u1 = at<lanes>(&sum.products[4 + j][i][o]);
        const Vector<lanes> u2 = at<lanes>(&sum.products[8 + j][i][o]), u3 = at<lanes>(&sum.products[12 + j][i][o]);
        rows[0][j] = u0 + 0.5f * (u1 + u2);
        rows[1][j] = 0.5f * (u1 - u2);
        rows[2][j] = 0.5f * (u1 + u2) + u3;
      }
      float taps[9][lanes];
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) {
        at<lanes>(taps[3 * r]) = rows[r][0] + 0.5f * (rows[r][1] + rows[r][2]);
        at<lanes>(taps[3 * r + 1]) = 0.5f * (rows[r][1] - rows[r][2]);
        at<lanes>(taps[3 * r + 2]) = 0.5f * (rows[r][1] + rows[r][2]) + rows[r][3];
      }
      for (std::int64_t lane = 0; lane < lanes; ++lane) {
        float* to = weight + (o + lane) * strides.out + i * strides.in;
        for (int tap = 0; tap < 9; ++tap) to[tap / 3 * strides.row + tap % 3 * strides.column] = taps[tap][lane];
      }
    }
  }
}

// Versions by the registers there are: 32 of 16 floats, 16 of 8, and 16 or 32 of 4.
#define FASTPERC_VERSION(attributes, lanes, rows, vectors)                                                            \
  attributes int floats_in_register() { return lanes; }                                                               \
  attributes void convolve_block(const Convolution& conv, std::int64_t first, std::int64_t count, float* transformed, \
                                 float* products) {                                                                   \
    convolve<lanes, rows, vectors>(conv, first, count, transformed, products);                                        \
  }                                                                                                                   \
  attributes void weights_panel(const float* weight, const WeightStrides& strides, std::int64_t in, float* to) {      \
    transform_weights<lanes>(weight, strides, in, to);                                                                \
  }                                                                                                                   \
  attributes void gradient_chunk(const WeightGradient& of, Partial& partial, float* transformed) {                    \
    add_up<lanes, rows, vectors>(of, partial, transformed);                                                           \
  }                                                                                                                   \
  attributes void gradient_panel(const Partial& sum, float* weight, const WeightStrides& strides) {                   \
    finish_weights<lanes>(sum, weight, strides);                                                                      \
  }
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
FASTPERC_VERSION(__attribute__((target("arch=x86-64-v4"))), 16, 8, 2)
FASTPERC_VERSION(__attribute__((target("arch=x86-64-v3"))), 8, 4, 2)
FASTPERC_VERSION(__attribute__((target("default"))), 4, 4, 2)
#elif defined(__GNUC__)
FASTPERC_VERSION(, 4, 4, 2)
#else
FASTPERC_VERSION(, 1, 4, 2)
#endif

}  // namespace

int winograd_lanes() { return floats_in_register(); }

void winograd_weights_cpu(const float* weight, float* transformed, std::int64_t in, std::int64_t out,
                          const WeightStrides& strides, int threads) {
  parallel_for(out / panel, threads, [&](std::int64_t p) {
    weights_panel(weight + p * panel * strides.out, strides, in, transformed + p * panel * points * in);
  });
}

void winograd_conv_cpu(const float* x, const float* weights, const float* bias, float* out, const WinogradShape& shape,
                       bool relu, int threads) {
  const std::int64_t tiles = shape.tiles();
  if (tiles == 0) return;
  const std::int64_t most = std::max(block_floats / (points * (shape.in + skew)), fewest_tiles);
  const std::int64_t turns = (tiles + threads * most - 1) / (threads * most);  // of as many blocks as threads
  const std::int64_t per_block = std::max((tiles + threads * turns - 1) / (threads * turns), fewest_tiles);
  const Convolution conv{x, weights, bias, out, shape, relu, per_block};
  take_turns((tiles + per_block - 1) / per_block, threads, [&](std::int64_t block) {
    float* floats = scratch(points * (conv.transformed_step() + conv.product_step()));
    const std::int64_t first = block * per_block;
    convolve_block(conv, first, std::min(per_block, tiles - first), floats, floats + points * conv.transformed_step());
  });
}

void winograd_weight_gradient_cpu(const float* x, const float* grad, float* weight, float* bias,
                                  const WinogradShape& shape, const WeightStrides& strides, int threads) {
  constexpr std::int64_t most_partials = 512;  // 33 MB
  const std::int64_t tiles = shape.tiles(), ins = shape.in / panel, outs = shape.out / panel;
  const std::int64_t most_chunks = std::clamp<std::int64_t>(most_partials / (ins * outs), 1, 8);
  const std::int64_t per_chunk = std::max<std::int64_t>((tiles + most_chunks - 1) / most_chunks, 1024);
  const std::int64_t chunks = std::max<std::int64_t>((tiles + per_chunk - 1) / per_chunk, 1);
  const std::unique_ptr<Partial[]> partials(new Partial[chunks * ins * outs]);  // [chunks, outs, ins]
  take_turns(chunks * outs * ins, threads, [&](std::int64_t task) {
    const std::int64_t first = task / (outs * ins) * per_chunk;
    const std::int64_t first_in = task % ins * panel, first_out = task / ins % outs * panel;
    gradient_chunk({x, grad, shape, first, std::min(per_chunk, tiles - first), first_in, first_out}, partials[task],
                   scratch(2 * points * gradient_step));
  });
  parallel_for(outs * ins, threads, [&](std::int64_t task) {
    Partial& sum = partials[task];
    constexpr std::int64_t floats = sizeof(Partial) / sizeof(float);
    float* to = reinterpret_cast<float*>(&sum);
    for (std::int64_t chunk = 1; chunk < chunks; ++chunk) {
      const float* from = reinterpret_cast<const float*>(&partials[chunk * outs * ins + task]);
      for (std::int64_t i = 0; i < floats; ++i) to[i] += from[i];
    }
    const std::int64_t first_in = task % ins * panel, first_out = task / ins * panel;
    gradient_panel(sum, weight + first_out * strides.out + first_in * strides.in, strides);
    if (bias && first_in == 0) std::copy(sum.bias, sum.bias + panel, bias + first_out);
  });
}

}  // namespace fastperc
