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

// How batch normalization walks through [outer, channels, inner].
struct Walk {
  enum Kind {
    slabs,   // runs, a channel at a time: all passes while it is hot
    slices,  // columns, a few at a time, likewise
    planes,  // runs, every pass over everything, in memory order
    rows,    // columns, likewise
  } kind;
  index_t item, size, bytes;
  Chunks chunks;  // of outer, for planes and rows
  index_t slice;  // columns

  explicit Walk(const BatchNorm& n)
      : kind(slabs),
        item(size_of(n.dtype)),
        size(n.outer * n.channels * n.inner),
        bytes(size * item),
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
};

bool streams(index_t bytes) {
  return bytes >= stream_from_bytes;
}

// Parts of rows can be streamed only if each begins on a cache line.
bool streams_slices(const Walk& walk, index_t channels, const void* out) {
  return streams(walk.bytes) && channels * walk.item % 64 == 0 &&
         reinterpret_cast<__UINTPTR_TYPE__>(out) % 64 == 0;
}

// Past the last channel the coefficients go on with the first, for the length of a vector.
constexpr index_t vector_of_doubles = 8;

void go_on(const Scratch& coefficients, index_t arrays, index_t channels, index_t item) {
  for (index_t array = 0; array < arrays; ++array) {
    char* const first = reinterpret_cast<char*>(coefficients[array]);
    for (index_t byte = 0; byte < vector_of_doubles * 8; ++byte) {
      first[channels * item + byte] = first[byte];
    }
  }
}

// Visits the rows of a part in blocks, from the last to the first: the last ones that the pass
// before has read are still in the cache.
template <class Visit>
void visit_rows_backwards(index_t outer, index_t row_bytes, int part, int parts, Visit visit) {
  const Range mine = share(outer, part, parts);
  const index_t most = std::max<index_t>(1, backwards_bytes / row_bytes);
  for (index_t end = mine.end, begin; end > mine.begin; end = begin) {
    begin = std::max(mine.begin, end - most);
    visit(begin, end - begin);
  }
}

// Calls visit(begin, end) for the groups of a part of all samples, as many of one sample at a time
// as stay in the first cache.
template <class Visit>
void visit_groups(const GroupNorm& n, index_t group_bytes, int part, int parts, Visit visit) {
  const Range mine = share(n.samples * n.groups, part, parts);
  const index_t most = std::max<index_t>(1, hot_bytes / std::max<index_t>(1, group_bytes));
  for (index_t g = mine.begin, end; g < mine.end; g = end) {
    end = std::min({g + most, (g / n.groups + 1) * n.groups, mine.end});
    visit(g, end);
  }
}

// Rows that stay in the first cache; at most 64, of which it is a divisor.
index_t hot_rows(index_t row_bytes) {
  index_t rows = 64;
  while (rows > 1 && rows * row_bytes > hot_bytes) rows /= 2;
  return rows;
}

// Visits the runs of a part of the planes, from the last to the first.
template <class Visit>
void visit_runs_backwards(index_t outer, index_t channels, int part, int parts, Visit visit) {
  const Range mine = share(outer * channels, part, parts);
  for (index_t run = mine.end; run-- > mine.begin;) visit(run, run % channels);
}

}  // namespace

