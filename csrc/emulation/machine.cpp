// The machine that emulated kernels run on. See cuda_runtime.h for how it comes to see every access to memory.
//
// A thread is a fiber; one runs at a time, until it waits. Which one runs next, and which blocks begin first, is drawn
// from a seed. Stopped, with a sentence that names kernel, block and thread, are:
// - launches that sm_80 or sm_90, whichever is emulated, would refuse: threads, grid, shared memory, residency;
// - reads and writes outside of every allocation, across the end of one, or out of line with their width;
// - two threads of a block at one place, one of them writing, with no barrier between;
// - two blocks at one place, one of them writing: unless the writer has made it known (by a fence, of its own thread or
//   behind a barrier, and then something atomic), and the reader looks past the first-level cache after a fence of its
//   own that came after something atomic;
// - barriers, votes and shuffles that not all threads reach together, and threads that wait for ever.
// Fresh memory, shared and global, is all ones: NaN in every type of float.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace emulation {
namespace {

// ---- devices ---------------------------------------------------------------------------------------

struct Device {
  const char* name;
  int multiprocessors;
  int64_t shared_of_multiprocessor, shared_of_block;  // bytes
};
// Whole GPUs, and slices of them on which a tensor takes several rounds.
constexpr Device kDevices[] = {{"sm_80", 108, 164 << 10, 163 << 10},
                               {"sm_90", 132, 228 << 10, 227 << 10},
                               {"a slice of sm_80", 3, 164 << 10, 163 << 10},
                               {"a slice of sm_90", 1, 228 << 10, 227 << 10},
                               {"a large slice of sm_90", 16, 228 << 10, 227 << 10}};
constexpr int kMaxThreads = 1024, kThreadsOfMultiprocessor = 2048, kReserved = 1 << 10, kWarp = 32;
constexpr int kMostBlocks = 2;         // on a multiprocessor: for more, kernels may take too many registers
constexpr int64_t kStatic = 12 << 10;  // bytes of static shared memory that a kernel may have
constexpr int64_t kDefaultShared = 48 << 10;

int device = 2;
std::map<std::pair<const void*, int>, int64_t> dynamic_limits;  // by kernel and device

// ---- memory ----------------------------------------------------------------------------------------

// Who wrote and who read four bytes last, in which launch, and in which of the block's times between barriers.
struct Trace {
  uint32_t launch = 0, block = 0, thread = 0, epoch = 0;
};
constexpr uint32_t kSeveral = ~0u;
struct Shadow {
  Trace writer, reader;  // of the reader, block and thread may be several
};

struct Region {
  uintptr_t begin = 0, end = 0;
  Shadow* shadows = nullptr;  // made, as zeros, where first needed
  bool huge = false;          // pages come as they are touched, and nobody keeps a shadow of them
  bool holds(uintptr_t address) const { return address >= begin && address < end; }
  Shadow& at(uintptr_t address) {
    if (!shadows) shadows = static_cast<Shadow*>(calloc((end - begin) / 4 + 2, sizeof(Shadow)));
    return shadows[(address - begin) / 4];
  }
};

std::mutex allocations_mutex;
std::map<uintptr_t, Region> allocations;  // by begin
Region* recent[4] = {};
constexpr size_t kGap = 4096;  // around an allocation, so that a step past its end is in no other
constexpr size_t kHuge = 64 << 20;
constexpr int kPages = PROT_READ | PROT_WRITE, kNoPages = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

struct Poisoned final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const bool huge = bytes >= kHuge;
    const size_t room = (bytes + 2 * kGap + 63) / 64 * 64;
    void* whole = huge ? mmap(nullptr, room, kPages, kNoPages, -1, 0) : aligned_alloc(64, room);
    if (!whole || whole == MAP_FAILED) throw std::bad_alloc();
    char* begin = static_cast<char*>(whole) + kGap;
    if (!huge) memset(begin, 0xff, bytes);  // NaN in every type of float
    const uintptr_t from = uintptr_t(begin);
    const std::lock_guard<std::mutex> lock(allocations_mutex);
    allocations[from] = {from, from + bytes, nullptr, huge};
    return {begin, begin, &release, c10::Device(c10::DeviceType::CPU)};
  }
  static void release(void* begin) {
    const std::lock_guard<std::mutex> lock(allocations_mutex);
    const auto found = allocations.find(uintptr_t(begin));
    const Region region = found->second;
    allocations.erase(found);
    std::fill(std::begin(recent), std::end(recent), nullptr);
    free(region.shadows);
    char* whole = static_cast<char*>(begin) - kGap;
    if (region.huge)
      munmap(whole, (region.end - region.begin + 2 * kGap + 63) / 64 * 64);
    else
      free(whole);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

Region* allocation_of(uintptr_t address) {
  for (Region* region : recent)
    if (region && region->holds(address)) return region;
  const std::lock_guard<std::mutex> lock(allocations_mutex);
  auto next = allocations.upper_bound(address);
  if (next == allocations.begin() || !(--next)->second.holds(address)) return nullptr;
  std::move_backward(std::begin(recent), std::end(recent) - 1, std::end(recent));
  return recent[0] = &next->second;
}

// ---- threads and blocks ----------------------------------------------------------------------------

enum class Wait { barrier, vote, arrive, depart };  // the barriers of a block

struct Block;
struct Thread {
  jmp_buf context;
  char* stack = nullptr;
  Block* block = nullptr;
  unsigned index = 0;
  bool done = false;
  uint64_t observed = 0, acquired = 0;  // when it last saw something atomic; what was known by then it may read
};
constexpr size_t kStack = 64 << 10;

struct Fence {
  uint64_t time;
  uint32_t thread, epoch;
};

struct Block {
  unsigned index = 0;
  uint32_t epoch = 0;
  std::vector<Thread*> threads, ready, sleeping;
  Wait wait = Wait::barrier;
  unsigned waiting = 0, done = 0, warp_waiting[kMaxThreads / kWarp] = {};
  int warp_apart[kMaxThreads / kWarp] = {};  // what the shuffle is that a warp waits for
  double shuffled[kMaxThreads];              // by thread
  bool vote = false, result = false;
  uint64_t acquired = 0;
  std::vector<std::pair<const void*, Region>> arrays;  // of shared memory, by site
  int64_t static_bytes = 0;
  ~Block() {
    for (auto& [site, array] : arrays) free(array.shadows), free(reinterpret_cast<void*>(array.begin - kGap));
  }
};

// ---- the machine -----------------------------------------------------------------------------------

std::minstd_rand generator;
int64_t launches = 0;
uint32_t launch_number = 0;
uint64_t now = 0;
const char* kernel_name = "";
void (*run_thread)(const void*) = nullptr;
Region arguments;                               // of the kernel, which every thread reads
std::vector<Thread*> idle;                      // fibers that wait for a block
std::map<unsigned, std::vector<Fence>> fences;  // by block, of those that are done too
unsigned grid = 0, arrived = 0;
unsigned last_blocks = 0;  // if not 0, how many of a grid are run, where they do not wait for one another
bool cooperative = false;
Thread* current = nullptr;
jmp_buf scheduler;
ucontext_t first_context;
std::string error;

size_t draw(size_t below) { return (size_t(generator()) - 1) * below / generator.max(); }

template <class... Words>
[[noreturn]] void fail(const Words&... words) {
  std::ostringstream sentence;
  sentence << "emulated on " << kDevices[device].name << ": ";
  (sentence << ... << words);
  if (!current) throw std::runtime_error(sentence.str());
  sentence << " (thread " << current->index << " of block " << current->block->index << ", " << kernel_name << ")";
  error = sentence.str();
  _longjmp(scheduler, 2);
}

void pause() {
  if (!_setjmp(current->context)) _longjmp(scheduler, 1);
}

// What a fiber runs: one thread after another, of one block after another.
void run_threads() {
  for (;;) {
    run_thread(reinterpret_cast<const void*>(arguments.begin));
    current->done = true;
    pause();
  }
}

ucontext_t starting;
void first_entry() {
  if (!_setjmp(current->context)) setcontext(&first_context);
  run_threads();
}

Thread* new_thread() {
  if (!idle.empty()) {
    Thread* thread = idle.back();
    idle.pop_back();
    return thread;
  }
  Thread* thread = new Thread;
  thread->stack = static_cast<char*>(mmap(nullptr, kStack, kPages, kNoPages, -1, 0));
  if (thread->stack == MAP_FAILED) throw std::runtime_error("emulation: no memory for the stacks of its threads");
  getcontext(&starting);
  starting.uc_stack.ss_sp = thread->stack;
  starting.uc_stack.ss_size = kStack;
  makecontext(&starting, first_entry, 0);
  current = thread;
  swapcontext(&first_context, &starting);
  current = nullptr;
  return thread;
}

void wake(Block& block) {
  for (const Thread* thread : block.threads) block.acquired = std::max(block.acquired, thread->acquired);
  block.ready = block.threads;
  block.waiting = 0;
  block.result = block.vote;
  block.vote = false;
  ++block.epoch;
}

// All threads of the block, none of them done, at one barrier.
void wait_for_block(Wait kind) {
  Block& block = *current->block;
  if (block.waiting && block.wait != kind) fail("threads of a block wait at different barriers");
  if (block.done) fail("a barrier that not all threads of the block reach: ", block.done, " are done");
  block.wait = kind;
  if (++block.waiting == block.threads.size()) {
    wake(block);
    if (kind == Wait::arrive) {
      ++arrived;
      fences[block.index].push_back({++now, kSeveral, block.epoch});
    }
  }
  pause();
}

// ---- accesses --------------------------------------------------------------------------------------

enum class Access { plain, past_l1, atomic };

// Whether this thread may rely on what another block wrote.
bool known(const Trace& writer) {
  const uint64_t until = std::max(current->acquired, current->block->acquired);
  for (const Fence& fence : fences[writer.block]) {
    if (fence.time > until) return false;
    if (fence.epoch > writer.epoch || (fence.epoch == writer.epoch && fence.thread == writer.thread)) return true;
  }
  return false;
}

void trace(Region& region, uintptr_t address, size_t bytes, bool writes, Access access, bool is_shared) {
  const Trace mine{launch_number, current->block->index, current->index, current->block->epoch};
  const char* const memory = is_shared ? "shared" : "global";
  for (uintptr_t at = address; at < address + bytes; at += 4) {
    Shadow& shadow = region.at(at);
    const Trace &writer = shadow.writer, reader = shadow.reader;
    if (writer.launch == mine.launch) {
      if (writer.block == mine.block) {
        if (writer.thread != mine.thread && writer.epoch == mine.epoch)
          fail("a race in ", memory, " memory with thread ", writer.thread, ", which wrote there: no barrier between");
      } else if (!known(writer)) {
        fail("block ", writer.block, " wrote there, and no fences make that known to this block");
      } else if (!writes && access == Access::plain) {
        fail("block ", writer.block, " wrote there: a plain read may find what the first-level cache held before");
      }
    }
    if (access == Access::atomic) continue;  // which races with nothing that is atomic too
    if (writes) {
      if (reader.launch == mine.launch &&
          (reader.block != mine.block || (reader.thread != mine.thread && reader.epoch == mine.epoch)))
        fail("a race in ", memory, " memory with a thread that reads there: no barrier between");
      shadow.writer = mine;
    } else if (reader.launch != mine.launch) {
      shadow.reader = mine;
    } else {
      const bool new_epoch = reader.block == mine.block && reader.epoch != mine.epoch;
      if (reader.block != mine.block) shadow.reader.block = kSeveral;
      shadow.reader.thread = reader.thread == mine.thread || new_epoch ? mine.thread : kSeveral;
      shadow.reader.epoch = mine.epoch;
    }
  }
}

void check(const void* pointer, size_t bytes, bool writes, Access access) {
  if (!current) return;
  const uintptr_t address = uintptr_t(pointer), stack = uintptr_t(current->stack);
  if (address >= stack && address < stack + kStack) return;  // a thread's own
  if (!writes && address >= arguments.begin && address + bytes <= arguments.end) return;
  if (access == Access::atomic) current->observed = ++now;
  Region* region = nullptr;
  for (auto& [site, array] : current->block->arrays)
    if (array.holds(address)) region = &array;
  const bool is_shared = region;
  if (!region) region = allocation_of(address);
  const char* const what = writes ? "a write" : "a read";
  if (!region) fail(what, " outside of every allocation");
  if (address + bytes > region->end) fail(what, " past the end of an allocation of ", region->end - region->begin);
  if (bytes >= 4 && !region->huge) trace(*region, address, bytes, writes, access, is_shared);
}

Region new_array(int64_t bytes) {
  char* whole = static_cast<char*>(aligned_alloc(64, (bytes + 2 * kGap + 63) / 64 * 64));
  memset(whole, 0xff, bytes + 2 * kGap);
  const uintptr_t begin = uintptr_t(whole) + kGap;
  return {begin, begin + bytes};
}

// ---- launches --------------------------------------------------------------------------------------

std::unique_ptr<Block> begin_block(unsigned index, unsigned threads, int64_t dynamic_bytes) {
  auto block = std::make_unique<Block>();
  block->index = index;
  block->arrays.reserve(16);
  block->arrays.push_back({nullptr, new_array(dynamic_bytes)});
  for (unsigned i = 0; i < threads; ++i) {
    Thread* thread = new_thread();
    thread->block = block.get();
    thread->index = i;
    thread->done = false;
    thread->observed = thread->acquired = 0;
    block->threads.push_back(thread);
  }
  block->ready = block->threads;
  return block;
}

// Lets one thread run until it waits.
void run_one(Block& block) {
  const size_t choice = draw(block.ready.size());
  std::swap(block.ready[choice], block.ready.back());
  current = block.ready.back();
  block.ready.pop_back();
  const int outcome = _setjmp(scheduler);
  if (outcome == 0) _longjmp(current->context, 1);
  if (outcome == 2) {
    current = nullptr;
    throw std::runtime_error(error);
  }
  if (current->done) {
    ++block.done;
    if (block.waiting) fail("a barrier that not all threads of the block reach: one is done");
  }
  current = nullptr;
}

void check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  const Device& on = kDevices[device];
  const dim3 &blocks = config.gridDim, &threads = config.blockDim;
  if (blocks.x < 1 || blocks.x > 0x7fffffffu || blocks.y != 1 || blocks.z != 1) fail("a grid of ", blocks.x, " blocks");
  if (threads.x < 1 || threads.x > kMaxThreads || threads.x % kWarp || threads.y != 1 || threads.z != 1)
    fail("blocks of ", threads.x, " threads");
  const auto limit = dynamic_limits.find({kernel, device});
  const int64_t bytes = int64_t(config.dynamicSmemBytes);
  if (bytes > (limit == dynamic_limits.end() ? kDefaultShared - kStatic : limit->second))
    fail("more dynamic shared memory than was asked for: ", bytes, " bytes");
  if (!cooperative) return;
  int held = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&held, kernel, int(threads.x), config.dynamicSmemBytes);
  if (blocks.x > unsigned(held * on.multiprocessors))
    fail("blocks that wait for one another, but are not resident together: ", blocks.x);
}

