#include "normalize.h"

#include <algorithm>
#include <limits>
#include <memory>

namespace fastopt {
namespace {

// Measured on Zen 4 with 1 MiB of L2 per core. What decides about partial sums is fixed by the
// shape, so the bits are the same on every machine.
constexpr index_t slab_bytes = 5 << 18;   // a channel this large stays in the cache
constexpr index_t slice_bytes = 1 << 18;  // of columns that are visited twice
constexpr index_t sliced_below_rows = 4096;
constexpr index_t sliced_up_to_bytes = 4 << 20;
constexpr index_t slice_line_bytes = 256;
constexpr index_t stream_from_bytes = 16 << 20;  // outputs that no cache will hold
constexpr index_t most_chunks = 64;
constexpr index_t backwards_bytes = 1 << 20;  // shorter pieces disturb the hardware's prefetching
constexpr index_t hot_bytes = 1 << 16;        // of rows or groups that are visited twice

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
  Scratch(index_t arrays, index_t n) : n_(n), data_(new double[size_t(arrays * n)]) {}
  double* operator[](index_t array) const { return data_.get() + array * n_; }

 private:
  index_t n_;
  std::unique_ptr<double[]> data_;
};

// The statistics' elements in equal chunks that are summed on their own and merged in order.
struct Chunks {
  index_t size, count;

  Chunks(index_t n, index_t smallest, index_t unit)
      : size(std::max(smallest, ((n + most_chunks - 1) / most_chunks + unit - 1) / unit * unit)),
        count((n + size - 1) / size) {}

  Range operator()(index_t chunk, index_t n) const {
    return {chunk * size, std::min(n, (chunk + 1) * size)};
  }
};

bool streams(index_t bytes) {
  return bytes >= stream_from_bytes;
}

// How batch normalization walks through [outer, channels, inner].
struct Walk {
  enum Kind {
    slabs,   // runs, a channel at a time: all passes while it is hot
    slices,  // columns, a few at a time, likewise
    planes,  // runs, every pass over everything, in memory order
    rows,    // columns, likewise
  } kind;
  index_t item, bytes;
  Chunks chunks;  // of outer, for planes and rows
  index_t slice;  // columns

  explicit Walk(const BatchNorm& n)
      : kind(slabs),
        item(size_of(n.dtype)),
        bytes(n.outer * n.channels * n.inner * item),
        chunks(n.outer, n.inner > 1 ? std::max<index_t>(1, (1 << 16) / n.inner) : 512,
               n.inner > 1 ? 1 : 64),
        slice(n.channels) {
    const index_t line = slice_line_bytes / item;
    if (n.inner > 1) {
      const bool hot = n.outer * n.inner * item <= slab_bytes && n.channels > 4;
      kind = hot || chunks.count == 1 ? slabs : planes;
    } else if (n.outer < sliced_below_rows || bytes <= sliced_up_to_bytes) {
      kind = slices;
      const index_t hot = slice_bytes / (n.outer * item), quarter = (n.channels + 3) / 4;
      slice = std::max<index_t>(1, std::min(hot, quarter + line - 1) / line) * line;
    } else {
      kind = rows;
    }
  }

  // Parts of rows can be streamed only if each begins on a cache line.
  bool stream(const BatchNorm& n, const void* out) const {
    const bool on_lines =
        n.channels * item % 64 == 0 && reinterpret_cast<__UINTPTR_TYPE__>(out) % 64 == 0;
    return streams(bytes) && (kind != slices || on_lines);
  }
};

// Arrays of coefficients of all channels, in x's dtype. Past the last channel they go on with the
// first, for the length of a vector: streamed rows are read as one run.
class Coefficients {
 public:
  Coefficients(index_t arrays, index_t channels, index_t item)
      : scratch_(arrays, channels + vector_of_doubles),
        arrays_(arrays),
        item_(item),
        bytes_(channels * item) {}

  void* operator()(index_t array, index_t c = 0) const { return at(scratch_[array], c, item_); }

  // center, scale and shift, the first three, from the statistics of the channels c to end.
  void set_forward(const Norm& kernels, const BatchNorm& n, index_t c, index_t end) const {
    kernels.forward_coefficients(end - c, n.eps, n.mean + c, n.variance + c, at(n.gamma, c, item_),
                                 at(n.beta, c, item_), (*this)(0, c), (*this)(1, c), (*this)(2, c));
  }

  void go_on() const {
    for (index_t array = 0; array < arrays_; ++array) {
      char* const first = reinterpret_cast<char*>(scratch_[array]);
      for (index_t byte = 0; byte < vector_of_doubles * 8; ++byte) {
        first[bytes_ + byte] = first[byte];
      }
    }
  }

 private:
  static constexpr index_t vector_of_doubles = 8;

