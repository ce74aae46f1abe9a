#include "memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace fastopt {
namespace {

constexpr size_t page = 4096, huge_page = 1 << 21;
constexpr size_t huge_from_bytes = 4 << 20;  // as in NumPy
constexpr size_t largest_total = size_t(1) << 30;
constexpr size_t most_blocks = 32;

struct Block {
  void* data;
  size_t bytes;
};

std::mutex mutex;
std::vector<Block>& kept = *new std::vector<Block>;  // the oldest first; arrays may outlive statics
size_t kept_bytes = 0;
bool closed = false;

// A forked child must not find the mutex held by a thread that it has not got.
[[maybe_unused]] const int fork_handler =
    pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });

void drop_oldest() {
  kept_bytes -= kept.front().bytes;
  std::free(kept.front().data);
  kept.erase(kept.begin());
}

// Kept memory is a whole number of pages, so that more requests find some of their size.
size_t whole_pages(size_t bytes) {
  const size_t unit = bytes < huge_from_bytes ? page : huge_page;
  return (bytes + unit - 1) / unit * unit;
}

}  // namespace

void* take(size_t bytes) {
  if (bytes < kept_from_bytes) {
    void* const data = std::malloc(std::max<size_t>(1, bytes));
    if (data == nullptr) throw std::bad_alloc();
    return data;
  }
  bytes = whole_pages(bytes);
  {
    const std::lock_guard lock(mutex);
    for (size_t i = kept.size(); i-- > 0;) {
      if (kept[i].bytes != bytes) continue;
      void* const data = kept[i].data;
      kept_bytes -= bytes;
      kept.erase(kept.begin() + std::ptrdiff_t(i));
      return data;
    }
  }
  const bool huge = bytes >= huge_from_bytes;
  void* const data = std::aligned_alloc(huge ? huge_page : page, bytes);
  if (data == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (huge) madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return data;
}

void give(void* data, size_t bytes) {
  if (bytes < kept_from_bytes) return std::free(data);
  bytes = whole_pages(bytes);
  const std::lock_guard lock(mutex);
  if (closed || bytes > largest_total) return std::free(data);
  while (kept.size() >= most_blocks || kept_bytes + bytes > largest_total) drop_oldest();
  kept.push_back({data, bytes});
  kept_bytes += bytes;
}

void empty_cache() {
  const std::lock_guard lock(mutex);
  while (!kept.empty()) drop_oldest();
}

void close_cache() {
  empty_cache();
  const std::lock_guard lock(mutex);
  closed = true;
}

}  // namespace fastopt
