// A stand-in for an accelerator, as torch's PrivateUse1 device: what a GPU refuses, or does only later, shows here.
//
// Its memory is this machine's, but not at the addresses that its tensors have. Its kernels are the CPU's, on copies of
// what they take, and run when they are called. Copies to it and from it can be told to be late: see "streams". What is
// right here by luck alone, because something was not late, is found by its order: see "races".

#include <array>
#include <atomic>
#include <deque>
#include <map>
#include <mutex>
#include <set>

#include <sys/mman.h>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

using at::Device, at::DeviceIndex, at::Tensor;
using c10::Stream, c10::StreamId, c10::CachingDeviceAllocator::DeviceStats;
using Held = std::lock_guard<std::mutex>; // `return Held(lock), value`: held while the value is computed
template <class T> using Maybe = std::optional<T>;

constexpr auto STANDIN = at::DeviceType::PrivateUse1;
constexpr DeviceIndex DEVICES = 2;
thread_local DeviceIndex current_device = 0;

DeviceIndex index_of(Device device) {
    TORCH_CHECK(device.index() < DEVICES, "standin: there is no device ", int(device.index()));
    return device.has_index() ? device.index() : current_device;
}

bool is_here(const Tensor &tensor) { return tensor.device().type() == STANDIN; }

// --- races
//
// As kernels run when they are called, numbers do not show that a copy overwrites what an earlier kernel of another
// stream may still read on a GPU. Clocks do. Each stream counts its uses of memory, and knows how far the others
// are by then: from events that it waits for, and from the host, which knows it from what it has waited for itself. Two
// uses of a byte, one of which writes, must be in such an order. A strided tensor's bytes are all from first to last.
// The host counts as one, whatever its threads. What it does to its own memory is not seen.

using Clock = std::vector<int64_t>; // by stream: so many of its uses of memory are over
constexpr StreamId HOST = -1;       // has a clock, but uses none of the device's memory

struct Use {
    StreamId stream = 0;
    int64_t number = 0; // of the stream's uses, from 1
    const char *name = "";
    bool operator==(const Use &) const = default;
    bool is_before(const Clock &clock) const { return !number || stream < clock.size() && number <= clock[stream]; }
};

struct Uses {
    Use write;
    std::vector<Use> reads; // since then, without those that come before another of them
    bool operator==(const Uses &) const = default;
};

struct Races {
    std::mutex lock; // taken last
    std::map<StreamId, Clock> clocks;
    std::map<uintptr_t, Uses> uses{{0, {}}}; // of all bytes from an address to the next one here
    std::atomic<bool> checked = false;

    auto split(uintptr_t address) {
        auto before = std::prev(uses.upper_bound(address));
        return before->first == address ? before : uses.emplace(address, before->second).first;
    }
    void join(uintptr_t start, uintptr_t end) { // so that there are no more addresses than changes
        for (auto at = uses.lower_bound(start); at != uses.end() && at->first <= end;)
            at = at->first && at->second == std::prev(at)->second ? uses.erase(at) : std::next(at);
    }
} &races = *new Races;

thread_local bool inside = false; // a kernel: the copies that it makes are none of a GPU's
struct Inside { bool before = std::exchange(inside, true); ~Inside() { inside = before; } };

Clock clock_of(StreamId stream) { return Held(races.lock), races.clocks[stream]; }

// What a stream or the host does from here on comes after all that is over by a clock.
void put_after(StreamId stream, const Clock &earlier) {
    Held held(races.lock);
    Clock &clock = races.clocks[stream];
    clock.resize(std::max(clock.size(), earlier.size()));
    for (size_t of = 0; of < earlier.size(); of++) clock[of] = std::max(clock[of], earlier[of]);
}

