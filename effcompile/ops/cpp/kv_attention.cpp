// Attention over a quantized KV cache on CPU. effcompile/ops/native.py compiles this once, together with kv_append.cpp.
//
// Codes become floats in registers, inside the two products of attention: no dequantized key or value is ever stored. All query
// heads of a key head are taken together, so that a code is converted once for them. Keys lie in panels of tokens, so that scores
// of neighboring tokens fill a register; values lie in rows. The keys are split into parts of fixed length, which threads take in
// turn and whose results are merged by their maxima and sums: no result depends on the number of threads.

namespace {

constexpr int CHUNK = 256;  // keys whose scores exist at a time
constexpr int SPLIT = 512;  // keys of one part

// --- the problem -------------------------------------------------------------------------------------------------------------

struct Problem {
  int64_t batch, heads, kv_heads, rows, depth, width;  // rows: queries of one head
  int64_t length, fresh, packed, capacity;  // tokens in all, of this call, in packed form; tokens that the buffers hold
  int64_t group, residual;                  // of grouped formats; 0 for 8 bits
  int64_t mask_kind, causal, threads;       // mask_kind: 0 none, 1 bool, 2 float
  int64_t k_stride[3], v_stride[3], mask_stride[4];
  const void *q, *k, *v, *mask;
  const uint8_t *k_codes, *v_codes;
  const uint16_t *k_scales, *k_zeros, *v_scales, *v_zeros;
  const void *k_recent, *v_recent;
  void* out;
  float *lse, *logits;  // logits: scores as softmax gets them, [batch, heads, rows, capacity + fresh], or null
  float scale, softcap;

  int64_t group_rows() const { return heads / kv_heads * rows; }
  int64_t old() const { return length - fresh; }
};

struct Scratch {
  std::vector<float> scores, weights, queries, bias, row, zeros;
};

struct Partial {  // of one part: maxima, sums of exponentials, weighted values [group_rows, padded width]
  float *top, *sum, *values;
};

// Whether any row may see a key of [begin, begin + count).
bool any_visible(const Problem& p, int64_t b, int64_t g, int64_t begin, int64_t count) {
  if (p.mask_kind != 1) return true;
  const int64_t shared = p.mask_stride[1] == 0 ? 1 : p.heads / p.kv_heads;
  for (int64_t h = 0; h < shared; ++h)
    for (int64_t i = 0; i < p.rows; ++i) {
      const uint8_t* m = static_cast<const uint8_t*>(p.mask) + b * p.mask_stride[0] +
                         (g * (p.heads / p.kv_heads) + h) * p.mask_stride[1] + i * p.mask_stride[2] + begin * p.mask_stride[3];
      for (int64_t j = 0; j < count; ++j)
        if (m[j * p.mask_stride[3]]) return true;
    }
  return false;
}

// Cap and mask the scores of keys [begin, begin + count) of all rows; what lies between count and padded is no key.
void restrict_scores(const Problem& p, int64_t b, int64_t g, int64_t begin, int64_t count, int64_t padded, float* s, int64_t lds) {
  const int64_t group = p.heads / p.kv_heads, rows = p.group_rows();
  for (int64_t i = 0; i < rows; ++i) {
    float* row = s + i * lds;
    if (p.softcap > 0.f)
      for (int64_t j = 0; j < count; ++j) row[j] = std::tanh(row[j] / p.softcap) * p.softcap;
    const int64_t query = i % p.rows, head = g * group + i / p.rows;
    if (p.mask_kind) {
      const int64_t at = b * p.mask_stride[0] + head * p.mask_stride[1] + query * p.mask_stride[2] + begin * p.mask_stride[3];
      const int64_t step = p.mask_stride[3];
      if (p.mask_kind == 1) {
        const uint8_t* m = static_cast<const uint8_t*>(p.mask) + at;
        if (step == 1) {
          for (int64_t j = 0; j < count; ++j) row[j] = m[j] ? row[j] : NEG;
        } else {
          for (int64_t j = 0; j < count; ++j) row[j] = m[j * step] ? row[j] : NEG;
        }
      } else {
        const float* m = static_cast<const float*>(p.mask) + at;
        for (int64_t j = 0; j < count; ++j) row[j] += m[j * step];
      }
    }
    if (p.causal) {
      const int64_t last = p.old() + query - begin;  // the last key of the chunk that this query sees
      for (int64_t j = std::clamp<int64_t>(last + 1, 0, count); j < count; ++j) row[j] = NEG;
    }
    for (int64_t j = count; j < padded; ++j) row[j] = NEG;
  }
}

// Write the scores of tokens [begin, begin + count): those of this call stand behind all places of the cache.
void tell_scores(const Problem& p, int64_t bg, int64_t begin, int64_t count, const float* s, int64_t lds) {
  if (!p.logits) return;
  for (int64_t i = 0; i < p.group_rows(); ++i) {
    float* line = p.logits + (bg * p.group_rows() + i) * (p.capacity + p.fresh);
    for (int64_t j = 0; j < count; ++j) line[begin + j < p.old() ? begin + j : p.capacity + begin + j - p.old()] = s[i * lds + j];
  }
}

// Turn scores into exp(score - maximum) and rescale what was summed under another maximum.
void soften(const Problem& p, float* s, int64_t lds, int64_t padded, const Partial& to, int64_t values) {
  for (int64_t i = 0; i < p.group_rows(); ++i) {
    float* row = s + i * lds;
    Vec most(NEG);
    for (int64_t j = 0; j < padded; j += Vec::size()) most = at::vec::maximum(most, Vec::loadu(row + j));
    float top = at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return at::vec::maximum(x, y); }, most);
    if (top <= to.top[i]) top = to.top[i];  // NaN stays, and so does the row
    const float shift = top == NEG ? 0.f : top;
    const Vec by(-shift);
    Vec sum(0.f);
    for (int64_t j = 0; j < padded; j += Vec::size()) {
      const Vec e = (Vec::loadu(row + j) + by).exp_u20();
      e.store(row + j);
      sum = sum + e;
    }
    const float alpha = std::exp(to.top[i] - shift);
    float held[Vec::size()], added = 0.f;
    sum.store(held);
    for (float value : held) added += value;
    to.sum[i] = to.sum[i] * alpha + added;
    to.top[i] = top;
    if (alpha != 1.f)
      for (int64_t d = 0; d < values; ++d) to.values[i * values + d] *= alpha;
  }
}

