/* One token through one layer in one call: window, reads and neurons.
 *
 * runtime/layer.py does the same step by step for any call. This is for the call that decoding consists of: one token whose
 * neurons fit into the window. In Python that takes ten times as long, because attention has emptied the caches each time. The
 * rules are those of runtime/window.py (who goes when room is needed) and reading/chunks.py (neighbours on flash are one read);
 * tests hold both against the same model. Every other call is refused before anything is changed, and done there. */

#include "native.h"

#ifdef HF_NATIVE

#include <stdlib.h>
#include <string.h>

#include "numbers.h"
#include "parallel.h"

/* --- the window */

static void note_use(Window *w, const int64_t *ids, int64_t n) {
    w->clock++;
    w->use_score *= w->growth;
    if (w->use_score > w->rescale_beyond) {
        for (int64_t i = 0; i < w->d_ff; i++)
            w->score[i] /= w->use_score;
        w->use_score = 1.0;
    }
    for (int64_t k = 0; k < n; k++) {
        w->last_used[ids[k]] = w->clock;
        w->score[ids[k]] += w->use_score;
    }
}

/* A neuron that may go. */
typedef struct {
    double rank;
    int64_t id;
} Idle;

_Static_assert(sizeof(Idle) == sizeof(Incoming), "they share their room");

static int goes_before(Idle a, Idle b) { return a.rank < b.rank || (a.rank == b.rank && a.id > b.id); }

/* Free `excess` slots of those that the token does not use. `heap` holds the neurons to go, the last of them on top. */
static void evict(Window *w, const uint8_t *selected, int64_t excess, Idle *heap) {
    int64_t size = 0;
    for (int64_t slot = 0; slot < w->capacity; slot++) {
        const int64_t id = w->neuron_in[slot];
        if (id < 0 || selected[id])
            continue;
        const int64_t last = w->last_used[id];
        const Idle idle = {last > w->clock - w->kept_tokens ? 1e30 * (double)last : w->score[id], id};
        int64_t at;
        if (size < excess) {
            for (at = size++; at && goes_before(heap[(at - 1) / 2], idle); at = (at - 1) / 2)
                heap[at] = heap[(at - 1) / 2];
        } else if (goes_before(idle, heap[0])) {
            at = 0;
            for (int64_t child; (child = 2 * at + 1) < size; at = child) {
                if (child + 1 < size && goes_before(heap[child], heap[child + 1]))
                    child++;
                if (!goes_before(idle, heap[child]))
                    break;
                heap[at] = heap[child];
            }
        } else {
            continue;
        }
        heap[at] = idle;
    }
    for (int64_t k = 0; k < size; k++) {
        const int64_t slot = w->slot_of[heap[k].id];
        w->slot_of[heap[k].id] = w->neuron_in[slot] = -1;
        w->free_slots[w->free++] = slot;
    }
}

/* --- reading */

static int by_slot(const void *a, const void *b) {
    const int64_t x = ((const Incoming *)a)->slot, y = ((const Incoming *)b)->slot;
    return (x > y) - (x < y);
}

static int by_place(const void *a, const void *b) {
    const int64_t x = ((const Incoming *)a)->place, y = ((const Incoming *)b)->place;
    return (x > y) - (x < y);
}

