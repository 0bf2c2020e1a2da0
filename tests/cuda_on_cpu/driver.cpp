// Runs CUDA launchers of csrc/kernels.h, in several orders of threads and blocks, on cases read from stdin, and
// writes their results to stdout. tests/test_cuda_on_cpu.py runs this program.
//
// A case is a launcher's name and its arguments. An answer is the contents of the buffers that the launcher fills. Each
// item is sent as its size in 8 bytes, then its bytes.
#include <iostream>
#include <iterator>

#include "kernels.h"

namespace {

using fastperc::DType;
using fastperc::Norm;

constexpr unsigned orders = 5;  // forwards, backwards, and three random ones

// Memory between two guards that must not be written to. AddressSanitizer also catches reads from the guards.
class Buffer {
 public:
  explicit Buffer(std::string contents) : initial(std::move(contents)), memory(initial.size() + 2 * guard + 64) {
    std::memset(memory.data(), 0xa5, memory.size());
    begin = memory.data() + guard;
    begin += -reinterpret_cast<std::uintptr_t>(begin) % 64;
    guard_access(true);
    reset();
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { guard_access(false); }
  void reset() { std::memcpy(begin, initial.data(), initial.size()); }
  std::string contents() const { return {begin, initial.size()}; }
  bool is_unchanged() const { return contents() == initial; }
  // A pointer to the byte at `offset`, or null if the buffer is empty.
  void* at(std::int64_t offset) { return initial.empty() ? nullptr : begin + offset; }
  bool guards_hold() {
    guard_access(false);
    const auto intact = [](char byte) { return byte == char(0xa5); };
    const bool hold = std::all_of(memory.data(), begin, intact) &&
                      std::all_of(begin + initial.size(), memory.data() + memory.size(), intact);
    guard_access(true);
    return hold;
  }

 private:
  static constexpr std::size_t guard = 256;
  std::string initial;
  std::vector<char> memory;
  char* begin;

  // Makes AddressSanitizer report access to the guards, or stops it.
  void guard_access([[maybe_unused]] bool on) {
#ifdef __SANITIZE_ADDRESS__
    if (on) {
      __asan_poison_memory_region(memory.data(), begin - memory.data());
      __asan_poison_memory_region(begin + initial.size(), memory.data() + memory.size() - begin - initial.size());
    } else {
      __asan_unpoison_memory_region(memory.data(), memory.size());
    }
#endif
  }
};

[[noreturn]] void fail(const std::string& message) {
  std::cerr << "driver: " << message << std::endl;
  std::exit(1);
}

std::string read() {
  std::uint64_t size;
  if (!std::cin.read(reinterpret_cast<char*>(&size), sizeof size)) fail("the case ends early");
  std::string bytes(size, '\0');
  std::cin.read(bytes.data(), static_cast<std::streamsize>(size));
  return bytes;
}
template <std::size_t count>
std::array<std::int64_t, count> read_numbers() {
  std::array<std::int64_t, count> numbers;
  const std::string bytes = read();
  if (bytes.size() != sizeof numbers) fail("wrong count of numbers");
  std::memcpy(&numbers, bytes.data(), sizeof numbers);
  return numbers;
}
void write(const std::string& bytes) {
  const std::uint64_t size = bytes.size();
  std::cout.write(reinterpret_cast<const char*>(&size), sizeof size);
  std::cout.write(bytes.data(), static_cast<std::streamsize>(size));
}

// Runs `kernel` in every order, from the same initial contents, and writes the contents of `filled`. The kernel also
// uses the buffers `read` and `scratch`.
void in_every_order(std::initializer_list<Buffer*> filled, std::initializer_list<Buffer*> read,
                    std::initializer_list<Buffer*> scratch, const std::function<void()>& kernel) {
  std::vector<std::string> answer;
  for (unsigned order = 0; order < orders; ++order) {
    for (const auto& buffers : {filled, scratch}) {
      for (Buffer* buffer : buffers) buffer->reset();
    }
    cuda_on_cpu::run_in_order(order);
    kernel();
    std::vector<std::string> contents;
    for (Buffer* buffer : filled) contents.push_back(buffer->contents());
    if (order == 0) answer = contents;
    if (contents != answer) fail("the result depends on the order of threads (order " + std::to_string(order) + ")");
    for (const auto& buffers : {filled, read, scratch}) {
      for (Buffer* buffer : buffers) {
        if (!buffer->guards_hold()) fail("written beyond the end of a buffer");
      }
    }
    for (Buffer* buffer : read) {
      if (!buffer->is_unchanged()) fail("an input was written to");
    }
  }
  for (const std::string& contents : answer) write(contents);
}

void tv_loss_fwd() {
  const DType dtype = fastperc::dtype_from_name(read());
  const Norm norm = read() == "l1" ? Norm::l1 : Norm::l2;
  const auto s = read_numbers<5>();
  const auto xs = read_numbers<3>(), gs = read_numbers<3>();
  const auto offsets = read_numbers<2>();  // of the first elements of x and grad, in bytes
  Buffer x(read()), grad(read()), loss(read());
  const fastperc::RowShape shape{s[0], s[1], s[2], s[3], s[4]};
  const std::size_t element = dtype == DType::float64 ? 8 : 4;
  Buffer partials(std::string(static_cast<std::size_t>(fastperc::tv_loss_partials(shape)) * element, '\xff'));
  in_every_order({&grad, &loss}, {&x}, {&partials}, [&] {
    fastperc::tv_loss_fwd_cuda(x.at(offsets[0]), grad.at(offsets[1]), loss.at(0), partials.at(0), dtype, norm, shape,
                               {xs[0], xs[1], xs[2]}, {gs[0], gs[1], gs[2]}, nullptr);
  });
}

}  // namespace

int main() {
  while (std::cin.peek() != std::istream::traits_type::eof()) {
    const std::string launcher = read();
    if (launcher == "tv_loss_fwd") {
      tv_loss_fwd();
    } else {
      fail("no launcher " + launcher);
    }
  }
}
