// Copies a window of an image, scaled and shifted, into a network's input: one pass for every layout and dtype.
#include "image_io.h"

#include <type_traits>

#include "kernels.h"
#include "parallel.h"

namespace fastperc {
namespace {

constexpr int channels = 3;

template <typename From, typename To>
void fill_row(const From* row, To* out, const Window& window, const ImageStrides& strides, float scale, float shift) {
  for (std::int64_t j = 0; j < window.width; ++j) {
    const From* pixel = row + reflected(window.left + j, window.columns) * strides.column;
    for (int c = 0; c < channels; ++c) {
      narrow(to_input(static_cast<float>(widen(pixel[c * strides.channel])), scale, shift), out[j * channels + c]);
    }
  }
}

}  // namespace

void image_io_cpu(const void* image, void* out, const std::string& image_dtype, DType dtype, std::int64_t images,
                  const Window& window, const ImageStrides& strides, float scale, float shift, int threads) {
  dispatch_pixels(image_dtype, [&](auto* from) {
    using From = std::remove_pointer_t<decltype(from)>;
    dispatch(dtype, [&](auto* to) {
      using To = std::remove_pointer_t<decltype(to)>;
      // A task takes a few rows: a single one takes less time than starting a task.
      constexpr std::int64_t rows = 8;
      const std::int64_t total = images * window.height;
      parallel_for((total + rows - 1) / rows, threads, [&](std::int64_t task) {
        for (std::int64_t i = task * rows; i < total && i < (task + 1) * rows; ++i) {
          const std::int64_t n = i / window.height, y = reflected(window.top + i % window.height, window.rows);
          const From* row = static_cast<const From*>(image) + n * strides.image + y * strides.row;
          fill_row(row, static_cast<To*>(out) + i * window.width * channels, window, strides, scale, shift);
        }
      });
    });
  });
}

}  // namespace fastperc