void run(const cudaLaunchConfig_t& config) {
  std::vector<unsigned> order(cooperative || !last_blocks ? grid : std::min(grid, last_blocks));
  for (unsigned i = 0; i < order.size(); ++i) order[i] = grid - 1 - i;
  std::shuffle(order.begin(), order.end(), generator);
  const size_t together = cooperative ? grid : 2;
  std::vector<std::unique_ptr<Block>> live;
  size_t begun = 0, block = 0;
  bool looked = false, stepped = false;  // the threads that poll, and any thread since
  while (begun < order.size() || !live.empty()) {
    while (live.size() < together && begun < order.size())
      live.push_back(begin_block(order[begun++], config.blockDim.x, int64_t(config.dynamicSmemBytes)));
    // Most often the same block again, as long as it can go on.
    if (block >= live.size() || live[block]->ready.empty() || draw(64) == 0) block = draw(live.size());
    for (size_t i = 0; i < live.size() && live[block]->ready.empty(); ++i) block = (block + 1) % live.size();
    if (live[block]->ready.empty()) {  // all wait; those that poll look again
      bool any = false;
      for (auto& other : live) {
        any |= !other->sleeping.empty();
        other->ready.swap(other->sleeping);
      }
      if (!any || (looked && !stepped)) fail("threads that wait for ever: a barrier or shuffle not all reach");
      looked = true;
      stepped = false;
      continue;
    }
    Block& chosen = *live[block];
    const size_t sleeping = chosen.sleeping.size();
    run_one(chosen);
    stepped |= chosen.sleeping.size() == sleeping;
    if (chosen.done == chosen.threads.size()) {
      idle.insert(idle.end(), chosen.threads.begin(), chosen.threads.end());
      live.erase(live.begin() + block);
    }
  }
}

}  // namespace

