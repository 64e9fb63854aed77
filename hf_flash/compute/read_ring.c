/* Reads with io_uring. Its structures and constants are declared here, because installed headers may be older than the kernel. */

#include "native.h"

#ifdef HF_NATIVE

#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "reading.h"

enum { RING_ENTRIES = 1024 };
enum { RING_SETUP = 425, RING_ENTER = 426, GET_EVENTS = 1, OP_READV = 1, OP_READ = 22, IN_THREADS = 16 };
enum { ENTRIES_AT = 0x10000000, ONE_MAPPING = 1, NOTHING_DROPPED = 2, PLAIN_READS = 8, FROM_5_9 = 64 };

typedef struct RingEntry { /* struct io_uring_sqe */
    uint8_t opcode, flags;
    uint16_t priority;
    int32_t fd;
    uint64_t offset, address;
    uint32_t length, rw_flags;
    uint64_t user_data, rest[3];
} RingEntry;

typedef struct RingCompletion { /* struct io_uring_cqe */
    uint64_t user_data;
    int32_t result;
    uint32_t flags;
} RingCompletion;

typedef struct { /* struct io_uring_params */
    uint32_t entries, completions, flags, cpu, idle, features, wq_fd, rest[3];
    struct {
        uint32_t head, tail, mask, count, flags, dropped, array, rest[3];
    } submitted;
    struct {
        uint32_t head, tail, mask, count, overflow, array, flags, rest[3];
    } completed;
} RingParams;

_Static_assert(sizeof(RingEntry) == 64 && sizeof(RingCompletion) == 16 && sizeof(RingParams) == 120, "as the kernel has them");

/* --- a ring */

static long enter(const Ring *ring, uint32_t submit, uint32_t wait) {
    const long got = syscall(RING_ENTER, ring->fd, submit, wait, wait ? GET_EVENTS : 0, NULL, 0);
    return got < 0 ? -errno : got;
}

/* Whether the kernel may accept more later. */
static int is_temporary(long error) { return error == -EINTR || error == -EAGAIN || error == -EBUSY; }

void close_ring(Ring *ring) {
    if (ring->fd < 0)
        return;
    if (ring->entries)
        munmap(ring->entries, ring->entry_bytes);
    if (ring->shared)
        munmap(ring->shared, ring->shared_bytes);
    close(ring->fd);
    ring->fd = -1;
}

static void *mapped(int fd, size_t nbytes, int64_t at) {
    void *found = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, at);
    return found == MAP_FAILED ? NULL : found;
}

int open_ring(Ring *ring) {
    const uint32_t needed = ONE_MAPPING | NOTHING_DROPPED | PLAIN_READS | FROM_5_9; /* since 5.9 reads are not cut short */
    RingParams params = {0};
    *ring = (Ring){.fd = (int32_t)syscall(RING_SETUP, RING_ENTRIES, &params)};
    if (ring->fd < 0)
        return errno;
    const size_t entries = params.submitted.array + params.entries * sizeof(uint32_t);
    const size_t completions = params.completed.array + params.completions * sizeof(RingCompletion);
    ring->shared_bytes = entries > completions ? entries : completions;
    ring->entry_bytes = params.entries * sizeof(RingEntry);
    char *shared = ring->shared = mapped(ring->fd, ring->shared_bytes, 0);
    ring->entries = mapped(ring->fd, ring->entry_bytes, ENTRIES_AT);
    if (!ring->shared || !ring->entries || (params.features & needed) != needed) {
        close_ring(ring);
        return ENOSYS;
    }
    ring->tail = (_Atomic uint32_t *)(shared + params.submitted.tail);
    ring->head = (_Atomic uint32_t *)(shared + params.completed.head);
    ring->end = (_Atomic uint32_t *)(shared + params.completed.tail);
    ring->completions = (RingCompletion *)(shared + params.completed.array);
    ring->room = params.entries;
    ring->completion_room = params.completions;
    for (uint32_t i = 0; i < params.entries; i++)
        ((uint32_t *)(shared + params.submitted.array))[i] = i;
    return 0;
}

