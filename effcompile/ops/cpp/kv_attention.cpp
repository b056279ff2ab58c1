// Attention over a quantized KV cache on CPU. effcompile/ops/native.py compiles this once, together with kv_append.cpp.
//
// Codes become floats in registers, inside the two products of attention: no dequantized key or value is ever stored. All query
// heads of a key head are taken together, so that a code is converted once for them. Keys lie in panels of tokens, so that scores
// of neighboring tokens fill a register; values lie in rows. The keys are split into parts of fixed length, which threads take in
// turn and whose results are merged by their maxima and sums: no result depends on the number of threads.

namespace {

// --- a part of the packed tokens -----------------------------------------------------------------------------------------------

template <int BITS>
void attend_packed(const Problem& p, const float* q, int64_t b, int64_t g, int64_t begin, int64_t end, Scratch& own,
                   const Partial& to) {
  const int64_t rows = p.group_rows(), lds = CHUNK, bg = b * p.kv_heads + g;
  const int64_t values = BITS >= 8 ? up(p.width, 16) : p.width, runs = p.width / CHANNELS;
  own.scores.resize(rows * lds);
  float* s = own.scores.data();
  if constexpr (BITS == ROWS8 || BITS == ROWS4) {
    constexpr int64_t part = BITS == ROWS4 ? 2 : 1;
    own.queries.resize(rows * p.depth);
    float* scaled = own.queries.data();
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t d = 0; d < p.depth; ++d) scaled[i * p.depth + d] = q[i * p.depth + d] * p.k_fixed[g * p.depth + d];
    const Rows r{scaled, rows, p.depth, values, s, to.values, lds};
    by_visible(p, b, g, begin, end, [&](int64_t at, int64_t count) {
      const int64_t padded = up(count, PANEL8);
      scores_rows<BITS>(p.k_codes + (bg * p.capacity + at) * p.depth / part, r, count, own.codes);
      restrict_scores(p, b, g, at, count, padded, s, lds);
      tell_scores(p, bg, at, count, s, lds);
      soften(p, s, lds, padded, to, values);
      values_rows<BITS>(p.v_codes + (bg * p.capacity + at) * p.width / part, r, count, own.codes);
    });
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t d = 0; d < p.width; ++d) to.values[i * values + d] *= p.v_fixed[g * p.width + d];
    return;
  }
  if constexpr (BITS == HIGH) {  // the lower plane counts as its middle
    own.bias.assign(rows, 0.f);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t d = 0; d < p.depth; ++d) own.bias[i] += 8.f * q[i * p.depth + d];
  }
  by_visible(p, b, g, begin, end, [&](int64_t at, int64_t count) {
    if constexpr (BITS >= 8) {
      constexpr int CODES = BITS == FLOATS ? FLOATS : 8;
      const Reg unit = every(BITS == FLOATS ? 256.f : 1.f);
      const int64_t padded = up(count, PANEL8);
      own.weights.resize(rows * lds);
      const int8_t* k = reinterpret_cast<const int8_t*>(p.k_codes) + (bg * p.capacity + at) * p.depth;
      by_rows(rows, [&](auto n, int64_t i) {
        if constexpr (BITS == PLANES) {
          const uint8_t* low = reinterpret_cast<const uint8_t*>(p.k_zeros) + (bg * p.capacity + at) * p.depth / 2;
          for (int64_t j = 0; j < padded; j += PANEL8)
            scores_planes<n.value>(k + j * p.depth, low + j * p.depth / 2, p.depth, q + i * p.depth, s + i * lds + j, lds);
        } else {
          scores8<n.value, CODES>(k, p.depth, padded / PANEL8, q + i * p.depth, s + i * lds, lds);
        }
      });
      if constexpr (BITS == HIGH)
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t j = 0; j < padded; j += W)
            store(s + i * lds + j, plus_product(every(own.bias[i]), load(s + i * lds + j), every(16.f)));
      const uint16_t *ks = p.k_scales + bg * p.capacity + at, *vs = p.v_scales + bg * p.capacity + at;
      for (int64_t j = 0; j < padded; j += W) {
        const Reg scale = times(halves(ks + j), unit);
        for (int64_t i = 0; i < rows; ++i) store(s + i * lds + j, times(load(s + i * lds + j), scale));
      }
      restrict_scores(p, b, g, at, count, padded, s, lds);
      tell_scores(p, bg, at, count, s, lds);
      soften(p, s, lds, padded, to, values);
      float* w = own.weights.data();
      for (int64_t j = 0; j < padded; j += W) {
        const Reg scale = times(halves(vs + j), unit);
        for (int64_t i = 0; i < rows; ++i) store(w + i * lds + j, times(load(s + i * lds + j), scale));
      }
      const int8_t* v = reinterpret_cast<const int8_t*>(p.v_codes) + (bg * p.capacity + at) * values;
      by_rows(rows, [&](auto n, int64_t i) {
        int64_t d = 0;
        for (; d + 4 * W <= values; d += 4 * W)
          values8<n.value, 4, CODES>(v + d, values, count, w + i * lds, lds, to.values + i * values + d);
        for (; d < values; d += W) values8<n.value, 1, CODES>(v + d, values, count, w + i * lds, lds, to.values + i * values + d);
      });
    } else {
      const int64_t padded = up(count, PANEL), groups = p.capacity / p.group, spans = p.width / p.group;
      own.queries.resize(rows * p.depth);
      own.bias.resize(rows);
      own.zeros.resize(2 * std::max(p.depth, p.width));
      float *scaled = own.queries.data(), *bias = own.bias.data();
      const uint8_t* k = p.k_codes + (bg * p.capacity + at) * p.depth * BITS / 8;
      for (int64_t j = 0; j < padded; j += PANEL) {
        if (j == 0 || (at + j) % p.group == 0) {  // a group begins: its scales go into the queries
          const int64_t line = (bg * groups + (at + j) / p.group) * p.depth;
          for (int64_t i = 0; i < rows; ++i) {
            Reg sum = every(0.f);
            for (int64_t d = 0; d < p.depth; d += W) {
              const Reg x = load(q + i * p.depth + d);
              store(scaled + i * p.depth + d, times(x, halves(p.k_scales + line + d)));
              sum = plus_product(sum, x, halves(p.k_zeros + line + d));
            }
            bias[i] = total(sum);
          }
        }
        by_rows(rows, [&](auto n, int64_t i) {
          scores_panel<n.value, BITS>(k + j * p.depth * BITS / 8, p.depth, scaled + i * p.depth, bias + i, s + i * lds + j, lds);
        });
      }
      restrict_scores(p, b, g, at, count, padded, s, lds);
      tell_scores(p, bg, at, count, s, lds);
      soften(p, s, lds, padded, to, values);
      own.weights.resize(rows * lds);
      float* w = own.weights.data();
      const uint8_t* v = p.v_codes + (bg * p.capacity + at) * p.width * BITS / 8;
      for (int64_t span = 0; span < spans; ++span) {
        const int64_t line = (bg * spans + span) * p.capacity + at;
        for (int64_t i = 0; i < rows; ++i) {
          Reg sum = every(0.f);
          for (int64_t j = 0; j < padded; j += W) {
            const Reg prob = load(s + i * lds + j);
            store(w + i * lds + j, times(prob, halves(p.v_scales + line + j)));
            sum = plus_product(sum, prob, halves(p.v_zeros + line + j));
          }
          const Reg shift = every(total(sum));
          float* sums = to.values + i * values + span * p.group;
          for (int64_t d = 0; d < p.group; d += W) store(sums + d, add(load(sums + d), shift));
        }
        for (int64_t run = span * p.group / CHANNELS; run < (span + 1) * p.group / CHANNELS; ++run)
          by_rows(rows, [&](auto n, int64_t i) {
            values_run<n.value, BITS>(v + run * 16, runs * 16, padded, w + i * lds, lds, to.values + i * values + run * CHANNELS,
                                      values);
          });
      }
    }
  });
}

