// The machine's own ceilings, so that a benchmark can say how far from the hardware it is: rate of
// float fused multiply-adds, rate of bf16 dot products (vdpbf16ps), bandwidth of reading and of
// copying a buffer of a given size. Every thread runs the same loop on data of its own; a sample
// is the wall time of one parallel region, and the best sample counts, because whatever disturbs
// a sample only makes it slower. An FMA has a latency of 4 to 5 cycles and two may start per
// cycle, so ten independent sums are needed; twelve fit the 16 registers of AVX2.
#include "params/ceilings.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace ft::FT_ISA {
namespace {

constexpr int kSums = 12;
constexpr int64_t kSteps = 100'000;        // FMA steps per sample and thread: some 0.3 ms
constexpr int64_t kSampleBytes = 8 << 20;  // bytes per sample and thread at least, likewise

// Best rate of `work` units per run of sample(thread) on every thread.
template <class F>
double best_rate(double work, double seconds, const F& sample) {
  using clock = std::chrono::steady_clock;
  const int threads = num_threads();
  const auto end = clock::now() + std::chrono::duration<double>(seconds);
  double best = 0;
  do {
    const auto start = clock::now();
    parallel_for(threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t thread = first; thread < last; ++thread) sample(thread);
    });
    const std::chrono::duration<double> took = clock::now() - start;
    best = std::max(best, work / took.count());
  } while (clock::now() < end);
  return best;
}

// Hides where a value comes from, so that the loop around it is really run.
template <class V>
FT_INLINE void opaque(V& value) {
  __asm__ volatile("" : "+m"(value));
}

double fma_rate(double seconds) {
  const double work = 2.0 * W * kSums * kSteps * num_threads();
  return best_rate(work, seconds, [](int64_t) {
    vf sums[kSums] = {}, a = splat(1.0f), b = splat(1e-9f);
    opaque(a);
    opaque(b);
    for (int64_t i = 0; i < kSteps; ++i) {
#pragma GCC unroll 12
      for (int k = 0; k < kSums; ++k) sums[k] = fma(sums[k], a, b);
    }
    for (vf& sum : sums) opaque(sum);
  });
}

double dot_rate(double seconds) {
#if defined(__AVX512BF16__)
  const double work = 4.0 * W * kSums * kSteps * num_threads();
  return best_rate(work, seconds, [](int64_t) {
    __m512 sums[kSums];
    for (__m512& sum : sums) sum = _mm512_setzero_ps();
    __m512i a = _mm512_set1_epi16(0x3f80), b = _mm512_set1_epi16(0x3080);  // 1 and 2^-30
    opaque(a);
    opaque(b);
    for (int64_t i = 0; i < kSteps; ++i) {
#  pragma GCC unroll 12
      for (int k = 0; k < kSums; ++k) {
        sums[k] = _mm512_dpbf16_ps(sums[k], (__m512bh)a, (__m512bh)b);
      }
    }
    for (__m512& sum : sums) opaque(sum);
  });
#else
  (void)seconds;
  return 0;
#endif
}

// Past the caches: writes go around them, which saves reading the lines that are overwritten.
FT_INLINE void store_past_cache(float* p, vf x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)x);
#else
  store(p, x);
#endif
}

FT_INLINE void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Threads × floats, each thread's part touched first by the thread that will use it.
class Buffer {
 public:
  Buffer(int threads, int64_t floats) : floats_(floats) {
    const size_t bytes = static_cast<size_t>(threads) * floats * sizeof(float);
    data_.reset(static_cast<float*>(std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096)));
    if (!data_) throw std::bad_alloc();
    parallel_for(threads, 1, [&](int64_t first, int64_t last) {
      std::fill(data_.get() + first * floats, data_.get() + last * floats, 1.f);
    });
  }
  float* of(int64_t thread) const { return data_.get() + thread * floats_; }

 private:
  std::unique_ptr<float, Free> data_;
  int64_t floats_;
};

constexpr int kVectors = 8;  // independent loads in flight

int64_t floats_per_thread(int64_t bytes) {
  const int64_t step = kVectors * W;
  return std::max<int64_t>(bytes / static_cast<int64_t>(sizeof(float)) / num_threads() / step, 1) *
         step;
}

double read_rate(int64_t bytes, double seconds) {
  const int threads = num_threads();
  const int64_t n = floats_per_thread(bytes);
  const Buffer buffer(threads, n);
  const int64_t passes = kSampleBytes / (n * 4) + 1;
  return best_rate(4.0 * n * passes * threads, seconds, [&](int64_t thread) {
    const float* p = buffer.of(thread);
    vf sums[kVectors] = {};
    for (int64_t pass = 0; pass < passes; ++pass) {
      for (int64_t i = 0; i < n; i += kVectors * W) {
#pragma GCC unroll 8
        for (int k = 0; k < kVectors; ++k) sums[k] += load(p + i + k * W);
      }
    }
    for (vf& sum : sums) opaque(sum);
  });
}

double copy_rate(int64_t bytes, double seconds) {
  const int threads = num_threads();
  const int64_t n = floats_per_thread(bytes / 2);
  const Buffer from(threads, n), to(threads, n);
  const int64_t passes = kSampleBytes / (n * 8) + 1;
  const auto rate = [&](auto write) {
    return best_rate(8.0 * n * passes * threads, seconds / 2, [&](int64_t thread) {
      const float* p = from.of(thread);
      float* q = to.of(thread);
      for (int64_t pass = 0; pass < passes; ++pass) {
        for (int64_t i = 0; i < n; i += kVectors * W) {
#pragma GCC unroll 8
          for (int k = 0; k < kVectors; ++k) write(q + i + k * W, load(p + i + k * W));
        }
        __asm__ volatile("" ::: "memory");  // each pass counts
      }
      fence();
    });
  };
  // Around the caches is the faster way for buffers that don't fit them, through them for others.
  return std::max(rate([](float* q, vf x) { store(q, x); }),
                  rate([](float* q, vf x) { store_past_cache(q, x); }));
}

}  // namespace

void ceilings(const CeilingParams& p) {
  switch (p.what) {
    case Ceiling::fma: *p.rate = fma_rate(p.seconds); break;
    case Ceiling::dot: *p.rate = dot_rate(p.seconds); break;
    case Ceiling::read: *p.rate = read_rate(p.bytes, p.seconds); break;
    case Ceiling::copy: *p.rate = copy_rate(p.bytes, p.seconds); break;
  }
}

}  // namespace ft::FT_ISA
