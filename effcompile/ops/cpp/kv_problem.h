// An attention over a KV cache: its operands, its mask, and the softmax of a chunk of keys.

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
  const float *k_fixed, *v_fixed;  // scales of channels that no token changes, [kv_heads, depth] and [kv_heads, width]
  const uint8_t* pick;             // [batch, kv_heads]: which to compute, or null: all
  float* peaks;                    // [batch, heads, rows]: the largest probability of each row, or null
  void* out;
  float *lse, *logits;  // logits: scores as softmax gets them, [batch, heads, rows, capacity + fresh], or null
  float scale, softcap;

  int64_t group_rows() const { return heads / kv_heads * rows; }
  int64_t old() const { return length - fresh; }
};

struct Scratch {
  std::vector<float> scores, weights, queries, bias, row, zeros;
  std::vector<uint8_t> codes;
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

// Call f(first, count) for runs of keys of [begin, end) that some row may see: of at most CHUNK keys, and whole pieces of PIECE.
template <typename F>
void by_visible(const Problem& p, int64_t b, int64_t g, int64_t begin, int64_t end, F f) {
  constexpr int64_t PIECE = PANEL8;
  for (int64_t at = begin; at < end; at += CHUNK) {
    const int64_t stop = std::min<int64_t>(at + CHUNK, end);
    if (p.mask_kind != 1) {
      f(at, stop - at);
      continue;
    }
    for (int64_t j = at; j < stop;) {
      int64_t last = j;
      while (last < stop && any_visible(p, b, g, last, std::min(PIECE, stop - last))) last = std::min(last + PIECE, stop);
      if (last > j) f(j, last - j);
      j = last + PIECE;  // of what is seen by nobody, nothing is read
    }
  }
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

}  // namespace
