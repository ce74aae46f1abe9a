#include "norm.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "memory.h"

namespace fastopt {
namespace {

// Measured on Zen 4 with 1 MiB of L2 per core. What decides about partial sums is fixed by the
// shape, so the bits are the same on every machine.
constexpr index_t slab_bytes = 5 << 18;                 // a channel this large stays in the cache
constexpr index_t slice_bytes = 1 << 18;                // of columns that are visited twice
constexpr index_t page_bytes = 4096;                    // shorter parts of rows disturb prefetching
constexpr index_t few_rows = 256, few_wide_rows = 512;  // below that, slices are faster
constexpr index_t chunk_rows = 128;                     // that have sums of their own
constexpr index_t unit_bytes = 256;                     // of a row, for each thread
constexpr index_t stream_from_bytes = 16 << 20;         // outputs that no cache will hold
constexpr index_t most_chunks = 64;
constexpr index_t backwards_bytes = 1 << 20;  // shorter pieces disturb the hardware's prefetching
constexpr index_t hot_bytes = 1 << 16;        // of rows or groups that are visited twice
constexpr index_t few_long_rows = 64, long_row = 8192;  // so few need no sums in double
constexpr index_t long_row_piece = 1 << 15, long_row_slice = 1 << 11;  // of which threads take some

index_t size_of(Dtype dtype) {
  return dtype == Dtype::float32 ? 4 : 8;
}

struct Range {
  index_t begin, end;
};

Range share(index_t n, int part, int parts) {
  return {n / parts * part + std::min<index_t>(n % parts, part),
          n / parts * (part + 1) + std::min<index_t>(n % parts, part + 1)};
}

const void* at(const void* data, index_t index, index_t item) {
  return data == nullptr ? nullptr : static_cast<const char*>(data) + index * item;
}
void* at(void* data, index_t index, index_t item) {
  return data == nullptr ? nullptr : static_cast<char*>(data) + index * item;
}

// Arrays of n numbers, not initialised.
class Scratch {
 public:
  Scratch(index_t arrays, index_t n)
      : n_(n), bytes_(size_t(arrays * n) * sizeof(double)), data_(take(bytes_)) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { give(data_, bytes_); }

  double* operator[](index_t array) const { return static_cast<double*>(data_) + array * n_; }

 private:
  index_t n_;
  size_t bytes_;
  void* data_;
};

// The statistics' elements in equal chunks that are summed on their own and merged in order.
struct Chunks {
  index_t size, count;

  Chunks(index_t n, index_t smallest, index_t unit, index_t most = most_chunks)
      : size(std::max(smallest, ((n + most - 1) / most + unit - 1) / unit * unit)),
        count((n + size - 1) / size) {}

  Range operator()(index_t chunk, index_t n) const {
    return {chunk * size, std::min(n, (chunk + 1) * size)};
  }
};

bool streams(index_t bytes) {
  return bytes >= stream_from_bytes;
}

// Each of n numbers so many times.
template <class T>
void repeat(const void* from, index_t n, index_t times, void* to) {
  T* next = static_cast<T*>(to);
  for (index_t i = 0; i < n; ++i, next += times) {
    std::fill_n(next, times, static_cast<const T*>(from)[i]);
  }
}
void repeat(const void* from, index_t n, index_t times, index_t item, void* to) {
  item == 4 ? repeat<float>(from, n, times, to) : repeat<double>(from, n, times, to);
}

// How batch normalization walks through [outer, channels, inner].
struct Walk {
  enum Kind {
    slabs,   // runs, a channel at a time: all passes while it is hot
    slices,  // few rows of columns, likewise, a few channels at a time
    planes,  // runs, every pass over everything, in memory order
    rows,    // columns, likewise
  } kind;
  index_t item, bytes;
  index_t width;    // columns of a channel: short runs are walked as columns
  index_t columns;  // of all channels; or the channels, where they are runs
  Chunks chunks;    // of outer, for planes and rows
  index_t unit;     // channels, of slices: a thread takes whole units
  index_t slice;    // channels at a time

  explicit Walk(const BatchNorm& n)
      : kind(slabs),
        item(size_of(n.dtype)),
        bytes(n.outer * n.channels * n.inner * item),
        width(n.inner > few_columns ? 1 : std::max<index_t>(1, n.inner)),
        columns(n.channels * width),
        chunks(n.inner > few_columns ? Chunks(n.outer, std::max<index_t>(1, (1 << 16) / n.inner), 1)
                                     : Chunks(n.outer, chunk_rows, 64)),
        unit(std::max<index_t>(1, unit_bytes / (width * item))),
        slice(1) {
    if (n.inner > few_columns) {
      const bool hot = n.outer * n.inner * item <= slab_bytes && n.channels > 4;
      kind = hot || chunks.count == 1 ? slabs : planes;
    } else if (n.outer < (columns * item < 2 * page_bytes ? few_rows : few_wide_rows)) {
      kind = slices;
      const index_t hot = std::max(page_bytes, slice_bytes / n.outer);
      slice = std::max<index_t>(1, hot / (unit * width * item)) * unit;
    } else {
      kind = rows;
    }
  }