void use(const char *name, StreamId stream, const Tensor &tensor, bool writes) {
    if (!races.checked || inside || !tensor.defined() || !is_here(tensor) || !tensor.numel()) return;
    size_t last = 0; // of its numbers, counted from the first in memory
    for (int64_t dim = 0; dim < tensor.dim(); dim++) last += (tensor.size(dim) - 1) * tensor.stride(dim);
    const uintptr_t start = uintptr_t(tensor.data_ptr()), end = start + (last + 1) * tensor.itemsize();
    put_after(stream, clock_of(HOST));
    Held held(races.lock);
    Clock &clock = races.clocks[stream];
    clock.resize(std::max(clock.size(), size_t(stream) + 1));
    const Use now{stream, ++clock[stream], name};
    auto check = [&](const Use &earlier, const char *did) {
        TORCH_CHECK(earlier.is_before(clock), "standin: race: ", name, " on stream ", stream, ", which ",
                    writes ? "writes" : "reads", " memory, is not ordered after ", earlier.name, " on stream ",
                    earlier.stream, ", which ", did, " it");
    };
    for (auto behind = races.split(end), at = races.split(start); at != behind; ++at) {
        auto &[write, reads] = at->second;
        check(write, "writes");
        if (writes) {
            for (const Use &read : reads) check(read, "reads");
            at->second = {now, {}};
        } else {
            std::erase_if(reads, [&](const Use &read) { return read.is_before(clock); });
            reads.push_back(now);
        }
    }
    races.join(start, end);
}

// Memory was freed: who gets the place next has nothing to do with it.
void forget_uses(uintptr_t start, size_t nbytes) {
    Held held(races.lock);
    for (auto behind = races.split(start + nbytes), at = races.split(start); at != behind; ++at) at->second = {};
    races.join(start, start + nbytes);
}

// --- memory: nobody may touch what lies at a tensor's address, or dies of a SIGSEGV. The numbers lie further up.

constexpr intptr_t FURTHER_UP = intptr_t(1) << 45;
constexpr size_t UNIT = 512; // allocations are counted in these, as on a GPU

struct Block { char *numbers; size_t nbytes; DeviceIndex device; };

struct Memory {
    std::mutex lock;
    std::map<uintptr_t, size_t> pinned;
    std::array<DeviceStats, DEVICES> stats;
    std::atomic<size_t> limit = size_t(4) << 30; // of each device

    auto counts(DeviceIndex at) { return std::array{&stats.at(at).allocated_bytes[0], &stats[at].reserved_bytes[0]}; }
} &memory = *new Memory; // never destroyed: Python frees tensors after static objects are gone

void *numbers_of(const Tensor &tensor) { return (char *)tensor.data_ptr() + (is_here(tensor) ? FURTHER_UP : 0); }

void free_block(void *context) {
    const std::unique_ptr<Block> block((Block *)context);
    forget_uses(uintptr_t(block->numbers - FURTHER_UP), block->nbytes);
    munmap(block->numbers - FURTHER_UP, block->nbytes); // first: who gets the numbers' place needs this one, too
    munmap(block->numbers, block->nbytes);
    Held held(memory.lock);
    for (auto *count : memory.counts(block->device)) count->decrease(block->nbytes);
}

