// What selectors read from a few rows, and from whole blocks, on CPU: sums of the attention of probe rows over keys and over
// distances, and means of blocks with how alike their positions are. effcompile/ops/native.py compiles this once and calls it. The
// products are those of tiles.h; no result depends on the number of threads.

namespace {

struct Probes {
  int64_t batch, heads, kv_heads, rows, columns, depth, width, bins;
  int64_t q_stride[3], k_stride[3];  // batch, head, position; the last dimension is contiguous
  int64_t pad_batch, threads;
  const int32_t* first;  // [batch, rows]: least kept key
  const int32_t* last;   // [batch, rows]: largest kept key, -1 for a row that has no say
  const uint8_t* pad;    // [pad_batch, columns]: kept keys, or null
  float scale;
};

constexpr int STRIP = 256;  // keys that are packed at a time
constexpr int LINES = 24;   // rows whose scores exist at a time: they stay in the second cache

inline float sum_of(const float* x, int64_t begin, int64_t end) {
  Vec sum(0.f);
  int64_t j = begin;
  for (; j + W <= end; j += W) sum = sum + Vec::loadu(x + j);
  float total = at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, sum);
  for (; j < end; ++j) total += x[j];
  return total;
}

// Scores of some rows to all keys up to `most`, then their probabilities, added to `column` by key and to `slash` by distance.
void add_rows(const Probes& p, const float* queries, int64_t lda, const float* keys, int64_t begin, int64_t count, int64_t b,
              float* scores, int64_t lds, float* column, float* slash) {
  const int32_t *first = p.first + b * p.rows + begin, *last = p.last + b * p.rows + begin, full = static_cast<int32_t>(p.depth);
  const uint8_t* pad = p.pad ? p.pad + (b % p.pad_batch) * p.columns : nullptr;
  int64_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max<int64_t>(most, std::min<int64_t>(p.columns, static_cast<int64_t>(last[i]) + 1));
  for (int64_t j = 0; j < most; j += NR) {
    const float* key = keys + j * p.depth;
    panel(count, queries, lda, Pieces<float>{&key, &full, 1, 0}, scores + j, lds, nullptr);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t low = std::max<int64_t>(0, first[i]), high = std::min<int64_t>(p.columns, static_cast<int64_t>(last[i]) + 1);
    if (low >= high) continue;
    float* row = scores + i * lds;
    std::fill(row, row + low, NEG);
    std::fill(row + high, row + up(high, W), NEG);
    if (pad)
      for (int64_t j = low; j < high; ++j) row[j] = pad[j] ? row[j] : NEG;
    Vec most_of(NEG), total(0.f);
    for (int64_t j = 0; j < high; j += W) most_of = at::vec::maximum(most_of, Vec::loadu(row + j));
    const float top = at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return at::vec::maximum(x, y); }, most_of);
    if (top == NEG) continue;
    const Vec scale(p.scale), shift(-top * p.scale);  // the scale is positive
    for (int64_t j = 0; j < high; j += W) {
      const Vec e = at::vec::fmadd(Vec::loadu(row + j), scale, shift).exp();
      e.store(row + j);
      total = total + e;
    }
    const float by = 1.f / at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, total);
    for (int64_t j = 0; j < high; ++j) column[j] += row[j] * by;
    // The row's own key is the last one that it may read, so that a bin is a range of keys that ends at a multiple of the width.
    for (int64_t n = 0; n < p.bins && last[i] + 1 - n * p.width > 0; ++n) {
      const int64_t end = std::min<int64_t>(high, last[i] + 1 - n * p.width);
      const int64_t from = std::max<int64_t>(0, static_cast<int64_t>(last[i]) + 1 - (n + 1) * p.width);
      if (from < end) slash[n] += by * sum_of(row, from, end);
    }
  }
}

// columns [batch, heads, columns]: what the rows give to each key. slashes [batch, heads, bins]: what they give by the distance to
// their last key, `width` keys to a bin.
template <typename S>
void probe(const Probes& p, const void* q_, const void* k_, float* columns, float* slashes) {
  const S *q = static_cast<const S*>(q_), *k = static_cast<const S*>(k_);
  const int64_t wide = up(p.columns, STRIP), lds = wide + W, lda = p.depth + W, group = p.heads / p.kv_heads;
  const int64_t parts = (p.rows + LINES - 1) / LINES, each = p.columns + p.bins;
  std::unique_ptr<float[]> keys(new float[wide * p.depth]);
  std::vector<float> sums(group * parts * each);  // of each part alone, so that no order of threads shows
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<float> queries(LINES * lda);
    std::unique_ptr<float[]> scores(new float[LINES * lds]);
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t g = 0; g < p.kv_heads; ++g) {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < wide / STRIP; ++n)
          pack_keys<S, float>(k + b * p.k_stride[0] + g * p.k_stride[1] + n * STRIP * p.k_stride[2], p.k_stride[2],
                              std::min<int64_t>(STRIP, p.columns - n * STRIP), p.depth, p.depth, STRIP, keys.get() + n * STRIP * p.depth);
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < group * parts; ++n) {
          const int64_t h = g * group + n / parts, begin = n % parts * LINES, count = std::min<int64_t>(LINES, p.rows - begin);
          for (int64_t i = 0; i < count; ++i) {
            const S* from = q + b * p.q_stride[0] + h * p.q_stride[1] + (begin + i) * p.q_stride[2];
            for (int64_t d = 0; d < p.depth; ++d) queries[i * lda + d] = static_cast<float>(from[d]);
          }
          float* sum = sums.data() + n * each;
          std::fill(sum, sum + each, 0.f);
          add_rows(p, queries.data(), lda, keys.get(), begin, count, b, scores.get(), lds, sum, sum + p.columns);
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < group; ++n) {
          float* column = columns + (b * p.heads + g * group + n) * p.columns;
          float* slash = slashes + (b * p.heads + g * group + n) * p.bins;
          std::fill(column, column + p.columns, 0.f);
          if (p.bins) std::fill(slash, slash + p.bins, 0.f);
          for (int64_t part = 0; part < parts; ++part) {
            const float* sum = sums.data() + (n * parts + part) * each;
            for (int64_t j = 0; j < p.columns; ++j) column[j] += sum[j];
            for (int64_t j = 0; j < p.bins; ++j) slash[j] += sum[p.columns + j];
          }
        }
      }
    }
  }
}