// --- a part of the packed tokens -----------------------------------------------------------------------------------------------

template <int BITS>
void attend_packed(const Problem& p, const float* q, int64_t b, int64_t g, int64_t begin, int64_t end, Scratch& own,
                   const Partial& to) {
  const int64_t rows = p.group_rows(), lds = CHUNK, bg = b * p.kv_heads + g;
  const int64_t values = BITS >= 8 ? up(p.width, 16) : p.width, runs = p.width / CHANNELS;
  own.scores.resize(rows * lds);
  float* s = own.scores.data();
  for (int64_t at = begin; at < end; at += CHUNK) {
    const int64_t count = std::min<int64_t>(CHUNK, end - at);
    if (!any_visible(p, b, g, at, count)) continue;
    if constexpr (BITS >= 8) {
      const Reg unit = every(BITS == FLOATS ? 256.f : 1.f);
      const int64_t padded = up(count, PANEL8);
      own.weights.resize(rows * lds);
      const int8_t* k = reinterpret_cast<const int8_t*>(p.k_codes) + (bg * p.capacity + at) * p.depth;
      by_rows(rows, [&](auto n, int64_t i) {
        scores8<n.value, BITS>(k, p.depth, padded / PANEL8, q + i * p.depth, s + i * lds, lds);
      });
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
          values8<n.value, 4, BITS>(v + d, values, count, w + i * lds, lds, to.values + i * values + d);
        for (; d < values; d += W) values8<n.value, 1, BITS>(v + d, values, count, w + i * lds, lds, to.values + i * values + d);
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
  }
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
  for (int64_t at = begin; at < end; at += CHUNK) {
    const int64_t count = std::min<int64_t>(CHUNK, end - at), padded = up(count, 16);
    if (!any_visible(p, b, g, at, count)) continue;
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
  }
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
      p.lse[n] = sum > 0.f ? top + std::log(sum) : sum == 0.f ? NEG : sum;
    }
  }
}

}  // namespace

// dtype: 0 float, 1 bfloat16, 2 half, of q, k, v, the recent tokens and the result. Sizes, of which the first is the bits (8, 4, 2, FLOATS, or
// 0 where all tokens are kept as they are), and pointers come in the order of use.
extern "C" void eff_kv_attention(int64_t dtype, const int64_t* sizes, const void* const* at, float scale, float softcap) {
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
  p.scale = scale, p.softcap = softcap;
  by_type(dtype, [&](auto kind) {
    using T = decltype(kind);
    if (bits == 8) {
      attend<T, 8>(p);
    } else if (bits == FLOATS) {
      attend<T, FLOATS>(p);
    } else if (bits == 0) {
      attend<T, 0>(p);
    } else if (bits == 4) {
      attend<T, 4>(p);
    } else {
      attend<T, 2>(p);
    }
  });
}