struct DeviceMemory final : c10::DeviceAllocator {
    at::DataPtr allocate(size_t asked) override {
        const Device device(STANDIN, current_device);
        const size_t nbytes = (asked + UNIT - 1) / UNIT * UNIT;
        if (!nbytes) return {nullptr, device};
        Held held(memory.lock);
        const size_t used = memory.stats[current_device].allocated_bytes[0].current;
        TORCH_CHECK_WITH(OutOfMemoryError, used + nbytes <= memory.limit, "standin out of memory. Tried to allocate ",
                         asked, " bytes on ", device, ", where ", used, " of ", memory.limit, " are in use");
        constexpr int FLAGS = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        auto *numbers = (char *)mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, FLAGS, -1, 0);
        auto *address = mmap(numbers - FURTHER_UP, nbytes, PROT_NONE, FLAGS | MAP_FIXED_NOREPLACE, -1, 0);
        TORCH_CHECK(numbers != MAP_FAILED && address == numbers - FURTHER_UP, "standin: mmap failed");
        for (auto *count : memory.counts(current_device)) count->increase(nbytes);
        return {address, new Block{numbers, nbytes, current_device}, &free_block, device};
    }
    void copy_data(void *target, const void *source, size_t nbytes) const override {
        memcpy((char *)target + FURTHER_UP, (char *)source + FURTHER_UP, nbytes);
    }
    bool initialized() override { return true; }
    void emptyCache(c10::MempoolId_t) override {}
    void recordStream(const at::DataPtr &, Stream) override {}
    DeviceStats getDeviceStats(DeviceIndex device) override { return Held(memory.lock), memory.stats.at(device); }
    void resetAccumulatedStats(DeviceIndex) override {}
    void resetPeakStats(DeviceIndex device) override {
        Held held(memory.lock);
        for (auto *count : memory.counts(device)) count->reset_peak();
    }
    std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
        const size_t limit = memory.limit, used = getDeviceStats(device).allocated_bytes[0].current;
        return {limit - std::min(used, limit), limit};
    }
} &allocator = *new DeviceMemory;

struct PinnedMemory final : c10::Allocator {
    at::DataPtr allocate(size_t nbytes) override {
        void *start = aligned_alloc(64, (nbytes + 63) / 64 * 64);
        Held held(memory.lock);
        memory.pinned[uintptr_t(start)] = nbytes;
        return {start, start, &unpin_and_free, Device(at::kCPU)};
    }
    static void unpin_and_free(void *start) {
        Held(memory.lock), memory.pinned.erase(uintptr_t(start));
        free(start);
    }
    void copy_data(void *target, const void *source, size_t nbytes) const override { memcpy(target, source, nbytes); }
} &pinned_allocator = *new PinnedMemory;

bool is_pinned(const void *address) {
    Held held(memory.lock);
    auto after = memory.pinned.upper_bound(uintptr_t(address));
    return after != memory.pinned.begin() && uintptr_t(address) - (--after)->first < after->second;
}

// --- streams
//
// With lazy copies, one with non_blocking between the device and pinned memory waits in its stream until that is used,
// or waited for. Who forgets to wait finds old numbers in the target; who overwrites the source too early finds the new
// ones there. Strided copies, and those that convert, are never late: torch does them on the host.

struct Mark { StreamId stream; int64_t number; };     // a point in the work of a stream
struct Event { Mark mark; Clock clock; };
struct Work { Tensor source, target; Mark awaited; }; // tensors are undefined where a mark is waited for
struct Queue { int64_t done = 0; std::deque<Work> waiting; };

struct Streams {
    std::mutex lock; // taken before the memory's
    std::map<StreamId, Queue> queues; // a stream's id modulo DEVICES is its device's index
    std::atomic<StreamId> made = 1;   // of each device
    std::atomic<bool> lazy = false;
} &streams = *new Streams;

thread_local std::array<StreamId, DEVICES> current_streams{0, 1};

// Do the work of a stream up to a mark. The lock is held; tensors are freed without it, as that may wait for Python.
void run(const Mark &mark, std::vector<Work> &finished) {
    Queue &queue = streams.queues[mark.stream];
    while (queue.done < mark.number && !queue.waiting.empty()) {
        const Work &work = finished.emplace_back(std::move(queue.waiting.front()));
        queue.waiting.pop_front();
        queue.done++;
        if (work.target.defined())
            memcpy(numbers_of(work.target), numbers_of(work.source), work.source.nbytes());
        else
            run(Mark(work.awaited), finished);
    }
}