// ---- what kernels call -----------------------------------------------------------------------------

Index thread_index() { return {current->index, 0, 0}; }
Index block_index() { return {current->block->index, 0, 0}; }

void* shared(const void* site, int64_t bytes) {
  Block& block = *current->block;
  for (auto& [known_site, array] : block.arrays)
    if (known_site == site) return reinterpret_cast<void*>(array.begin);
  block.static_bytes += (bytes + 15) / 16 * 16;
  if (block.static_bytes > kStatic) fail("more than ", kStatic, " bytes of static shared memory");
  block.arrays.push_back({site, new_array(bytes)});
  return reinterpret_cast<void*>(block.arrays.back().second.begin);
}

void* dynamic_shared() { return reinterpret_cast<void*>(current->block->arrays[0].second.begin); }

void barrier() { wait_for_block(Wait::barrier); }

bool barrier_or(bool vote) {
  current->block->vote |= vote;
  wait_for_block(Wait::vote);
  return current->block->result;
}

double shuffle_xor(double value, int apart) {
  Block& block = *current->block;
  const unsigned warp = current->index / kWarp;
  if (apart < 1 || apart >= kWarp) fail("a shuffle across ", apart, " lanes");
  if (block.warp_waiting[warp] && block.warp_apart[warp] != apart) fail("lanes of a warp at different shuffles");
  block.warp_apart[warp] = apart;
  double* const values = &block.shuffled[warp * kWarp];
  values[current->index % kWarp] = value;
  if (++block.warp_waiting[warp] == kWarp) {
    block.warp_waiting[warp] = 0;
    for (int lane = 0; lane < kWarp; ++lane)
      if (lane < (lane ^ apart)) std::swap(values[lane], values[lane ^ apart]);
    const auto first = block.threads.begin() + warp * kWarp;
    block.ready.insert(block.ready.end(), first, first + kWarp);
  }
  pause();
  return values[current->index % kWarp];
}