  Scratch scratch_;
  index_t arrays_, item_, bytes_;
};

// What the walk calls for a range of channels: `start`, then `reduce` to two numbers a channel,
// `finish`, and `apply` to every element. Elements and channels are given by their index.
struct ForwardPass {
  const BatchNorm& n;
  const Norm& kernels;
  const Running& running;
  index_t item;
  bool reduces, applies;
  index_t reduced_bytes, bytes;  // memory traffic
  double *first, *second;        // of all channels
  Coefficients coefficients;
  Forward forward;

  ForwardPass(const Settings& settings, const BatchNorm& norm, const Walk& walk, const Running& run,
              const void* residual, void* y)
      : n(norm),
        kernels(settings.table->norm[size_t(n.dtype)]),
        running(run),
        item(walk.item),
        reduces(n.training),
        applies(y != nullptr),
        reduced_bytes(walk.bytes),
        bytes(walk.bytes * (2 + (residual != nullptr))),
        first(n.mean),
        second(n.variance),
        coefficients(3, n.channels, item),
        forward{n.x,    residual,         y, coefficients(0), coefficients(1), coefficients(2),
                n.relu, walk.stream(n, y)} {}

  void start(index_t, index_t) const {}

  void reduce(index_t element, index_t, Runs runs, double* mean, double* m2) const {
    kernels.moments(at(n.x, element, item), runs, 1, 0, true, mean, m2);
  }

  void reduce_columns(index_t element, index_t, index_t rows, index_t columns, double* mean,
                      double* m2, double* scratch) const {
    kernels.column_moments(at(n.x, element, item), rows, n.channels, columns, mean, m2, scratch);
  }

  // What more rows say about the channels is joined to what is known of those before them.
  void join(index_t c, index_t end, index_t known, index_t rows, const double* mean,
            const double* m2) const {
    kernels.merge(double(known * n.inner), first + c, second + c, double(rows * n.inner), mean + c,
                  m2 + c, end - c);
  }

  // From the sums of squared deviations to everything that depends on the channel alone.
  void finish(index_t c, index_t end) const {
    const index_t width = end - c;
    if (n.training) {
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
    kernels.column_apply(shifted(element, c), rows, n.channels, columns);
  }

  Forward shifted(index_t element, index_t c) const {
    Forward f = forward;
    for (const void** array : {&f.x, &f.residual}) *array = at(*array, element, item);
    f.y = at(f.y, element, item);
    for (const void** array : {&f.center, &f.scale, &f.shift}) *array = at(*array, c, item);
    return f;
  }
};

struct BackwardPass {
  const BatchNorm& n;
  const Norm& kernels;
  void *dgamma, *dbeta;
  index_t item;
  bool reduces = true, applies = true;
  index_t reduced_bytes, bytes;
  Scratch sums;
  double *first, *second;
  Coefficients coefficients;
  Backward backward;

  BackwardPass(const Settings& settings, const BatchNorm& norm, const Walk& walk, const void* dy,
               const void* y, void* dx, void* dresidual, void* gamma_gradient, void* beta_gradient)
      : n(norm),
        kernels(settings.table->norm[size_t(n.dtype)]),
        dgamma(gamma_gradient),
        dbeta(beta_gradient),
        item(walk.item),
        reduced_bytes(walk.bytes * 2),
        bytes(walk.bytes * (3 + (y != nullptr) + (dresidual != nullptr))),
        sums(2, n.channels),
        first(sums[0]),
        second(sums[1]),
        coefficients(6, n.channels, item),
        backward{dy,
                 n.x,
                 y,
                 dx,
                 dresidual,
                 coefficients(0),
                 coefficients(1),
                 coefficients(2),
                 coefficients(3),
                 coefficients(4),
                 coefficients(5),
                 n.relu,
                 walk.stream(n, dx)} {}

  void start(index_t c, index_t end) const { coefficients.set_forward(kernels, n, c, end); }

  void reduce(index_t element, index_t c, Runs runs, double* sum, double* product) const {
    kernels.gradient_sums(shifted(element, c), runs, 1, 0, sum, product);
  }

  void reduce_columns(index_t element, index_t c, index_t rows, index_t columns, double* sum,
                      double* product, double* scratch) const {
    kernels.column_gradient_sums(shifted(element, c), rows, n.channels, columns, sum, product,
                                 scratch);
  }

  void join(index_t c, index_t end, index_t, index_t, const double* sum,
            const double* product) const {
    kernels.add_sums(end - c, sum + c, first + c);
    kernels.add_sums(end - c, product + c, second + c);
  }

  void finish(index_t c, index_t end) const {
    const double count =
        n.training ? double(n.outer * n.inner) : std::numeric_limits<double>::infinity();
    kernels.backward_coefficients(end - c, n.eps, count, n.mean + c, n.variance + c,
                                  at(n.gamma, c, item), first + c, second + c, coefficients(0, c),
                                  coefficients(3, c), coefficients(4, c), coefficients(5, c));
    kernels.round_sums(end - c, second + c, at(dgamma, c, item));
    kernels.round_sums(end - c, first + c, at(dbeta, c, item));
  }

