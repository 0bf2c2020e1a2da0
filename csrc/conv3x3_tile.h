// The transforms of a tile and the matrix products, shared by the 3×3 convolution and by the gradient of its weights.
// Both compile them for several instruction sets: see FASTPERC_VERSIONS.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "conv3x3.h"
#include "parallel.h"

namespace fastperc::winograd {

constexpr std::int64_t panel = winograd_panel;
constexpr std::int64_t skew = 16;  // added to strides: powers of two would share the same lines of the cache

// A vector of as many floats as a register holds.
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
  x = x < zero ? zero : x;  // NaN stays NaN
}
template <int lanes>
FASTPERC_INLINE const Vector<lanes>& at(const float* p) {
  return *reinterpret_cast<const Vector<lanes>*>(p);
}
template <int lanes>
FASTPERC_INLINE Vector<lanes>& at(float* p) {
  return *reinterpret_cast<Vector<lanes>*>(p);
}

// Scratch memory of this thread, kept from one call to the next.
inline float* scratch(std::int64_t floats) {
  static thread_local std::unique_ptr<float[]> kept;
  static thread_local std::int64_t size = 0;
  constexpr std::int64_t line = 64;  // bytes
  if (floats + line > size) kept.reset(new float[size = floats + line]);
  const auto address = reinterpret_cast<std::uintptr_t>(kept.get());
  return reinterpret_cast<float*>((address + line - 1) / line * line);
}

// Calls f(task) for every task. Each thread takes the next task when it has finished one.
template <typename F>
void take_turns(std::int64_t tasks, int threads, F&& f) {
  std::atomic<std::int64_t> next{0};
  parallel_for(std::min<std::int64_t>(threads, tasks), threads, [&](std::int64_t) {
    for (std::int64_t task; (task = next++) < tasks;) f(task);
  });
}

// The transforms along one axis: Bᵀ of t + 2 pixels, G of three taps, Aᵀ of t + 2 products.
template <int tile>
struct Transform;