int32_t hf_try_ring(void) {
    Ring ring;
    long error = open_ring(&ring);
    if (!error)
        error = -enter(&ring, 0, 0);
    close_ring(&ring);
    return (int32_t)error;
}

/* --- reads */

/* How many reads the kernel has. Their number is limited, because completions of more reads might find no room. */
static uint32_t reads_in_kernel(const Reader *reader) {
    int64_t count = 0;
    for (const Batch *batch = reader->batches; batch; batch = batch->next)
        count += batch->threaded ? 0 : batch->untouched - batch->done;
    return (uint32_t)count;
}

/* Process the available completions. */
static void take_results(Reader *reader) {
    Ring *ring = &reader->ring;
    uint32_t head = atomic_load(ring->head);
    for (; head != atomic_load(ring->end); head++) {
        const RingCompletion *completion = &ring->completions[head & (ring->completion_room - 1)];
        Read *read = (Read *)(uintptr_t)completion->user_data;
        const int whole = completion->result == read->length;
        mark_done(reader, read, whole ? 0 : read_now(read->batch->file, read, &reader->bounce)); /* repeated to learn the reason */
    }
    atomic_store(ring->head, head);
}

static RingEntry entry_of(Read *read, int in_background) {
    const int alone = read->count == 1; /* cheaper: the kernel copies and checks the pieces of a vectored read */
    return (RingEntry){
        .opcode = alone ? OP_READ : OP_READV,
        .flags = in_background ? IN_THREADS : 0,
        .fd = read->batch->file->fd,
        .offset = (uint64_t)read->offset,
        .address = (uint64_t)(uintptr_t)(alone ? read->pieces->iov_base : read->pieces),
        .length = alone ? (uint32_t)read->pieces->iov_len : (uint32_t)read->count,
        .user_data = (uint64_t)(uintptr_t)read,
    };
}

void submit_to_ring(Reader *reader, Batch *batch, int in_background) {
    Ring *ring = &reader->ring;
    const uint32_t begin = atomic_load(ring->tail), free = ring->completion_room - reads_in_kernel(reader);
    const uint32_t room = free < ring->room ? free : ring->room;
    uint32_t tail = begin;
    for (; batch->untouched < batch->n && tail - begin < room; batch->untouched++, tail++) {
        Read *read = &batch->reads[batch->untouched];
        read->state = UNDER_WAY;
        ring->entries[tail & (ring->room - 1)] = entry_of(read, in_background);
    }
    atomic_store(ring->tail, tail);
    uint32_t left = tail - begin;
    while (left) {
        const long got = enter(ring, left, 0);
        if (got > 0) {
            left -= (uint32_t)got;
        } else if (got != 0 && got != -EINTR) {
            ring->refuses = !is_temporary(got); /* resources may be short only for a moment */
            break;
        }
    }
    atomic_store(ring->tail, tail - left); /* take back what the kernel did not accept */
    for (; left; left--)
        batch->reads[--batch->untouched].state = NEW;
}

/* Wait for a completion. */
static void await_result(Reader *reader) {
    const long got = reader->ring.refuses ? -EPERM : enter(&reader->ring, 0, 1);
    if (got < 0 && got != -EINTR) { /* the completion still arrives in shared memory */
        const struct timespec moment = {.tv_nsec = 50000};
        reader->ring.refuses |= !is_temporary(got);
        nanosleep(&moment, NULL);
    }
}

void complete_in_ring(Reader *reader, Batch *batch) {
    while (!batch->threaded && batch->done < batch->n) {
        take_results(reader);
        if (batch->untouched < batch->n && !reader->ring.refuses)
            submit_to_ring(reader, batch, 0);
        if (batch->done == batch->untouched && batch->done < batch->n)
            batch->threaded = 1; /* no read is under way: the ring does not accept them */
        else if (batch->done < batch->untouched)
            await_result(reader);
    }
}

#endif
