// A few rows of a few columns, held as a vector for each column. Included by kernels.cpp inside the
// namespace of one ISA.

template <class T, index_t most>
struct Tile {
  static constexpr index_t rows = vector_bytes / index_t(sizeof(T));
  Vector<T> column[most];
};

template <class T, int... k>
void zip(Vector<T>& low, Vector<T>& high, Vector<T> a, Vector<T> b, Indices<k...>) {
  constexpr int width = sizeof...(k);
#ifdef __clang__
  low = __builtin_shufflevector(a, b, (k / 2 + k % 2 * width)...);
  high = __builtin_shufflevector(a, b, (width / 2 + k / 2 + k % 2 * width)...);
#else
  using Places = decltype(a < b);
  low = __builtin_shuffle(a, b, Places{(k / 2 + k % 2 * width)...});
  high = __builtin_shuffle(a, b, Places{(width / 2 + k / 2 + k % 2 * width)...});
#endif
}

// A square of numbers: after log2(width) rounds of the perfect shuffle it is transposed.
template <class T>
void transpose(Vector<T>* v) {
  constexpr int width = vector_bytes / int(sizeof(T));
  for (int round = 1; round < width; round *= 2) {
    Vector<T> zipped[width];
    for (int i = 0; i < width / 2; ++i) {
      zip<T>(zipped[2 * i], zipped[2 * i + 1], v[i], v[i + width / 2], CountTo<width>{});
    }
    for (int i = 0; i < width; ++i) v[i] = zipped[i];
  }
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
