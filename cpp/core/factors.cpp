#include "factors.h"

#include <algorithm>
#include <utility>

namespace fastopt {
namespace {

constexpr int row_stream = 2, column_stream = 3;
constexpr index_t band_lines = 32;

const std::vector<index_t>& strides_of(const ArrayStep& step, int stream) {
  return step.layout->streams[size_t(stream)].strides;
}

// Adds n numbers, and n more, to the first ones.
void add_up(double* sums, index_t n, index_t count) {
  for (index_t i = 1; i < count; ++i) {
    for (index_t k = 0; k < n; ++k) sums[k] += sums[i * n + k];
  }
}

}  // namespace

// Along its rows the mean of a row is one, along its columns that of a column. An axis of one
// element is none of the layout's.
Factors::Matrices::Matrices(const ArrayStep& s) : step(s), apart(s.layout->shape.size()) {
  step.stream_count = 1;
  const std::vector<index_t>& shape = step.layout->shape;
  line_axis = across_axis = shape.size();
  const auto extent = [&](size_t axis) { return axis < shape.size() ? shape[axis] : 1; };
  const auto along = [&](size_t axis, int stream) { return strides_of(step, stream)[axis] == 0; };
  index_t elements = 1;
  for (size_t axis = shape.size(); axis-- > 0; elements *= shape[axis]) {
    apart[axis] = elements;
    if (!along(axis, row_stream) && !along(axis, column_stream)) {
      count *= shape[axis];
    } else if (line_axis == shape.size()) {
      line_axis = axis;
      lines_are_rows = along(axis, row_stream);
    } else {
      across_axis = axis;
    }
  }
  length = extent(line_axis);
  lines = extent(across_axis);
  bands = (lines + band_lines - 1) / band_lines;
  pieces = blocks_of(length);
}

index_t Factors::Matrices::place(index_t matrix, const std::vector<index_t>& strides) const {
  const std::vector<index_t>& shape = step.layout->shape;
  index_t place = 0;
  for (size_t axis = shape.size(); axis-- > 0;) {
    if (axis == line_axis || axis == across_axis) continue;
    place += matrix % shape[axis] * strides[axis];
    matrix /= shape[axis];
  }
  return place;
}

void Factors::Matrices::add(index_t tile, const std::function<void(const Line&)>& add) const {
  const index_t piece = tile % pieces, band = tile / pieces % bands;
  const index_t matrix = tile / pieces / bands, begin = piece * block;
  const index_t n = std::min(block, length - begin);
  const auto from = [&](size_t axis) { return axis < apart.size() ? apart[axis] : 1; };
  const index_t first = place(matrix, apart) + begin * from(line_axis);
  double* const sums_across = across + (matrix * bands + band) * length + begin;
  double* const sums_along = along + (matrix * pieces + piece) * lines;
  std::fill_n(sums_across, n, 0.0);
  for (index_t i = band * band_lines; i < std::min((band + 1) * band_lines, lines); ++i) {
    add({step, first + i * from(across_axis), from(line_axis), n, sums_along[i], sums_across});
  }
}

void Factors::Matrices::finish(index_t matrix) const {
  double* const sums_along = along + matrix * pieces * lines;
  double* const sums_across = across + matrix * bands * length;
  add_up(sums_along, lines, pieces);
  add_up(sums_across, length, bands);
  const auto factor = [&](bool rows) {
    const int stream = rows ? row_stream : column_stream;
    const std::vector<index_t>& strides = strides_of(step, stream);
    const bool of_lines = rows == lines_are_rows;
    const size_t axis = of_lines ? across_axis : line_axis;
    const index_t begin = place(matrix, strides);
    return Factor{of_lines ? lines : length,   of_lines ? sums_along : sums_across,
                  of_lines ? length : lines,   static_cast<char*>(step.streams[stream]) + begin,
                  roots[rows ? 0 : 1] + begin, axis < strides.size() ? strides[axis] : 0};
  };
  step.rule->factor(step.coefficients, factor(true), factor(false));
}

Factors::Factors(const std::vector<ArrayStep>& steps) {
  const auto is_factored = [](const ArrayStep& step) { return step.rule->factor != nullptr; };
  if (std::none_of(steps.begin(), steps.end(), is_factored)) return;
  steps_ = steps;
  index_t numbers = 0;
  for (const ArrayStep& step : steps) {
    if (!is_factored(step) || step.size == 0) continue;
    const Matrices& a = arrays_.emplace_back(step);
    const index_t sums = a.count * (a.pieces * a.lines + a.bands * a.length);
    tiles_.add(step.size * item_size(step.rule->dtype), a.count * a.bands * a.pieces);
    matrices_.add(sums * index_t(sizeof(double)), a.count);
    numbers += sums + a.count * (a.lines + a.length);
  }
  memory_.emplace(1, numbers);
  double* next = (*memory_)[0];
  const auto take = [&](index_t n) { return std::exchange(next, next + n); };
  size_t i = 0;
  for (ArrayStep& step : steps_) {
    if (!is_factored(step) || step.size == 0) continue;
    Matrices& a = arrays_[i++];
    a.along = take(a.count * a.pieces * a.lines);
    a.across = take(a.count * a.bands * a.length);
    for (const int stream : {row_stream, column_stream}) {
      const bool of_lines = (stream == row_stream) == a.lines_are_rows;
      double* const roots = take(a.count * (of_lines ? a.lines : a.length));
      a.roots[stream - row_stream] = reinterpret_cast<char*>(roots);
      step.streams[stream] = roots;
    }
  }
}

void Factors::each_line(int part, int parts, const std::function<void(const Line&)>& add) const {
  tiles_.visit(part, parts, [&](size_t i, Range tiles) {
    for (index_t tile = tiles.begin; tile < tiles.end; ++tile) arrays_[i].add(tile, add);
  });
}

void Factors::finish(int part, int parts) const {
  matrices_.visit(part, parts, [&](size_t i, Range matrices) {
    for (index_t k = matrices.begin; k < matrices.end; ++k) arrays_[i].finish(k);
  });
}

}  // namespace fastopt
