// The mean of the codes that a token is most like, on CPU: products with all codes, the choice of the largest and the sum of those
// codes in one pass, so that scores exist for a few tokens and a strip of codes alone. effcompile/ops/native.py compiles this once and
// calls it. The products are those of tiles.h; no result depends on the number of threads.

namespace {

struct Book {
  int64_t tokens, groups, codes, depth, most, threads;
  int64_t x_stride[2], code_stride[2];  // token and group, group and code; the last dimension is contiguous
};

constexpr int STRIP = 256;     // codes whose scores exist at a time, a multiple of NR
constexpr int LINES = 2 * MR;  // tokens that share a strip

// The largest scores of a token so far, the largest first; of equal ones the code that came first.
struct Best {
  float* scores;
  int64_t* ids;
  int64_t most;

  void offer(float score, int64_t id) {
    if (score != score) score = std::numeric_limits<float>::infinity();  // torch ranks NaN above all
    int64_t at = most - 1;
    if (!(score > scores[at])) return;
    for (; at > 0 && score > scores[at - 1]; --at) {
      scores[at] = scores[at - 1];
      ids[at] = ids[at - 1];
    }
    scores[at] = score;
    ids[at] = id;
  }
};

// Offer a strip of scores: most vectors hold none that is larger than the least of the best.
inline void offer_strip(Best& best, const float* scores, int64_t first, int64_t count) {
  for (int64_t j = 0; j < count; j += W) {
    const Vec least(best.scores[best.most - 1]);
    uint32_t larger = static_cast<uint32_t>((Vec::loadu(scores + j) <= least).zero_mask()) & ((1ull << W) - 1);  // or no number
    for (; larger; larger &= larger - 1) {
      const int64_t at = j + __builtin_ctz(larger);
      if (at < count) best.offer(scores[at], first + at);
    }
  }
}

template <typename S>
void snap(const Book& p, const S* x, const S* codes, const float* scale, S* out) {
  const int64_t wide = up(p.codes, STRIP), lda = p.depth + W, parts = (p.tokens + LINES - 1) / LINES;
  const int32_t full = static_cast<int32_t>(p.depth);
  std::unique_ptr<float[]> packed(new float[wide * p.depth]);
#pragma omp parallel num_threads(p.threads)
  {
    std::vector<float> lines(LINES * lda), strip(STRIP * p.depth), scores(LINES * STRIP), most(LINES * p.most), sum(p.depth);
    std::vector<int64_t> ids(LINES * p.most);
    for (int64_t g = 0; g < p.groups; ++g) {
      const S* book = codes + g * p.code_stride[0];
#pragma omp for schedule(static)
      for (int64_t n = 0; n < wide / STRIP; ++n) {
        const int64_t begin = n * STRIP, count = std::min<int64_t>(STRIP, p.codes - begin);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t d = 0; d < p.depth; ++d)
            strip[i * p.depth + d] = static_cast<float>(book[(begin + i) * p.code_stride[1] + d]) * scale[g * p.codes + begin + i];
        pack_keys<float, float>(strip.data(), p.depth, count, p.depth, p.depth, STRIP, packed.get() + begin * p.depth);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t n = 0; n < parts; ++n) {
        const int64_t begin = n * LINES, rows = std::min<int64_t>(LINES, p.tokens - begin);
        for (int64_t i = 0; i < rows; ++i) {
          const S* from = x + (begin + i) * p.x_stride[0] + g * p.x_stride[1];
          for (int64_t d = 0; d < p.depth; ++d) lines[i * lda + d] = static_cast<float>(from[d]);
          std::fill(most.begin() + i * p.most, most.begin() + (i + 1) * p.most, NEG);
          for (int64_t k = 0; k < p.most; ++k) ids[i * p.most + k] = k;
        }
        for (int64_t c = 0; c < p.codes; c += STRIP) {
          const int64_t count = std::min<int64_t>(STRIP, p.codes - c);
          for (int64_t j = 0; j < up(count, NR); j += NR) {
            const float* code = packed.get() + (c + j) * p.depth;
            panel(rows, lines.data(), lda, Pieces<float>{&code, &full, 1, 0}, scores.data() + j, STRIP, nullptr);
          }
          for (int64_t i = 0; i < rows; ++i) {
            Best best{most.data() + i * p.most, ids.data() + i * p.most, p.most};
            offer_strip(best, scores.data() + i * STRIP, c, count);
          }
        }
        for (int64_t i = 0; i < rows; ++i) {
          std::fill(sum.begin(), sum.end(), 0.f);
          for (int64_t k = 0; k < p.most; ++k) {
            const S* code = book + ids[i * p.most + k] * p.code_stride[1];
            for (int64_t d = 0; d < p.depth; ++d) sum[d] += static_cast<float>(code[d]);
          }
          S* to = out + ((begin + i) * p.groups + g) * p.depth;
          for (int64_t d = 0; d < p.depth; ++d) to[d] = static_cast<S>(sum[d] / static_cast<float>(p.most));
        }
      }
    }
  }
}

template <typename S>
void snap_of(const Book& p, const void* const* pointers) {
  snap<S>(p, static_cast<const S*>(pointers[0]), static_cast<const S*>(pointers[1]), static_cast<const float*>(pointers[2]),
          static_cast<S*>(const_cast<void*>(pointers[3])));
}

}  // namespace

// dtype: 0 float, 1 bfloat16, 2 half. pointers: x, codes, scale, out.
extern "C" void eff_codebook(int64_t dtype, const int64_t* sizes, const void* const* pointers) {
  Book p{};
  int64_t at = 0;
  for (int64_t* field : {&p.tokens, &p.groups, &p.codes, &p.depth, &p.most, &p.threads, &p.x_stride[0], &p.x_stride[1],
                         &p.code_stride[0], &p.code_stride[1]})
    *field = sizes[at++];
  (dtype == 0 ? snap_of<float> : dtype == 1 ? snap_of<at::BFloat16> : snap_of<at::Half>)(p, pointers);
}
