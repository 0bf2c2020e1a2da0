// Winograd's transforms and the matrix products, shared by the 3×3 convolution, the gradient of its weights, and the
// 9×9 convolutions at the ends of a network. All compile them for several instruction sets: see FASTPERC_VERSIONS.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "conv3x3.h"
#include "norm_relu.h"
#include "parallel.h"

namespace fastperc::winograd {

constexpr std::int64_t panel = winograd_panel;
constexpr std::int64_t chunk = 16;  // channels of V that lie together
constexpr std::int64_t skew = 16;   // added to strides: powers of two would share the same lines of the cache

constexpr std::int64_t line = 16;  // floats, of the cache

// A hint; the address need not exist.
#ifdef __GNUC__
#define FASTPERC_PREFETCH(address) __builtin_prefetch(address, 0, 2)
#else
#define FASTPERC_PREFETCH(address) (void)(address)
#endif

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
template <typename Vector>
FASTPERC_INLINE void relu6(Vector& x) {
  relu(x);
  const Vector zero = {}, six = zero + 6.0f;
  x = x > six ? six : x;
}
template <typename Vector>
FASTPERC_INLINE void leaky(Vector& x, const Vector& slopes) {
  const Vector zero = {};
  x = x > zero ? x : x * slopes;  // NaN stays NaN
}
template <int lanes>
FASTPERC_INLINE const Vector<lanes>& at(const float* p) {
  return *reinterpret_cast<const Vector<lanes>*>(p);
}
template <int lanes>
FASTPERC_INLINE Vector<lanes>& at(float* p) {
  return *reinterpret_cast<Vector<lanes>*>(p);
}

// The activation of the channels from `channel` on.
template <int lanes>
FASTPERC_INLINE void activate(Vector<lanes>& x, const Activation& activation, std::int64_t channel) {
  if (activation.kind == ActivationKind::relu) {
    relu(x);
  } else if (activation.kind == ActivationKind::slopes) {
    leaky(x, at<lanes>(activation.slopes + channel));
  } else if (activation.kind == ActivationKind::relu6) {
    relu6(x);
  }
}

// Scratch memory of this thread, kept from one call to the next.
inline float* scratch(std::int64_t floats) {
  static thread_local std::unique_ptr<float[]> kept;
  static thread_local std::int64_t size = 0;
  constexpr std::uintptr_t bytes = line * sizeof(float);
  if (floats + line > size) kept.reset(new float[size = floats + line]);
  const auto address = reinterpret_cast<std::uintptr_t>(kept.get());
  return reinterpret_cast<float*>((address + bytes - 1) / bytes * bytes);
}

// Threads that make the same calls of take_turns, one after the other. Each begins with a share of adjacent tasks, the
// same in each call, so that it reads what it has written in the call before: that is still in its cache. Then it helps
// with the others' shares.
class Team {
 public:
  // Calls f() on at most `threads` threads, as a team.
  template <typename F>
  static void run(std::int64_t threads, F&& f) {
    Team team;
    team.shares = std::clamp<std::int64_t>(threads, 1, most);
    for (auto& turn : team.taken) std::for_each(turn, turn + team.shares, [](Share& share) { share.tasks = 0; });
#pragma omp parallel num_threads(team.shares)
    {
      Member member{team};
#ifdef _OPENMP
      member.number = omp_get_thread_num();
#endif
      Member* const before = std::exchange(current(), &member);
      f();
      current() = before;
    }
  }

  // Whether this thread is of a team.
  static bool works() { return current(); }

  // Calls f(task) for every task on the threads of this thread's team. All of them call this, and return afterwards.
  template <typename F>
  static void take_turns(std::int64_t tasks, F&& f) {
    Member& member = *current();
    Share *now = member.team.taken[member.turn % 2], *later = member.team.taken[++member.turn % 2];
    const std::int64_t shares = member.team.shares;
    for (std::int64_t i = 0; i < shares; ++i) {
      const std::int64_t share = (member.number + i) % shares;
      const std::int64_t first = share * tasks / shares, end = (share + 1) * tasks / shares;
      for (std::int64_t task; (task = first + now[share].tasks++) < end;) f(task);
    }
    if (member.number == 0) std::for_each(later, later + shares, [](Share& share) { share.tasks = 0; });
#pragma omp barrier
  }