  // Parts of rows can be streamed only if each begins on a cache line.
  bool stream(const void* out) const {
    const bool on_lines = columns * item % 64 == 0 && unit * width * item % 64 == 0 &&
                          reinterpret_cast<__UINTPTR_TYPE__>(out) % 64 == 0;
    return streams(bytes) && (kind != slices || on_lines);
  }
};

// Arrays of coefficients of all channels, in x's dtype, and of all columns. Past the last column
// they go on with the first, for the length of a vector: streamed rows are read as one run.
class Coefficients {
 public:
  Coefficients(index_t arrays, const BatchNorm& n, const Walk& walk)
      : of_channels_(arrays, n.channels + vector_of_doubles),
        of_columns_(walk.width > 1 ? arrays : 0, walk.columns + vector_of_doubles),
        arrays_(arrays),
        item_(walk.item),
        width_(walk.width),
        bytes_(walk.columns * walk.item) {}

  void* operator()(index_t array, index_t c = 0) const { return at(of_channels_[array], c, item_); }

  void* of_columns(index_t array, index_t c = 0) const {
    return width_ == 1 ? (*this)(array, c) : at(of_columns_[array], c * width_, item_);
  }

  // center, scale and shift, the first three, from the statistics of the channels c to end.
  void set_forward(const Norm& kernels, const BatchNorm& n, index_t c, index_t end) const {
    kernels.forward_coefficients(end - c, n.eps, n.mean + c, n.variance + c, at(n.gamma, c, item_),
                                 at(n.beta, c, item_), (*this)(0, c), (*this)(1, c), (*this)(2, c));
    spread(0, 3, c, end);
  }

  // From the channels c to end to their columns.
  void spread(index_t first, index_t last, index_t c, index_t end) const {
    if (width_ == 1) return;
    for (index_t array = first; array < last; ++array) {
      repeat((*this)(array, c), end - c, width_, item_, of_columns(array, c));
    }
  }

  void go_on() const {
    for (index_t array = 0; array < arrays_; ++array) {
      char* const first = static_cast<char*>(of_columns(array));
      for (index_t byte = 0; byte < vector_of_doubles * 8; ++byte) {
        first[bytes_ + byte] = first[byte];
      }
    }
  }

 private:
  static constexpr index_t vector_of_doubles = 8;

  Scratch of_channels_, of_columns_;
  index_t arrays_, item_, width_, bytes_;
};

// What the walk calls for a range of channels: `start`, then `reduce` to two numbers a channel or a
// column, `finish`, and `apply` to every element. Elements and channels are given by their index.
struct ForwardPass {
  const BatchNorm& n;
  const Norm& kernels;
  const Running& running;
  const Walk& walk;
  const index_t item = walk.item;
  bool reduces, applies;
  index_t reduced_bytes, bytes;  // memory traffic
  Scratch of_columns;
  double *first, *second;  // mean and sum of squared deviations
  Coefficients coefficients;
  Forward forward;

  ForwardPass(const Settings& settings, const BatchNorm& norm, const Walk& walked,
              const Running& run, const void* residual, void* y)
      : n(norm),
        kernels(settings.table->norm[size_t(n.dtype)]),
        running(run),
        walk(walked),
        reduces(n.training),
        applies(y != nullptr),
        reduced_bytes(walk.bytes),
        bytes(walk.bytes * (2 + (residual != nullptr))),
        of_columns(walk.width > 1 ? 2 : 0, walk.columns),
        first(walk.width > 1 ? of_columns[0] : n.mean),
        second(walk.width > 1 ? of_columns[1] : n.variance),
        coefficients(3, n, walk),
        forward{n.x,
                residual,
                y,
                coefficients.of_columns(0),
                coefficients.of_columns(1),
                coefficients.of_columns(2),
                n.relu,
                walk.stream(y)} {}

  void start(index_t, index_t) const {}

  void reduce(index_t element, index_t, Runs runs, double* mean, double* m2) const {
    kernels.moments(at(n.x, element, item), runs, 1, 0, true, mean, m2);
  }