  void apply(index_t element, index_t c, Runs runs) const {
    kernels.gradient_apply(shifted(element, c), runs, 0);
  }

  void apply_columns(index_t element, index_t c, index_t rows, index_t columns) const {
    kernels.column_gradient_apply(shifted(element, c), rows, n.channels, columns);
  }

  Backward shifted(index_t element, index_t c) const {
    Backward b = backward;
    for (const void** array : {&b.dy, &b.x, &b.y}) *array = at(*array, element, item);
    for (void** array : {&b.dx, &b.dresidual}) *array = at(*array, element, item);
    for (const void** array : {&b.center, &b.scale, &b.shift, &b.on_dy, &b.on_x, &b.constant}) {
      *array = at(*array, c, item);
    }
    return b;
  }
};

// Every channel's passes one after the other, while its elements are in the cache.
template <class Pass>
void visit_slabs(const Settings& settings, const Pass& pass) {
  const BatchNorm& n = pass.n;
  const Runs runs{n.outer, n.channels * n.inner, n.inner};
  parallel_for(settings, pass.bytes, [&](int part, int parts) {
    const Range mine = share(n.channels, part, parts);
    for (index_t c = mine.begin; c < mine.end; ++c) {
      const index_t element = c * n.inner;
      pass.start(c, c + 1);
      if (pass.reduces) pass.reduce(element, c, runs, pass.first + c, pass.second + c);
      pass.finish(c, c + 1);
      if (pass.applies) pass.apply(element, c, runs);
    }
  });
}

// The same for a few columns at a time.
template <class Pass>
void visit_slices(const Settings& settings, const Walk& walk, const Pass& pass) {
  const BatchNorm& n = pass.n;
  const index_t slices = (n.channels + walk.slice - 1) / walk.slice;
  parallel_for(settings, pass.bytes, [&](int part, int parts) {
    const Range mine = share(slices, part, parts);
    const Scratch scratch(3, walk.slice);
    for (index_t s = mine.begin; s < mine.end; ++s) {
      const index_t c = s * walk.slice, end = std::min(c + walk.slice, n.channels);
      pass.start(c, end);
      if (pass.reduces) {
        pass.reduce_columns(c, c, n.outer, end - c, pass.first + c, pass.second + c, scratch[0]);
      }
      pass.finish(c, end);
      if (pass.applies) pass.apply_columns(c, c, n.outer, end - c);
    }
  });
}

// Reduces chunks of planes or rows on their own, and joins what they yield in order.
template <class Pass>
void reduce_chunks(const Settings& settings, const Walk& walk, const Pass& pass) {
  const BatchNorm& n = pass.n;
  const Chunks& chunks = walk.chunks;
  const index_t channels = n.channels, inner = n.inner;
  const Scratch first(chunks.count, channels), second(chunks.count, channels);
  parallel_for(settings, pass.reduced_bytes, [&](int part, int parts) {
    if (walk.kind == Walk::rows) {
      const Range mine = share(chunks.count, part, parts);
      const Scratch scratch(3, channels);
      for (index_t k = mine.begin; k < mine.end; ++k) {
        const Range rows = chunks(k, n.outer);
        pass.reduce_columns(rows.begin * channels, 0, rows.end - rows.begin, channels, first[k],
                            second[k], scratch[0]);
      }
    } else {
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
  parallel_for(settings, chunks.count * channels * 16, [&](int part, int parts) {
    const Range mine = share(channels, part, parts);
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
      const index_t most = std::max<index_t>(1, backwards_bytes / (n.channels * walk.item));
      for (index_t end = mine.end, begin; end > mine.begin; end = begin) {
        begin = std::max(mine.begin, end - most);
        pass.apply_columns(begin * n.channels, 0, end - begin, n.channels);
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
  const Scratch sums(n.samples, channels), products(n.samples, channels);
  parallel_for(settings, 3 * bytes, [&](int part, int parts) {
    const Scratch coefficients(6, channels), statistics(2, channels);
    visit_groups(n, group * item, part, parts, [&](index_t g, index_t end) {
      const index_t c = g % n.groups * n.channels, count = (end - g) * n.channels;
      double* const sum = sums[g / n.groups] + c;
      double* const product = products[g / n.groups] + c;
      for (index_t i = g; i < end; ++i) {
        std::fill_n(statistics[0] + (i - g) * n.channels, n.channels, n.mean[i]);
        std::fill_n(statistics[1] + (i - g) * n.channels, n.channels, n.variance[i]);
      }
      kernels.forward_coefficients(count, n.eps, statistics[0], statistics[1], nullptr, nullptr,
                                   coefficients[0], coefficients[1], coefficients[2]);
      const Backward b{at(dy, g * group, item),
                       at(n.x, g * group, item),
                       nullptr,
                       at(dx, g * group, item),
                       nullptr,
                       coefficients[0],
                       coefficients[1],
                       coefficients[2],
                       coefficients[3],
                       coefficients[4],
                       coefficients[5],
                       false,
                       streams(bytes)};
      kernels.gradient_sums(b, {1, run, run}, count, run, sum, product);
      kernels.group_coefficients(end - g, n.channels, n.eps, double(group), n.mean + g,
                                 n.variance + g, at(n.gamma, c, item), sum, product,
                                 coefficients[0], coefficients[3], coefficients[4],
                                 coefficients[5]);
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
  parallel_for(settings, 2 * bytes, [&](int part, int parts) {
    const Range mine = share(n.rows, part, parts);
    double center[64], scale[64], shift[64];
    for (index_t r = mine.begin; r < mine.end; r += most) {
      const index_t rows = std::min(most, mine.end - r);
      const void* const x = at(n.x, r * columns, item);
      kernels.moments(x, {1, columns, columns}, rows, columns, n.centered, n.mean + r,
                      n.variance + r);
      for (index_t i = r; i < r + rows; ++i) n.variance[i] /= double(columns);
      kernels.forward_coefficients(rows, n.eps, n.mean + r, n.variance + r, nullptr, nullptr,
                                   center, scale, shift);
      kernels.row_apply(
          {x, nullptr, at(y, r * columns, item), center, scale, shift, false, streams(bytes)},
          n.gamma, n.beta, rows, columns);
    }
  });
}

void layer_norm_backward(const Settings& settings, const LayerNorm& n, const void* dy, void* dx,
                         void* dgamma, void* dbeta) {
  const Norm& kernels = settings.table->norm[size_t(n.dtype)];
  const index_t item = size_of(n.dtype), bytes = n.rows * n.columns * item;
  const index_t most = hot_rows(2 * n.columns * item);
  const Chunks chunks(n.rows, 16, 16);
  const Scratch gammas(chunks.count, n.columns), betas(chunks.count, n.columns);
  parallel_for(settings, 3 * bytes, [&](int part, int parts) {
    const Range mine = share(chunks.count, part, parts);
    const Scratch floats(2, n.columns), coefficients(6, most), totals(2, most);
    std::fill_n(floats[0], 2 * n.columns, 0.0);
    for (index_t k = mine.begin; k < mine.end; ++k) {
      const Range rows = chunks(k, n.rows);
      std::fill_n(gammas[k], n.columns, 0.0);
      std::fill_n(betas[k], n.columns, 0.0);
      for (index_t r = rows.begin, end; r < rows.end; r = end) {
        end = std::min(r + most, rows.end);
        kernels.forward_coefficients(end - r, n.eps, n.mean + r, n.variance + r, nullptr, nullptr,
                                     coefficients[0], coefficients[1], coefficients[2]);
        const index_t first = r * n.columns;
        const Backward b{at(dy, first, item),
                         at(n.x, first, item),
                         nullptr,
                         at(dx, first, item),
                         nullptr,
                         coefficients[0],
                         coefficients[1],
                         coefficients[2],
                         coefficients[3],
                         coefficients[4],
                         coefficients[5],
                         false,
                         streams(bytes)};
        kernels.row_gradient_sums(b, n.gamma, end - r, n.columns, totals[0], totals[1]);
        if (!n.centered) std::fill_n(totals[0], end - r, 0.0);
        kernels.backward_coefficients(end - r, n.eps, double(n.columns), n.mean + r, n.variance + r,
                                      nullptr, totals[0], totals[1], coefficients[0],
                                      coefficients[3], coefficients[4], coefficients[5]);
        kernels.row_gradient_apply(b, n.gamma, end - r, n.columns, floats[0], floats[1]);
        if ((end - rows.begin) % 64 == 0 || end == rows.end) {
          kernels.flush_sums(floats[0], n.columns, gammas[k]);
          kernels.flush_sums(floats[1], n.columns, betas[k]);
        }
      }
    }
  });
  parallel_for(settings, 16 * chunks.count * n.columns, [&](int part, int parts) {
    const Range mine = share(n.columns, part, parts);
    const index_t c = mine.begin, width = mine.end - mine.begin;
    for (index_t k = 1; k < chunks.count; ++k) {
      kernels.add_sums(width, gammas[k] + c, gammas[0] + c);
      kernels.add_sums(width, betas[k] + c, betas[0] + c);
    }
    kernels.round_sums(width, gammas[0] + c, at(dgamma, c, item));
    if (dbeta != nullptr) kernels.round_sums(width, betas[0] + c, at(dbeta, c, item));
  });
}

}  // namespace fastopt