// --- the tokens that are not packed: the recent ones or all, and those of this call ----------------------------------------------------

inline void widen(const float* from, float* to, int64_t count) { std::memcpy(to, from, count * sizeof(float)); }
template <typename T>
inline void widen(const T* from, float* to, int64_t count) {
  for (int64_t d = 0; d < count; ++d) to[d] = static_cast<float>(from[d]);
}

inline float dot(const float* x, const float* y, int64_t count) {
  Reg sum = every(0.f);
  int64_t d = 0;
  for (; d + W <= count; d += W) sum = plus_product(sum, load(x + d), load(y + d));
  float result = total(sum);
  for (; d < count; ++d) result += x[d] * y[d];
  return result;
}

template <typename T>
void attend_plain(const Problem& p, const float* q, int64_t b, int64_t g, int64_t begin, int64_t end, Scratch& own, const Partial& to) {
  const int64_t rows = p.group_rows(), lds = CHUNK, bg = b * p.kv_heads + g;
  const int64_t values = p.group ? p.width : up(p.width, 16);
  own.scores.resize(rows * lds);
  own.row.resize(std::max(p.depth, p.width));
  float *s = own.scores.data(), *row = own.row.data();
  const auto of = [&](int64_t j, bool key) {
    if (j >= p.old()) {
      const int64_t* stride = key ? p.k_stride : p.v_stride;
      return static_cast<const T*>(key ? p.k : p.v) + b * stride[0] + g * stride[1] + (j - p.old()) * stride[2];
    }
    const int64_t many = key ? p.depth : p.width;
    return static_cast<const T*>(key ? p.k_recent : p.v_recent) + (bg * p.residual + j % p.residual) * many;
  };
  by_visible(p, b, g, begin, end, [&](int64_t at, int64_t count) {
    const int64_t padded = up(count, 16);
    for (int64_t j = 0; j < count; ++j) {
      widen(of(at + j, true), row, p.depth);
      for (int64_t i = 0; i < rows; ++i) s[i * lds + j] = dot(q + i * p.depth, row, p.depth);
    }
    restrict_scores(p, b, g, at, count, padded, s, lds);
    tell_scores(p, bg, at, count, s, lds);
    soften(p, s, lds, padded, to, values);
    for (int64_t j = 0; j < count; ++j) {
      widen(of(at + j, false), row, p.width);
      for (int64_t i = 0; i < rows; ++i) {
        const float by = s[i * lds + j];
        float* sums = to.values + i * values;
        // A row that does not see the token may meet anything in it, NaN too.
        if (by != 0.f)
          for (int64_t d = 0; d < p.width; ++d) sums[d] += by * row[d];
      }
    }
  });
}