/* Begin to read the missing neurons. Neighbours on flash are one read, and one piece of it if they are neighbours in memory. */
static void begin_reads(void *step) {
    Step *s = step;
    const int64_t row_bytes = s->job.layout.row_bytes;
    const Incoming *incoming = s->incoming;
    struct iovec *piece = s->pieces;
    s->chunks = 0;
    for (int64_t i = 0, end; i < s->missing; i = end) {
        s->offsets[s->chunks] = s->file_offset + incoming[i].place * row_bytes;
        s->first[s->chunks++] = piece - s->pieces;
        for (end = i; end < s->missing && end - i < s->max_run && incoming[end].place == incoming[i].place + end - i; end++) {
            char *address = (char *)s->job.matrix + incoming[end].slot * row_bytes;
            if (end > i && (char *)piece[-1].iov_base + piece[-1].iov_len == address)
                piece[-1].iov_len += (size_t)row_bytes;
            else
                *piece++ = (struct iovec){address, (size_t)row_bytes};
        }
        const int64_t begin = s->offsets[s->chunks - 1], stop = begin + (end - i) * row_bytes;
        s->read_bytes += ((stop + s->block_bytes - 1) & -s->block_bytes) - (begin & -s->block_bytes);
    }
    s->first[s->chunks] = piece - s->pieces;
    s->ticket = hf_read_start(s->reader, s->file, &(Order){s->offsets, s->first, s->pieces, s->chunks, 0});
    s->failed = !s->ticket;
}

/* Wait for them, whatever happens: until then memory is written to. */
static void end_reads(void *step) {
    Step *s = step;
    s->failed = s->failed || hf_read_wait(s->reader, s->ticket);
}

/* --- the whole */

/* Find the neurons, and those that are missing, and make room for these. Returns 0, with nothing changed, if it cannot. */
static int make_room(Step *s) {
    Window *w = &s->window;
    int64_t n = 0, resident = 0, missing = 0;
    for (int64_t id = 0; id < w->d_ff; id++)
        if (s->selected[id]) {
            if (n == s->max_used)
                return 0;
            const int64_t slot = w->slot_of[id];
            s->ids[n] = id;
            s->rows[n] = slot;
            if (slot < 0)
                s->missing_at[missing++] = n++;
            else
                s->resident_at[resident++] = n++;
        }
    if (n > w->capacity || (missing && (!s->reader || missing > s->max_missing)))
        return 0;
    s->used = s->job.n = n;
    s->missing = missing;
    note_use(w, s->ids, n);
    if (missing > w->free)
        evict(w, s->selected, missing - w->free, (Idle *)s->incoming);
    w->free -= missing;
    for (int64_t k = 0; k < missing; k++)
        s->incoming[k].slot = w->free_slots[w->free + k];
    qsort(s->incoming, (size_t)missing, sizeof *s->incoming, by_slot);
    for (int64_t k = 0; k < missing; k++) {
        const int64_t id = s->ids[s->missing_at[k]];
        s->rows[s->missing_at[k]] = s->incoming[k].slot;
        s->incoming[k].place = s->place_of ? s->place_of[id] : id;
    }
    if (s->place_of)
        qsort(s->incoming, (size_t)missing, sizeof *s->incoming, by_place);
    return 1;
}

/* The slots of missing neurons hold them now; or, after a failure, nothing. */
static void take_in(Step *s) {
    Window *w = &s->window;
    for (int64_t k = 0; k < s->missing; k++) {
        const int64_t id = s->ids[s->missing_at[k]], slot = s->rows[s->missing_at[k]];
        if (s->failed) {
            w->free_slots[w->free++] = slot;
        } else {
            w->neuron_in[slot] = id;
            w->slot_of[id] = slot;
        }
    }
}

int FAST hf_step(Step *s) {
    TokenJob *job = &s->job;
    const Meanwhile reads = {begin_reads, end_reads, s};
    const double start = now_s();
    s->failed = 0;
    s->chunks = s->read_bytes = 0;
    job->waited_s = 0.0;
    if (!make_room(s))
        return 0;
    s->managed_s = now_s() - start;
    job->rows = s->rows;
    job->ids = s->ids;
    job->positions = s->resident_at;
    job->todo = job->n - s->missing;
    job->meanwhile = s->missing ? &reads : NULL;
    hf_up(job);
    job->meanwhile = NULL;
    if (s->missing)
        take_in(s);
    if (s->failed)
        return 0;
    if (s->missing) {
        job->positions = s->missing_at;
        job->todo = s->missing;
        hf_up(job);
    }
    memset(job->out, 0, (size_t)job->layout.width * sizeof(float));
    hf_down(job);
    return 1;
}

#endif
