#include <limits>
#include <numeric>

#include "norm_parts.h"

namespace fastopt {
namespace {

constexpr index_t slab_bytes = 5 << 18;                 // a channel this large stays in the cache
constexpr index_t page_bytes = 4096;                    // shorter parts of rows disturb prefetching
constexpr index_t few_rows = 256, few_wide_rows = 512;  // below that, slices are faster
constexpr index_t chunk_rows = 128;                     // that have sums of their own
constexpr index_t chunk_elements = 1 << 16;             // the same, of planes
constexpr index_t unit_bytes = 256;                     // of a row, for each thread
constexpr index_t backwards_bytes = 1 << 20;  // shorter pieces disturb the hardware's prefetching

// How batch normalization walks through [outer, channels, inner]: a channel is runs, each a plane
// of it, or where they would be short, a few columns of a row.
struct Walk {
  enum Kind {
    slabs,   // runs, a channel at a time: all passes while it is hot
    slices,  // columns of few rows, likewise, a few channels at a time
    planes,  // runs, every pass over everything, in memory order
    rows,    // columns, likewise
  } kind;
  index_t item, bytes;
  index_t width;  // numbers that a channel is reduced to: one, or one of each of its columns
  index_t sums;   // those of all channels; where channels are columns, the elements of a row

  explicit Walk(const BatchNorm& n)
      : kind(kind_of(n)),
        item(item_size(n.dtype)),
        bytes(n.outer * n.channels * n.inner * item),
        width(columns_of(n)),
        sums(n.channels * width) {}

  // Channels of slices: a thread takes whole units.
  index_t unit() const { return std::max<index_t>(1, unit_bytes / (width * item)); }

  // Parts of rows can be streamed only if each begins on a cache line.
  bool stream(const void* out) const {
    const bool on_lines = sums * item % 64 == 0 && unit() * width * item % 64 == 0 &&
                          reinterpret_cast<__UINTPTR_TYPE__>(out) % 64 == 0;
    return streams(bytes) && (kind != slices || on_lines);
  }

  // Of outer, for planes and rows.
  static Chunks chunks_of(const BatchNorm& n) {
    return n.inner > few_columns
               ? Chunks(n.outer, std::max<index_t>(1, chunk_elements / n.inner), 1)
               : Chunks(n.outer, chunk_rows, 64);
  }

 private:
  static index_t columns_of(const BatchNorm& n) {
    return n.inner > few_columns ? 1 : std::max<index_t>(1, n.inner);
  }

  static Kind kind_of(const BatchNorm& n) {
    const index_t item = item_size(n.dtype);
    if (n.inner > few_columns) {
      const bool hot = n.outer * n.inner * item <= slab_bytes && n.channels > 4;
      return hot || chunks_of(n).count == 1 ? slabs : planes;
    }
    const index_t row_bytes = n.channels * columns_of(n) * item;
    return n.outer < (row_bytes < 2 * page_bytes ? few_rows : few_wide_rows) ? slices : rows;
  }
};

// Arrays of coefficients of all channels, in x's dtype, and of all columns. Past the last column
// they go on with the first, for the length of a vector: streamed rows are read as one run.
class Coefficients {
 public:
  Coefficients(index_t arrays, const BatchNorm& n, const Walk& walk)
      : n_(n),
        walk_(walk),
        arrays_(arrays),
        of_channels_(arrays, n.channels + vector_of_doubles),
        of_columns_(walk.width > 1 ? arrays : 0, walk.sums + vector_of_doubles) {}

  // Of the channel c and those after it, or of their columns.
  ForwardCoefficients forward(index_t c) const {
    return {of_column(0, c), of_column(1, c), of_column(2, c)};
  }
  BackwardCoefficients backward(index_t c) const {
    return {of_column(3, c), of_column(4, c), of_column(5, c)};
  }

  // From the statistics of the channels c to end.
  void set_forward(const Norm& kernels, index_t c, index_t end) const {
    kernels.forward_coefficients(end - c, from(n_.statistics, c), at(n_.gamma, c, walk_.item),
                                 at(n_.beta, c, walk_.item),
                                 {of_channel(0, c), of_channel(1, c), of_channel(2, c)});
    spread(0, c, end);
  }

