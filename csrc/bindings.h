// What the files of Python bindings share.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <utility>

namespace fastperc {

using Address = std::uintptr_t;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// A struct of the numbers, in their order.
template <typename Struct, std::size_t size, std::size_t... i>
Struct filled(const std::array<std::int64_t, size>& numbers, std::index_sequence<i...>) {
  return {numbers[i]...};
}
template <typename Struct, std::size_t size>
Struct filled(const std::array<std::int64_t, size>& numbers) {
  return filled<Struct>(numbers, std::make_index_sequence<size>());
}

// Defines the convolutions of frozen networks that run again and again (bindings_conv.cpp).
void def_prepared_convs(pybind11::module_& m);

}  // namespace fastperc
