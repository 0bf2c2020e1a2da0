// Convolutions one after the other in one call: prepared convolutions, and what each of them reads and writes.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace fastperc {

// Some rows of a convolution's output y: of how many images, from how many rows of x, below how many rows of zeros.
struct Strip {
  std::int64_t images, rows, top, out_rows;
};

// A convolution of other maps of the same shape, each time from x and skip to out.
struct PreparedConv {
  // All pointers point to the first row that the strip reads or writes.
  std::function<void(const float* x, const float* skip, float* out, const Strip& strip, int threads)> run;
  Strip whole;
  std::int64_t kernel, stride;                // down; the kernel with its dilation
  std::int64_t row, out_row, skip_row;        // floats from a row to the next
  std::int64_t image, out_image, skip_image;  // floats from an image to the next
};

// A convolution, and the numbers of the maps that it reads and writes; no skip is -1.
struct SeriesLayer {
  PreparedConv conv;
  std::int64_t x, skip, out;
};

// Convolutions of which each may read what those before it have written. Maps are numbered: first those of the caller,
// then those in memory that is only needed during a call.
class ConvSeries {
 public:
  // `offsets` says where the maps lie that are not the caller's, in floats.
  ConvSeries(std::vector<SeriesLayer> layers, std::vector<std::int64_t> offsets);
  // Runs all of them on at most `threads` threads; the results do not depend on how many.
  void run(std::vector<float*> maps, float* memory, int threads) const;

 private:
  // Layers [first, last), each of which reads what the one before it writes.
  struct Stage {
    std::size_t first, last;
    std::int64_t floats;  // of the maps between them
  };
  void run_stage(const Stage& stage, const std::vector<float*>& maps, int threads) const;
  void run_strip(const Stage& stage, const std::vector<float*>& maps, std::int64_t image, std::int64_t first,
                 std::int64_t last) const;
  bool may_follow(const Stage& stage, const std::vector<std::int64_t>& readers) const;

  std::vector<SeriesLayer> layers_;
  std::vector<std::int64_t> offsets_;
  std::vector<Stage> stages_;
};

}  // namespace fastperc