  // From their sums, too; `count` elements are a channel.
  void set_backward(const Norm& kernels, double count, GradientSums sums, index_t c,
                    index_t end) const {
    kernels.backward_coefficients(end - c, from(n_.statistics, c), count,
                                  at(n_.gamma, c, walk_.item), sums, of_channel(0, c),
                                  {of_channel(3, c), of_channel(4, c), of_channel(5, c)});
    spread(3, c, end);
  }

  void go_on() const {
    for (index_t array = 0; array < arrays_; ++array) {
      char* const first = static_cast<char*>(of_column(array, 0));
      for (index_t byte = 0; byte < vector_of_doubles * 8; ++byte) {
        first[walk_.sums * walk_.item + byte] = first[byte];
      }
    }
  }

 private:
  static constexpr index_t vector_of_doubles = 8;

  void* of_channel(index_t array, index_t c) const {
    return at(of_channels_[array], c, walk_.item);
  }
  void* of_column(index_t array, index_t c) const {
    return walk_.width == 1 ? of_channel(array, c)
                            : at(of_columns_[array], c * walk_.width, walk_.item);
  }

  // Three arrays, from the channels c to end to their columns.
  void spread(index_t first, index_t c, index_t end) const {
    if (walk_.width == 1) return;
    for (index_t array = first; array < first + 3; ++array) {
      repeat(of_channel(array, c), end - c, walk_.width, walk_.item, of_column(array, c));
    }
  }

  const BatchNorm& n_;
  const Walk& walk_;
  const index_t arrays_;
  const Scratch of_channels_, of_columns_;
};

// What the forward and the backward pass have in common. The walk calls for a range of channels:
// `start`, then `reduce` to two numbers a channel or a column, `finish`, and `apply` to every
// element. Elements and channels are given by their index.
struct Pass {
  const BatchNorm& n;
  const Norm& kernels;
  const Walk& walk;
  const index_t item;
  bool reduces = true, applies = true;
  index_t reduced_bytes, bytes;  // memory traffic of reduce, and of apply
  Coefficients coefficients;
  Scratch sums;
  double *const first = sums[0], *const second = sums[1];

  Pass(const Settings& settings, const Walk& walked, const BatchNorm& norm, index_t arrays)
      : n(norm),
        kernels(settings.table->norm[size_t(n.dtype)]),
        walk(walked),
        item(walk.item),
        coefficients(arrays, n, walk),
        sums(2, walk.sums) {}
};

// `first` are means and `second` sums of squared deviations.
struct ForwardPass : Pass {
  const Running& running;
  const void* residual;
  void* y;

  ForwardPass(const Settings& settings, const Walk& walk, const BatchNorm& n,
              const Running& running_statistics, const void* added, void* out)
      : Pass(settings, walk, n, 3), running(running_statistics), residual(added), y(out) {
    reduces = n.training;
    applies = y != nullptr;
    reduced_bytes = walk.bytes;
    bytes = walk.bytes * (2 + (residual != nullptr));
  }

  void start(index_t, index_t) const {}

  void reduce(index_t element, index_t, Runs runs, double* mean, double* m2) const {
    kernels.moments(at(n.x, element, item), runs, 1, 0, true, {mean, m2});
  }

  void reduce_columns(index_t element, index_t, Rows rows, double* mean, double* m2,
                      double* scratch) const {
    kernels.column_moments(at(n.x, element, item), rows, {mean, m2}, scratch);
  }

  // What more rows say is joined to what is known of those before them.
  void join(Range mine, Range rows, double* mean, double* m2) const {
    const index_t inner = n.inner / walk.width, begin = mine.begin;
    kernels.merge(double(rows.begin * inner), {first + begin, second + begin},
                  double((rows.end - rows.begin) * inner), {mean + begin, m2 + begin},
                  mine.end - begin);
  }

  // A channel's statistics from its moments, or from those of its columns.
  void set_statistics(index_t c) const {
    const double *const mean = first + c * walk.width, *const m2 = second + c * walk.width;
    const double count = double(n.outer * n.inner);
    if (walk.width == 1) {
      n.statistics.mean[c] = *mean;
      n.statistics.variance[c] = *m2 / count;
      return;
    }
    double mean_sum = 0, deviations = 0;
    for (index_t k = 0; k < walk.width; ++k) mean_sum += mean[k];
    n.statistics.mean[c] = mean_sum / double(walk.width);
    for (index_t k = 0; k < walk.width; ++k) {
      const double d = mean[k] - n.statistics.mean[c];
      deviations += m2[k] + double(n.outer) * (d * d);
    }
    n.statistics.variance[c] = deviations / count;
  }

