// A few rows of a few columns, held as a vector for each column. Included by kernels.cpp inside the
// namespace of one ISA.

template <class T, index_t most>
struct Tile {
  static constexpr index_t rows = vector_bytes / index_t(sizeof(T));
  Vector<T> column[most];
};

// Of the numbers of a and then b those at these places.
template <class T, int... place>
Vector<T> shuffled(Vector<T> a, Vector<T> b, Indices<place...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, place...);
#else
  using Places = decltype(a < b);
  return __builtin_shuffle(a, b, Places{place...});
#endif
}

// One bit of the rows' index for one of the columns', in ways that processors are fast at: numbers
// in turns from both rows in each 16 bytes, or every second 16 bytes.
template <class T, bool within, int... k>
void exchange(Vector<T>& a, Vector<T>& b, Indices<k...>) {
  constexpr int width = sizeof...(k), part = 16 / int(sizeof(T));
  const Vector<T> x = a, y = b;
  if constexpr (within) {
    a = shuffled<T>(x, y, Indices<(k / part * part + k % part / 2 + k % 2 * width)...>{});
    b = shuffled<T>(x, y, Indices<(k / part * part + (k % part + part) / 2 + k % 2 * width)...>{});
  } else {
    a = shuffled<T>(x, y, Indices<(k / part * 2 * part + k % part)...>{});
    b = shuffled<T>(x, y, Indices<(k / part * 2 * part + k % part + part)...>{});
  }
}

// Of rows so far apart, then of those of the next bit.
template <class T, int apart>
[[gnu::always_inline]] inline void exchange_rows(Vector<T>* v) {
  constexpr int width = vector_bytes / int(sizeof(T)), part = 16 / int(sizeof(T));
  if constexpr (apart < width) {
    unrolled<width / 2>([=](auto i) {
      Vector<T>* const first = v + i / apart * 2 * apart + i % apart;
      exchange<T, (apart < part)>(first[0], first[apart], CountTo<width>{});
    });
    constexpr int next = apart >= part ? 2 * apart : apart > 1 ? apart / 2 : part;
    exchange_rows<T, next>(v);
  }
}

// A square of numbers.
template <class T>
void transpose(Vector<T>* square) {
  constexpr int width = vector_bytes / int(sizeof(T));
  Vector<T> v[width];
  unrolled<width>([&](auto i) { v[i] = square[i]; });
  exchange_rows<T, 8 / int(sizeof(T))>(v);
  unrolled<width>([&](auto i) { square[i] = v[i]; });
}

// The first rows of those that are left. A row's load may reach into the next rows, but not past
// the last one.
template <class T, index_t most>
void load_columns(const T* from, index_t rows_left, index_t columns, Tile<T, most>& tile) {
  constexpr index_t width = Tile<T, most>::rows;
  const index_t rows = rows_left < width ? rows_left : width, n = rows * columns;
  const index_t reach = (width - 1) * columns + (columns + width - 1) / width * width;
  T padded[width * most + width];
  if (reach > rows_left * columns) {
    __builtin_memcpy(padded, from, sizeof(T) * static_cast<__SIZE_TYPE__>(n));
    for (index_t i = n; i < reach; ++i) padded[i] = 0;
    from = padded;
  }
  for (index_t c = 0; c < columns; c += width) {
    for (index_t r = 0; r < width; ++r) {
      tile.column[c + r] = load<Vector<T>>(from + r * columns + c);
    }
    transpose<T>(tile.column + c);
  }
}

template <class T, index_t most>
void store_columns(Tile<T, most>& tile, T* to, index_t rows, index_t columns) {
  constexpr index_t width = Tile<T, most>::rows;
  T padded[width * most + width];
  T* const rows_to = columns % width == 0 ? to : padded;
  for (index_t c = 0; c < columns; c += width) transpose<T>(tile.column + c);
  for (index_t r = 0; r < rows; ++r) {  // a row's padding is under the next row
    for (index_t c = 0; c < columns; c += width) {
      store<false>(rows_to + r * columns + c, tile.column[c + r]);
    }
  }
  if (rows_to != to) {
    __builtin_memcpy(to, padded, sizeof(T) * static_cast<__SIZE_TYPE__>(rows * columns));
  }
}