void batch_norm(const Settings& settings, const BatchNorm& n, const Running& running,
                const void* residual, void* y) {
  const Norm& kernels = settings.table->norm[size_t(n.dtype)];
  const Walk walk(n);
  const index_t item = walk.item, channels = n.channels, inner = n.inner;
  const Runs runs{n.outer, channels * inner, inner};
  const double count = double(n.outer * inner);
  const Scratch coefficients(3, channels + vector_of_doubles);
  Forward forward{n.x,    residual, y, coefficients[0], coefficients[1], coefficients[2],
                  n.relu, false};
  const index_t traffic = walk.bytes * (2 + (residual != nullptr));

  // From the sums of squared deviations to everything that depends on the channel alone.
  const auto finish = [&](index_t c, index_t end) {
    if (n.training) {
      for (index_t i = c; i < end; ++i) n.variance[i] /= count;
      const double factor = running.unbiased ? count / (count - 1) : 1.0;
      if (running.mean != nullptr) {
        kernels.move_average(end - c, running.momentum, 1.0, n.mean + c, at(running.mean, c, item));
      }
      if (running.variance != nullptr) {
        kernels.move_average(end - c, running.momentum, factor, n.variance + c,
                             at(running.variance, c, item));
      }
    }
    kernels.forward_coefficients(end - c, n.eps, n.mean + c, n.variance + c, at(n.gamma, c, item),
                                 at(n.beta, c, item), at(coefficients[0], c, item),
                                 at(coefficients[1], c, item), at(coefficients[2], c, item));
  };
  const auto shifted = [&](index_t element, index_t c) {
    Forward f = forward;
    f.x = at(n.x, element, item);
    f.residual = at(residual, element, item);
    f.y = at(y, element, item);
    f.center = at(f.center, c, item);
    f.scale = at(f.scale, c, item);
    f.shift = at(f.shift, c, item);
    return f;
  };

  if (walk.kind == Walk::slabs) {
    forward.stream = streams(walk.bytes);
    parallel_for(settings, traffic, [&](int part, int parts) {
      const Range mine = share(channels, part, parts);
      for (index_t c = mine.begin; c < mine.end; ++c) {
        if (n.training) {
          kernels.moments(at(n.x, c * inner, item), runs, 1, 0, true, n.mean + c, n.variance + c);
        }
        finish(c, c + 1);
        if (y != nullptr) kernels.apply(shifted(c * inner, c), runs, 0);
      }
    });
    return;
  }
  if (walk.kind == Walk::slices) {
    forward.stream = streams_slices(walk, channels, y);
    const index_t slices = (channels + walk.slice - 1) / walk.slice;
    parallel_for(settings, traffic, [&](int part, int parts) {
      const Range mine = share(slices, part, parts);
      const Scratch scratch(3, walk.slice);
      for (index_t s = mine.begin; s < mine.end; ++s) {
        const index_t c = s * walk.slice, width = std::min(walk.slice, channels - c);
        if (n.training) {
          kernels.column_moments(at(n.x, c, item), n.outer, channels, width, n.mean + c,
                                 n.variance + c, scratch[0]);
        }
        finish(c, c + width);
        if (y != nullptr) kernels.column_apply(shifted(c, c), n.outer, channels, width);
      }
    });
    return;
  }

  const Chunks& chunks = walk.chunks;
  if (n.training) {
    const Scratch means(chunks.count, channels), deviations(chunks.count, channels);
    parallel_for(settings, walk.bytes, [&](int part, int parts) {
      if (walk.kind == Walk::rows) {
        const Range mine = share(chunks.count, part, parts);
        const Scratch scratch(3, channels);
        for (index_t k = mine.begin; k < mine.end; ++k) {
          const Range rows = chunks(k, n.outer);
          kernels.column_moments(at(n.x, rows.begin * channels, item), rows.end - rows.begin,
                                 channels, channels, means[k], deviations[k], scratch[0]);
        }
      } else {
        const Range mine = share(chunks.count * channels, part, parts);
        for (index_t i = mine.begin; i < mine.end; ++i) {
          const index_t k = i / channels, c = i % channels;
          const Range planes = chunks(k, n.outer);
          kernels.moments(at(n.x, (planes.begin * channels + c) * inner, item),
                          {planes.end - planes.begin, runs.stride, inner}, 1, 0, true, means[k] + c,
                          deviations[k] + c);
        }
      }
    });
    parallel_for(settings, chunks.count * channels * 16, [&](int part, int parts) {
      const Range mine = share(channels, part, parts);
      const index_t width = mine.end - mine.begin;
      std::copy_n(means[0] + mine.begin, width, n.mean + mine.begin);
      std::copy_n(deviations[0] + mine.begin, width, n.variance + mine.begin);
      for (index_t k = 1; k < chunks.count; ++k) {
        const Range rows = chunks(k, n.outer);
        kernels.merge(double(rows.begin * inner), n.mean + mine.begin, n.variance + mine.begin,
                      double((rows.end - rows.begin) * inner), means[k] + mine.begin,
                      deviations[k] + mine.begin, width);
      }
      finish(mine.begin, mine.end);
    });
  } else {
    parallel_for(settings, 0, [&](int, int) { finish(0, channels); });
  }
  if (y == nullptr) return;
  forward.stream = streams(walk.bytes);
  go_on(coefficients, 3, channels, item);
  parallel_for(settings, traffic, [&](int part, int parts) {
    if (walk.kind == Walk::rows) {
      visit_rows_backwards(n.outer, channels * item, part, parts, [&](index_t row, index_t rows) {
        kernels.column_apply(shifted(row * channels, 0), rows, channels, channels);
      });
    } else {
      visit_runs_backwards(n.outer, channels, part, parts, [&](index_t run, index_t c) {
        kernels.apply(shifted(run * inner, c), {1, inner, inner}, 0);
      });
    }
  });
}

