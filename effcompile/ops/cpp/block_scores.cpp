// What selectors of blocks compute on CPU: the mass that antidiagonals see, and the choice of the fewest blocks that hold a share.
// effcompile/ops/native.py compiles this once and calls it. The products are those of tiles.h and tiles_amx.h; no result depends on
// the number of threads.

namespace {

struct Mass {
  int64_t batch, heads, kv_heads, rows, columns, depth, stride, q_block, k_block;
  int64_t q_stride[3], k_stride[3];                     // batch, head, position; the last dimension is contiguous
  int64_t seen_batch, seen_heads, pad_batch, threads;
  int64_t q_units, k_units, q_blocks, k_blocks;
  const uint8_t* seen;  // [seen_batch, seen_heads, q_units, k_units]: units of keys that a unit of queries is judged by
  const uint8_t* pad;   // [pad_batch, columns]: keys that count, or null
  float scale;          // of the sum along an antidiagonal
};

// Units of queries at a time, in whole blocks: they share the panels of keys.
template <typename T>
constexpr int LINES = STEP<T> == 2 ? 24 : 32;

// One unit of positions: `stride` vectors in a row, zeros past the end and where `pad` is 0; the last one first where `back`.
template <typename S, typename T>
void line_of(const S* source, int64_t step, int64_t count, const Mass& p, const uint8_t* pad, bool back, T* out) {
  for (int64_t r = 0; r < p.stride; ++r) {
    T* to = out + (back ? p.stride - 1 - r : r) * p.depth;
    if (r < count && (!pad || pad[r])) {
      const S* from = source + r * step;
      // Positions lie far apart where heads lie between them, so that the processor does not see what comes next.
      for (int64_t d = 0; d < p.depth; d += 64 / static_cast<int64_t>(sizeof(S))) __builtin_prefetch(from + 4 * step + d);
      for (int64_t d = 0; d < p.depth; ++d) to[d] = static_cast<T>(static_cast<float>(from[d]));
    } else {
      std::fill(to, to + p.depth, T(0));
    }
  }
}

// NR units of keys as one panel: lines first, then their transpose in squares that stay in the first cache.
template <typename S, typename T>
void panel_of(const S* k, const Mass& p, const uint8_t* pad, int64_t panel, int64_t deep, T* lines, T* out) {
  constexpr bool pairs = std::is_same_v<T, at::BFloat16>;
  for (int64_t n = 0; n < NR; ++n) {
    const int64_t begin = (panel * NR + n) * p.stride;
    const int64_t count = std::max<int64_t>(0, p.columns - begin);
    T* line = lines + n * deep;
    line_of<S, T>(k + begin * p.k_stride[2], p.k_stride[2], count, p, pad ? pad + begin : nullptr, false, line);
    std::fill(line + p.stride * p.depth, line + deep, T(0));
  }
  for (int64_t k0 = 0; k0 < deep; k0 += W)
    for (int64_t n = 0; n < NR; ++n) {
      const T* line = lines + n * deep;
      for (int64_t j = k0; j < std::min<int64_t>(k0 + W, deep); ++j)
        out[pairs ? (j / 2) * 2 * NR + 2 * n + j % 2 : j * NR + n] = line[j];
    }
}

// The softmax of one row over the units that it is judged by, added to the blocks of keys that they lie in.
void add_row(const Mass& p, float* row, const uint8_t* seen, int64_t end, float* blocks) {
  const int64_t each = p.k_block / p.stride, wide = up(end, W);  // the row has room for a whole vector
  for (int64_t j = 0; j < end; ++j) row[j] = seen[j] ? row[j] * p.scale : NEG;
  std::fill(row + end, row + wide, NEG);
  Vec most(NEG), sums(0.f);
  for (int64_t j = 0; j < wide; j += W) most = at::vec::maximum(most, Vec::loadu(row + j));
  const float top = at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return at::vec::maximum(x, y); }, most);
  if (top == NEG) return;
  for (int64_t j = 0; j < wide; j += W) {
    const Vec e = (Vec::loadu(row + j) - Vec(top)).exp();
    e.store(row + j);
    sums = sums + e;
  }
  const float total = at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, sums);
  const float by = 1.f / total;
  for (int64_t j = 0; j < end; j += each) {
    float sum = 0.f;
    for (int64_t i = j; i < std::min(end, j + each); ++i) sum += row[i];
    blocks[j / each] += sum * by;
  }
}

