#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "norm_parts.h"

namespace fastopt {
namespace {

constexpr index_t slab_bytes = 5 << 18;                 // a channel this large stays in the cache
constexpr index_t page_bytes = 4096;                    // shorter parts of rows disturb prefetching
constexpr index_t few_rows = 256, few_wide_rows = 512;  // below that, slices are faster
constexpr index_t chunk_rows = 128;                     // that have sums of their own
constexpr index_t unit_bytes = 256;                     // of a row, for each thread
constexpr index_t backwards_bytes = 1 << 20;  // shorter pieces disturb the hardware's prefetching

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
        item(item_size(n.dtype)),
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
    kernels.forward_coefficients(end - c, from(n.statistics, c), at(n.gamma, c, item_),
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

// The running statistics of the channels c to end, where there are such.
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
        first(walk.width > 1 ? of_columns[0] : n.statistics.mean),
        second(walk.width > 1 ? of_columns[1] : n.statistics.variance),
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
    n.statistics.mean[c] = mean_sum / double(walk.width);
    for (index_t k = 0; k < walk.width; ++k) {
      const double d = mean[k] - n.statistics.mean[c];
      deviations += m2[k] + double(n.outer) * (d * d);
    }
    n.statistics.variance[c] = deviations;
  }

  // From the sums of squared deviations to everything that depends on the channel alone.
  void finish(index_t c, index_t end) const {
    if (n.training) {
      for (index_t i = c; walk.width > 1 && i < end; ++i) join_columns(i);
      const double count = double(n.outer * n.inner);
      for (index_t i = c; i < end; ++i) n.statistics.variance[i] /= count;
    }
    kernels.choose_units(n.training ? at(n.x, c * n.inner, item) : nullptr,
                         {n.outer, n.channels * n.inner, n.inner}, end - c, n.inner, true,
                         from(n.statistics, c));
    if (n.training) move_running(kernels, n, running, c, end);
    coefficients.set_forward(kernels, n, c, end);
  }

  void apply(index_t element, index_t c, Runs runs) const {
    if (n.statistics.unit[c] == 1) return kernels.apply(shifted(element, c), runs, 0);
    const Scratch copy(1, runs.inner);
    for (index_t run = 0; run < runs.count; ++run) {
      Forward f = shifted(element + run * runs.stride, c);
      multiply_by_units(kernels, n.statistics.unit + c, f.x, 1, runs.inner, copy[0]);
      f.x = copy[0];
      kernels.apply(f, {1, runs.inner, runs.inner}, 0);
    }
  }

