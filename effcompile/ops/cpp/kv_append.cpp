// The quantization of new tokens of a KV cache on CPU; it writes the same bits as the bodies in effcompile/ops/kv/.

namespace {

uint16_t half_of(float x) { return c10::Half(x).x; }
uint16_t next_up(uint16_t bits) { return bits + 1; }  // of a number that is not negative
uint16_t next_down(uint16_t bits) { return (bits & 0x7fff) == 0 ? 0x8001 : bits & 0x8000 ? bits + 1 : bits - 1; }
constexpr uint16_t NAN16 = 0x7e00;

// Scale of one row of symmetric 8-bit codes: the half next to the quotient that leaves no code beyond what rounds to the largest.
template <typename T, int BITS>
uint16_t scale8(const T* x, int64_t count) {
  float most = 0.f;
  bool sound = true;
  for (int64_t d = 0; d < count; ++d) {
    const float value = std::fabs(static_cast<float>(x[d]));
    most = std::max(most, value);
    sound = sound && finite(value);
  }
  if (!sound) return NAN16;
  constexpr float largest = BITS == FLOATS ? 448.f : BITS == PLANES ? 2047.f : 127.f;
  constexpr float beyond = BITS == FLOATS ? 456.f : largest + .5f;
  uint16_t scale = half_of(most / largest);
  if (beyond * wide(scale) < most) scale = next_up(scale);
  return scale;
}

template <int BITS>
inline int8_t code8(float x, float scale) {
  if (!(scale > 0.f) || !finite(scale)) return 0;
  if (BITS == FLOATS) return static_cast<int8_t>(c10::Float8_e4m3fn(std::clamp(x / scale, -448.f, 448.f)).x);
  return static_cast<int8_t>(std::clamp(std::nearbyint(x / scale), -127.f, 127.f));
}

inline int code12(float x, float scale) {
  if (!(scale > 0.f) || !finite(scale)) return 0;
  return static_cast<int>(std::clamp(std::nearbyint(x / scale), -2047.f, 2047.f));
}

struct Append {
  int64_t batch, kv_heads, depth, width, count, length, packed, packed_after, capacity, group, residual, threads;
  int64_t k_stride[3], v_stride[3];
  const void *k, *v;
  uint8_t *k_codes, *v_codes;
  uint16_t *k_scales, *k_zeros, *v_scales, *v_zeros;
  void *k_recent, *v_recent;
  const int64_t* places;  // [batch, kv_heads]: where the one token of each goes, or null: behind the others
};

template <typename T, int BITS>
void append8(const Append& a) {
  const int64_t width = up(a.width, 16);
#pragma omp parallel for collapse(2) schedule(static) num_threads(a.threads) if (a.count > 64)
  for (int64_t bg = 0; bg < a.batch * a.kv_heads; ++bg) {
    for (int64_t t = 0; t < a.count; ++t) {
      const int64_t b = bg / a.kv_heads, g = bg % a.kv_heads, at = a.places ? a.places[bg] : a.length + t, place = bg * a.capacity + at;
      const T* k = static_cast<const T*>(a.k) + b * a.k_stride[0] + g * a.k_stride[1] + t * a.k_stride[2];
      const T* v = static_cast<const T*>(a.v) + b * a.v_stride[0] + g * a.v_stride[1] + t * a.v_stride[2];
      a.k_scales[place] = scale8<T, BITS>(k, a.depth);
      a.v_scales[place] = scale8<T, BITS == PLANES ? 8 : BITS>(v, a.width);
      const float ks = wide(a.k_scales[place]), vs = wide(a.v_scales[place]);
      int8_t* panel = reinterpret_cast<int8_t*>(a.k_codes) + (bg * a.capacity + at / PANEL8 * PANEL8) * a.depth + at % PANEL8;
      if constexpr (BITS == PLANES) {
        uint8_t* low = reinterpret_cast<uint8_t*>(a.k_zeros) + (bg * a.capacity + at / PANEL8 * PANEL8) * a.depth / 2 + at % PANEL8;
        for (int64_t d = 0; d < a.depth; d += 2) {
          const int x = code12(static_cast<float>(k[d]), ks), y = code12(static_cast<float>(k[d + 1]), ks);
          panel[d * PANEL8] = static_cast<int8_t>(x >> 4);
          panel[(d + 1) * PANEL8] = static_cast<int8_t>(y >> 4);
          low[d / 2 * PANEL8] = static_cast<uint8_t>((x & 15) | (y & 15) << 4);
        }
      } else {
        for (int64_t d = 0; d < a.depth; ++d) panel[d * PANEL8] = code8<BITS>(static_cast<float>(k[d]), ks);
      }
      int8_t* row = reinterpret_cast<int8_t*>(a.v_codes) + place * width;
      for (int64_t d = 0; d < a.width; ++d) row[d] = code8<BITS>(static_cast<float>(v[d]), vs);
    }
  }
}

// Codes of rows with fixed scales; what no scale reaches is clipped, and NaN becomes 0.
template <typename T, int BITS>
void append_rows(const Append& a) {
  constexpr float least = BITS == ROWS8 ? -128.f : -8.f, most = BITS == ROWS8 ? 127.f : 7.f;
#pragma omp parallel for collapse(2) schedule(static) num_threads(a.threads) if (a.count > 64)
  for (int64_t bg = 0; bg < a.batch * a.kv_heads; ++bg)
    for (int64_t t = 0; t < a.count; ++t) {
      const int64_t b = bg / a.kv_heads, g = bg % a.kv_heads, at = a.places ? a.places[bg] : a.length + t;
      for (const bool key : {true, false}) {
        const int64_t many = key ? a.depth : a.width;
        const int64_t* stride = key ? a.k_stride : a.v_stride;
        const T* x = static_cast<const T*>(key ? a.k : a.v) + b * stride[0] + g * stride[1] + t * stride[2];
        const float* scale = reinterpret_cast<const float*>(key ? a.k_scales : a.v_scales) + g * many;
        const auto code = [&](int64_t d) {
          const float value = std::nearbyint(static_cast<float>(x[d]) / scale[d]);
          return value != value ? 0 : static_cast<int>(std::clamp(value, least, most));
        };
        uint8_t* to = (key ? a.k_codes : a.v_codes) + (bg * a.capacity + at) * (BITS == ROWS8 ? many : many / 2);
        if (BITS == ROWS8) {
          for (int64_t d = 0; d < many; ++d) to[d] = static_cast<uint8_t>(code(d));
        } else {
          for (int64_t d = 0; d < many; d += 2) to[d / 2] = static_cast<uint8_t>(code(d) + 8 | (code(d + 1) + 8) << 4);
        }
      }
    }
}

// Scale and zero of a group: the zero is the largest half that is not above any value, the scale the least that reaches all.
struct Grid {
  uint16_t scale, zero;
};

inline Grid grid_of(float least, float most, bool sound, int levels) {
  if (!sound) return {NAN16, NAN16};
  uint16_t zero = half_of(least);
  if (wide(zero) > least) zero = next_down(zero);
  const float span = (most - wide(zero)) / static_cast<float>(levels);
  uint16_t scale = half_of(span);
  if (wide(scale) < span) scale = next_up(scale);
  return {scale, zero};
}

inline uint8_t code_of(float x, float scale, float zero, int levels) {
  if (!(scale > 0.f) || !finite(scale)) return 0;
  return static_cast<uint8_t>(std::clamp(std::nearbyint((x - zero) / scale), 0.f, static_cast<float>(levels)));
}

// Pack the group of tokens that begins at `first`: keys per channel, values per token and span of channels.
template <typename T, int BITS, typename Key, typename Value>
void pack_group(const Append& a, int64_t bg, int64_t first, Key key, Value value) {
  constexpr int levels = (1 << BITS) - 1;
  const int64_t group = a.group, spans = a.width / group, runs = a.width / CHANNELS;
  const int64_t line = (bg * (a.capacity / group) + first / group) * a.depth;
  std::vector<uint8_t> codes(group * std::max(a.depth, a.width));
  for (int64_t d = 0; d < a.depth; ++d) {
    float least = std::numeric_limits<float>::infinity(), most = -least;
    bool sound = true;
    for (int64_t t = 0; t < group; ++t) {
      const float x = static_cast<float>(key(first + t)[d]);
      least = std::min(least, x), most = std::max(most, x), sound = sound && finite(x);
    }
    const Grid grid = grid_of(least, most, sound, levels);
    a.k_scales[line + d] = grid.scale, a.k_zeros[line + d] = grid.zero;
    for (int64_t t = 0; t < group; ++t)
      codes[d * group + t] = code_of(static_cast<float>(key(first + t)[d]), wide(grid.scale), wide(grid.zero), levels);
  }
  uint8_t* k = a.k_codes + (bg * a.capacity + first) * a.depth * BITS / 8;
  for (int64_t panel = 0; panel < group; panel += PANEL, k += PANEL * a.depth * BITS / 8)
    for (int64_t d = 0; d < a.depth; d += 2)
      for (int64_t t = 0; t < 16; ++t) {
        const uint8_t *x = codes.data() + d * group + panel + t, *y = x + group;
        if constexpr (BITS == 4) {
          k[d * 16 + t] = x[0] | x[16] << 4;
          k[d * 16 + 16 + t] = y[0] | y[16] << 4;
        } else {
          k[d * 8 + t] = x[0] | x[16] << 2 | y[0] << 4 | y[16] << 6;
        }
      }
  for (int64_t t = 0; t < group; ++t) {
    const T* from = value(first + t);
    for (int64_t span = 0; span < spans; ++span) {
      float least = std::numeric_limits<float>::infinity(), most = -least;
      bool sound = true;
      for (int64_t d = span * group; d < (span + 1) * group; ++d) {
        const float x = static_cast<float>(from[d]);
        least = std::min(least, x), most = std::max(most, x), sound = sound && finite(x);
      }
      const Grid grid = grid_of(least, most, sound, levels);
      const int64_t at = (bg * spans + span) * a.capacity + first + t;
      a.v_scales[at] = grid.scale, a.v_zeros[at] = grid.zero;
      for (int64_t d = span * group; d < (span + 1) * group; ++d)
        codes[t * a.width + d] = code_of(static_cast<float>(from[d]), wide(grid.scale), wide(grid.zero), levels);
    }
  }
  uint8_t* v = a.v_codes + (bg * a.capacity + first) * a.width * BITS / 8;
  for (int64_t t = 0; t < group; t += 2)
    for (int64_t run = 0; run < runs; ++run)
      for (int64_t d = 0; d < 16; ++d) {
        const uint8_t *x = codes.data() + t * a.width + run * CHANNELS + d, *y = x + a.width;
        if constexpr (BITS == 4) {
          v[(t * runs + run) * 16 + d] = x[0] | x[16] << 4;
          v[((t + 1) * runs + run) * 16 + d] = y[0] | y[16] << 4;
        } else {
          v[(t / 2 * runs + run) * 16 + d] = x[0] | x[16] << 2 | y[0] << 4 | y[16] << 6;
        }
      }
}

template <typename T, int BITS>
void append_grouped(const Append& a) {
  const int64_t groups = (a.packed_after - a.packed) / a.group;
  const auto row = [&](int64_t bg, int64_t j, bool key) {
    const int64_t many = key ? a.depth : a.width;
    if (j < a.length) return static_cast<const T*>(key ? a.k_recent : a.v_recent) + (bg * a.residual + j % a.residual) * many;
    const int64_t* stride = key ? a.k_stride : a.v_stride;
    return static_cast<const T*>(key ? a.k : a.v) + bg / a.kv_heads * stride[0] + bg % a.kv_heads * stride[1] +
           (j - a.length) * stride[2];
  };
#pragma omp parallel for collapse(2) schedule(static) num_threads(a.threads) if (groups * a.batch * a.kv_heads > 2)
  for (int64_t bg = 0; bg < a.batch * a.kv_heads; ++bg)
    for (int64_t n = 0; n < groups; ++n)
      pack_group<T, BITS>(
          a, bg, a.packed + n * a.group, [&](int64_t j) { return row(bg, j, true); }, [&](int64_t j) { return row(bg, j, false); });
  // What stays is written last: a group may have been read from the places that it takes.
  for (int64_t bg = 0; bg < a.batch * a.kv_heads; ++bg)
    for (int64_t j = std::max(a.length, a.packed_after); j < a.length + a.count; ++j) {
      std::memcpy(static_cast<T*>(a.k_recent) + (bg * a.residual + j % a.residual) * a.depth, row(bg, j, true), a.depth * sizeof(T));
      std::memcpy(static_cast<T*>(a.v_recent) + (bg * a.residual + j % a.residual) * a.width, row(bg, j, false), a.width * sizeof(T));
    }
}

}  // namespace