  // Everything that depends on the channel alone.
  void finish(index_t c, index_t end) const {
    for (index_t i = c; n.training && i < end; ++i) set_statistics(i);
    kernels.choose_units(n.training ? at(n.x, c * n.inner, item) : nullptr,
                         {n.outer, n.channels * n.inner, n.inner}, end - c, n.inner, true,
                         from(n.statistics, c));
    if (n.training) move_running(kernels, n, running, c, end);
    coefficients.set_forward(kernels, c, end);
  }

  void apply(index_t element, index_t c, Runs runs) const {
    if (n.statistics.unit[c] == 1) {
      return kernels.apply(forward(element, c), after(element), runs, 0);
    }
    const Scratch copy(1, runs.inner);
    for (index_t run = 0; run < runs.count; ++run) {
      const index_t from = element + run * runs.stride;
      kernels.apply(in_units(from, c, 1, runs.inner, copy), after(from),
                    {1, runs.inner, runs.inner}, 0);
    }
  }

  void apply_columns(index_t element, index_t c, Rows rows) const {
    const index_t channels = rows.columns / walk.width;
    if (!has_units(from(n.statistics, c), channels)) {
      return kernels.column_apply(forward(element, c), after(element), rows);
    }
    const Scratch copy(1, rows.columns);
    for (index_t row = 0; row < rows.count; ++row) {
      const index_t from = element + row * rows.stride;
      kernels.column_apply(in_units(from, c, channels, walk.width, copy), after(from),
                           {1, rows.stride, rows.columns});
    }
  }

  Forward forward(index_t element, index_t c) const {
    return {at(n.x, element, item), at(y, element, item), coefficients.forward(c), walk.stream(y)};
  }

  // The same of a copy of x in its units, so many of each of so many channels.
  Forward in_units(index_t element, index_t c, index_t channels, index_t of_each,
                   const Scratch& copy) const {
    Forward f = forward(element, c);
    multiply_by_units(kernels, n.statistics.unit + c, f.x, channels, of_each, copy[0]);
    f.x = copy[0];
    return f;
  }

  Activation after(index_t element) const { return {at(residual, element, item), n.relu}; }
};

// `first` are sums of dy and `second` sums of dy (x - center).
struct BackwardPass : Pass {
  const void *dy, *y;
  const Gradients& gradients;
  void* dresidual;
  Scratch of_channels;

  BackwardPass(const Settings& settings, const Walk& walk, const BatchNorm& n,
               const void* y_gradient, const void* output, const Gradients& results,
               void* residual_gradient)
      : Pass(settings, walk, n, 6),
        dy(y_gradient),
        y(output),
        gradients(results),
        dresidual(residual_gradient),
        of_channels(walk.width > 1 ? 2 : 0, n.channels) {
    reduced_bytes = walk.bytes * 2;
    bytes = walk.bytes * (3 + (y != nullptr) + (dresidual != nullptr));
  }

  void start(index_t c, index_t end) const { coefficients.set_forward(kernels, c, end); }

  void reduce(index_t element, index_t c, Runs runs, double* sum, double* product) const {
    kernels.gradient_sums(backward(element, c), before(element, c), runs, 1, 0, {sum, product});
  }

  void reduce_columns(index_t element, index_t c, Rows rows, double* sum, double* product,
                      double* scratch) const {
    kernels.column_gradient_sums(backward(element, c), before(element, c), rows, {sum, product},
                                 scratch);
  }

  void join(Range mine, Range, const double* sum, const double* product) const {
    const index_t begin = mine.begin, count = mine.end - begin;
    kernels.add_sums(count, sum + begin, first + begin);
    kernels.add_sums(count, product + begin, second + begin);
  }

  // Those of the channels c to end, from those of their columns.
  GradientSums channel_sums(index_t c, index_t end) const {
    if (walk.width == 1) return {first + c, second + c};
    const auto add = [&](const double* of_columns, double* of_channel) {
      for (index_t i = c; i < end; ++i) {
        const double* const columns = of_columns + i * walk.width;
        of_channel[i] = std::accumulate(columns, columns + walk.width, 0.0);
      }
    };
    add(first, of_channels[0]);
    add(second, of_channels[1]);
    return {of_channels[0] + c, of_channels[1] + c};
  }