// --- all of it ---------------------------------------------------------------------------------------------------------------

template <typename T, int BITS>
void attend(const Problem& p) {
  const int64_t rows = p.group_rows(), values = p.group ? p.width : up(p.width, 16), pairs = p.batch * p.kv_heads;
  const int64_t packed = std::min(p.packed, p.old()), splits = (packed + SPLIT - 1) / SPLIT;
  const int64_t parts = splits + (p.length - packed + SPLIT - 1) / SPLIT;
  std::vector<float> queries(pairs * rows * p.depth), tops(pairs * parts * rows, NEG), sums(pairs * parts * rows, 0.f),
      weighted(pairs * parts * rows * values, 0.f);
  const T* q = static_cast<const T*>(p.q);
  for (size_t n = 0; n < queries.size(); ++n) queries[n] = static_cast<float>(q[n]) * p.scale;
#pragma omp parallel num_threads(p.threads)
  {
    Scratch own;
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < pairs * parts; ++n) {
      const int64_t bg = n / parts, b = bg / p.kv_heads, g = bg % p.kv_heads, part = n % parts;
      if (p.pick && !p.pick[bg]) continue;
      const Partial to{tops.data() + n * rows, sums.data() + n * rows, weighted.data() + n * rows * values};
      const float* mine = queries.data() + bg * rows * p.depth;
      if (part >= splits) {
        const int64_t begin = packed + (part - splits) * SPLIT;
        attend_plain<T>(p, mine, b, g, begin, std::min<int64_t>(p.length, begin + SPLIT), own, to);
      } else if constexpr (BITS != 0) {
        attend_packed<BITS>(p, mine, b, g, part * SPLIT, std::min<int64_t>(packed, (part + 1) * SPLIT), own, to);
      }
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < pairs * rows; ++n) {
      const int64_t bg = n / rows, i = n % rows;
      if (p.pick && !p.pick[bg]) continue;
      float top = NEG, sum = 0.f;
      for (int64_t part = 0; part < parts; ++part) top = std::max(top, tops[(bg * parts + part) * rows + i]);
      const float shift = top == NEG ? 0.f : top;
      own.row.assign(p.width, 0.f);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t at = (bg * parts + part) * rows + i;
        const float by = std::exp(tops[at] - shift);
        if (tops[at] == NEG) continue;  // nothing was visible in it
        sum += sums[at] * by;
        for (int64_t d = 0; d < p.width; ++d) own.row[d] += weighted[at * values + d] * by;
      }
      const float by = sum > 0.f ? 1.f / sum : sum == 0.f ? 0.f : sum;
      T* out = static_cast<T*>(p.out) + n * p.width;
      for (int64_t d = 0; d < p.width; ++d) out[d] = static_cast<T>(own.row[d] * by);
      if (p.peaks) p.peaks[n] = sum == 0.f ? 1.f : by;  // the sum is one of exp(score - largest score)
      p.lse[n] = sum > 0.f ? top + std::log(sum) : sum == 0.f ? NEG : sum;
    }
  }
}

