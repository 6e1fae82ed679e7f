#include "simt/shared.h"

#include <algorithm>
#include <cstring>

#include "simt/runtime.h"

namespace ft::simt {

namespace {
constexpr int64_t kCapacity = 320 * 1024;  // more than any block has, and room between arrays
constexpr int64_t kGap = 64;               // between arrays, of nobody
constexpr int64_t kGranule = 2;

std::string thread_name(int thread) { return "thread " + std::to_string(thread); }
}  // namespace

Shared::Shared()
    : memory_(kCapacity + 1024),
      cells_(kCapacity / kGranule),
      clocks_(32),
      copies_(1024),
      groups_(1024) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(memory_.data());
  base_ = reinterpret_cast<char*>((at + 1023) / 1024 * 1024);
}

void Shared::start(int threads, int64_t dynamic_bytes, int64_t static_bytes) {
  static_left_ = static_bytes;
  if (++block_ == 0) {  // the number has come round: no cell may look as if it were of this block
    std::fill(cells_.begin(), cells_.end(), Cell{});
    block_ = 1;
  }
  arrays_.clear();
  end_ = 0;
  if (dynamic_bytes > 0) {
    arrays_.push_back({nullptr, "dynamic shared memory", 0, dynamic_bytes});
    end_ = dynamic_bytes;
  }
  for (int w = 0; w < 32; ++w) {
    clocks_[static_cast<size_t>(w)] = Clock{};
    tick(w);
  }
  for (int t = 0; t < threads; ++t) {
    copies_[static_cast<size_t>(t)].clear();
    groups_[static_cast<size_t>(t)] = 0;
  }
}

void* Shared::named(const void* key, const char* name, int64_t bytes) {
  for (const Array& a : arrays_) {
    if (a.key == key) return base_ + a.begin;
  }
  static_left_ -= bytes;
  if (static_left_ < 0) {
    report("shared array " + std::string(name) + " of " + std::to_string(bytes) +
           " bytes: " + std::to_string(-static_left_) + " more than the kernel may have");
  }
  const int64_t begin = (end_ + kGap + 127) / 128 * 128;
  if (begin + bytes > kCapacity) report("shared array " + std::string(name) + " does not fit");
  end_ = begin + bytes;
  arrays_.push_back({key, name, begin, end_});
  return base_ + begin;
}

int64_t Shared::offset_of(const void* at, int64_t bytes, const char* what) const {
  const int64_t offset = static_cast<const char*>(at) - base_;
  if (offset % (bytes & -bytes) != 0) {  // of a struct of 12 bytes: 4
    report(std::string("misaligned ") + what + " of " + std::to_string(bytes) +
           " bytes in shared memory");
  }
  for (const Array& a : arrays_) {
    if (offset >= a.begin && offset + bytes <= a.end) {
      if (bytes < kGranule) report("shared memory is watched in steps of two bytes, not one");
      return offset;
    }
  }
  std::string where = " outside the block's shared memory";
  for (const Array& a : arrays_) {
    if (offset >= a.begin - kGap && offset < a.end + kGap) {
      const int64_t past = offset < a.begin ? offset - a.begin : offset + bytes - a.end;
      where += ", " + std::to_string(past < 0 ? -past : past) + " bytes " +
               (past < 0 ? "before " : "past ") + a.name;
      break;
    }
  }
  report(std::string(what) + where);
}

std::string Shared::name_of(int64_t offset) const {
  for (const Array& a : arrays_) {
    if (offset >= a.begin && offset < a.end) {
      return std::string(a.name) + " + " + std::to_string(offset - a.begin);
    }
  }
  return "shared memory";
}

bool Shared::ordered(const Access& before, int thread) const {
  if (before.thread < 0 || before.thread == thread) return true;
  const size_t from = static_cast<size_t>(before.thread) / 32,
               to = static_cast<size_t>(thread) / 32;
  const uint32_t known = clocks_[to].of_warp[from];
  return from == to ? before.clock < known : before.clock <= known;
}

Cell& Shared::cell(int64_t offset) {
  Cell& c = cells_[static_cast<size_t>(offset / kGranule)];
  if (c.block != block_) {
    c = Cell{};
    c.block = block_;
  }
  return c;
}