  void finish(index_t c, index_t end) const {
    const GradientSums both = channel_sums(c, end);
    const double count =
        n.training ? double(n.outer * n.inner) : std::numeric_limits<double>::infinity();
    coefficients.set_backward(kernels, count, both, c, end);
    kernels.round_sums(end - c, both.product, at(gradients.dgamma, c, item));
    kernels.round_sums(end - c, both.dy, at(gradients.dbeta, c, item));
  }

  void apply(index_t element, index_t c, Runs runs) const {
    kernels.gradient_apply(backward(element, c), before(element, c), runs, 0);
  }

  void apply_columns(index_t element, index_t c, Rows rows) const {
    kernels.column_gradient_apply(backward(element, c), before(element, c), rows);
  }

  Backward backward(index_t element, index_t c) const {
    return {at(dy, element, item),          at(n.x, element, item),
            coefficients.forward(c).center, at(gradients.dx, element, item),
            coefficients.backward(c),       walk.stream(gradients.dx)};
  }

  ActivationGradient before(index_t element, index_t c) const {
    const ForwardCoefficients by = coefficients.forward(c);
    return {n.relu, at(y, element, item), by.scale, by.shift, at(dresidual, element, item)};
  }
};

// All passes over a few channels one after the other, while their elements are in the cache; the
// second from the last run to the first.
template <class Pass>
void visit_slabs(const Settings& settings, const Pass& pass) {
  const BatchNorm& n = pass.n;
  const index_t stride = n.channels * n.inner, last = (n.outer - 1) * stride;
  const Runs runs{n.outer, stride, n.inner}, backwards{n.outer, -stride, n.inner};
  const index_t most = std::max<index_t>(1, hot_bytes / (n.outer * n.inner * pass.item));
  parallel_for(settings, pass.bytes, [&](int part, int parts) {
    const Range mine = share(n.channels, part, parts);
    for (index_t first = mine.begin, end; first < mine.end; first = end) {
      end = std::min(first + most, mine.end);
      pass.start(first, end);
      for (index_t c = first; pass.reduces && c < end; ++c) {
        pass.reduce(c * n.inner, c, runs, pass.first + c, pass.second + c);
      }
      pass.finish(first, end);
      for (index_t c = first; pass.applies && c < end; ++c) {
        pass.apply(c * n.inner + last, c, backwards);
      }
    }
  });
}

// The same for the columns of a few channels at a time.
template <class Pass>
void visit_slices(const Settings& settings, const Pass& pass) {
  const BatchNorm& n = pass.n;
  const index_t width = pass.walk.width, unit = pass.walk.unit();
  const index_t units = (n.channels + unit - 1) / unit;
  const index_t hot = std::max(page_bytes, slice_bytes / n.outer);
  const index_t most = std::max<index_t>(1, hot / (unit * width * pass.item)) * unit;
  parallel_for(settings, pass.bytes, [&](int part, int parts) {
    const Range mine = share(units, part, parts);
    const index_t last = std::min(mine.end * unit, n.channels);
    const Scratch scratch(3, std::min(most, n.channels) * width);
    for (index_t c = mine.begin * unit, end; c < last; c = end) {
      end = std::min(c + most, last);
      const index_t column = c * width;
      const Rows rows{n.outer, pass.walk.sums, (end - c) * width};
      pass.start(c, end);
      if (pass.reduces) {
        pass.reduce_columns(column, c, rows, pass.first + column, pass.second + column, scratch[0]);
      }
      pass.finish(c, end);
      if (pass.applies) pass.apply_columns(column, c, rows);
    }
  });
}

// Reduces chunks of planes or rows on their own, and joins what they yield in order.
template <class Pass>
void reduce_chunks(const Settings& settings, const Pass& pass) {
  const BatchNorm& n = pass.n;
  const Chunks chunks = Walk::chunks_of(n);
  const index_t sums = pass.walk.sums, inner = n.inner;
  const Scratch first(chunks.count, sums), second(chunks.count, sums);
  parallel_for(settings, pass.reduced_bytes, [&](int part, int parts) {
    if (pass.walk.kind == Walk::rows) {
      const Range mine = share(chunks.count, part, parts);
      const Scratch scratch(3, sums);
      for (index_t k = mine.begin; k < mine.end; ++k) {
        const auto [begin, end] = chunks(k, n.outer);
        pass.reduce_columns(begin * sums, 0, {end - begin, sums, sums}, first[k], second[k],
                            scratch[0]);
      }
    } else {
      const index_t channels = n.channels;
      const Range mine = share(chunks.count * channels, part, parts);
      for (index_t i = mine.begin; i < mine.end; ++i) {
        const index_t k = i / channels, c = i % channels;
        const auto [begin, end] = chunks(k, n.outer);
        pass.reduce((begin * channels + c) * inner, c, {end - begin, channels * inner, inner},
                    first[k] + c, second[k] + c);
      }
    }
  });
  parallel_for(settings, chunks.count * sums * 16, [&](int part, int parts) {
    const Range mine = share(sums, part, parts);
    std::copy(first[0] + mine.begin, first[0] + mine.end, pass.first + mine.begin);
    std::copy(second[0] + mine.begin, second[0] + mine.end, pass.second + mine.begin);
    for (index_t k = 1; k < chunks.count; ++k) {
      pass.join(mine, chunks(k, n.outer), first[k], second[k]);
    }
  });
}

// All elements from the last to the first: the last ones that were reduced are in the cache.
template <class Pass>
void apply_backwards(const Settings& settings, const Pass& pass) {
  const BatchNorm& n = pass.n;
  parallel_for(settings, pass.bytes, [&](int part, int parts) {
    if (pass.walk.kind == Walk::rows) {
      const Range mine = share(n.outer, part, parts);
      const index_t columns = pass.walk.sums;
      const index_t most = std::max<index_t>(1, backwards_bytes / (columns * pass.item));
      for (index_t end = mine.end, begin; end > mine.begin; end = begin) {
        begin = std::max(mine.begin, end - most);
        pass.apply_columns(begin * columns, 0, {end - begin, columns, columns});
      }
    } else {
      const Range mine = share(n.outer * n.channels, part, parts);
      for (index_t run = mine.end; run-- > mine.begin;) {
        pass.apply(run * n.inner, run % n.channels, {1, n.inner, n.inner});
      }
    }
  });
}

template <class Pass>
void visit_channels(const Settings& settings, const Pass& pass) {
  if (pass.walk.kind == Walk::slabs) return visit_slabs(settings, pass);
  if (pass.walk.kind == Walk::slices) return visit_slices(settings, pass);
  // For its floating-point environment.
  parallel_for(settings, 0, [&](int, int) { pass.start(0, pass.n.channels); });
  if (pass.reduces) reduce_chunks(settings, pass);
  parallel_for(settings, 0, [&](int, int) { pass.finish(0, pass.n.channels); });
  pass.coefficients.go_on();
  if (pass.applies) apply_backwards(settings, pass);
}

}  // namespace

void move_running(const Norm& kernels, const BatchNorm& n, const Running& running, index_t c,
                  index_t end) {
  if (running.mean == nullptr) return;
  const double count = double(n.outer * n.inner);
  const double factor = running.unbiased ? count / (count - 1) : 1.0;
  const Statistics s = from(n.statistics, c);
  const bool units = has_units(s, end - c);
  const Scratch of_x(2, units ? end - c : 0);
  double* const mean = units ? of_x[0] : s.mean;
  double* const variance = units ? of_x[1] : s.variance;
  for (index_t i = 0; units && i < end - c; ++i) {
    mean[i] = s.mean[i] / s.unit[i];
    variance[i] = s.variance[i] / s.unit[i] / s.unit[i];
  }
  const auto move = [&](void* average, double correction, const double* value) {
    kernels.move_average(end - c, running.momentum, correction, value,
                         at(average, c, item_size(n.dtype)));
  };
  move(running.mean, 1.0, mean);
  move(running.variance, factor, variance);
}

void batch_norm(const Settings& settings, const BatchNorm& n, const Running& running,
                const void* residual, void* y) {
  const Walk walk(n);
  visit_channels(settings, ForwardPass(settings, walk, n, running, residual, y));
}

void batch_norm_backward(const Settings& settings, const BatchNorm& norm, const void* dy,
                         const void* y, const Gradients& gradients, void* dresidual) {
  const index_t channels = norm.channels, rows = norm.outer * channels;
  in_units(settings, norm, channels, rows, norm.inner, gradients.dx, [&](const BatchNorm& n) {
    const Walk walk(n);
    visit_channels(settings, BackwardPass(settings, walk, n, dy, y, gradients, dresidual));
  });
}

}  // namespace fastopt