extern "C" void eff_kv_append(int64_t dtype, const int64_t* sizes, void* const* at) {
  Append a{};
  const int64_t bits = *sizes++;
  for (int64_t* field : {&a.batch, &a.kv_heads, &a.depth, &a.width, &a.count, &a.length, &a.packed, &a.packed_after, &a.capacity,
                         &a.group, &a.residual, &a.threads})
    *field = *sizes++;
  for (int i = 0; i < 3; ++i) a.k_stride[i] = *sizes++;
  for (int i = 0; i < 3; ++i) a.v_stride[i] = *sizes++;
  a.k = at[0], a.v = at[1];
  a.k_codes = static_cast<uint8_t*>(at[2]), a.v_codes = static_cast<uint8_t*>(at[3]);
  a.k_scales = static_cast<uint16_t*>(at[4]), a.v_scales = static_cast<uint16_t*>(at[5]);
  a.k_zeros = static_cast<uint16_t*>(at[6]), a.v_zeros = static_cast<uint16_t*>(at[7]);
  a.k_recent = at[8], a.v_recent = at[9];
  a.places = static_cast<const int64_t*>(at[10]);
  by_type(dtype, [&](auto kind) {
    using T = decltype(kind);
    if (bits == 8) {
      append8<T, 8>(a);
    } else if (bits == FLOATS) {
      append8<T, FLOATS>(a);
    } else if (bits == PLANES) {
      append8<T, PLANES>(a);
    } else if (bits == ROWS8) {
      append_rows<T, ROWS8>(a);
    } else if (bits == ROWS4) {
      append_rows<T, ROWS4>(a);
    } else if (bits == 4) {
      append_grouped<T, 4>(a);
    } else {
      append_grouped<T, 2>(a);
    }
  });
}