  void reduce_columns(index_t element, index_t, index_t rows, index_t columns, double* mean,
                      double* m2, double* scratch) const {
    kernels.column_moments(at(n.x, element, item), rows, walk.columns, columns, mean, m2, scratch);
  }

  // What more rows say about the columns is joined to what is known of those before them.
  void join(index_t column, index_t end, index_t known, index_t rows, const double* mean,
            const double* m2) const {
    const index_t inner = n.inner / walk.width;
    kernels.merge(double(known * inner), first + column, second + column, double(rows * inner),
                  mean + column, m2 + column, end - column);
  }

  // From the statistics of a channel's columns to its own.
  void join_columns(index_t c) const {
    const double *const mean = first + c * walk.width, *const m2 = second + c * walk.width;
    double mean_sum = 0, deviations = 0;
    for (index_t k = 0; k < walk.width; ++k) mean_sum += mean[k];
    n.mean[c] = mean_sum / double(walk.width);
    for (index_t k = 0; k < walk.width; ++k) {
      const double d = mean[k] - n.mean[c];
      deviations += m2[k] + double(n.outer) * (d * d);
    }
    n.variance[c] = deviations;
  }

  // From the sums of squared deviations to everything that depends on the channel alone.
  void finish(index_t c, index_t end) const {
    const index_t width = end - c;
    if (n.training) {
      for (index_t i = c; walk.width > 1 && i < end; ++i) join_columns(i);
      const double count = double(n.outer * n.inner);
      for (index_t i = c; i < end; ++i) n.variance[i] /= count;
      const double factor = running.unbiased ? count / (count - 1) : 1.0;
      const auto move = [&](void* average, double correction, const double* value) {
        if (average == nullptr) return;
        kernels.move_average(width, running.momentum, correction, value + c, at(average, c, item));
      };
      move(running.mean, 1.0, n.mean);
      move(running.variance, factor, n.variance);
    }
    coefficients.set_forward(kernels, n, c, end);
  }

  void apply(index_t element, index_t c, Runs runs) const {
    kernels.apply(shifted(element, c), runs, 0);
  }

  void apply_columns(index_t element, index_t c, index_t rows, index_t columns) const {
    kernels.column_apply(shifted(element, c), rows, walk.columns, columns);
  }

  Forward shifted(index_t element, index_t c) const {
    Forward f = forward;
    for (const void** array : {&f.x, &f.residual}) *array = at(*array, element, item);
    f.y = at(f.y, element, item);
    for (const void** array : {&f.center, &f.scale, &f.shift}) {
      *array = at(*array, c * walk.width, item);
    }
    return f;
  }
};

struct BackwardPass {
  const BatchNorm& n;
  const Norm& kernels;
  void *dgamma, *dbeta;
  const Walk& walk;
  const index_t item = walk.item;
  bool reduces = true, applies = true;
  index_t reduced_bytes, bytes;
  Scratch of_channels, of_columns;
  double *first, *second;  // sums of dy and dy (x - center)
  Coefficients coefficients;
  Backward backward;

  BackwardPass(const Settings& settings, const BatchNorm& norm, const Walk& walked, const void* dy,
               const void* y, void* dx, void* dresidual, void* gamma_gradient, void* beta_gradient)
      : n(norm),
        kernels(settings.table->norm[size_t(n.dtype)]),
        dgamma(gamma_gradient),
        dbeta(beta_gradient),
        walk(walked),
        reduced_bytes(walk.bytes * 2),
        bytes(walk.bytes * (3 + (y != nullptr) + (dresidual != nullptr))),
        of_channels(2, n.channels),
        of_columns(walk.width > 1 ? 2 : 0, walk.columns),
        first(walk.width > 1 ? of_columns[0] : of_channels[0]),
        second(walk.width > 1 ? of_columns[1] : of_channels[1]),
        coefficients(6, n, walk),
        backward{dy,
                 n.x,
                 y,
                 dx,
                 dresidual,
                 coefficients.of_columns(0),
                 coefficients.of_columns(1),
                 coefficients.of_columns(2),
                 coefficients.of_columns(3),
                 coefficients.of_columns(4),
                 coefficients.of_columns(5),
                 n.relu,
                 walk.stream(dx)} {}

  void start(index_t c, index_t end) const { coefficients.set_forward(kernels, n, c, end); }

  void reduce(index_t element, index_t c, Runs runs, double* sum, double* product) const {
    kernels.gradient_sums(shifted(element, c), runs, 1, 0, sum, product);
  }

  void reduce_columns(index_t element, index_t c, index_t rows, index_t columns, double* sum,
                      double* product, double* scratch) const {
    kernels.column_gradient_sums(shifted(element, c), rows, walk.columns, columns, sum, product,
                                 scratch);
  }

