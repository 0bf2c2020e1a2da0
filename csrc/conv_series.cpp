// Runs convolutions one after the other by one team of threads.
//
// Where a 1×1 convolution widens a map, a depthwise one follows and a 1×1 one narrows it again, the wide maps may not
// fit the caches. Then a thread computes all of them for a few rows of the last map, so that only those rows of the
// wide maps exist; rows that two strips need are computed for each. Other convolutions run whole, all threads at one of
// them.
#include "conv_series.h"

#include <algorithm>

#include "conv3x3_tile.h"

namespace fastperc {
namespace {

// Measured on cores with an L2 cache of 2 MB: strips pay where a thread's share of the maps between the layers takes
// more than 128 KB, and the rows of those maps that a strip needs should take half of the cache.
constexpr std::int64_t share_floats = 1 << 15, strip_floats = 1 << 18;
constexpr std::int64_t most_floats = 1 << 20;  // of a strip of a single row

constexpr std::int64_t over(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t cache_line_of(std::int64_t floats) { return over(floats, winograd::line) * winograd::line; }

struct Rows {
  std::int64_t first, last;
};

// The rows of x that rows of y are made of.
Rows rows_of_x(const PreparedConv& conv, const Rows& y) {
  const std::int64_t first = y.first * conv.stride - conv.whole.top;
  const std::int64_t last = (y.last - 1) * conv.stride - conv.whole.top + conv.kernel;
  return {std::max<std::int64_t>(first, 0), std::min(last, conv.whole.rows)};
}

// Whether every row of y is made of at least a row of x.
bool reads_rows(const PreparedConv& conv) {
  const Strip& whole = conv.whole;
  return whole.top < conv.kernel && (whole.out_rows - 1) * conv.stride < whole.rows + whole.top;
}

// Memory of this thread for the rows between the layers of a strip; the kernels use `scratch` meanwhile.
float* memory_of_strips(std::int64_t floats) {
  static thread_local std::vector<float> kept;
  if (floats + winograd::line > static_cast<std::int64_t>(kept.size())) kept.resize(floats + winograd::line);
  const auto address = reinterpret_cast<std::uintptr_t>(kept.data());
  constexpr std::uintptr_t bytes = winograd::line * sizeof(float);
  return reinterpret_cast<float*>((address + bytes - 1) / bytes * bytes);
}

}  // namespace

ConvSeries::ConvSeries(std::vector<SeriesLayer> layers, std::vector<std::int64_t> offsets)
    : layers_(std::move(layers)), offsets_(std::move(offsets)) {
  std::int64_t maps = 0;
  for (const SeriesLayer& layer : layers_) maps = std::max({maps, layer.x + 1, layer.skip + 1, layer.out + 1});
  std::vector<std::int64_t> readers(maps);
  for (const SeriesLayer& layer : layers_) {
    ++readers[layer.x];
    if (layer.skip >= 0) ++readers[layer.skip];
  }
  for (std::int64_t map = 0; map < maps - static_cast<std::int64_t>(offsets_.size()); ++map) {
    readers[map] = 0;  // the caller reads it too
  }
  for (std::size_t first = 0; first < layers_.size();) {
    Stage stage{first, first + 1, 0};
    while (may_follow(stage, readers)) {
      const PreparedConv& conv = layers_[stage.last++].conv;
      stage.floats += conv.whole.images * conv.image;
    }
    const PreparedConv& final = layers_[stage.last - 1].conv;
    if (final.kernel > 1) stage = {first, first + 1, 0};
    stages_.push_back(stage);
    first = stage.last;
  }
}

// Whether the layer after a stage may be a part of it: it alone reads what the stage writes, and at most one kernel of
// a stage is larger than 1, so that strips compute few rows twice.
bool ConvSeries::may_follow(const Stage& stage, const std::vector<std::int64_t>& readers) const {
  if (stage.last == layers_.size()) return false;
  const SeriesLayer &before = layers_[stage.last - 1], &next = layers_[stage.last];
  if (next.x != before.out || readers[next.x] != 1) return false;
  if (next.conv.kernel == 1 && before.conv.kernel == 1) return false;
  const auto is_large = [](const SeriesLayer& layer) { return layer.conv.kernel > 1; };
  const bool has_large = std::any_of(&layers_[stage.first], &layers_[stage.last], is_large);
  return !(has_large && is_large(next)) && reads_rows(before.conv) && reads_rows(next.conv);
}

void ConvSeries::run(std::vector<float*> maps, float* memory, int threads) const {
  for (const std::int64_t offset : offsets_) maps.push_back(memory + offset);
  const auto all = [&] {
    for (const Stage& stage : stages_) run_stage(stage, maps, threads);
  };
  if (threads > 1) {
    winograd::Team::run(threads, all);
  } else {
    all();
  }
}

void ConvSeries::run_stage(const Stage& stage, const std::vector<float*>& maps, int threads) const {
  const Strip& last = layers_[stage.last - 1].conv.whole;
  const std::int64_t images = std::max<std::int64_t>(last.images, 1), floats = stage.floats / images;
  if (stage.floats / threads > share_floats && floats / std::max<std::int64_t>(last.out_rows, 1) <= most_floats) {
    const std::int64_t wanted = std::max(over(floats, strip_floats), over(threads, images));
    const std::int64_t strips = std::min(over(wanted, threads) * threads, last.out_rows);
    return winograd::take_turns(images * strips, threads, [&](std::int64_t task) {
      const std::int64_t strip = task % strips;
      run_strip(stage, maps, task / strips, strip * last.out_rows / strips, (strip + 1) * last.out_rows / strips);
    });
  }
  for (std::size_t i = stage.first; i < stage.last; ++i) {
    const SeriesLayer& layer = layers_[i];
    const float* skip = layer.skip < 0 ? nullptr : maps[layer.skip];
    layer.conv.run(maps[layer.x], skip, maps[layer.out], layer.conv.whole, threads);
  }
}

// Computes the rows [first, last) of what a stage writes.
void ConvSeries::run_strip(const Stage& stage, const std::vector<float*>& maps, std::int64_t image, std::int64_t first,
                           std::int64_t last) const {
  constexpr std::size_t most = 3;  // layers of a stage
  Rows y[most + 1];                // that each layer reads, and those of the last map
  const std::size_t count = stage.last - stage.first;
  std::int64_t floats = 0;
  y[count] = {first, last};
  for (std::size_t i = count; i-- > 0;) {
    const PreparedConv& conv = layers_[stage.first + i].conv;
    y[i] = rows_of_x(conv, y[i + 1]);
    if (i > 0) floats += cache_line_of((y[i].last - y[i].first) * conv.row);
  }
  const SeriesLayer& start = layers_[stage.first];
  const float* x = maps[start.x] + image * start.conv.image + y[0].first * start.conv.row;
  float* middle = memory_of_strips(floats);
  for (std::size_t i = 0; i < count; ++i) {
    const SeriesLayer& layer = layers_[stage.first + i];
    const PreparedConv& conv = layer.conv;
    const Rows &from = y[i], &to = y[i + 1];
    const Strip strip{1, from.last - from.first, from.first - to.first * conv.stride + conv.whole.top,
                      to.last - to.first};
    const float* skip =
        layer.skip < 0 ? nullptr : maps[layer.skip] + image * conv.skip_image + to.first * conv.skip_row;
    float* out = i + 1 < count ? middle : maps[layer.out] + image * conv.out_image + to.first * conv.out_row;
    conv.run(x, skip, out, strip, 1);
    x = out;
    middle += cache_line_of((to.last - to.first) * conv.out_row);
  }
}

}  // namespace fastperc