void batch_norm_backward(const Settings& settings, const BatchNorm& n, const void* dy,
                         const void* y, void* dx, void* dresidual, void* dgamma, void* dbeta) {
  const Norm& kernels = settings.table->norm[size_t(n.dtype)];
  const Walk walk(n);
  const index_t item = walk.item, channels = n.channels, inner = n.inner;
  const Runs runs{n.outer, channels * inner, inner};
  const double count =
      n.training ? double(n.outer * inner) : std::numeric_limits<double>::infinity();
  const Scratch coefficients(6, channels + vector_of_doubles), sums(2, channels);
  Backward backward{dy,
                    n.x,
                    y,
                    dx,
                    dresidual,
                    coefficients[0],
                    coefficients[1],
                    coefficients[2],
                    coefficients[3],
                    coefficients[4],
                    coefficients[5],
                    n.relu,
                    false};
  const index_t traffic = walk.bytes * (3 + (y != nullptr) + (dresidual != nullptr));

  const auto start = [&](index_t c, index_t end) {
    kernels.forward_coefficients(end - c, n.eps, n.mean + c, n.variance + c, at(n.gamma, c, item),
                                 at(n.beta, c, item), at(coefficients[0], c, item),
                                 at(coefficients[1], c, item), at(coefficients[2], c, item));
  };
  const auto finish = [&](index_t c, index_t end) {
    kernels.backward_coefficients(end - c, n.eps, count, n.mean + c, n.variance + c,
                                  at(n.gamma, c, item), sums[0] + c, sums[1] + c,
                                  at(coefficients[0], c, item), at(coefficients[3], c, item),
                                  at(coefficients[4], c, item), at(coefficients[5], c, item));
    kernels.round_sums(end - c, sums[1] + c, at(dgamma, c, item));
    kernels.round_sums(end - c, sums[0] + c, at(dbeta, c, item));
  };
  const auto shifted = [&](index_t element, index_t c) {
    Backward b = backward;
    b.dy = at(dy, element, item);
    b.x = at(n.x, element, item);
    b.y = at(y, element, item);
    b.dx = at(dx, element, item);
    b.dresidual = at(dresidual, element, item);
    b.center = at(b.center, c, item);
    b.scale = at(b.scale, c, item);
    b.shift = at(b.shift, c, item);
    b.on_dy = at(b.on_dy, c, item);
    b.on_x = at(b.on_x, c, item);
    b.constant = at(b.constant, c, item);
    return b;
  };

  if (walk.kind == Walk::slabs) {
    backward.stream = streams(walk.bytes);
    parallel_for(settings, traffic, [&](int part, int parts) {
      const Range mine = share(channels, part, parts);
      for (index_t c = mine.begin; c < mine.end; ++c) {
        start(c, c + 1);
        const Backward b = shifted(c * inner, c);
        kernels.gradient_sums(b, runs, 1, 0, sums[0] + c, sums[1] + c);
        finish(c, c + 1);
        kernels.gradient_apply(b, runs, 0);
      }
    });
    return;
  }
  if (walk.kind == Walk::slices) {
    backward.stream = streams_slices(walk, channels, dx);
    const index_t slices = (channels + walk.slice - 1) / walk.slice;
    parallel_for(settings, traffic, [&](int part, int parts) {
      const Range mine = share(slices, part, parts);
      const Scratch scratch(2, walk.slice);
      for (index_t s = mine.begin; s < mine.end; ++s) {
        const index_t c = s * walk.slice, width = std::min(walk.slice, channels - c);
        start(c, c + width);
        const Backward b = shifted(c, c);
        kernels.column_gradient_sums(b, n.outer, channels, width, sums[0] + c, sums[1] + c,
                                     scratch[0]);
        finish(c, c + width);
        kernels.column_gradient_apply(b, n.outer, channels, width);
      }
    });
    return;
  }

  const Chunks& chunks = walk.chunks;
  const Scratch parts_of_dy(chunks.count, channels), parts_of_product(chunks.count, channels);
  parallel_for(settings, 0, [&](int, int) { start(0, channels); });
  parallel_for(settings, walk.bytes * 2, [&](int part, int parts) {
    if (walk.kind == Walk::rows) {
      const Range mine = share(chunks.count, part, parts);
      const Scratch scratch(2, channels);
      for (index_t k = mine.begin; k < mine.end; ++k) {
        const Range rows = chunks(k, n.outer);
        kernels.column_gradient_sums(shifted(rows.begin * channels, 0), rows.end - rows.begin,
                                     channels, channels, parts_of_dy[k], parts_of_product[k],
                                     scratch[0]);
      }
    } else {
      const Range mine = share(chunks.count * channels, part, parts);
      for (index_t i = mine.begin; i < mine.end; ++i) {
        const index_t k = i / channels, c = i % channels;
        const Range planes = chunks(k, n.outer);
        kernels.gradient_sums(shifted((planes.begin * channels + c) * inner, c),
                              {planes.end - planes.begin, runs.stride, inner}, 1, 0,
                              parts_of_dy[k] + c, parts_of_product[k] + c);
      }
    }
  });
  parallel_for(settings, chunks.count * channels * 16, [&](int part, int parts) {
    const Range mine = share(channels, part, parts);
    const index_t c = mine.begin, width = mine.end - mine.begin;
    std::fill_n(sums[0] + c, width, 0.0);
    std::fill_n(sums[1] + c, width, 0.0);
    for (index_t k = 0; k < chunks.count; ++k) {
      kernels.add_sums(width, parts_of_dy[k] + c, sums[0] + c);
      kernels.add_sums(width, parts_of_product[k] + c, sums[1] + c);
    }
    finish(c, mine.end);
  });
  backward.stream = streams(walk.bytes);
  go_on(coefficients, 6, channels, item);
  parallel_for(settings, traffic, [&](int part, int parts) {
    if (walk.kind == Walk::rows) {
      visit_rows_backwards(n.outer, channels * item, part, parts, [&](index_t row, index_t rows) {
        kernels.column_gradient_apply(shifted(row * channels, 0), rows, channels, channels);
      });
    } else {
      visit_runs_backwards(n.outer, channels, part, parts, [&](index_t run, index_t c) {
        kernels.gradient_apply(shifted(run * inner, c), {1, inner, inner}, 0);
      });
    }
  });
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
