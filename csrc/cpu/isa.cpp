#include "cpu/isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#  include <cpuid.h>
#endif
#if defined(__linux__)
#  include <sys/syscall.h>
#  include <unistd.h>
#endif

namespace ft {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
constexpr int kCount = sizeof(kNames) / sizeof(kNames[0]);

// Whether the CPU multiplies tiles of bf16, and the system lets this process use their registers:
// Linux wants to be asked, once, since saving them takes 8 KB of every thread's state.
bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & kBf16) == 0 || (d & kTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool parse(const char* name, Isa* out) {
  for (int i = 0; i < kCount; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      *out = static_cast<Isa>(i);
      return true;
    }
  }
  return false;
}

// The highest set that FASTTRANSFORMER_CPU_ISA lets this process use. A name that no set has
// changes nothing but prints a warning: a misspelt variable must not stop an import.
Isa cap() {
  Isa highest = Isa::amx;
  const char* name = std::getenv("FASTTRANSFORMER_CPU_ISA");
  if (name == nullptr || *name == '\0' || parse(name, &highest)) return highest;
  std::fprintf(stderr, "fasttransformer: FASTTRANSFORMER_CPU_ISA=%s is ignored, it is not one of",
               name);
  for (const char* known : kNames) std::fprintf(stderr, " %s", known);
  std::fputc('\n', stderr);
  return highest;
}

// The highest set up to `highest` that this CPU has.
Isa detect([[maybe_unused]] Isa highest) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (highest >= Isa::amx && avx512_bf16 && may_use_amx()) return Isa::amx;
  if (highest >= Isa::avx512_bf16 && avx512_bf16) return Isa::avx512_bf16;
  if (highest >= Isa::avx512 && avx512) return Isa::avx512;
  if (highest >= Isa::avx2 && avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> value = best_isa();
  return value;
}

}  // namespace

Isa best_isa() {
  static const Isa best = detect(cap());
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
