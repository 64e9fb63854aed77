/* A few tokens through one layer in one call: window, reads and neurons.
 *
 * runtime/layer.py does the same step by step for any call. This file is for the calls of decoding: one token, a small batch or a
 * draft, whose neurons fit into the window. In Python they take ten times as long, because attention has emptied the caches each
 * time. The rules are those of runtime/window.py (who is evicted when room is needed) and reading/chunks.py (neighbours on flash
 * are one read); tests compare both with the same model. Every other call is refused before anything is changed, and
 * runtime/layer.py does it. */

#include "native.h"

#ifdef HF_NATIVE

#include <stdlib.h>
#include <string.h>

#include "numbers.h"
#include "parallel.h"

enum { MOST_TOKENS = 16 }; /* tokens in a call (`tokens` of TokenRoom in kernels.py) */

/* --- the window */

/* Note which neurons the tokens of a call use: last use and score. */
static void note_use(Step *s, int64_t n) {
    Window *w = &s->window;
    const int64_t start = w->clock, earlier = s->tokens > w->kept_tokens ? s->tokens - w->kept_tokens : 0;
    double score_of[MOST_TOKENS + 1]; /* what 0, 1, 2, ... uses add to a score */
    w->clock += s->tokens;
    w->use_score *= w->growth;
    if (w->use_score > w->rescale_beyond) {
        for (int64_t i = 0; i < w->d_ff; i++)
            w->score[i] /= w->use_score;
        w->use_score = 1.0;
    }
    for (int64_t uses = 0; uses <= s->tokens; uses++)
        score_of[uses] = w->use_score * (double)uses;
    for (int64_t k = 0; k < n; k++) {
        const int64_t id = s->ids[k];
        int64_t uses = 0, last = start + earlier; /* at least the last token before those that the window keeps */
        for (int64_t t = 0; t < s->tokens; t++)
            if (s->selected[t * w->d_ff + id]) {
                uses++;
                last = start + t + 1 > last ? start + t + 1 : last;
            }
        w->last_used[id] = last;
        w->score[id] += score_of[uses];
    }
}

/* A neuron that may be evicted. */
typedef struct {
    double rank;
    int64_t id;
} Idle;

_Static_assert(sizeof(Idle) == sizeof(Incoming), "they share their room");

static int goes_before(Idle a, Idle b) { return a.rank < b.rank || (a.rank == b.rank && a.id > b.id); }

/* Free `excess` slots of neurons that no token uses. `heap` holds the neurons to evict; the last to go is on top. */
static void evict(Window *w, const uint8_t *used, int64_t excess, Idle *heap) {
    int64_t size = 0;
    for (int64_t slot = 0; slot < w->capacity; slot++) {
        const int64_t id = w->neuron_in[slot];
        if (id < 0 || used[id])
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

/* Begin to read the missing neurons. Neighbours on flash are one read, and one piece of it if also neighbours in memory. */
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
    s->ticket = hf_read_start(s->reader, s->file, &(Order){s->offsets, s->first, s->pieces, s->chunks, 0, 1});
    s->failed = !s->ticket;
}

/* Wait for the reads in any case: until then they write to memory. */
static void end_reads(void *step) {
    Step *s = step;
    s->failed = s->failed || hf_read_wait(s->reader, s->ticket);
}

/* --- the whole */

/* [d_ff] whether any token uses a neuron. */
static const uint8_t *used_by_any(Step *s) {
    const int64_t d_ff = s->window.d_ff;
    if (s->tokens == 1)
        return s->selected;
    memcpy(s->used_by_any, s->selected, (size_t)d_ff);
    for (int64_t t = 1; t < s->tokens; t++)
        for (int64_t id = 0; id < d_ff; id++)
            s->used_by_any[id] |= s->selected[t * d_ff + id];
    return s->used_by_any;
}

/* Find the neurons that are used and those that are missing, and make room for the latter. Returns 0, with nothing changed, if
 * this is impossible. */
static int make_room(Step *s) {
    Window *w = &s->window;
    const uint8_t *used = used_by_any(s);
    int64_t n = 0, resident = 0, missing = 0;
    for (int64_t id = 0; id < w->d_ff; id++)
        if (used[id]) {
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
    s->used = n;
    s->missing = missing;
    note_use(s, n);
    if (missing > w->free)
        evict(w, used, missing - w->free, (Idle *)s->incoming);
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

/* Enter missing neurons into the window after they were read; after a failure, free their slots. */
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

/* --- computing */

typedef void (*Multiply)(Step *s, const int64_t *positions, int64_t todo, const Meanwhile *meanwhile);

static void up_of_one(Step *s, const int64_t *positions, int64_t todo, const Meanwhile *meanwhile) {
    TokenJob *job = &s->job;
    job->positions = positions;
    job->todo = todo;
    job->meanwhile = *meanwhile;
    hf_up(job);
    s->waited_s += job->meanwhile.waited_s;
}

static void up_of_several(Step *s, const int64_t *positions, int64_t todo, const Meanwhile *meanwhile) {
    TokensJob *job = &s->several;
    job->positions = positions;
    job->todo = todo;
    job->meanwhile = *meanwhile;
    hf_several_up(job);
    s->waited_s += job->meanwhile.waited_s;
}

/* The products with resident rows while the missing rows are read, then with these. Returns whether they could be read. */
static int multiply(Step *s, Multiply up) {
    const Meanwhile nothing = {0}, reads = {.begin = begin_reads, .end = end_reads, .data = s};
    up(s, s->resident_at, s->used - s->missing, s->missing ? &reads : &nothing);
    if (!s->missing)
        return 1;
    take_in(s);
    if (s->failed)
        return 0;
    up(s, s->missing_at, s->missing, &nothing);
    return 1;
}

static int one_token(Step *s) {
    TokenJob *job = &s->job;
    job->n = s->used;
    job->rows = s->rows;
    job->ids = s->ids;
    if (!multiply(s, up_of_one))
        return 0;
    memset(job->out, 0, (size_t)job->layout.width * sizeof(float));
    hf_down(job);
    return 1;
}

static int several_tokens(Step *s) {
    TokensJob *job = &s->several;
    for (int64_t k = 0; k < s->used; k++)
        s->places[k] = (const char *)s->job.matrix + s->rows[k] * s->job.layout.row_bytes;
    job->n = s->used;
    job->rows = s->places;
    job->ids = s->ids;
    job->used = s->selected;
    job->tokens = s->tokens;
    if (!multiply(s, up_of_several))
        return 0;
    memset(job->out, 0, (size_t)(s->tokens * job->layout.width) * sizeof(float));
    hf_several_nonzero(job);
    hf_several_down(job);
    return 1;
}

int hf_step(Step *s) {
    const double start = now_s();
    s->failed = 0;
    s->chunks = s->read_bytes = 0;
    s->waited_s = 0.0;
    if (s->tokens > MOST_TOKENS || !make_room(s))
        return 0;
    s->managed_s = now_s() - start;
    return s->tokens == 1 ? one_token(s) : several_tokens(s);
}

#endif
