// The one order of every reduction: 128 bytes of sums, blocks counted from the first element,
// tails. Included by kernels.cpp inside the namespace of one ISA.

template <class T>
constexpr index_t lanes_of = accumulator_bytes / index_t(sizeof(T));
constexpr int registers = accumulator_bytes / vector_bytes;

// So many numbers on every ISA.
template <class T, index_t n>
using Pack [[gnu::vector_size(n * sizeof(T))]] = T;

constexpr index_t prefetch_bytes = 4096;

// Not returned: vectors wider than a register have no settled way to be.
template <class Whole, class Half>
void add_halves(const Whole& whole, Half& sum) {
  Half halves[2];
  __builtin_memcpy(halves, &whole, sizeof whole);
  sum = halves[0] + halves[1];
}

// 128 bytes of sums; lane k adds the elements k, k + lanes, ... of each run on every ISA, and the
// last lanes of a run are its last elements.
template <class T>
struct Sums {
  Vector<T> part[registers] = {};

  // In T down to eight sums, then in double.
  double total() const {
    Vector<T> folded[registers];
    unrolled<registers>([&](auto r) { folded[r] = part[r]; });
    fold<registers / 2>(folded);
    Pack<T, 8> sums;
    if constexpr (sizeof sums < vector_bytes) {
      add_halves(folded[0], sums);
    } else {
      __builtin_memcpy(&sums, folded, sizeof sums);
    }
    const auto eight = __builtin_convertvector(sums, Pack<double, 8>);
    Pack<double, 4> four;
    Pack<double, 2> two;
    add_halves(eight, four);
    add_halves(four, two);
    return two[0] + two[1];
  }

 private:
  template <int n>
  static void fold(Vector<T>* folded) {
    if constexpr (n * vector_bytes >= index_t(sizeof(Pack<T, 8>))) {
      unrolled<n>([=](auto r) { folded[r] += folded[r + n]; });
      fold<n / 2>(folded);
    }
  }
};

// The last elements of a run, which do not fill the lanes: read as the last lanes of the run, of
// which those already counted are masked out.
template <class T>
struct Tail {
  using Mask = decltype(Vector<T>{} < Vector<T>{});

  // As many zeros as lanes, then as many ones.
  struct Edge {
    decltype(+Mask{}[0]) value[2 * lanes_of<T>] = {};
    constexpr Edge() {
      for (index_t k = lanes_of<T>; k < 2 * lanes_of<T>; ++k) value[k] = -1;
    }
  };
  static constexpr Edge edge{};

  explicit Tail(index_t run) : n(run), begin(n - n % lanes_of<T>) {
    const auto* const from = edge.value + n % lanes_of<T>;
    unrolled<registers>([&](auto r) { mask[r] = load<Mask>(from + r * width_of<T>); });
  }

  index_t n, begin;
  Mask mask[registers];
};

// Calls add(r, read, keep, prefetch) for every register r of every 128 bytes of a run: read(x)
// gives its elements of the array x, keep(v) makes those zero that are not to be counted, and
// prefetch(x) fetches the same place of the array x where that is a new cache line.
template <class T, class Add>
[[gnu::always_inline]] inline void each_lane(const Tail<T>& tail, Add add, index_t begin = 0) {
  constexpr index_t width = width_of<T>;
  for (index_t i = begin; i < tail.begin; i += lanes_of<T>) {
    unrolled<registers>([&](auto r) {
      add(
          r, [=](const T* x) { return load<Vector<T>>(x + i + r * width); },
          [](Vector<T> v) { return v; },
          [=](const T* x) {
            if (r * vector_bytes % line_bytes == 0) prefetch_to_l2(x + i + r * width);
          });
    });
  }
  if (tail.begin == tail.n) return;
  unrolled<registers>([&](auto r) {
    add(
        r, [&](const T* x) { return load<Vector<T>>(x + tail.n - lanes_of<T> + r * width); },
        [&](Vector<T> v) {
          return reinterpret_cast<Vector<T>>(reinterpret_cast<typename Tail<T>::Mask>(v) &
                                             tail.mask[r]);
        },
        [](const T*) {});
  });
}

// How far ahead to prefetch, in elements: the next run, where runs are neither too short nor too
// long for that.
template <class T>
index_t ahead_of(Runs runs) {
  const index_t bytes = runs.inner * index_t(sizeof(T));
  return bytes >= prefetch_bytes / 2 && bytes <= 8 * prefetch_bytes
             ? runs.stride
             : prefetch_bytes / index_t(sizeof(T));
}

// The blocks of a statistic: whole runs as long as they fit, else equal parts of one. A run is no
// shorter than the lanes.
template <class T>
struct Blocks {
  Runs runs;
  index_t group = 1, length;
  Tail<T> part, last_part;

  explicit Blocks(Runs r) : runs(r), length(length_of(r.inner)), part(length), last_part(rest()) {
    if (runs.inner < block && runs.count > 1) group = block / runs.inner;
  }

  // Calls visit(first element, runs, the elements of each run).
  template <class Visit>
  void each(Visit visit) const {
    if (group > 1) {
      for (index_t run = 0; run < runs.count; run += group) {
        visit(run * runs.stride, run + group <= runs.count ? group : runs.count - run, part);
      }
      return;
    }
    for (index_t run = 0; run < runs.count; ++run) {
      for (index_t i = 0; i < runs.inner; i += length) {
        visit(run * runs.stride + i, Constant<1>{}, i + length < runs.inner ? part : last_part);
      }
    }
  }

  // Calls visit(begin, end, first element, runs, the elements of each run) for statistics from
  // `begin` to `end`: one and its blocks in turn, or all where each is a single block. Not inlined,
  // a visit has the registers to itself.
  template <class Visit>
  void each_of(index_t statistics, const Visit& visit) const {
    if (runs.count == 1 && runs.inner < block) return visit(0, statistics, 0, 1, part);
    for (index_t i = 0; i < statistics; ++i) {
      each([&](index_t begin, index_t count, const Tail<T>& tail) {
        visit(i, i + 1, begin, count, tail);
      });
    }
  }

 private:
  static index_t length_of(index_t inner) {
    if (inner < block) return inner;
    const index_t parts = (inner + block / 2) / block;
    const index_t even = (inner + parts - 1) / parts;
    return (even + lanes_of<T> - 1) / lanes_of<T> * lanes_of<T>;
  }

  index_t rest() const {
    const index_t over = runs.inner % length;
    return over == 0 ? length : over;
  }
};