  void join(index_t column, index_t end, index_t, index_t, const double* sum,
            const double* product) const {
    kernels.add_sums(end - column, sum + column, first + column);
    kernels.add_sums(end - column, product + column, second + column);
  }

  void join_columns(index_t c) const {
    for (const auto& [from, to] : {std::pair{first, of_channels[0]}, {second, of_channels[1]}}) {
      to[c] = std::accumulate(from + c * walk.width, from + (c + 1) * walk.width, 0.0);
    }
  }

  void finish(index_t c, index_t end) const {
    for (index_t i = c; walk.width > 1 && i < end; ++i) join_columns(i);
    double *const sums = of_channels[0] + c, *const products = of_channels[1] + c;
    const double count =
        n.training ? double(n.outer * n.inner) : std::numeric_limits<double>::infinity();
    kernels.backward_coefficients(end - c, n.eps, count, n.mean + c, n.variance + c,
                                  at(n.gamma, c, item), sums, products, coefficients(0, c),
                                  coefficients(3, c), coefficients(4, c), coefficients(5, c));
    coefficients.spread(3, 6, c, end);
    kernels.round_sums(end - c, products, at(dgamma, c, item));
    kernels.round_sums(end - c, sums, at(dbeta, c, item));
  }

  void apply(index_t element, index_t c, Runs runs) const {
    kernels.gradient_apply(shifted(element, c), runs, 0);
  }

  void apply_columns(index_t element, index_t c, index_t rows, index_t columns) const {
    kernels.column_gradient_apply(shifted(element, c), rows, walk.columns, columns);
  }