template <typename S, typename T>
void antidiagonals(const Mass& p, const void* q_, const void* k_, float* out) {
  const S *q = static_cast<const S*>(q_), *k = static_cast<const S*>(k_);
  // An odd multiple of a cache line, so that the rows of a tile do not meet in one set of the cache.
  const int64_t deep = up(p.stride * p.depth, STEP<T>), lda = deep + 64 / static_cast<int64_t>(sizeof(T));
  const int64_t panels = (p.k_units + NR - 1) / NR, lds = panels * NR, group = p.heads / p.kv_heads;
  const int64_t per = p.q_block / p.stride, many = std::max<int64_t>(1, LINES<T> / per), tasks = (p.q_blocks + many - 1) / many;
  const int32_t full = static_cast<int32_t>(deep);
  std::unique_ptr<T[]> keys(new T[panels * NR * deep]);  // not filled: every panel is written before it is read
  std::fill(out, out + p.batch * p.heads * p.q_blocks * p.k_blocks, 0.f);
#pragma omp parallel num_threads(p.threads)
  {
    const TileRegisters registers(std::is_same_v<T, at::BFloat16>);
    std::vector<T> lines(NR * deep), queries(many * per * lda);
    std::vector<float> scores(many * per * lds);
    for (int64_t b = 0; b < p.batch; ++b) {
      const uint8_t* pad = p.pad ? p.pad + (b % p.pad_batch) * p.columns : nullptr;
      for (int64_t g = 0; g < p.kv_heads; ++g) {
#pragma omp for schedule(static)
        for (int64_t n = 0; n < panels; ++n)
          panel_of<S, T>(k + b * p.k_stride[0] + g * p.k_stride[1], p, pad, n, deep, lines.data(), keys.get() + n * NR * deep);
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < group * tasks; ++n) {
          // Late queries are judged by the most keys under a causal mask: they go first.
          const int64_t h = g * group + n % group, first = (tasks - 1 - n / group) * many;
          const int64_t u = first * per, rows = std::min((first + many) * per, p.q_units) - u;
          const uint8_t* seen = p.seen + (((b % p.seen_batch) * p.seen_heads + h % p.seen_heads) * p.q_units + u) * p.k_units;
          int64_t end = p.k_units;
          auto idle = [&](int64_t column) {
            for (int64_t i = 0; i < rows; ++i)
              if (seen[i * p.k_units + column]) return false;
            return true;
          };
          while (end > 0 && idle(end - 1)) --end;
          if (end == 0) continue;
          for (int64_t i = 0; i < rows; ++i) {
            const int64_t begin = (u + i) * p.stride;
            const S* from = q + b * p.q_stride[0] + h * p.q_stride[1] + begin * p.q_stride[2];
            T* line = queries.data() + i * lda;
            line_of<S, T>(from, p.q_stride[2], p.rows - begin, p, nullptr, true, line);
            std::fill(line + p.stride * p.depth, line + lda, T(0));
          }
          for (int64_t j = 0; j < end; j += NR) {
            const T* key = keys.get() + (j / NR) * NR * deep;
            panel(registers, rows, queries.data(), lda, Pieces<T>{&key, &full, 1, 0}, scores.data() + j, lds, nullptr);
          }
          float* lines_of = out + ((b * p.heads + h) * p.q_blocks + first) * p.k_blocks;
          for (int64_t i = 0; i < rows; ++i)
            add_row(p, scores.data() + i * lds, seen + i * p.k_units, end, lines_of + (i / per) * p.k_blocks);
          for (int64_t i = 0; i < (rows + per - 1) / per; ++i) {
            const float by = 1.f / static_cast<float>(std::min(per, rows - i * per));
            for (int64_t j = 0; j < p.k_blocks; ++j) lines_of[i * p.k_blocks + j] *= by;
          }
        }
      }
    }
  }
}

}  // namespace

