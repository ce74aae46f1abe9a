// float32 numbers in fewer bytes, and back: fastopt.codecs says it in NumPy. Included by
// kernels.cpp inside the namespace of one ISA.
//
// Only integers decide what is stored, so that no mode of the processor changes it: subnormal
// numbers are neither read as zero nor made zero here.

using Word = unsigned;

inline Word bits_of(float x) {
  return __builtin_bit_cast(Word, x);
}
inline float float_of(Word bits) {
  return __builtin_bit_cast(float, bits);
}

constexpr Word sign_bit = 0x80000000u, infinity_bits = 0x7f800000u, nan_bits = 0x7fc00000u;
constexpr Word one_bits = 0x3f800000u;

// bfloat16: the upper half of a float32.

// What is cut to its upper half then; any NaN is one.
inline Word rounded_up(Word bits, Word by) {
  return (bits & ~sign_bit) > infinity_bits ? nan_bits : bits + by;
}

inline void load_bfloat16(const void* from, const float*, index_t n, float* __restrict to) {
  const auto* __restrict x = static_cast<const unsigned short*>(from);
#pragma omp simd
  for (index_t i = 0; i < n; ++i) to[i] = float_of(Word(x[i]) << 16);
}

inline void store_bfloat16(const float* __restrict from, index_t n, void* to, float*) {
  auto* __restrict y = static_cast<unsigned short*>(to);
#pragma omp simd
  for (index_t i = 0; i < n; ++i) {
    const Word bits = bits_of(from[i]);
    y[i] = static_cast<unsigned short>(rounded_up(bits, 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

// Two elements have a word, the one of the even index its lower half.
inline void store_bfloat16_at_random(const float* __restrict from, index_t element, index_t n,
                                     Key key, void* to) {
  constexpr index_t piece = scale_block;
  auto* __restrict y = static_cast<unsigned short*>(to);
  for (index_t begin = 0; begin < n; begin += piece) {
    const auto first = static_cast<Word>((element + begin) / 2);
    union {
      Word word[piece / 2];
      unsigned short half[piece];
    } random;
#pragma omp simd
    for (index_t i = 0; i < piece / 2; ++i) {
      Word w = (first + static_cast<Word>(i)) ^ key.word[0];
      w = ((w ^ w >> 16) * 0x7feb352du) ^ key.word[1];
      w = (w ^ w >> 15) * 0x846ca68bu;
      random.word[i] = w ^ w >> 16;
    }
    const index_t end = begin + piece < n ? begin + piece : n;
#pragma omp simd
    for (index_t i = begin; i < end; ++i) {
      const Word by = random.half[i - begin];
      y[i] = static_cast<unsigned short>(rounded_up(bits_of(from[i]), by) >> 16);
    }
  }
}

// float16: five bits of exponent; its subnormal numbers are normal ones here.

inline void load_float16(const void* from, const float*, index_t n, float* __restrict to) {
  const auto* __restrict x = static_cast<const unsigned short*>(from);
#pragma omp simd
  for (index_t i = 0; i < n; ++i) {
    const Word magnitude = Word(x[i] & 0x7fff) << 13, sign = Word(x[i] & 0x8000) << 16;
    const Word normal = magnitude + (Word(127 - 15) << 23);
    const Word special = magnitude + (Word(255 - 31) << 23);  // infinite or NaN
    const Word small = bits_of(float(int(x[i] & 0x7fff)) * 0x1p-24f);
    const Word large = magnitude >= Word(31) << 23 ? special : normal;
    to[i] = float_of((magnitude < Word(1) << 23 ? small : large) | sign);
  }
}

inline void store_float16(const float* __restrict from, index_t n, void* to, float*) {
  auto* __restrict y = static_cast<unsigned short*>(to);
  constexpr Word smallest = Word(127 - 14) << 23, beyond = Word(127 + 16) << 23;
#pragma omp simd
  for (index_t i = 0; i < n; ++i) {
    const Word bits = bits_of(from[i]), magnitude = bits & ~sign_bit, sign = bits >> 16 & 0x8000;
    const Word normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (Word(127 - 15) << 23)) >> 13;
    // Rounds at 2^-24, the last place of 0.5.
    const Word small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const Word special = magnitude > infinity_bits ? 0x7e00 | (magnitude >> 13 & 0x3ff) : 0x7c00;
    const Word finite = magnitude < smallest ? small : normal;
    y[i] = static_cast<unsigned short>((magnitude >= beyond ? special : finite) | sign);
  }
}

// 8 bits: an exponent and three bits of mantissa, of the magnitude beside the largest of its block,
// shifted so that 0 is a number and small ones are linear: ((1 + (u & 7) / 8) 2^(u >> 3) - 1) /
// top. With a sign, u has 7 bits, without one 8.
template <bool is_signed>
struct EightBits {
  static constexpr Word top_code = is_signed ? 127 : 255;
  static constexpr float top = is_signed ? 0x1.ep15f - 1 : 0x1.ep31f - 1;
  static constexpr int mantissa_shift = 20;  // of a float32's 23 bits, three are left

  static void load(const void* from, const float* scales, index_t n, float* to) {
    const auto* codes = static_cast<const unsigned char*>(from);
    for (index_t begin = 0; begin < n; begin += scale_block) {
      const index_t end = begin + scale_block < n ? begin + scale_block : n;
      load_block(codes + begin, *scales++ / top, end - begin, to + begin);
    }
  }

  // All scales first: the codes of a block wait long for its own.
  static void store(const float* from, index_t n, void* to, float* scales) {
    auto* codes = static_cast<unsigned char*>(to);
    const auto each_block = [&](auto visit) {
      for (index_t begin = 0, k = 0; begin < n; begin += scale_block, ++k) {
        const index_t end = begin + scale_block < n ? begin + scale_block : n;
        visit(from + begin, end - begin, codes + begin, scales[k]);
      }
    };
    each_block([](const float* x, index_t size, unsigned char*, float& scale) {
      scale = scale_of(largest_of(x, size));
    });
    each_block(store_block);
  }

 private:
  static void load_block(const unsigned char* __restrict codes, float unit, index_t n,
                         float* __restrict to) {
#pragma omp simd
    for (index_t i = 0; i < n; ++i) {
      const Word code = Word(is_signed ? int(static_cast<signed char>(codes[i])) : int(codes[i]))
                        << mantissa_shift;
      const Word one = is_signed ? (code & sign_bit) | one_bits : one_bits;
      const Word kept = is_signed ? code & (sign_bit | top_code << mantissa_shift) : code;
      to[i] = (float_of(kept + one_bits) - float_of(one)) * unit;
    }
  }

  static Word largest_of(const float* x, index_t n) {
    int largest = 0;
#pragma omp simd reduction(max : largest)
    for (index_t i = 0; i < n; ++i) {
      const int magnitude = int(bits_of(x[i]) & ~sign_bit);
      largest = magnitude > largest ? magnitude : largest;
    }
    return Word(largest);
  }

  // A block of numbers too small for one is zero; where one is infinite or NaN, all are NaN.
  static float scale_of(Word largest) {
    if (largest >= infinity_bits) return float_of(nan_bits);
    return largest < bits_of(smallest_scale) ? 0 : float_of(largest);
  }

  static void store_block(const float* __restrict from, index_t n, unsigned char* __restrict codes,
                          float scale) {
    if (!(scale > 0)) {
      __builtin_memset(codes, 0, static_cast<__SIZE_TYPE__>(n));
      return;
    }
    const float unit = top / scale;
#pragma omp simd
    for (index_t i = 0; i < n; ++i) {
      const Word bits = bits_of(from[i]), magnitude = is_signed ? bits & ~sign_bit : bits;
      const Word half = Word(1) << (mantissa_shift - 1);
      int u = int(bits_of(float_of(magnitude) * unit + 1) + half - one_bits);
      if (!is_signed) {  // what is positive does not become zero: it is divided by
        constexpr int one_code = 1 << mantissa_shift;
        const int least = int(bits) < one_code ? int(bits) : one_code;
        u = u > least ? u : least;
      }
      const Word sign = is_signed ? bits >> 24 & 0x80 : 0;
      codes[i] = static_cast<unsigned char>(Word(u) >> mantissa_shift | sign);
    }
  }

  static constexpr float smallest_scale = 0x1p-90f;
};