void finish(StreamId stream, int64_t number = INT64_MAX) {
    std::vector<Work> finished;
    Held held(streams.lock);
    run({stream, number}, finished);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
    static constexpr auto static_type = STANDIN;
    static Device device(DeviceIndex index) { return Device(STANDIN, index); }
    at::DeviceType type() const override { return STANDIN; }
    DeviceIndex deviceCount() const noexcept override { return DEVICES; }
    Device getDevice() const override { return device(current_device); }
    void setDevice(Device next) const override { current_device = index_of(next); }
    void uncheckedSetDevice(Device next) const noexcept override { current_device = next.index(); }
    Device exchangeDevice(Device next) const override { return device(std::exchange(current_device, index_of(next))); }

    static Stream stream(StreamId id) { return Stream(Stream::UNSAFE, device(DeviceIndex(id % DEVICES)), id); }
    Stream getStream(Device of) const override { return stream(current_streams[index_of(of)]); }
    Stream getNewStream(Device of, int) const override { return stream(streams.made++ * DEVICES + index_of(of)); }
    Stream exchangeStream(Stream next) const override {
        return stream(std::exchange(current_streams[next.device_index()], next.id()));
    }
    bool queryStream(const Stream &of) const override {
        return Held(streams.lock), streams.queues[of.id()].waiting.empty();
    }
    void synchronizeStream(const Stream &of) const override {
        finish(of.id());
        put_after(HOST, clock_of(of.id()));
    }
    void synchronizeDevice(const DeviceIndex index) const override {
        for (StreamId number = 0; number < streams.made; number++) synchronizeStream(stream(number * DEVICES + index));
    }

    void record(void **event, const Stream &of, const DeviceIndex, const c10::EventFlag) const override {
        Held held(streams.lock);
        const Queue &queue = streams.queues[of.id()];
        delete (Event *)*event;
        *event = new Event{{of.id(), queue.done + int64_t(queue.waiting.size())}, clock_of(of.id())};
    }
    void block(void *event, const Stream &of) const override {
        const auto &[mark, clock] = *(Event *)event;
        if (!queryEvent(event)) Held(streams.lock), streams.queues[of.id()].waiting.push_back({{}, {}, mark});
        put_after(of.id(), clock);
    }
    bool queryEvent(void *event) const override {
        const Mark &mark = ((Event *)event)->mark;
        return Held(streams.lock), streams.queues[mark.stream].done >= mark.number;
    }
    void synchronizeEvent(void *event) const override {
        const auto &[mark, clock] = *(Event *)event;
        finish(mark.stream, mark.number);
        put_after(HOST, clock);
    }
    void destroyEvent(void *event, const DeviceIndex) const noexcept override { delete (Event *)event; }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// Random numbers are the CPU's, from its generator: with the same seed, both sample the same.
struct Hooks final : at::PrivateUse1HooksInterface {
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
    bool isPinnedPtr(const void *address) const override { return is_pinned(address); }
    c10::Allocator *getPinnedMemoryAllocator() const override { return &pinned_allocator; }
    at::Generator getNewGenerator(DeviceIndex) const override { return at::make_generator<at::CPUGeneratorImpl>(); }
};

// --- kernels

constexpr at::DispatchKeySet KEYS(at::DispatchKey::PrivateUse1);

Tensor empty(at::IntArrayRef size, Maybe<at::ScalarType> dtype, Maybe<at::Layout>, Maybe<Device> device, Maybe<bool>,
             Maybe<at::MemoryFormat> format) {
    c10::DeviceGuard guard(device.value_or(Device(STANDIN)));
    return at::detail::empty_generic(size, &allocator, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, Maybe<at::ScalarType> dtype, Maybe<at::Layout>,
                     Maybe<Device> device, Maybe<bool>) {
    c10::DeviceGuard guard(device.value_or(Device(STANDIN)));
    return at::detail::empty_strided_generic(size, stride, &allocator, KEYS, c10::dtype_or_default(dtype));
}

bool may_be_late(const Tensor &source, const Tensor &target) {
    return is_here(source) != is_here(target) && source.dtype() == target.dtype() && source.sizes() == target.sizes() &&
           source.is_contiguous() && target.is_contiguous() &&
           is_pinned((is_here(source) ? target : source).data_ptr());
}

Tensor copy_from(const Tensor &source, const Tensor &target, bool non_blocking) {
    const StreamId stream = current_streams[(is_here(source) ? source : target).device().index()];
    const StreamId other = is_here(target) ? current_streams[target.device().index()] : stream;
    const bool late = non_blocking && may_be_late(source, target);
    if (other != stream) put_after(stream, clock_of(other)); // between devices, the streams of both wait
    use("copy_", stream, source, false);
    use("copy_", stream, target, true);
    if (other != stream) put_after(other, clock_of(stream));
    if (!is_here(target) && !late && !inside) put_after(HOST, clock_of(stream));
    if (late && streams.lazy) {
        Held(streams.lock), streams.queues[stream].waiting.push_back({source.detach(), target.detach(), {}});
        return target;
    }
    finish(stream);
    finish(other);
    auto on_cpu = [](const Tensor &t) { return at::from_blob(numbers_of(t), t.sizes(), t.strides(), t.dtype()); };
    on_cpu(target).copy_(on_cpu(source));
    return target;
}

// For operators with `out=`, whose size the CPU has found.
Tensor copy_from_and_resize(const Tensor &source, const Tensor &target) {
    if (source.sizes() != target.sizes()) {
        Tensor fresh = at::empty(source.sizes(), target.options()), resized = target;
        at::native::set_storage_cpu_(resized, fresh.storage(), 0, fresh.sizes(), fresh.strides());
    }
    return copy_from(source, target, false);
}

Tensor &set_storage(Tensor &self, at::Storage storage) {
    const auto count = int64_t(storage.nbytes() / self.dtype().itemsize());
    return at::native::set_storage_cpu_(self, storage, 0, {count}, {});
}

// Where a GPU's kernels take tensors of the CPU, too: as a number, and as indices in brackets.
bool may_be_on_cpu(const Tensor &tensor, const std::string &name, bool in_list) {
    static const std::set<std::string> brackets{"index", "index_put", "index_put_", "_index_put_impl_"};
    static const std::set<std::string> no_numbers{"index_select", "index_copy", "index_copy_", "index_add_",
                                                  "gather",       "scatter",    "scatter_",    "embedding"};
    return tensor.is_cpu() && (tensor.dim() == 0 ? !no_numbers.count(name) : in_list && brackets.count(name));
}

// The result of a kernel, which may be of a device that none of what it takes is of.
void use_fresh(const char *name, const Tensor &tensor) {
    if (tensor.defined() && is_here(tensor)) use(name, current_streams[tensor.device().index()], tensor, true);
}

// All other operators: refuse what a GPU would refuse, then let the CPU compute.
void fallback(const c10::OperatorHandle &op, torch::jit::Stack *stack) {
    const std::string name = op.schema().name().substr(strlen("aten::"));
    struct Taken { Tensor tensor; bool in_list, written; };
    std::vector<Taken> tensors;
    const auto &arguments = op.schema().arguments();
    for (size_t number = 0; number < arguments.size(); number++) {
        const at::IValue &value = torch::jit::peek(*stack, number, arguments.size());
        const bool written = arguments[number].alias_info() && arguments[number].alias_info()->isWrite();
        if (value.isTensor() && value.toTensor().defined()) tensors.push_back({value.toTensor(), false, written});
        if (!value.isList()) continue;
        for (const at::IValue &item : value.toListRef())
            if (item.isTensor() && item.toTensor().defined()) tensors.push_back({item.toTensor(), true, written});
    }
    Maybe<Device> device;
    for (const auto &[tensor, in_list, written] : tensors)
        if (is_here(tensor) && !device) device = tensor.device();
    for (const auto &[tensor, in_list, written] : tensors)
        TORCH_CHECK(!device || tensor.device() == *device || may_be_on_cpu(tensor, name, in_list),
                    "Expected all tensors to be on the same device, but found at least two devices, ", *device, " and ",
                    tensor.device(), "! (", name, ")");
    c10::OptionalDeviceGuard guard(device);
    const StreamId stream = current_streams[current_device];
    for (const auto &[tensor, in_list, written] : tensors) use(op.schema().name().c_str(), stream, tensor, written);
    finish(stream);
    Inside(), at::native::cpu_fallback(op, stack);
    for (const at::IValue &value : torch::jit::last(*stack, op.schema().returns().size())) {
        if (value.isTensor()) use_fresh(op.schema().name().c_str(), value.toTensor());
        if (value.isTensorList())
            for (const Tensor &tensor : value.toTensorVector()) use_fresh(op.schema().name().c_str(), tensor);
        // The host waits for a number, and for the size of what it gets.
        if (value.isScalar() || name == "nonzero" || name == "masked_select") put_after(HOST, clock_of(stream));
    }
}

// A device that is not the CPU has to have this one.
Tensor convolve(const Tensor &x, const Tensor &weight, const Maybe<Tensor> &bias, at::IntArrayRef stride,
                at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
                int64_t groups) {
    for (const Tensor &taken : {x, weight, bias.value_or(Tensor())})
        use("convolution", current_streams[x.device().index()], taken, false);
    Tensor result = (Inside(), [&] {
        const Maybe<Tensor> on_cpu = bias && bias->defined() ? Maybe<Tensor>(bias->cpu()) : Maybe<Tensor>();
        return at::convolution(x.cpu(), weight.cpu(), on_cpu, stride, padding, dilation, transposed, output_padding,
                               groups).to(x.device());
    }());
    use_fresh("convolution", result);
    return result;
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
    library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
    library.impl("empty.memory_format", TORCH_FN(empty));
    library.impl("empty_strided", TORCH_FN(empty_strided));
    library.impl("_copy_from", TORCH_FN(copy_from));
    library.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
    library.impl("set_.source_Storage", TORCH_FN(set_storage));
    library.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
    library.impl("view", TORCH_FN(at::native::view));
    library.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
    library.impl("unfold", TORCH_FN(at::native::unfold));
    library.impl("convolution_overrideable", TORCH_FN(convolve));
    library.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
    library.impl("record_stream", [](Tensor &, Stream) {}); // a late copy holds its tensors
}

} // namespace

// --- for Python: numbers in and out, so that ctypes is enough

extern "C" {

void standin_start() {
    c10::SetAllocator(STANDIN, &allocator);
    at::RegisterPrivateUse1HooksInterface(new Hooks);
}

bool standin_set_lazy(bool lazy) { return streams.lazy.exchange(lazy); }
bool standin_set_checked(bool checked) {
    Held held(races.lock);
    if (checked != races.checked) races.uses = {{0, {}}}; // in between, nobody counts
    return races.checked.exchange(checked);
}
size_t standin_set_memory_limit(size_t nbytes) { return memory.limit.exchange(nbytes); }

// Copies that are still to be done, with host memory that begins in this range.
size_t standin_late_copies(uintptr_t start, size_t nbytes) {
    Held held(streams.lock);
    size_t found = 0;
    for (const auto &[_, queue] : streams.queues)
        for (const auto &[source, target, awaited] : queue.waiting)
            if (target.defined()) found += uintptr_t((is_here(source) ? target : source).data_ptr()) - start < nbytes;
    return found;
}

bool standin_register_pinned(uintptr_t start, size_t nbytes) {
    Held held(memory.lock);
    auto after = memory.pinned.lower_bound(start + nbytes);
    const bool is_free = after == memory.pinned.begin() || (--after)->first + after->second <= start;
    return is_free && memory.pinned.emplace(start, nbytes).second;
}

bool standin_unregister_pinned(uintptr_t start) { return Held(memory.lock), memory.pinned.erase(start); }
}