template <>
struct Transform<2> {
  template <typename V>
  static FASTPERC_INLINE void input(const V (&d)[4], V (&v)[4]) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  }
  template <typename V>
  static FASTPERC_INLINE void weight(const V (&g)[3], V (&u)[4]) {
    u[0] = g[0];
    u[1] = 0.5f * (g[0] + g[1] + g[2]);
    u[2] = 0.5f * (g[0] - g[1] + g[2]);
    u[3] = g[2];
  }
  template <typename V>
  static FASTPERC_INLINE void output(const V (&m)[4], V (&y)[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
};

template <>
struct Transform<4> {
  template <typename V>
  static FASTPERC_INLINE void input(const V (&d)[6], V (&v)[6]) {
    const V even = d[4] - 4.0f * d[2], odd = d[3] - 4.0f * d[1], inner = d[4] - d[2], outer = 2.0f * (d[3] - d[1]);
    v[0] = 4.0f * d[0] - 5.0f * d[2] + d[4];
    v[1] = even + odd;
    v[2] = even - odd;
    v[3] = inner + outer;
    v[4] = inner - outer;
    v[5] = 4.0f * d[1] - 5.0f * d[3] + d[5];
  }
  template <typename V>
  static FASTPERC_INLINE void weight(const V (&g)[3], V (&u)[6]) {
    const V sum = g[0] + g[2], scaled = (1.0f / 24) * g[0] + (1.0f / 6) * g[2], middle = (1.0f / 12) * g[1];
    u[0] = 0.25f * g[0];
    u[1] = (-1.0f / 6) * (sum + g[1]);
    u[2] = (-1.0f / 6) * (sum - g[1]);
    u[3] = scaled + middle;
    u[4] = scaled - middle;
    u[5] = g[2];
  }
  template <typename V>
  static FASTPERC_INLINE void output(const V (&m)[6], V (&y)[4]) {
    const V near = m[1] + m[2], far = m[3] + m[4], near_difference = m[1] - m[2], far_difference = m[3] - m[4];
    y[0] = m[0] + near + far;
    y[1] = near_difference + 2.0f * far_difference;
    y[2] = near + 4.0f * far;
    y[3] = near_difference + 8.0f * far_difference + m[5];
  }
};

// The position of the first output of a tile.
struct Place {
  std::int64_t image, row, column;
};
FASTPERC_INLINE Place place(const WinogradShape& s, std::int64_t index) {
  const std::int64_t across = s.tiles_across(), down = s.tiles_down();
  return {index / across / down, index / across % down * s.tile, index % across * s.tile};
}

// to [(tile + 2)², step] = V of a tile, for `channels` channels from `first` on.
template <int lanes, int tile>
FASTPERC_INLINE void transform_tile(const float* x, const WinogradShape& s, std::int64_t index, std::int64_t first,
                                    std::int64_t channels, float* to, std::int64_t step) {
  constexpr int width = tile + 2;
  const Place p = place(s, index);
  const float* pixels[width][width];  // null outside the image
  for (int i = 0; i < width; ++i) {
    for (int j = 0; j < width; ++j) {
      const std::int64_t row = p.row - s.padding + i, column = p.column - s.padding + j;
      const bool inside = row >= 0 && row < s.rows && column >= 0 && column < s.columns;
      pixels[i][j] = inside ? x + ((p.image * s.rows + row) * s.columns + column) * s.in + first : nullptr;
    }
  }
  const Vector<lanes> zero = {};
  for (std::int64_t c = 0; c < channels; c += lanes) {
    Vector<lanes> rows[width][width], from[width], made[width];
#pragma GCC unroll 6
    for (int j = 0; j < width; ++j) {
#pragma GCC unroll 6
      for (int i = 0; i < width; ++i) from[i] = pixels[i][j] ? at<lanes>(pixels[i][j] + c) : zero;
      Transform<tile>::input(from, made);
#pragma GCC unroll 6
      for (int i = 0; i < width; ++i) rows[i][j] = made[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < width; ++i) {
      Transform<tile>::input(rows[i], made);
#pragma GCC unroll 6
      for (int j = 0; j < width; ++j) at<lanes>(to + (width * i + j) * step + c) = made[j];
    }
  }
}

// c [rows, panel] = a [rows, inner] · b [inner, panel], or += if `add`. The sums of `rows` rows and `vectors` vectors
// are kept in registers. Element (r, k) of a is at r · row_step + k · inner_step.
template <int lanes, int rows, int vectors, bool add>
FASTPERC_INLINE void multiply(const float* a, std::int64_t row_step, std::int64_t inner_step, const float* b, float* c,
                              std::int64_t inner) {
  Vector<lanes> sums[rows][vectors] = {};
  for (std::int64_t k = 0; k < inner; ++k) {
    Vector<lanes> b_row[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) b_row[v] = at<lanes>(b + k * panel + v * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] += a[r * row_step + k * inner_step] * b_row[v];
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

// The same product for `count` rows, a multiple of 4.
template <int lanes, int rows, int vectors, bool add>
FASTPERC_INLINE void multiply_rows(const float* a, std::int64_t row_step, std::int64_t inner_step, const float* b,
                                   float* c, std::int64_t inner, std::int64_t count) {
  static_assert(rows % 4 == 0, "the remaining rows are computed four at a time");
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

// Expands VERSION(attributes, lanes, rows, vectors) for each instruction set: with 32 registers of 16 floats, 16 of 8,
// and 16 or 32 of 4. `multiply` keeps the sums of `rows` × `vectors` registers.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FASTPERC_VERSIONS(VERSION)                             \
  VERSION(__attribute__((target("arch=x86-64-v4"))), 16, 8, 2) \
  VERSION(__attribute__((target("arch=x86-64-v3"))), 8, 4, 2)  \
  VERSION(__attribute__((target("default"))), 4, 4, 2)
#elif defined(__GNUC__)
#define FASTPERC_VERSIONS(VERSION) VERSION(, 4, 4, 2)
#else
#define FASTPERC_VERSIONS(VERSION) VERSION(, 1, 4, 2)
#endif

}  // namespace fastperc::winograd