struct Means {
  int64_t batch, heads, length, depth, unit;
  int64_t stride[3];  // batch, head, position; the last dimension is contiguous
  int64_t real_batch, threads;
  const uint8_t* real;  // [real_batch, length]: positions that count, or null
};

// mean [batch, heads, units, depth] of the positions of each unit that count. alike [batch, heads, units], or null: the mean cosine
// between them, themselves included, which is the square of the mean of the unit vectors.
template <typename S>
void block_means(const Means& p, const void* x_, float* mean, float* alike) {
  const S* x = static_cast<const S*>(x_);
  const int64_t wide = up(p.depth, W), units = (p.length + p.unit - 1) / p.unit;
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<float> row(wide, 0.f), sums(wide), directions(wide);
#pragma omp for schedule(static)
    for (int64_t at = 0; at < p.batch * units * p.heads; ++at) {
      // Heads are the inner loop: those of one position lie side by side where projections made them.
      const int64_t b = at / (units * p.heads), u = at / p.heads % units, h = at % p.heads;
      const uint8_t* real = p.real ? p.real + (b % p.real_batch) * p.length : nullptr;
      std::fill(sums.begin(), sums.end(), 0.f);
      std::fill(directions.begin(), directions.end(), 0.f);
      int64_t count = 0;
      for (int64_t n = u * p.unit; n < std::min(p.length, (u + 1) * p.unit); ++n) {
        if (real && !real[n]) continue;
        ++count;
        const S* from = x + b * p.stride[0] + h * p.stride[1] + n * p.stride[2];
        for (int64_t d = 0; d < p.depth; d += 64 / static_cast<int64_t>(sizeof(S))) __builtin_prefetch(from + 4 * p.stride[2] + d);
        for (int64_t d = 0; d < p.depth; ++d) row[d] = static_cast<float>(from[d]);
        Vec square(0.f);
        for (int64_t d = 0; d < wide; d += W) {
          const Vec value = Vec::loadu(row.data() + d);
          (Vec::loadu(sums.data() + d) + value).store(sums.data() + d);
          square = at::vec::fmadd(value, value, square);
        }
        if (!alike) continue;
        const float norm = std::sqrt(at::vec::vec_reduce_all<float>([](Vec& a, Vec& c) { return a + c; }, square));
        const Vec by(1.f / std::max(norm, 1e-12f));
        for (int64_t d = 0; d < wide; d += W)
          at::vec::fmadd(Vec::loadu(row.data() + d), by, Vec::loadu(directions.data() + d)).store(directions.data() + d);
      }
      const float by = 1.f / static_cast<float>(std::max<int64_t>(1, count));
      float* to = mean + ((b * p.heads + h) * units + u) * p.depth;
      float squares = 0.f;
      for (int64_t d = 0; d < p.depth; ++d) {
        to[d] = sums[d] * by;
        squares += directions[d] * by * directions[d] * by;
      }
      if (alike) alike[(b * p.heads + h) * units + u] = squares;
    }
  }
}

}  // namespace

// dtype: 0 float, 1 bfloat16, 2 half. pointers: q [.., rows, ..] of the probe rows, k, first, last, pad, columns, slashes.
extern "C" void eff_probe(int64_t dtype, const int64_t* sizes, const void* const* pointers, float scale) {
  Probes p{};
  int64_t at = 0;
  for (int64_t* field : {&p.batch, &p.heads, &p.kv_heads, &p.rows, &p.columns, &p.depth, &p.width, &p.bins}) *field = sizes[at++];
  for (int64_t* stride : {p.q_stride, p.k_stride})
    for (int i = 0; i < 3; ++i) stride[i] = sizes[at++];
  p.pad_batch = sizes[at++];
  p.threads = sizes[at++];
  p.scale = scale;
  p.first = static_cast<const int32_t*>(pointers[2]);
  p.last = static_cast<const int32_t*>(pointers[3]);
  p.pad = static_cast<const uint8_t*>(pointers[4]);
  auto run = dtype == 0 ? probe<float> : dtype == 1 ? probe<at::BFloat16> : probe<at::Half>;
  run(p, pointers[0], pointers[1], static_cast<float*>(const_cast<void*>(pointers[5])), static_cast<float*>(const_cast<void*>(pointers[6])));
}

// pointers: x, real, mean, alike.
extern "C" void eff_block_means(int64_t dtype, const int64_t* sizes, const void* const* pointers, float) {
  Means p{};
  int64_t at = 0;
  for (int64_t* field : {&p.batch, &p.heads, &p.length, &p.depth, &p.unit, &p.stride[0], &p.stride[1], &p.stride[2], &p.real_batch, &p.threads})
    *field = sizes[at++];
  p.real = static_cast<const uint8_t*>(pointers[1]);
  auto run = dtype == 0 ? block_means<float> : dtype == 1 ? block_means<at::BFloat16> : block_means<at::Half>;
  run(p, pointers[0], static_cast<float*>(const_cast<void*>(pointers[2])), static_cast<float*>(const_cast<void*>(pointers[3])));
}
