#include "layout.h"

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <utility>

#include "element.h"

namespace fastopt {

index_t View::size() const {
  return std::accumulate(shape, shape + ndim, index_t(1), std::multiplies());
}

Extent::Extent(const View& view) : begin(view.data), end(view.data) {
  if (view.size() == 0) return;
  end += item_size(view.dtype);
  for (index_t axis = 0; axis < view.ndim; ++axis) {
    const index_t reach = (view.shape[axis] - 1) * view.strides[axis];
    (reach < 0 ? begin : end) += reach;
  }
}

bool is_packed(const View& view) {
  const Extent extent(view);
  return extent.end - extent.begin == view.size() * item_size(view.dtype) && !overlaps_itself(view);
}

bool overlaps_itself(const View& view) {
  if (view.size() == 0) return false;
  std::vector<std::pair<index_t, index_t>> axes;  // |stride|, extent
  for (index_t axis = 0; axis < view.ndim; ++axis) {
    if (view.shape[axis] > 1) axes.emplace_back(std::abs(view.strides[axis]), view.shape[axis]);
  }
  std::sort(axes.begin(), axes.end());
  index_t bytes = item_size(view.dtype);
  for (const auto& [stride, extent] : axes) {
    if (stride < bytes) return true;
    bytes += stride * (extent - 1);
  }
  return false;
}

void Regions::add(const Extent& extent, size_t id) {
  if (extent.begin != extent.end) parts_.push_back({extent, nullptr, id});
}

bool Layout::dense() const {
  return std::all_of(streams.begin(), streams.end(), [](const Stream& s) { return s.dense; });
}

Layout layout_of(std::span<const View> views, const View& order) {
  std::vector<index_t> axes;
  for (index_t axis = 0; axis < order.ndim; ++axis) {
    if (order.shape[axis] != 1) axes.push_back(axis);
  }
  std::stable_sort(axes.begin(), axes.end(), [&](index_t a, index_t b) {
    return std::abs(order.strides[a]) > std::abs(order.strides[b]);
  });
  Layout layout;
  layout.streams.resize(views.size());
  for (const index_t axis : axes) {
    const index_t extent = order.shape[axis];
    const bool joins = !layout.shape.empty() &&
                       std::equal(views.begin(), views.end(), layout.streams.begin(),
                                  [&](const View& view, const Layout::Stream& stream) {
                                    return stream.strides.back() == view.strides[axis] * extent;
                                  });
    if (joins) {
      layout.shape.back() *= extent;
    } else {
      layout.shape.push_back(extent);
    }
    for (size_t s = 0; s < views.size(); ++s) {
      if (joins) layout.streams[s].strides.pop_back();
      layout.streams[s].strides.push_back(views[s].strides[axis]);
    }
  }
  const bool is_empty = order.size() == 0;
  for (size_t s = 0; s < views.size(); ++s) {
    index_t bytes = item_size(views[s].dtype);
    const std::vector<index_t>& strides = layout.streams[s].strides;
    layout.streams[s].shared = std::find(strides.begin(), strides.end(), 0) != strides.end();
    layout.streams[s].dense = true;
    for (size_t axis = layout.shape.size(); axis-- > 0; bytes *= layout.shape[axis]) {
      layout.streams[s].dense &= is_empty || layout.streams[s].strides[axis] == bytes;
    }
  }
  return layout;
}

}  // namespace fastopt
