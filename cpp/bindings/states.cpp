#include "states.h"

#include <algorithm>
#include <cstdint>

#include "core/element.h"

namespace fastopt {
namespace {

// A processor takes a load for the reload of a store before it that is a multiple of a page away,
// and waits: a step over 64 K elements whose arrays began at the same place of a page took up to
// 2.7 times as long. So states begin elsewhere than their parameters: each so many lines further
// on.
constexpr size_t line_bytes = 64, page_bytes = 4096;
constexpr size_t lines_apart = 17;
constexpr size_t placed_from_bytes = 4 * page_bytes;  // smaller ones would leave too much room

// Memory of a power of two in size would lie a power of two apart, and then share the banks of the
// memory: a step over 16 M elements took 1.25 times as long. Room behind large ones keeps them off.
constexpr size_t padded_from_bytes = 1 << 24, padding_bytes = 1 << 22;

size_t place_unit(size_t bytes) {
  return bytes >= placed_from_bytes ? page_bytes : line_bytes;
}

template <class T>
void fill(char* data, index_t n, double value) {
  std::fill_n(reinterpret_cast<T*>(data), n, static_cast<T>(value));
}

void fill(const View& view, double value) {
  switch (item_size(view.dtype)) {
    case 1:
      return fill<std::uint8_t>(view.data, view.size(), value);
    case 2:
      return fill<std::uint16_t>(view.data, view.size(), value);
    case 4:
      return fill<float>(view.data, view.size(), value);
    default:
      return fill<double>(view.data, view.size(), value);
  }
}

Dtype dtype_named(const std::string& name) {
  for (int i = 0; i < dtype_count; ++i) {
    if (name == dtype_name(Dtype(i))) return Dtype(i);
  }
  fail<std::invalid_argument>("there is no dtype '", name, "'");
}

}  // namespace

// They lie one after the other: a step finds them in few large pages, and walks on from one to the
// next without a break. With 1000 arrays of 4096 elements that saves an eighth of its time.
std::vector<Array> new_states(const std::vector<Array>& models, const std::string& dtype,
                              double value, int number) {
  const auto stored_as = [&](const Array& model) {
    return dtype.empty() ? compute_dtype(dtype_of(model)) : dtype_named(dtype);
  };
  size_t size = 0;
  for (const Array& model : models) {
    const auto bytes = size_t(model.size() * item_size(stored_as(model)));
    size += bytes + place_unit(bytes);
  }
  const Array memory = shared_memory(size + (size >= padded_from_bytes ? padding_bytes : 0));
  std::vector<Array> states;
  states.reserve(models.size());
  auto end = reinterpret_cast<std::uintptr_t>(memory.data());
  for (const Array& model : models) {
    const Dtype stored = stored_as(model);
    const index_t item = item_size(stored);
    const auto bytes = size_t(model.size() * item);
    // In whole lines from the parameter's place, so that no store straddles two of them.
    const size_t offset = size_t(number + 1) * lines_apart * line_bytes;
    const auto wanted = reinterpret_cast<std::uintptr_t>(model.data()) + offset;
    const auto begin = end + (wanted - end) % place_unit(bytes);
    Shape strides = dense_strides(model);
    for (index_t& stride : strides) stride = stride / model.itemsize() * item;
    const View view{
        reinterpret_cast<char*>(begin), stored, true, model.ndim(), model.shape(), strides.data()};
    states.push_back(array_of(view, memory));
    fill(view, value);
    end = begin + bytes;
  }
  return states;
}

std::vector<Array> new_numbers(size_t count, double value) {
  const Array memory = shared_memory(count * sizeof(double));
  double* const numbers = static_cast<double*>(const_cast<void*>(memory.data()));
  std::fill_n(numbers, count, value);
  std::vector<Array> arrays;
  for (size_t i = 0; i < count; ++i) {
    arrays.push_back(ArrayOf<double>(Shape{}, numbers + i, memory));
  }
  return arrays;
}

}  // namespace fastopt