 private:
  static constexpr std::int64_t most = 256;
  struct alignas(line * sizeof(float)) Share {
    std::atomic<std::int64_t> tasks;  // taken from it
  };
  struct Member {
    Team& team;
    std::int64_t number = 0, turn = 0;
  };
  static Member*& current() {
    static thread_local Member* member = nullptr;
    return member;
  }

  std::int64_t shares;
  Share taken[2][most];  // in this turn, and in the next
};

// Calls f(task) for every task, on at most `threads` threads: those of the team, if this thread is of one.
template <typename F>
void take_turns(std::int64_t tasks, int threads, F&& f) {
  if (threads > 1 && Team::works()) {
    Team::take_turns(tasks, f);
  } else if (threads > 1 && tasks > 1) {
    Team::run(std::min<std::int64_t>(tasks, threads), [&] { Team::take_turns(tasks, f); });
  } else {
    for (std::int64_t task = 0; task < tasks; ++task) f(task);
  }
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
struct Transform<3> {
  template <typename V>
  static FASTPERC_INLINE void input(const V (&d)[5], V (&v)[5]) {
    const V outer = d[3] - d[1], inner = d[3] - d[2];
    v[0] = 2.0f * (d[0] - d[2]) + outer;
    v[1] = inner - 2.0f * d[1];
    v[2] = inner - 2.0f * (d[2] - d[1]);
    v[3] = outer;
    v[4] = d[4] - d[2] - 2.0f * outer;
  }
  template <typename V>
  static FASTPERC_INLINE void output(const V (&m)[5], V (&y)[3]) {
    y[0] = m[0] + m[1] + m[2] + m[3];
    y[1] = m[1] - m[2] + 2.0f * m[3];
    y[2] = m[1] + m[2] + 4.0f * m[3] + m[4];
  }
};

// At the points 0, ±√½, ±√2 and ∞. With 0, ±1, ±2 and ∞ the rounding errors are twice as large.
template <>
struct Transform<4> {
  static constexpr float near_point = 0.70710678f, far_point = 1.41421356f;

  template <typename V>
  static FASTPERC_INLINE void input(const V (&d)[6], V (&v)[6]) {
    const V even_near = d[4] - 2.0f * d[2], odd_near = d[3] - 2.0f * d[1];
    const V even_far = d[4] - 0.5f * d[2], odd_far = d[3] - 0.5f * d[1];
    v[0] = d[0] - 2.5f * d[2] + d[4];
    v[1] = even_near + near_point * odd_near;
    v[2] = even_near - near_point * odd_near;
    v[3] = even_far + far_point * odd_far;
    v[4] = even_far - far_point * odd_far;
    v[5] = d[1] - 2.5f * d[3] + d[5];
  }
  template <typename V>
  static FASTPERC_INLINE void weight(const V (&g)[3], V (&u)[6]) {
    const V near = (-2.0f / 3) * g[0] - (1.0f / 3) * g[2], near_middle = (-2.0f / 3 * near_point) * g[1];
    const V far = (1.0f / 6) * g[0] + (1.0f / 3) * g[2], far_middle = (1.0f / 6 * far_point) * g[1];
    u[0] = g[0];
    u[1] = near + near_middle;
    u[2] = near - near_middle;
    u[3] = far + far_middle;
    u[4] = far - far_middle;
    u[5] = g[2];
  }
  template <typename V>
  static FASTPERC_INLINE void output(const V (&m)[6], V (&y)[4]) {
    const V near = m[1] + m[2], far = m[3] + m[4], near_difference = m[1] - m[2], far_difference = m[3] - m[4];
    y[0] = m[0] + near + far;
    y[1] = near_point * (near_difference + 2.0f * far_difference);
    y[2] = 0.5f * (near + 4.0f * far);
    y[3] = 0.5f * near_point * (near_difference + 8.0f * far_difference) + m[5];
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

// to [(tile + 2)², step] = V of a tile, for `channels` channels from `first` on. There are chunk_step floats from a
// chunk of channels to the next.
template <int lanes, int tile>
FASTPERC_INLINE void transform_tile(const float* x, const WinogradShape& s, std::int64_t index, std::int64_t first,
                                    std::int64_t channels, float* to, std::int64_t step, std::int64_t chunk_step) {
  constexpr int width = tile + 2;
  const Place p = place(s, index);
  const float* pixels[width][width];  // null outside the image
  for (int i = 0; i < width; ++i) {
    for (int j = 0; j < width; ++j) {
      const std::int64_t row = p.row - s.padding + i, column = p.column - s.padding + j;
      const bool inside = row >= 0 && row < s.rows && column >= 0 && column < s.columns;
      pixels[i][j] = inside ? x + ((p.image * s.rows + row) * s.columns + column) * s.in_step + first : nullptr;
    }
  }
  const Vector<lanes> zero = {};
  for (std::int64_t c = 0; c < channels; c += lanes) {
    Vector<lanes> rows[width][width], from[width], made[width];
#pragma GCC unroll 6
    for (int j = 0; j < width; ++j) {
#pragma GCC unroll 6
      for (int i = 0; i < width; ++i) {
        from[i] = pixels[i][j] ? at<lanes>(pixels[i][j] + c) : zero;
        if (j >= 2) FASTPERC_PREFETCH(pixels[i][j] + tile * s.in_step + c);  // the tile on the right
      }
      Transform<tile>::input(from, made);
#pragma GCC unroll 6
      for (int i = 0; i < width; ++i) rows[i][j] = made[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < width; ++i) {
      Transform<tile>::input(rows[i], made);
#pragma GCC unroll 6
      for (int j = 0; j < width; ++j) {
        at<lanes>(to + (width * i + j) * step + c / chunk * chunk_step + c % chunk) = made[j];
      }
    }
  }
}

// The left factor of a product: element (r, k) is at r · row + k / chunk · chunk_step + k % chunk · inner.
struct LeftStrides {
  std::int64_t row, inner, chunk, chunk_step;
};

// c [rows, pitch] = a [rows, inner] · b [inner, pitch], or += if `add`, for `vectors` vectors of their columns. The
// sums are kept in registers. With `ahead`, `next` is memory that will be read soon, a line of it for each k.
template <int lanes, int rows, int vectors, int pitch, bool add, bool ahead>
FASTPERC_INLINE void multiply(const float* a, const LeftStrides& left, const float* b, float* c, std::int64_t inner,
                              const float* next) {
  Vector<lanes> sums[rows][vectors] = {};
  for (std::int64_t first = 0; first < inner; first += left.chunk, a += left.chunk_step) {
    const std::int64_t count = std::min(left.chunk, inner - first);
    for (std::int64_t k = 0; k < count; ++k, b += pitch) {
      if (ahead) FASTPERC_PREFETCH(next + (first + k) * line);
      Vector<lanes> b_row[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) b_row[v] = at<lanes>(b + v * lanes);
#pragma GCC unroll 16
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sums[r][v] += a[r * left.row + k * left.inner] * b_row[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      Vector<lanes>& to = at<lanes>(c + r * pitch + v * lanes);
      to = add ? to + sums[r][v] : sums[r][v];
    }
  }
}

// The same product for `count` rows, a multiple of 4, and all columns, `rows` × `vectors` registers at a time.
template <int lanes, int rows, int vectors, int pitch, bool add, bool ahead>
FASTPERC_INLINE void multiply_rows(const float* a, const LeftStrides& left, const float* b, float* c,
                                   std::int64_t inner, std::int64_t count, const float* next = nullptr) {
  constexpr int across = vectors * lanes < pitch ? vectors : pitch / lanes, down = rows * vectors / across;
  static_assert(down % 4 == 0, "the remaining rows are computed four at a time");
  for (std::int64_t o = 0; o < pitch; o += across * lanes) {
    std::int64_t r = 0;
    for (; r + down <= count; r += down) {
      multiply<lanes, down, across, pitch, add, ahead>(a + r * left.row, left, b + o, c + r * pitch + o, inner, next);
    }
    for (; r < count; r += 4) {
      multiply<lanes, 4, across, pitch, add, ahead>(a + r * left.row, left, b + o, c + r * pitch + o, inner, next);
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