void fence() {
  fences[current->block->index].push_back({++now, current->index, current->block->epoch});
  current->acquired = current->observed;
}

void sleep() {
  current->block->sleeping.push_back(current);
  pause();
}

void grid_arrive() {
  if (!cooperative) fail("a barrier of the grid, in a launch that is not cooperative");
  wait_for_block(Wait::arrive);
}

void grid_wait() {
  while (arrived < grid) sleep();
  current->acquired = ++now;
  wait_for_block(Wait::depart);
}

unsigned add_atomically(unsigned* to, unsigned value) {
  check(to, sizeof(*to), true, Access::atomic);
  const unsigned before = *to;
  *to += value;
  return before;
}

void read_past_l1(const void* from, int64_t bytes, void* to) {
  check(from, size_t(bytes), false, Access::past_l1);
  memcpy(to, from, size_t(bytes));
}

void launch(const cudaLaunchConfig_t& config, const void* kernel, const char* name, void (*run_one_thread)(const void*),
            const void* given, int64_t bytes) {
  cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i)
    cooperative |= config.attrs[i].id == cudaLaunchAttributeCooperative && config.attrs[i].val.cooperative;
  check_launch(config, kernel);
  ++launches, ++launch_number;
  kernel_name = name;
  run_thread = run_one_thread;
  arguments = {uintptr_t(given), uintptr_t(given) + bytes};
  grid = config.gridDim.x;
  arrived = 0;
  fences.clear();
  try {
    run(config);
  } catch (...) {
    idle.clear();  // fibers that stopped in the middle of a kernel are of no more use
    throw;
  }
}

}  // namespace emulation

