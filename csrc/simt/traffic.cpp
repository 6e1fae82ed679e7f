#include "simt/traffic.h"

namespace ft::simt {

namespace { constexpr uintptr_t kSector = 32; }

void TrafficCounter::start(int threads) {
  own_ = Traffic{};
  warps_.assign(static_cast<std::size_t>(threads) / 32, Warp{});
  for (auto& made : made_) made.assign(static_cast<std::size_t>(threads), 0);
}

void TrafficCounter::access(int thread, uintptr_t at, int64_t bytes, bool store) {
  const std::size_t t = static_cast<std::size_t>(thread), kind = store ? 1 : 0;
  auto& requests = warps_[t / 32].sectors[kind];
  const std::size_t n = made_[kind][t]++;
  if (n >= requests.size()) requests.resize(n + 1);
  const uintptr_t last = (at + static_cast<uintptr_t>(bytes) - 1) / kSector;
  for (uintptr_t s = at / kSector; s <= last; ++s) requests[n].insert(s);
}

Traffic TrafficCounter::finish() const {
  Traffic sum = own_;
  for (const Warp& w : warps_) {
    sum.load_requests += static_cast<int64_t>(w.sectors[0].size());
    sum.store_requests += static_cast<int64_t>(w.sectors[1].size());
    for (const auto& s : w.sectors[0]) sum.load_sectors += static_cast<int64_t>(s.size());
    for (const auto& s : w.sectors[1]) sum.store_sectors += static_cast<int64_t>(s.size());
  }
  return sum;
}

}  // namespace ft::simt
