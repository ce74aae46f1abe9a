#include <optional>

#include "norm_parts.h"

namespace fastopt {
namespace {

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
      repeat(*given[i], n.groups * n.channels, n.inner, item_size(n.dtype), parameters_[i]);
      *given[i] = parameters_[i];
    }
  }

  const LayerNorm& operator*() const { return rows_; }

 private:
  Scratch parameters_;
  LayerNorm rows_;
};

void group_gradients(const Settings& settings, const GroupNorm& n, const void* dy,
                     const Gradients& gradients) {
  const Norm& kernels = settings.table->norm[size_t(n.dtype)];
  const index_t item = item_size(n.dtype), run = n.inner, group = n.channels * n.inner;
  const index_t bytes = n.samples * n.groups * group * item, channels = n.groups * n.channels;
  if (short_runs(n)) {
    return row_gradients(settings, *GroupsAsRows(n), n.inner, dy, gradients);
  }
  const Scratch sums(n.samples, channels), products(n.samples, channels);
  parallel_for(settings, 3 * bytes, [&](int part, int parts) {
    const Scratch coefficients(6, channels), of_groups(3, n.groups);
    void* const center = forward_in(coefficients).center;
    const BackwardCoefficients by = backward_in(coefficients);
    visit_groups(n, group * item, part, parts, [&](index_t g, index_t end) {
      const index_t c = g % n.groups * n.channels, count = (end - g) * n.channels;
      const GradientSums both{sums[g / n.groups] + c, products[g / n.groups] + c};
      const Statistics statistics = from(n.statistics, g);
      const void* const gamma = at(n.gamma, c, item);
      kernels.forward_coefficients(end - g, statistics, nullptr, nullptr, forward_in(of_groups));
      repeat(of_groups[0], end - g, n.channels, item, center);
      const index_t first = g * group;
      const Backward b{
          at(dy, first, item), at(n.x, first, item), center, at(gradients.dx, first, item), by,
          streams(bytes)};
      if (run <= few_columns) {
        kernels.row_gradient_sums(b, {}, count, run, both);
      } else {
        kernels.gradient_sums(b, {}, {1, run, run}, count, run, both);
      }
      if (n.channels == 1) {  // many at a time, not one by one
        kernels.backward_coefficients(count, statistics, double(group), gamma, both, center, by);
      } else {
        kernels.group_coefficients(end - g, n.channels, statistics, double(group), gamma, both,
                                   center, by);
      }
      kernels.gradient_apply(b, {}, {count, run, run}, 1);
    });
  });
  parallel_for(settings, 16 * n.samples * channels, [&](int part, int parts) {
    const Range mine = share(channels, part, parts);
    const index_t c = mine.begin, width = mine.end - mine.begin;
    for (index_t sample = 1; sample < n.samples; ++sample) {
      kernels.add_sums(width, sums[sample] + c, sums[0] + c);
      kernels.add_sums(width, products[sample] + c, products[0] + c);
    }
    kernels.round_sums(width, products[0] + c, at(gradients.dgamma, c, item));
    kernels.round_sums(width, sums[0] + c, at(gradients.dbeta, c, item));
  });
}

}  // namespace

void group_norm(const Settings& settings, const GroupNorm& n, void* y) {
  if (short_runs(n)) return layer_norm(settings, *GroupsAsRows(n), y);
  const Norm& kernels = settings.table->norm[size_t(n.dtype)];
  const index_t item = item_size(n.dtype), run = n.inner, group = n.channels * n.inner;
  const index_t bytes = n.samples * n.groups * group * item;
  parallel_for(settings, 2 * bytes, [&](int part, int parts) {
    const index_t most = n.groups * n.channels;
    const Scratch coefficients(3, most), of_channels(3, most), m2(1, n.groups);
    const ForwardCoefficients by = forward_in(coefficients);
    visit_groups(n, group * item, part, parts, [&](index_t g, index_t end) {
      const index_t c = g % n.groups * n.channels, groups = end - g, channels = groups * n.channels;
      const Statistics statistics = from(n.statistics, g);
      const void* x = at(n.x, g * group, item);
      kernels.row_moments(x, groups, group, true, {statistics.mean, m2[0]});
      for (index_t i = 0; i < groups; ++i) statistics.variance[i] = m2[0][i] / double(group);
      kernels.choose_units(x, {1, group, group}, groups, group, true, statistics);
      std::optional<Scratch> copy;
      if (has_units(statistics, groups)) {
        copy.emplace(groups, group);
        multiply_by_units(kernels, statistics.unit, x, groups, group, (*copy)[0]);
        x = (*copy)[0];
      }
      repeat<double>(statistics.mean, groups, n.channels, of_channels[0]);
      repeat<double>(statistics.variance, groups, n.channels, of_channels[1]);
      repeat<double>(statistics.unit, groups, n.channels, of_channels[2]);
      kernels.forward_coefficients(channels,
                                   {of_channels[0], of_channels[1], of_channels[2], statistics.eps},
                                   at(n.gamma, c, item), at(n.beta, c, item), by);
      kernels.apply({x, at(y, g * group, item), by, streams(bytes)}, {}, {channels, run, run}, 1);
    });
  });
}

void group_norm_backward(const Settings& settings, const GroupNorm& norm, const void* dy,
                         const Gradients& gradients) {
  const index_t groups = norm.samples * norm.groups;
  in_units(settings, norm, groups, groups, norm.channels * norm.inner, gradients.dx,
           [&](const GroupNorm& n) { group_gradients(settings, n, dy, gradients); });
}

}  // namespace fastopt