// dtype: 0 float, 1 bfloat16, 2 half. `sizes` and `pointers` are in the order in which Mass is filled below.
extern "C" void eff_antidiagonal_mass(int64_t dtype, const int64_t* sizes, const void* const* pointers, float scale) {
  Mass p{};
  int64_t at = 0;
  for (int64_t* field : {&p.batch, &p.heads, &p.kv_heads, &p.rows, &p.columns, &p.depth, &p.stride, &p.q_block, &p.k_block})
    *field = sizes[at++];
  for (int64_t* stride : {p.q_stride, p.k_stride})
    for (int i = 0; i < 3; ++i) stride[i] = sizes[at++];
  for (int64_t* field : {&p.seen_batch, &p.seen_heads, &p.pad_batch, &p.threads}) *field = sizes[at++];
  p.q_units = (p.rows + p.stride - 1) / p.stride;
  p.k_units = (p.columns + p.stride - 1) / p.stride;
  p.q_blocks = (p.rows + p.q_block - 1) / p.q_block;
  p.k_blocks = (p.columns + p.k_block - 1) / p.k_block;
  p.scale = scale;
  p.seen = static_cast<const uint8_t*>(pointers[2]);
  p.pad = static_cast<const uint8_t*>(pointers[3]);
  float* out = static_cast<float*>(const_cast<void*>(pointers[4]));
  if (dtype == 0) {
    antidiagonals<float, float>(p, pointers[0], pointers[1], out);
  } else if (dtype == 1) {
    antidiagonals<at::BFloat16, std::conditional_t<EFF_DOT_BF16, at::BFloat16, float>>(p, pointers[0], pointers[1], out);
  } else {
    antidiagonals<at::Half, float>(p, pointers[0], pointers[1], out);
  }
}

// `sizes`: rows, columns, steps of the bisection, threads. `pointers`: mass float, some, forced and the map that is written, each
// [rows, columns]. What is computed is written out in effcompile/ops/block_choice.py.
extern "C" void eff_top_cdf(int64_t, const int64_t* sizes, const void* const* pointers, float share) {
  const int64_t rows = sizes[0], columns = sizes[1], steps = sizes[2];
  const float* mass = static_cast<const float*>(pointers[0]);
  const uint8_t *some = static_cast<const uint8_t*>(pointers[1]), *forced = static_cast<const uint8_t*>(pointers[2]);
  uint8_t* out = static_cast<uint8_t*>(const_cast<void*>(pointers[3]));
#pragma omp parallel num_threads(sizes[3])
  {
    std::vector<float> rest(up(columns, W), 0.f);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < rows; ++n) {
      const int64_t line = n * columns;
      float most = 0.f;
      double total = 0, held = 0;
      for (int64_t j = 0; j < columns; ++j) {
        const bool mine = some[line + j] && forced[line + j];
        const float value = some[line + j] ? mass[line + j] : 0.f;
        total += value;
        held += mine ? value : 0.f;
        rest[j] = mine ? 0.f : value;
        most = std::max(most, rest[j]);
        out[line + j] = mine;
      }
      const double missing = static_cast<double>(share) * total - held;
      if (!(missing > 0)) continue;
      auto enough = [&](float least) {
        const Vec bound(least);
        Vec sum(0.f);
        for (int64_t j = 0; j < columns; j += W) {
          const Vec x = Vec::loadu(rest.data() + j);
          sum = sum + Vec::blendv(Vec(0.f), x, x >= bound);
        }
        return at::vec::vec_reduce_all<float>([](Vec& x, Vec& y) { return x + y; }, sum) >= missing;
      };
      float low = 0.f, high = most;
      for (int64_t step = 0; step < steps && low < high; ++step) {  // the largest threshold at which enough mass is kept
        const float middle = (low + high) / 2;
        (enough(middle) ? low : high) = middle;
      }
      const float least = enough(high) ? high : low;  // the largest block alone may be enough
      for (int64_t j = 0; j < columns; ++j) out[line + j] |= rest[j] >= least && rest[j] > 0.f;
    }
  }
}
