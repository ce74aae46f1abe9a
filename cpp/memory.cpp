#include "memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdlib>
#include <limits>
#include <mutex>
#include <new>

namespace fastopt {
namespace {

constexpr size_t page = 4096, huge_page = 1 << 21;
constexpr size_t huge_from_bytes = 4 << 20;  // as in NumPy
constexpr size_t kept_from_bytes = 1 << 16;  // below it the C library does well
constexpr size_t largest_total = size_t(1) << 30;
constexpr size_t most_blocks = 16;

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

void* take(size_t bytes) {
  {
    const std::lock_guard lock(mutex);
    for (size_t i = kept.size(); i-- > 0;) {
      if (kept[i].bytes != bytes) continue;
      void* const data = kept[i].data;
      kept_bytes -= bytes;
      kept.erase(kept.begin() + py::ssize_t(i));
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
  const std::lock_guard lock(mutex);
  if (closed || bytes > largest_total) {
    std::free(data);
    return;
  }
  while (kept.size() >= most_blocks || kept_bytes + bytes > largest_total) drop_oldest();
  kept.push_back({data, bytes});
  kept_bytes += bytes;
}

}  // namespace

py::array new_output(const std::vector<py::ssize_t>& shape, Dtype dtype) {
  const py::dtype type = dtype == Dtype::float32 ? py::dtype::of<float>() : py::dtype::of<double>();
  size_t bytes = size_t(type.itemsize());
  for (const py::ssize_t extent : shape) {
    if (extent != 0 &&
        bytes > size_t(std::numeric_limits<py::ssize_t>::max()) / 2 / size_t(extent)) {
      throw std::bad_alloc();
    }
    bytes *= size_t(extent);
  }
  if (bytes < kept_from_bytes) return py::array(type, shape);
  const size_t unit = bytes < huge_from_bytes ? page : huge_page;
  bytes = (bytes + unit - 1) / unit * unit;
  void* const data = take(bytes);
  // The array's memory comes back when the last array that looks at it is gone. A capsule carries
  // one pointer; its context carries the size.
  PyObject* const owner = PyCapsule_New(data, nullptr, [](PyObject* capsule) {
    give(PyCapsule_GetPointer(capsule, nullptr), size_t(PyCapsule_GetContext(capsule)));
  });
  if (owner == nullptr) {
    give(data, bytes);
    throw py::error_already_set();
  }
  PyCapsule_SetContext(owner, reinterpret_cast<void*>(bytes));
  return py::array(type, shape, data, py::reinterpret_steal<py::object>(owner));
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
