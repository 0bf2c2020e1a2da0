// What the files of Python bindings share.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels.h"

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

inline Norm norm_from_name(const std::string& name) {
  if (name == "l2") return Norm::l2;
  if (name == "l1") return Norm::l1;
  throw std::invalid_argument("fastperc: norm must be 'l2' or 'l1', got " + name);
}

inline NormPointers norm_pointers(const std::array<Address, 3>& norm) {
  return {pointer<float>(norm[0]), pointer<float>(norm[1]), pointer<float>(norm[2])};
}
inline Statistics norm_statistics(const std::array<Address, 2>& s, std::int64_t count_step) {
  return {pointer<double>(s[0]), pointer<double>(s[1]), count_step};
}
inline NormParameters norm_parameters(const std::array<Address, 2>& p, double eps) {
  return {pointer<float>(p[0]), pointer<float>(p[1]), eps};
}
inline Output output_from_name(const std::string& name) {
  if (name == "tanh") return Output::tanh;
  if (name == "linear") return Output::linear;
  if (name == "plain") return Output::plain;
  throw std::invalid_argument("fastperc: output must be 'tanh', 'linear' or 'plain', got " + name);
}

// Defines the launchers of CUDA kernels (bindings_cuda.cpp).
void def_cuda_launchers(pybind11::module_& m);

// Defines the convolutions of frozen networks that run again and again (bindings_conv.cpp).
void def_prepared_convs(pybind11::module_& m);

}  // namespace fastperc