// ---- the runtime -----------------------------------------------------------------------------------

using namespace emulation;

cudaError_t cudaGetDevice(int* current_device) {
  *current_device = device;
  return 0;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int of) {
  const Device& on = kDevices[of];
  switch (name) {
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = int(on.shared_of_multiprocessor); break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = kReserved; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(on.shared_of_block); break;
    case cudaDevAttrMultiProcessorCount: *value = on.multiprocessors; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
  }
  return 0;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->sharedSizeBytes = kStatic;
  return 0;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute name, int value) {
  if (name != cudaFuncAttributeMaxDynamicSharedMemorySize) return 0;
  if (value < 0 || value + kStatic > kDevices[device].shared_of_block)
    fail("more shared memory than a block can have: ", value, " bytes besides the static ones");
  dynamic_limits[{kernel, device}] = value;
  return 0;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, size_t bytes) {
  const int64_t by_shared = kDevices[device].shared_of_multiprocessor / (int64_t(bytes) + kStatic + kReserved);
  *blocks = int(std::min<int64_t>({by_shared, kThreadsOfMultiprocessor / threads, kMostBlocks}));
  return 0;
}

// ---- what tests call -------------------------------------------------------------------------------

extern "C" {
#define EXPORTED __attribute__((visibility("default")))
EXPORTED void emulation_begin(unsigned seed, int on) {
  static Poisoned poisoned;
  c10::SetCPUAllocator(&poisoned, 255);
  generator.seed(seed);
  device = on;
}
EXPORTED void emulation_end() { c10::SetCPUAllocator(c10::GetDefaultCPUAllocator(), 255); }
EXPORTED void emulation_run_last_blocks(unsigned blocks) { last_blocks = blocks; }
EXPORTED int64_t emulation_launches() { return launches; }

// ---- what the compiler puts before every access, and where arithmetic goes wrong ---------------------

#define ACCESSES(bytes)                                                                             \
  void __tsan_read##bytes(void* at) { check(at, bytes, false, Access::plain); }                     \
  void __tsan_write##bytes(void* at) { check(at, bytes, true, Access::plain); }                     \
  void __tsan_unaligned_read##bytes(void* at) { check(at, bytes, false, Access::plain); }           \
  void __tsan_unaligned_write##bytes(void* at) { check(at, bytes, true, Access::plain); }           \
  void __tsan_volatile_read##bytes(void* at) { check(at, bytes, false, Access::atomic); }           \
  void __tsan_volatile_write##bytes(void* at) { check(at, bytes, true, Access::atomic); }           \
  void __tsan_unaligned_volatile_read##bytes(void* at) { check(at, bytes, false, Access::atomic); } \
  void __tsan_unaligned_volatile_write##bytes(void* at) { check(at, bytes, true, Access::atomic); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* at, long bytes) { check(at, size_t(bytes), false, Access::plain); }
void __tsan_write_range(void* at, long bytes) { check(at, size_t(bytes), true, Access::plain); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
int __tsan_atomic32_fetch_add(volatile int* at, int value, int) {  // the host's: a count of a tensor's owners
  return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);
}

// Each gets where it happened as the first part of its data.
struct Source {
  const char* file;
  unsigned line, column;
};
#define WRONG(handler, sentence, ...) \
  void __ubsan_handle_##handler(const Source* source, ##__VA_ARGS__) { fail(sentence, ", line ", source->line); }
WRONG(type_mismatch_v1, "an access out of line with its width", void*)
WRONG(add_overflow, "an integer overflow", void*, void*)
WRONG(sub_overflow, "an integer overflow", void*, void*)
WRONG(mul_overflow, "an integer overflow", void*, void*)
WRONG(negate_overflow, "an integer overflow", void*)
WRONG(divrem_overflow, "a division by zero", void*, void*)
WRONG(shift_out_of_bounds, "a shift by more bits than there are", void*, void*)
WRONG(out_of_bounds, "an index past the end of an array", void*)
}