void Shared::read(int thread, const void* at, int64_t bytes) {
  const int64_t begin = offset_of(at, bytes, "load");
  const size_t warp = static_cast<size_t>(thread) / 32;
  const Access me{thread, clocks_[warp].of_warp[warp]};
  for (int64_t offset = begin; offset < begin + bytes; offset += kGranule) {
    Cell& c = cell(offset);
    if (c.copier >= 0) {
      report("load of " + name_of(offset) + ", where a cp.async of " + thread_name(c.copier) +
             " has not been waited for");
    }
    if (c.write.thread < 0) report("load of " + name_of(offset) + ", which nobody has written");
    if (!ordered(c.write, thread)) {
      report("race: load of " + name_of(offset) + ", which " + thread_name(c.write.thread) +
             " wrote with no barrier between");
    }
    Access& last = c.read[0];
    if (last.thread >= 0 && static_cast<size_t>(last.thread) / 32 == warp &&
        last.clock == me.clock) {
      c.many = c.many || last.thread != thread;
      last.thread = thread;
      continue;
    }
    c.read[1] = last;
    last = me;
    c.many = false;
  }
}

void Shared::check_write(int thread, int64_t offset, bool atomic) {
  Cell& c = cell(offset);
  if (c.copier >= 0) {
    report("store to " + name_of(offset) + ", where a cp.async of " + thread_name(c.copier) +
           " has not been waited for");
  }
  if (!(atomic && c.atomic) && !ordered(c.write, thread)) {
    report("race: store to " + name_of(offset) + ", which " + thread_name(c.write.thread) +
           " wrote with no barrier between");
  }
  const size_t warp = static_cast<size_t>(thread) / 32;
  for (const Access& r : c.read) {
    const bool others = c.many && &r == &c.read[0] && r.thread >= 0 &&
                        static_cast<size_t>(r.thread) / 32 == warp &&
                        r.clock >= clocks_[warp].of_warp[warp];
    if (others || !ordered(r, thread)) {
      report("race: store to " + name_of(offset) + ", which " +
             (r.thread == thread ? "other lanes" : thread_name(r.thread)) +
             " read with no barrier between");
    }
  }
}

void Shared::write(int thread, const void* at, int64_t bytes) {
  const int64_t begin = offset_of(at, bytes, "store");
  const size_t warp = static_cast<size_t>(thread) / 32;
  for (int64_t offset = begin; offset < begin + bytes; offset += kGranule) {
    check_write(thread, offset, false);
    cell(offset).write = {thread, clocks_[warp].of_warp[warp]};
    cell(offset).atomic = false;
  }
}

// Additions don't race with one another, but with what else is done there.
void Shared::atomic(int thread, const void* at, int64_t bytes) {
  const int64_t begin = offset_of(at, bytes, "atomic addition");
  const size_t warp = static_cast<size_t>(thread) / 32;
  for (int64_t offset = begin; offset < begin + bytes; offset += kGranule) {
    check_write(thread, offset, true);
    Cell& c = cell(offset);
    if (c.write.thread < 0) {
      report("atomic addition to " + name_of(offset) + ", which nobody has written");
    }
    c.write = {thread, clocks_[warp].of_warp[warp]};
    c.atomic = true;
  }
}

void Shared::copy(int thread, void* shared, const void* global, int bytes, int valid) {
  const int64_t begin = offset_of(shared, bytes, "cp.async");
  for (int64_t offset = begin; offset < begin + bytes; offset += kGranule) {
    check_write(thread, offset, false);
    cell(offset).copier = thread;
  }
  const size_t t = static_cast<size_t>(thread);
  copies_[t].push_back(
      {static_cast<char*>(shared), static_cast<const char*>(global), bytes, valid, groups_[t]});
}

void Shared::commit(int thread) { ++groups_[static_cast<size_t>(thread)]; }

void Shared::wait(int thread, int groups_left) {
  const size_t t = static_cast<size_t>(thread), warp = t / 32;
  std::vector<Copy>& copies = copies_[t];
  size_t done = 0;
  // A group's number is the commits before it: copies that were not committed are never done here.
  while (done < copies.size() && copies[done].group < groups_[t] - groups_left) {
    const Copy& c = copies[done++];
    std::memcpy(c.shared, c.global, static_cast<size_t>(c.valid));
    std::memset(c.shared + c.valid, 0, static_cast<size_t>(c.bytes - c.valid));
    const int64_t begin = c.shared - base_;
    for (int64_t offset = begin; offset < begin + c.bytes; offset += kGranule) {
      cell(offset).copier = -1;
      cell(offset).write = {thread, clocks_[warp].of_warp[warp]};
      cell(offset).atomic = false;
    }
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace ft::simt
