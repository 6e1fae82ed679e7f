#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace ft {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512_bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

bool parse(const char* name, Isa* out) {
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      *out = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> value = [] {
    Isa wanted = best_isa();
    const char* env = std::getenv("FASTTRANSFORMER_CPU_ISA");
    if (env != nullptr && parse(env, &wanted) && wanted > best_isa()) wanted = best_isa();
    return wanted;
  }();
  return value;
}

}  // namespace

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa isa() { return current().load(std::memory_order_relaxed); }

const char* isa_name(Isa value) { return kNames[static_cast<int>(value)]; }

bool set_isa(const char* name) {
  Isa wanted;
  if (!parse(name, &wanted) || wanted > best_isa()) return false;
  current().store(wanted, std::memory_order_relaxed);
  return true;
}

}  // namespace ft
