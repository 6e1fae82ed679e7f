#include "cpu/isa.h"

#include <atomic>
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

Isa detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
    return may_use_amx() ? Isa::amx : Isa::avx512_bf16;
  }
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
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