  Backward shifted(index_t element, index_t c) const {
    Backward b = backward;
    for (const void** array : {&b.dy, &b.x, &b.y}) *array = at(*array, element, item);
    for (void** array : {&b.dx, &b.dresidual}) *array = at(*array, element, item);
    for (const void** array : {&b.center, &b.scale, &b.shift, &b.on_dy, &b.on_x, &b.constant}) {
      *array = at(*array, c * walk.width, item);
    }
    return b;
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
void visit_slices(const Settings& settings, const Walk& walk, const Pass& pass) {
  const BatchNorm& n = pass.n;
  const index_t units = (n.channels + walk.unit - 1) / walk.unit, width = walk.width;
  parallel_for(settings, pass.bytes, [&](int part, int parts) {
    const Range mine = share(units, part, parts);
    const index_t last = std::min(mine.end * walk.unit, n.channels);
    const Scratch scratch(3, std::min(walk.slice, n.channels) * width);
    for (index_t c = mine.begin * walk.unit, end; c < last; c = end) {
      end = std::min(c + walk.slice, last);
      const index_t column = c * width, columns = (end - c) * width;
      pass.start(c, end);
      if (pass.reduces) {
        pass.reduce_columns(column, c, n.outer, columns, pass.first + column, pass.second + column,
                            scratch[0]);
      }
      pass.finish(c, end);
      if (pass.applies) pass.apply_columns(column, c, n.outer, columns);
    }
  });
}

// Reduces chunks of planes or rows on their own, and joins what they yield in order.
template <class Pass>
void reduce_chunks(const Settings& settings, const Walk& walk, const Pass& pass) {
  const BatchNorm& n = pass.n;
  const Chunks& chunks = walk.chunks;
  const index_t columns = walk.columns, inner = n.inner;
  const Scratch first(chunks.count, columns), second(chunks.count, columns);
  parallel_for(settings, pass.reduced_bytes, [&](int part, int parts) {
    if (walk.kind == Walk::rows) {
      const Range mine = share(chunks.count, part, parts);
      const Scratch scratch(3, columns);
      for (index_t k = mine.begin; k < mine.end; ++k) {
        const Range rows = chunks(k, n.outer);
        pass.reduce_columns(rows.begin * columns, 0, rows.end - rows.begin, columns, first[k],
                            second[k], scratch[0]);
      }
    } else {
      const index_t channels = n.channels;
      const Range mine = share(chunks.count * channels, part, parts);
      for (index_t i = mine.begin; i < mine.end; ++i) {
        const index_t k = i / channels, c = i % channels;
        const Range planes = chunks(k, n.outer);
        pass.reduce((planes.begin * channels + c) * inner, c,
                    {planes.end - planes.begin, channels * inner, inner}, first[k] + c,
                    second[k] + c);
      }
    }
  });
  parallel_for(settings, chunks.count * columns * 16, [&](int part, int parts) {
    const Range mine = share(columns, part, parts);
    std::copy(first[0] + mine.begin, first[0] + mine.end, pass.first + mine.begin);
    std::copy(second[0] + mine.begin, second[0] + mine.end, pass.second + mine.begin);
    for (index_t k = 1; k < chunks.count; ++k) {
      const Range rows = chunks(k, n.outer);
      pass.join(mine.begin, mine.end, rows.begin, rows.end - rows.begin, first[k], second[k]);
    }
  });
}

// All elements from the last to the first: the last ones that were reduced are in the cache.
template <class Pass>
void apply_backwards(const Settings& settings, const Walk& walk, const Pass& pass) {
  const BatchNorm& n = pass.n;
  parallel_for(settings, pass.bytes, [&](int part, int parts) {
    if (walk.kind == Walk::rows) {
      const Range mine = share(n.outer, part, parts);
      const index_t columns = walk.columns;
      const index_t most = std::max<index_t>(1, backwards_bytes / (columns * walk.item));
      for (index_t end = mine.end, begin; end > mine.begin; end = begin) {
        begin = std::max(mine.begin, end - most);
        pass.apply_columns(begin * columns, 0, end - begin, columns);
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
void visit_channels(const Settings& settings, const Walk& walk, const Pass& pass) {
  if (walk.kind == Walk::slabs) return visit_slabs(settings, pass);
  if (walk.kind == Walk::slices) return visit_slices(settings, walk, pass);
  // For its floating-point environment.
  parallel_for(settings, 0, [&](int, int) { pass.start(0, pass.n.channels); });
  if (pass.reduces) reduce_chunks(settings, walk, pass);
  parallel_for(settings, 0, [&](int, int) { pass.finish(0, pass.n.channels); });
  pass.coefficients.go_on();
  if (pass.applies) apply_backwards(settings, walk, pass);
}

// Calls visit(begin, end) for the groups of a part of all samples, as many of one sample at a time
// as stay in the second cache.
template <class Visit>
void visit_groups(const GroupNorm& n, index_t group_bytes, int part, int parts, Visit visit) {
  const Range mine = share(n.samples * n.groups, part, parts);
  const index_t most = std::max<index_t>(1, hot_bytes / std::max<index_t>(1, group_bytes));
  for (index_t g = mine.begin, end; g < mine.end; g = end) {
    end = std::min({g + most, (g / n.groups + 1) * n.groups, mine.end});
    visit(g, end);
  }
}

// Rows that stay in the second cache; at most 64, of which it is a divisor.
index_t hot_rows(index_t row_bytes) {
  index_t rows = 64;
  while (rows > 1 && rows * row_bytes > hot_bytes) rows /= 2;
  return rows;
}

Backward backward_of(const void* dy, const void* x, void* dx, const Scratch& coefficients,
                     bool stream) {
  return {dy,
          x,
          nullptr,
          dx,
          nullptr,
          coefficients[0],
          coefficients[1],
          coefficients[2],
          coefficients[3],
          coefficients[4],
          coefficients[5],
          false,
          stream};
}

// Every row's dx, and dgamma and dbeta, each of `run` neighbours in a sample.
void row_gradients(const Settings& settings, const LayerNorm& n, index_t run, const void* dy,
                   void* dx, void* dgamma, void* dbeta) {
  const Norm& kernels = settings.table->norm[size_t(n.dtype)];
  const index_t item = size_of(n.dtype), columns = n.columns, parameters = n.groups * columns;
  const index_t samples = n.rows / n.groups, bytes = n.rows * columns * item;
  // Rows at a time: samples, where they are one row, else of a sample.
  const index_t most = hot_rows(2 * columns * item), apart = n.groups > 1 ? columns : 0;
  const index_t most_samples = n.groups > 1 ? 1 : most;
  // The groups whose sums in T stay in the cache while the samples pass by.
  const index_t most_groups = std::max<index_t>(1, slice_bytes / (3 * columns * item));
  // Chunks of few samples have more sums than are worth their memory.
  const Chunks chunks(samples, std::clamp<index_t>(samples / 8, 16, 64), 16,
                      std::max<index_t>(1, most_chunks / n.groups));
  const Scratch gammas(chunks.count, parameters), betas(chunks.count, parameters);
  parallel_for(settings, 3 * bytes, [&](int part, int parts) {
    const Range mine = share(chunks.count * n.groups, part, parts);
    const index_t widest = std::min(most_groups, n.groups) * columns;
    const Scratch floats(2, widest), coefficients(6, most), totals(2, most);
    std::fill_n(floats[0], 2 * widest, 0.0);
    for (index_t i = mine.begin, next; i < mine.end; i = next) {
      const index_t k = i / n.groups, group = i % n.groups;
      const index_t last = std::min({group + most_groups, n.groups, group + mine.end - i});
      next = i + last - group;
      const index_t width = (last - group) * columns, offset = group * columns;
      std::fill_n(gammas[k] + offset, width, 0.0);
      std::fill_n(betas[k] + offset, width, 0.0);
      const Range chunk = chunks(k, samples);
      for (index_t s = chunk.begin, end; s < chunk.end; s = end) {
        end = std::min(s + most_samples, chunk.end);
        for (index_t g = group, g_end; g < last; g = g_end) {
          g_end = std::min(g + (n.groups > 1 ? most : 1), last);
          const index_t r = s * n.groups + g, rows = (end - s) * (g_end - g), first = r * columns;
          const void* const gamma = at(n.gamma, g * columns, item);
          kernels.forward_coefficients(rows, n.eps, n.mean + r, n.variance + r, nullptr, nullptr,
                                       coefficients[0], coefficients[1], coefficients[2]);
          const Backward b = backward_of(at(dy, first, item), at(n.x, first, item),
                                         at(dx, first, item), coefficients, streams(bytes));
          kernels.row_gradient_sums(b, gamma, apart, rows, columns, totals[0], totals[1]);
          if (!n.centered) std::fill_n(totals[0], rows, 0.0);
          kernels.backward_coefficients(rows, n.eps, double(columns), n.mean + r, n.variance + r,
                                        nullptr, totals[0], totals[1], coefficients[0],
                                        coefficients[3], coefficients[4], coefficients[5]);
          const index_t in_sums = (g - group) * columns;
          kernels.row_gradient_apply(b, gamma, apart, rows, columns, columns,
                                     at(floats[0], in_sums, item), at(floats[1], in_sums, item));
        }
        if ((end - chunk.begin) % 64 == 0 || end == chunk.end) {
          kernels.flush_sums(floats[0], width, gammas[k] + offset);
          kernels.flush_sums(floats[1], width, betas[k] + offset);
        }
      }
    }
  });
  parallel_for(settings, 16 * chunks.count * parameters, [&](int part, int parts) {
    const Range mine = share(parameters / run, part, parts);
    const index_t count = mine.end - mine.begin, first = mine.begin * run;
    const Scratch joined(1, count);
    const auto finish = [&](const Scratch& sums, void* gradient) {
      for (index_t k = 1; k < chunks.count; ++k) {
        kernels.add_sums(count * run, sums[k] + first, sums[0] + first);
      }
      for (index_t i = 0; i < count; ++i) {
        const double* const from = sums[0] + first + i * run;
        joined[0][i] = std::accumulate(from, from + run, 0.0);
      }
      kernels.round_sums(count, joined[0], at(gradient, mine.begin, item));
    };
    finish(gammas, dgamma);
    finish(betas, dbeta);
  });
}

// The same of few long rows, whose elements the threads share: the sums of all rows, then dx, and
// dgamma and dbeta of the columns that a thread has.
void long_row_gradients(const Settings& settings, const LayerNorm& n, const void* dy, void* dx,
                        void* dgamma, void* dbeta) {
  const Norm& kernels = settings.table->norm[size_t(n.dtype)];
  const index_t item = size_of(n.dtype), bytes = n.rows * n.columns * item;
  const Chunks pieces(n.columns, long_row_piece, 64);
  const Chunks slices(n.columns, long_row_slice, 64, n.columns);
  const Scratch coefficients(6, n.rows);
  const Scratch sums(pieces.count, n.rows), products(pieces.count, n.rows);
  const auto from = [&](index_t element) {
    return backward_of(at(dy, element, item), at(n.x, element, item), at(dx, element, item),
                       coefficients, streams(bytes));
  };
  // For its floating-point environment.
  parallel_for(settings, 0, [&](int, int) {
    kernels.forward_coefficients(n.rows, n.eps, n.mean, n.variance, nullptr, nullptr,
                                 coefficients[0], coefficients[1], coefficients[2]);
  });
  parallel_for(settings, 2 * bytes, [&](int part, int parts) {
    const Range mine = share(n.rows * pieces.count, part, parts);
    for (index_t i = mine.begin; i < mine.end; ++i) {
      const index_t row = i / pieces.count, k = i % pieces.count;
      const Range piece = pieces(k, n.columns);
      Backward b = from(row * n.columns + piece.begin);
      b.center = at(b.center, row, item);
      kernels.row_gradient_sums(b, at(n.gamma, piece.begin, item), 0, 1, piece.end - piece.begin,
                                sums[k] + row, products[k] + row);
    }
  });
  parallel_for(settings, 0, [&](int, int) {
    for (index_t k = 1; k < pieces.count; ++k) {
      kernels.add_sums(n.rows, sums[k], sums[0]);
      kernels.add_sums(n.rows, products[k], products[0]);
    }
    if (!n.centered) std::fill_n(sums[0], n.rows, 0.0);
    kernels.backward_coefficients(n.rows, n.eps, double(n.columns), n.mean, n.variance, nullptr,
                                  sums[0], products[0], coefficients[0], coefficients[3],
                                  coefficients[4], coefficients[5]);
  });
  parallel_for(settings, 3 * bytes, [&](int part, int parts) {
    const Range mine = share(slices.count, part, parts);
    for (index_t i = mine.begin; i < mine.end; ++i) {
      const Range slice = slices(i, n.columns);
      const index_t c = slice.begin, width = slice.end - c;
      for (void* gradient : {dgamma, dbeta}) {
        std::fill_n(static_cast<char*>(at(gradient, c, item)), width * item, char(0));
      }
      kernels.row_gradient_apply(from(c), at(n.gamma, c, item), 0, n.rows, n.columns, width,
                                 at(dgamma, c, item), at(dbeta, c, item));
    }
  });
}

// Of several channels: a single short run is a row with one gamma.
bool short_runs(const GroupNorm& n) {
  return n.inner <= few_columns && n.channels > 1;
}

// Groups of short runs as rows, with gamma and beta of every element.
class GroupsAsRows {
 public:
  explicit GroupsAsRows(const GroupNorm& n)
      : parameters_(2, n.groups * n.channels * n.inner), rows_{n, {}, {}, n.groups, true} {
    rows_.rows = n.samples * n.groups;
    rows_.columns = n.channels * n.inner;
    const void** const given[] = {&rows_.gamma, &rows_.beta};
    for (index_t i = 0; i < 2; ++i) {
      if (*given[i] == nullptr) continue;
      repeat(*given[i], n.groups * n.channels, n.inner, size_of(n.dtype), parameters_[i]);
      *given[i] = parameters_[i];
    }
  }

  const LayerNorm& operator*() const { return rows_; }

 private:
  Scratch parameters_;
  LayerNorm rows_;
};

}  // namespace

void batch_norm(const Settings& settings, const BatchNorm& n, const Running& running,
                const void* residual, void* y) {
  const Walk walk(n);
  visit_channels(settings, walk, ForwardPass(settings, n, walk, running, residual, y));
}

void batch_norm_backward(const Settings& settings, const BatchNorm& n, const void* dy,
                         const void* y, void* dx, void* dresidual, void* dgamma, void* dbeta) {
  const Walk walk(n);
  visit_channels(settings, walk,
                 BackwardPass(settings, n, walk, dy, y, dx, dresidual, dgamma, dbeta));
}

void group_norm(const Settings& settings, const GroupNorm& n, void* y) {
  if (short_runs(n)) return layer_norm(settings, *GroupsAsRows(n), y);
  const Norm& kernels = settings.table->norm[size_t(n.dtype)];
  const index_t item = size_of(n.dtype), run = n.inner, group = n.channels * n.inner;
  const index_t bytes = n.samples * n.groups * group * item;
  parallel_for(settings, 2 * bytes, [&](int part, int parts) {
    const Scratch coefficients(5, n.groups * n.channels);
    visit_groups(n, group * item, part, parts, [&](index_t g, index_t end) {
      const index_t c = g % n.groups * n.channels, channels = (end - g) * n.channels;
      kernels.moments(at(n.x, g * group, item), {1, group, group}, end - g, group, true, n.mean + g,
                      n.variance + g);
      for (index_t i = g; i < end; ++i) {
        n.variance[i] /= double(group);
        std::fill_n(coefficients[3] + (i - g) * n.channels, n.channels, n.mean[i]);
        std::fill_n(coefficients[4] + (i - g) * n.channels, n.channels, n.variance[i]);
      }
      kernels.forward_coefficients(channels, n.eps, coefficients[3], coefficients[4],
                                   at(n.gamma, c, item), at(n.beta, c, item), coefficients[0],
                                   coefficients[1], coefficients[2]);
      kernels.apply({at(n.x, g * group, item), nullptr, at(y, g * group, item), coefficients[0],
                     coefficients[1], coefficients[2], false, streams(bytes)},
                    {channels, run, run}, 1);
    });
  });
}

void group_norm_backward(const Settings& settings, const GroupNorm& n, const void* dy, void* dx,
                         void* dgamma, void* dbeta) {
  const Norm& kernels = settings.table->norm[size_t(n.dtype)];
  const index_t item = size_of(n.dtype), run = n.inner, group = n.channels * n.inner;
  const index_t bytes = n.samples * n.groups * group * item, channels = n.groups * n.channels;
  if (short_runs(n)) {
    return row_gradients(settings, *GroupsAsRows(n), n.inner, dy, dx, dgamma, dbeta);
  }
  const Scratch sums(n.samples, channels), products(n.samples, channels);
  parallel_for(settings, 3 * bytes, [&](int part, int parts) {
    const Scratch coefficients(6, channels), of_groups(3, n.groups);
    visit_groups(n, group * item, part, parts, [&](index_t g, index_t end) {
      const index_t c = g % n.groups * n.channels, count = (end - g) * n.channels;
      double* const sum = sums[g / n.groups] + c;
      double* const product = products[g / n.groups] + c;
      kernels.forward_coefficients(end - g, n.eps, n.mean + g, n.variance + g, nullptr, nullptr,
                                   of_groups[0], of_groups[1], of_groups[2]);
      repeat(of_groups[0], end - g, n.channels, item, coefficients[0]);
      const index_t first = g * group;
      const Backward b = backward_of(at(dy, first, item), at(n.x, first, item), at(dx, first, item),
                                     coefficients, streams(bytes));
      if (run <= few_columns) {
        kernels.row_gradient_sums(b, nullptr, 0, count, run, sum, product);
      } else {
        kernels.gradient_sums(b, {1, run, run}, count, run, sum, product);
      }
      if (n.channels == 1) {  // many at a time, not one by one
        kernels.backward_coefficients(count, n.eps, double(group), n.mean + g, n.variance + g,
                                      at(n.gamma, c, item), sum, product, coefficients[0],
                                      coefficients[3], coefficients[4], coefficients[5]);
      } else {
        kernels.group_coefficients(end - g, n.channels, n.eps, double(group), n.mean + g,
                                   n.variance + g, at(n.gamma, c, item), sum, product,
                                   coefficients[0], coefficients[3], coefficients[4],
                                   coefficients[5]);
      }
      kernels.gradient_apply(b, {count, run, run}, 1);
    });
  });
  parallel_for(settings, 16 * n.samples * channels, [&](int part, int parts) {
    const Range mine = share(channels, part, parts);
    const index_t c = mine.begin, width = mine.end - mine.begin;
    for (index_t sample = 1; sample < n.samples; ++sample) {
      kernels.add_sums(width, sums[sample] + c, sums[0] + c);
      kernels.add_sums(width, products[sample] + c, products[0] + c);
    }
    kernels.round_sums(width, products[0] + c, at(dgamma, c, item));
    kernels.round_sums(width, sums[0] + c, at(dbeta, c, item));
  });
}

void layer_norm(const Settings& settings, const LayerNorm& n, void* y) {
  const Norm& kernels = settings.table->norm[size_t(n.dtype)];
  const index_t item = size_of(n.dtype), bytes = n.rows * n.columns * item;
  const index_t columns = n.columns, most = hot_rows(columns * item);
  const index_t apart = n.groups > 1 ? columns : 0;
  parallel_for(settings, 2 * bytes, [&](int part, int parts) {
    const Range mine = share(n.rows, part, parts);
    double center[64], scale[64], shift[64];
    for (index_t r = mine.begin, end; r < mine.end; r = end) {
      const index_t group = r % n.groups, offset = group * columns;
      end = std::min(r + most, mine.end);
      if (n.groups > 1) end = std::min(end, r - group + n.groups);
      const index_t rows = end - r;
      const void* const x = at(n.x, r * columns, item);
      kernels.moments(x, {1, columns, columns}, rows, columns, n.centered, n.mean + r,
                      n.variance + r);
      for (index_t i = r; i < end; ++i) n.variance[i] /= double(columns);
      kernels.forward_coefficients(rows, n.eps, n.mean + r, n.variance + r, nullptr, nullptr,
                                   center, scale, shift);
      kernels.row_apply(
          {x, nullptr, at(y, r * columns, item), center, scale, shift, false, streams(bytes)},
          at(n.gamma, offset, item), at(n.beta, offset, item), apart, rows, columns);
    }
  });
}

void layer_norm_backward(const Settings& settings, const LayerNorm& n, const void* dy, void* dx,
                         void* dgamma, void* dbeta) {
  if (n.rows < few_long_rows && n.columns >= long_row) {
    return long_row_gradients(settings, n, dy, dx, dgamma, dbeta);
  }
  row_gradients(settings, n, 1, dy, dx, dgamma, dbeta);
}

}  // namespace fastopt