// Keys of 12 bits in two planes: the lower one is read for the key heads of which some row has no probability of `theta` or more by
// the upper one, now or at the last step, which `last` tells [batch, kv_heads]. `peaks` gets the least of the rows' largest.
template <typename T>
void attend_planes(Problem p, float theta, const float* last, float* peaks) {
  const int64_t rows = p.group_rows(), pairs = p.batch * p.kv_heads;
  std::vector<float> tops(pairs * rows);
  std::vector<uint8_t> high(pairs, 1), whole(pairs, 0);
  p.peaks = tops.data();
  const auto least = [&](int64_t bg) { return *std::min_element(tops.begin() + bg * rows, tops.begin() + (bg + 1) * rows); };
  for (int64_t bg = 0; last && bg < pairs; ++bg) whole[bg] = !(last[bg] >= theta), high[bg] = !whole[bg];
  if (!last && theta > 1.f) high.assign(pairs, 0), whole.assign(pairs, 1);  // no probability is that large
  p.pick = high.data();
  attend<T, HIGH>(p);
  for (int64_t bg = 0; bg < pairs; ++bg) {
    if (high[bg] && !last) whole[bg] = !(least(bg) >= theta);
    if (high[bg]) peaks[bg] = least(bg);
  }
  p.pick = whole.data();
  attend<T, PLANES>(p);
  for (int64_t bg = 0; bg < pairs; ++bg)
    if (whole[bg] && (last || !high[bg])) peaks[bg] = least(bg);
}

}  // namespace

// dtype: 0 float, 1 bfloat16, 2 half, of q, k, v, the recent tokens and the result. Sizes, of which the first is the bits (8, 4, 2, a name
// of codes.h, or 0 where all tokens are kept as they are), and pointers come in the order of use.
extern "C" void eff_kv_attention(int64_t dtype, const int64_t* sizes, const void* const* at, float scale, float softcap, float theta) {
  Problem p{};
  const int64_t bits = *sizes++;
  for (int64_t* field : {&p.batch, &p.heads, &p.kv_heads, &p.rows, &p.depth, &p.width, &p.length, &p.fresh, &p.packed, &p.capacity,
                         &p.group, &p.residual, &p.mask_kind, &p.causal, &p.threads})
    *field = *sizes++;
  for (int i = 0; i < 3; ++i) p.k_stride[i] = *sizes++;
  for (int i = 0; i < 3; ++i) p.v_stride[i] = *sizes++;
  for (int i = 0; i < 4; ++i) p.mask_stride[i] = *sizes++;
  p.q = at[0], p.k = at[1], p.v = at[2], p.mask = at[3];
  p.out = const_cast<void*>(at[4]), p.lse = static_cast<float*>(const_cast<void*>(at[5]));
  p.logits = static_cast<float*>(const_cast<void*>(at[6]));
  ++at;
  p.k_codes = static_cast<const uint8_t*>(at[6]), p.v_codes = static_cast<const uint8_t*>(at[7]);
  p.k_scales = static_cast<const uint16_t*>(at[8]), p.v_scales = static_cast<const uint16_t*>(at[9]);
  p.k_zeros = static_cast<const uint16_t*>(at[10]), p.v_zeros = static_cast<const uint16_t*>(at[11]);
  p.k_recent = at[12], p.v_recent = at[13];
  p.k_fixed = static_cast<const float*>(at[8]), p.v_fixed = static_cast<const float*>(at[9]);
  p.scale = scale, p.softcap = softcap;
  by_type(dtype, [&](auto kind) {
    using T = decltype(kind);
    if (bits == 8) {
      attend<T, 8>(p);
    } else if (bits == FLOATS) {
      attend<T, FLOATS>(p);
    } else if (bits == ROWS8) {
      attend<T, ROWS8>(p);
    } else if (bits == ROWS4) {
      attend<T, ROWS4>(p);
    } else if (bits == PLANES) {
      attend_planes<T>(p, theta, static_cast<const float*>(at[14]), static_cast<float*>(const_cast<void*>(at[15])));
    } else if (bits == 0) {
      attend<T, 0>(p);
    } else if (bits == 4) {
      attend<T, 4>(p);
    } else {
      attend<T, 2>(p);
    }
  });
}