  void apply_columns(index_t element, index_t c, index_t rows, index_t columns) const {
    const index_t stride = walk.columns, channels = columns / walk.width;
    if (!has_units(from(n.statistics, c), channels)) {
      return kernels.column_apply(shifted(element, c), rows, stride, columns);
    }
    const Scratch copy(1, columns);
    for (index_t row = 0; row < rows; ++row) {
      Forward f = shifted(element + row * stride, c);
      multiply_by_units(kernels, n.statistics.unit + c, f.x, channels, walk.width, copy[0]);
      f.x = copy[0];
      kernels.column_apply(f, 1, stride, columns);
    }
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
    kernels.backward_coefficients(end - c, from(n.statistics, c), count, at(n.gamma, c, item), sums,
                                  products, coefficients(0, c), coefficients(3, c),
                                  coefficients(4, c), coefficients(5, c));
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

// Batch renormalization from the statistics: r and d, and what stands for gamma and beta.
template <class T>
void correct(const BatchNorm& n, const Running& running, const Renorm& renorm, void* scale_data,
             void* shift_data) {
  const T* const gamma = static_cast<const T*>(n.gamma);
  const T* const beta = static_cast<const T*>(n.beta);
  const T* const running_mean = static_cast<const T*>(running.mean);
  const T* const running_variance = static_cast<const T*>(running.variance);
  const Statistics& s = n.statistics;
  for (index_t c = 0; c < n.channels; ++c) {
    const double unit = s.unit[c], sigma = std::sqrt(s.variance[c] + s.eps * unit * unit) / unit;
    const double running_sigma = std::sqrt(double(running_variance[c]) + s.eps);
    const double distance = s.mean[c] / unit - double(running_mean[c]);
    const double r = std::clamp(sigma / running_sigma, 1 / renorm.r_max, renorm.r_max);
    const double d = std::clamp(distance / running_sigma, -renorm.d_max, renorm.d_max);
    const double weight = gamma == nullptr ? 1.0 : double(gamma[c]);
    renorm.r[c] = r;
    renorm.d[c] = d;
    static_cast<T*>(scale_data)[c] = T(weight * r);
    static_cast<T*>(shift_data)[c] = T(weight * d + (beta == nullptr ? 0.0 : double(beta[c])));
  }
}

template <class T>
void scale_by_r(const BatchNorm& n, const Renorm& renorm, void* scale) {
  const T* const gamma = static_cast<const T*>(n.gamma);
  for (index_t c = 0; c < n.channels; ++c) {
    static_cast<T*>(scale)[c] = T((gamma == nullptr ? 1.0 : double(gamma[c])) * renorm.r[c]);
  }
}

// gamma's part in the scale and in the shift.
template <class T>
void join_gradients(const BatchNorm& n, const Renorm& renorm, void* dgamma_data,
                    const void* dbeta_data) {
  T* const dgamma = static_cast<T*>(dgamma_data);
  const T* const dbeta = static_cast<const T*>(dbeta_data);
  for (index_t c = 0; c < n.channels; ++c) {
    dgamma[c] = T(renorm.r[c] * double(dgamma[c]) + renorm.d[c] * double(dbeta[c]));
  }
}

}  // namespace

void batch_norm(const Settings& settings, const BatchNorm& n, const Running& running,
                const void* residual, void* y) {
  const Walk walk(n);
  visit_channels(settings, walk, ForwardPass(settings, n, walk, running, residual, y));
}

void batch_norm_backward(const Settings& settings, const BatchNorm& norm, const void* dy,
                         const void* y, void* dx, void* dresidual, void* dgamma, void* dbeta) {
  const index_t channels = norm.channels, rows = norm.outer * channels;
  in_units(settings, norm, channels, rows, norm.inner, dx, [&](const BatchNorm& n) {
    const Walk walk(n);
    visit_channels(settings, walk,
                   BackwardPass(settings, n, walk, dy, y, dx, dresidual, dgamma, dbeta));
  });
}

void batch_renorm(const Settings& settings, const BatchNorm& n, const Running& running,
                  const Renorm& renorm, void* y) {
  batch_norm(settings, n, {}, nullptr, nullptr);
  const Scratch parameters(2, n.channels);
  parallel_for(settings, 0, [&](int, int) {
    const auto run = n.dtype == Dtype::float32 ? correct<float> : correct<double>;
    run(n, running, renorm, parameters[0], parameters[1]);
    move_running(settings.table->norm[size_t(n.dtype)], n, running, 0, n.channels);
  });
  BatchNorm corrected = n;
  corrected.training = false;
  corrected.gamma = parameters[0];
  corrected.beta = parameters[1];
  batch_norm(settings, corrected, {}, nullptr, y);
}

void batch_renorm_backward(const Settings& settings, const BatchNorm& n, const Renorm& renorm,
                           const void* dy, void* dx, void* dgamma, void* dbeta) {
  const Scratch scale(1, n.channels);
  BatchNorm corrected = n;
  corrected.gamma = scale[0];
  const bool single = n.dtype == Dtype::float32;
  parallel_for(settings, 0, [&](int, int) {
    single ? scale_by_r<float>(n, renorm, scale[0]) : scale_by_r<double>(n, renorm, scale[0]);
  });
  batch_norm_backward(settings, corrected, dy, nullptr, dx, nullptr, dgamma, dbeta);
  parallel_for(settings, 0, [&](int, int) {
    single ? join_gradients<float>(n, renorm, dgamma, dbeta)
           : join_gradients<double>(n, renorm, dgamma, dbeta);
  });
}

}  // namespace fastopt
