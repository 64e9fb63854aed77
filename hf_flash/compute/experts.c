/* A few tokens through the experts of a layer in one call: slots, reads, products.
 *
 * runtime/experts.py does the same step by step, for prompts. In Python it takes a millisecond per layer, because attention has
 * emptied the caches each time. The rules are those of runtime/expert_slots.py; tests compare both with the same model. The call
 * alone decides which of the two computes it, so results do not depend on what is in memory. */

#include "native.h"

#ifdef HF_NATIVE

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "numbers.h"
#include "parallel.h"

/* An expert that some tokens of the call use. */
typedef struct {
    int64_t expert, first, pairs; /* its `pairs` pairs are the rows from `first` on */
    char *slot;                   /* the slot that it is in, or is read into; null: none yet */
    int64_t number;               /* the number of the slot */
    int kept;                     /* whether it stays after the call */
    int ahead;                    /* whether it is being read on a guess, into a slot of the layer */
    int64_t tickets[MOST_ORDERS], count;
} Used;

/* Room for an `Order`. */
typedef struct {
    int64_t *offsets, *first;
    struct iovec *pieces;
} OrderRoom;

typedef struct {
    ExpertStep *s;
    Used *used;
    int64_t *pair_of, *row_of;            /* [pairs] the pair (token * k + place) of a row, and the row of a pair, or -1 */
    int is_one;                           /* whether all rows are of one token, and no expert has two of them */
    char *x, *products, *hidden, *found;  /* [pairs, width], [pairs, up_outputs], [pairs, neurons], [pairs, width] */
    LinearJob *jobs;
    OrderRoom room;
} Call;

/* --- who uses what */

/* Order the pairs of a token and an expert by expert. Returns how many experts are used. */
static int64_t find_used(Call *call) {
    ExpertStep *s = call->s;
    const int64_t pairs = s->tokens * s->k;
    int64_t n = 0, row = 0;
    for (int64_t pair = 0; pair < pairs; pair++)
        call->row_of[pair] = -1;
    for (int64_t pair = 0; pair < pairs; pair++) {
        const int64_t expert = s->index[pair];
        if (call->row_of[pair] >= 0 || expert < 0 || expert >= s->window->experts)
            continue;
        Used *used = call->used + n++;
        *used = (Used){.expert = expert, .first = row};
        for (int64_t other = pair; other < pairs; other++)
            if (s->index[other] == expert) {
                call->row_of[other] = row;
                call->pair_of[row++] = other;
            }
        used->pairs = row - used->first;
    }
    return n;
}

static void release(ExpertWindow *w, int64_t slot) { w->free_slots[w->free++] = slot; }

/* The index of the read on a guess that brings an expert; -1 if none does. */
static int64_t ahead_of(const ExpertWindow *w, int64_t expert) {
    for (int64_t i = 0; i < w->ahead; i++)
        if (w->ahead_reads[i].expert == expert)
            return i;
    return -1;
}

/* Whether an expert in a slot has a scale that is not a finite number. */
static int is_damaged(const ExpertStep *s, int64_t expert, const char *slot) {
    for (int64_t p = 0; p < s->pieces; p++) {
        const ExpertPiece *piece = s->piece + p;
        if (piece->scale_place < 0)
            continue;
        const char *scales = slot + s->at[expert * s->places + piece->scale_place];
        const int64_t rows = (piece->outputs + piece->scales.block_rows - 1) / piece->scales.block_rows;
        if (hf_has_no_number(scales, rows * piece->scales.columns, piece->scales.dtype))
            return 1;
    }
    return 0;
}

/* Wait for a read on a guess. If it fails, the expert stays missing; a call that needs it reads it again and reports the error. */
static void wait_for_ahead(ExpertStep *s, int64_t i) {
    ExpertWindow *w = s->window;
    AheadRead read = w->ahead_reads[i];
    int failed = 0;
    w->ahead_reads[i] = w->ahead_reads[--w->ahead];
    while (read.count)
        failed |= hf_read_wait(s->reader, read.tickets[--read.count]) != 0;
    const int64_t slot = w->slot_of[read.expert];
    if (failed || is_damaged(s, read.expert, w->slots + slot * w->slot_bytes)) {
        release(w, slot);
        w->slot_of[read.expert] = -1;
    }
}

/* Note the uses, and evict experts. Hits that are not kept are released once they are computed. */
static void make_room(Call *call, int64_t n, char *stays) {
    ExpertStep *s = call->s;
    ExpertWindow *w = s->window;
    int64_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        const int64_t last = call->pair_of[call->used[i].first + call->used[i].pairs - 1] / s->k;
        w->last_used[call->used[i].expert] = w->clock + 1 + last;
    }
    w->clock += s->tokens;
    memset(stays, 0, (size_t)w->experts);
    for (int64_t i = 0; i < n; i++)
        stays[call->used[i].expert] = 2; /* used by this call */
    for (int64_t e = 0; e < w->experts; e++) {
        if (!stays[e] && w->slot_of[e] >= 0)
            stays[e] = 1; /* in a slot, not used */
        count += stays[e] != 0;
    }
    for (; count > w->capacity; count--) { /* least recently used first, then highest number; reads on a guess if no other unused */
        int64_t worst = -1, worst_ahead = -1;
        for (int64_t e = 0; e < w->experts; e++)
            if (stays[e] == 1 && ahead_of(w, e) >= 0)
                worst_ahead = e;
            else if (stays[e] > 0 && (worst < 0 || w->last_used[e] <= w->last_used[worst]))
                worst = e;
        if (worst < 0 || (stays[worst] == 2 && worst_ahead >= 0)) {
            worst = worst_ahead;
            wait_for_ahead(s, ahead_of(w, worst));
        }
        if (stays[worst] == 1) {
            release(w, w->slot_of[worst]);
            w->slot_of[worst] = -1;
            stays[worst] = 0;
        } else {
            stays[worst] = -1; /* used, but not kept */
        }
    }
    for (int64_t i = 0; i < n; i++) {
        Used *used = call->used + i;
        used->kept = stays[used->expert] > 0;
        used->number = w->slot_of[used->expert];
        used->slot = used->number < 0 ? NULL : w->slots + used->number * w->slot_bytes;
        const int64_t ahead = ahead_of(w, used->expert);
        if (ahead < 0)
            continue;
        const AheadRead *read = w->ahead_reads + ahead; /* this call takes its reads over */
        used->ahead = 1;
        used->count = read->count;
        memcpy(used->tickets, read->tickets, sizeof used->tickets);
        w->ahead_reads[ahead] = w->ahead_reads[--w->ahead];
        w->slot_of[used->expert] = -1; /* until the read is done */
        s->ahead_used++;
    }
}

/* --- reading */

/* Begin to read an expert into a slot. Returns the number of tickets; a ticket of 0 is a read that could not begin. */
static int64_t start_reads(ExpertStep *s, OrderRoom room, int64_t expert, char *slot, int64_t *tickets) {
    int64_t count = 0;
    for (int64_t o = s->first_order[expert]; o < s->first_order[expert + 1]; o++) {
        const int64_t *order = s->orders + 3 * o, *read = s->reads + 3 * order[1];
        for (int64_t i = 0; i < order[2]; i++, read += 3) {
            room.offsets[i] = read[0];
            room.first[i] = i;
            room.pieces[i] = (struct iovec){slot + read[1], (size_t)read[2]};
            s->read_bytes += read[2];
        }
        room.first[order[2]] = order[2];
        const Order reads = {room.offsets, room.first, room.pieces, order[2], 1, 1};
        tickets[count++] = hf_read_start(s->reader, s->files[order[0]], &reads);
        s->chunks++;
    }
    return count;
}

static void note_error(ExpertStep *s, const Used *used, int32_t error) {
    if (error && !s->error) {
        s->error = error;
        s->failed = 1 + used->expert;
    }
}

/* Begin to read an expert, unless it is being read already. Returns 0 if it needs a slot and none is free. */
static int start_reading(Call *call, Used *used) {
    ExpertWindow *w = used->kept ? call->s->window : call->s->passing;
    if (used->ahead)
        return 1;
    if (!w->free)
        return 0;
    used->number = w->free_slots[--w->free];
    used->slot = w->slots + used->number * w->slot_bytes;
    used->count = start_reads(call->s, call->room, used->expert, used->slot, used->tickets);
    for (int64_t i = 0; i < used->count; i++)
        if (!used->tickets[i])
            note_error(call->s, used, 12); /* ENOMEM: nothing will arrive */
    return 1;
}

/* Wait for all tickets of an expert but one, and return that one; 0 if there is none. */
static int64_t last_ticket(Call *call, Used *used) {
    while (used->count > 1) {
        const double start = now_s();
        note_error(call->s, used, hf_read_wait(call->s->reader, used->tickets[--used->count]));
        call->s->waited_s += now_s() - start;
    }
    return used->count ? used->tickets[--used->count] : 0;
}

/* --- computing */

INLINE float clamped(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

/* One hidden value. Each step is rounded, as by torch. */
INLINE float gated(const ExpertGate *g, float gate, float up, int dtype) {
    const float limit = g->limit;
    gate = gate > limit ? limit : gate;
    up = clamped(up, -limit, limit);
    if (g->code == EXPERT_SILU)
        return rounded(rounded(gate / (1.0f + expf(-gate)), dtype) * up, dtype);
    const float share = rounded(1.0f / (1.0f + expf(-rounded(gate * g->alpha, dtype))), dtype);
    return rounded(rounded(up + 1.0f, dtype) * rounded(gate * share, dtype), dtype);
}

INLINE void gate_row(const ExpertGate *g, const void *products, void *hidden, int64_t row, int64_t neurons, int dtype) {
    const int turns = g->code == EXPERT_SWIGLU;
    const int64_t in = row * neurons * (g->code == EXPERT_RELU2 ? 1 : 2), out = row * neurons;
    for (int64_t i = 0; i < neurons; i++) {
        const float first = one(products, in + (turns ? 2 * i : i), dtype);
        float value;
        if (g->code == EXPERT_RELU2) {
            value = first <= 0.0f ? 0.0f : first; /* NaN stays NaN */
            value = rounded(value * value, dtype);
        } else {
            value = gated(g, first, one(products, in + (turns ? 2 * i + 1 : neurons + i), dtype), dtype);
        }
        put(hidden, out + i, value, dtype);
    }
}

void FAST hf_expert_gate(const ExpertGate *gate, const void *products, void *hidden, int64_t rows, int64_t neurons, int32_t dtype) {
    for (int64_t row = 0; row < rows; row++)
        BY_DTYPE(dtype, gate_row, gate, products, hidden, row, neurons);
}

/* Products of some experts with their tokens. Meanwhile the calling thread waits for the reads of `next`, which may be null. */
static FAST void multiply(Call *call, Used *const *some, int64_t n, int is_down, Used *next) {
    ExpertStep *s = call->s;
    const int64_t size = size_of(s->dtype), begin = is_down ? s->up_pieces : 0, end = is_down ? s->pieces : s->up_pieces;
    const int64_t inputs = is_down ? s->neurons : s->width, outputs = is_down ? s->width : s->up_outputs;
    const char *x = is_down ? call->hidden : call->x;
    char *out = is_down ? call->found : call->products;
    const char *bias = is_down ? s->down_bias : s->up_bias;
    int64_t jobs = 0;
    for (int64_t i = 0; i < n; i++)
        for (int64_t p = begin; p < end; p++) {
            const ExpertPiece *piece = s->piece + p;
            const int64_t first = some[i]->first, *at = s->at + some[i]->expert * s->places;
            Scales scales = piece->scales;
            scales.at = piece->scale_place < 0 ? NULL : some[i]->slot + at[piece->scale_place];
            call->jobs[jobs++] = (LinearJob){
                .weight = some[i]->slot + at[p], .scales = scales,
                .bias = bias ? bias + (some[i]->expert * outputs + piece->first_output) * size : NULL,
                .x = x + (!is_down && call->is_one ? 0 : first * inputs * size),
                .out = out + (first * outputs + piece->first_output) * size,
                .rows = piece->outputs, .columns = piece->inputs, .tokens = some[i]->pairs, .out_stride = outputs,
                .dtype = s->dtype, .weight_dtype = piece->dtype, .turned = piece->turned,
            };
        }
    LinearsJob all = {.jobs = call->jobs, .n = jobs, .reader = s->reader, .threads = s->threads, .no_avx512 = s->no_avx512};
    all.ticket = next ? last_ticket(call, next) : 0;
    if (!hf_linears(&all) && !s->error)
        s->error = 12; /* ENOMEM */
    s->waited_s += all.waited_s;
    if (next)
        note_error(s, next, all.error);
}

/* Compute some experts that are in memory. */
static FAST void compute(Call *call, Used *const *some, int64_t n, Used *next) {
    ExpertStep *s = call->s;
    const int64_t size = size_of(s->dtype), up_bytes = s->up_outputs * size, hidden_bytes = s->neurons * size;
    if (n)
        multiply(call, some, n, 0, NULL);
    for (int64_t i = 0; i < n; i++)
        hf_expert_gate(&s->gate, call->products + some[i]->first * up_bytes, call->hidden + some[i]->first * hidden_bytes,
                       some[i]->pairs, s->neurons, s->dtype);
    if (n || next)
        multiply(call, some, n, 1, next);
}

/* Sum a token's experts with the router's weights, in the router's order. A product is rounded if both factors have the dtype. */
INLINE void sum_token(const Call *call, int64_t token, int dtype) {
    const ExpertStep *s = call->s;
    for (int64_t i = 0; i < s->width; i++) {
        float sum = 0.0f;
        for (int64_t k = 0; k < s->k; k++) {
            const int64_t pair = token * s->k + k, row = call->row_of[pair];
            if (row < 0)
                continue;
            const float product = one(call->found, row * s->width + i, dtype) * one(s->weights, pair, s->weights_dtype);
            sum += s->weights_dtype == dtype ? rounded(product, dtype) : product;
        }
        put(s->out, token * s->width + i, sum, dtype);
    }
}

static FAST void sum_tokens(const Call *call) {
    for (int64_t token = 0; token < call->s->tokens; token++)
        BY_DTYPE(call->s->dtype, sum_token, call, token);
}

/* --- the whole */

/* Compute the experts that are in slots first, then each of the others as it arrives. */
static FAST void compute_all(Call *call, int64_t n, Used **hits, Used **missing) {
    ExpertStep *s = call->s;
    int64_t there = 0, lacking = 0, started = 0;
    for (int64_t i = 0; i < n; i++)
        if (call->used[i].slot && !call->used[i].ahead)
            hits[there++] = call->used + i;
        else if (call->used[i].ahead)
            missing[lacking++] = call->used + i; /* its read began first */
    for (int kept = 1; kept >= 0; kept--)
        for (int64_t i = 0; i < n; i++)
            if (!call->used[i].slot && call->used[i].kept == kept)
                missing[lacking++] = call->used + i;
    s->hits = there;
    while (started < lacking && start_reading(call, missing[started]))
        started++;
    compute(call, hits, there, started ? missing[0] : NULL);
    for (int64_t i = 0; i < there; i++)
        if (!hits[i]->kept) {
            s->window->slot_of[hits[i]->expert] = -1;
            release(s->window, hits[i]->number);
        }
    for (int64_t i = 0; i < lacking; i++) {
        while (started < lacking && start_reading(call, missing[started]))
            started++;
        Used *came = missing[i];
        const int64_t ticket = last_ticket(call, came);
        if (ticket)
            note_error(s, came, hf_read_wait(s->reader, ticket));
        if (!s->error && !s->damaged && is_damaged(s, came->expert, came->slot))
            s->damaged = 1 + came->expert;
        const int is_whole = !s->error && !s->damaged;
        if (came->kept && is_whole)
            s->window->slot_of[came->expert] = came->number;
        compute(call, &came, is_whole, i + 1 < started ? missing[i + 1] : NULL);
        if (!came->kept)
            release(came->ahead ? s->window : s->passing, came->number);
    }
}

static FAST void gather_x(Call *call, int64_t n) {
    ExpertStep *s = call->s;
    const size_t nbytes = (size_t)(s->width * size_of(s->dtype));
    call->is_one = s->tokens == 1;
    for (int64_t i = 0; i < n; i++)
        call->is_one &= call->used[i].pairs == 1;
    if (call->is_one) {
        memcpy(call->x, s->x, nbytes);
        return;
    }
    for (int64_t i = 0; i < n; i++)
        for (int64_t row = call->used[i].first; row < call->used[i].first + call->used[i].pairs; row++)
            memcpy(call->x + row * nbytes, (const char *)s->x + call->pair_of[row] / s->k * nbytes, nbytes);
}

/* Cut a part off a block of memory. */
static void *cut(char **memory, int64_t nbytes) {
    void *part = *memory;
    *memory += (nbytes + 63) & ~(int64_t)63;
    return part;
}

int FAST hf_expert_step(ExpertStep *s) {
    const double start = now_s();
    const int64_t pairs = s->tokens * s->k, size = size_of(s->dtype), reads = s->most_reads;
    const int64_t sizes[] = {
        pairs * (int64_t)sizeof(Used),     8 * pairs,           8 * pairs,       pairs * s->width * size, pairs * s->up_outputs * size,
        pairs * s->neurons * size,         pairs * s->width * size,
        pairs * s->pieces * (int64_t)sizeof(LinearJob), 8 * reads, 8 * (reads + 1), reads * (int64_t)sizeof(struct iovec),
        s->window->experts,                8 * pairs,           8 * pairs,
    };
    int64_t total = 64;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        total += (sizes[i] + 63) & ~(int64_t)63;
    char *const memory = malloc((size_t)total), *at = memory;
    if (!memory)
        return 0;
    Call call = {.s = s};
    call.used = cut(&at, sizes[0]);
    call.pair_of = cut(&at, sizes[1]);
    call.row_of = cut(&at, sizes[2]);
    call.x = cut(&at, sizes[3]);
    call.products = cut(&at, sizes[4]);
    call.hidden = cut(&at, sizes[5]);
    call.found = cut(&at, sizes[6]);
    call.jobs = cut(&at, sizes[7]);
    call.room.offsets = cut(&at, sizes[8]);
    call.room.first = cut(&at, sizes[9]);
    call.room.pieces = cut(&at, sizes[10]);
    char *stays = cut(&at, sizes[11]);
    Used **hits = cut(&at, sizes[12]), **missing = cut(&at, sizes[13]);
    s->read_bytes = s->chunks = s->failed = s->damaged = s->ahead_used = 0;
    s->error = 0;
    s->waited_s = 0.0;
    s->used = find_used(&call);
    make_room(&call, s->used, stays);
    gather_x(&call, s->used);
    s->managed_s = now_s() - start;
    compute_all(&call, s->used, hits, missing);
    if (!s->error && !s->damaged)
        sum_tokens(&call);
    free(memory);
    return 1;
}

/* --- on a guess */

void hf_expert_settle(ExpertStep *s) {
    while (s->window->ahead)
        wait_for_ahead(s, s->window->ahead - 1);
}

/* The least recently used expert in a slot that is not among the guessed ones; -1 if there is none. */
static int64_t least_used(const ExpertStep *s) {
    const ExpertWindow *w = s->window;
    int64_t worst = -1;
    for (int64_t e = 0; e < w->experts; e++) {
        int guessed = w->slot_of[e] < 0;
        for (int64_t i = 0; i < s->k; i++)
            guessed |= s->index[i] == e;
        if (!guessed && (worst < 0 || w->last_used[e] <= w->last_used[worst]))
            worst = e;
    }
    return worst;
}

int64_t hf_expert_ahead(ExpertStep *s) {
    ExpertWindow *w = s->window;
    char *const memory = malloc((size_t)(s->most_reads * (16 + (int64_t)sizeof(struct iovec)) + 192)), *at = memory;
    s->read_bytes = s->chunks = 0;
    hf_expert_settle(s); /* the guesses of the previous token, which have arrived by now */
    if (!memory)
        return 0;
    OrderRoom room = {.offsets = cut(&at, 8 * s->most_reads), .first = cut(&at, 8 * (s->most_reads + 1))};
    room.pieces = (struct iovec *)at;
    for (int64_t i = 0; i < s->k && w->ahead < MOST_AHEAD; i++) {
        const int64_t expert = s->index[i];
        if (expert < 0 || expert >= w->experts || w->slot_of[expert] >= 0)
            continue;
        if (!w->free) {
            const int64_t worst = least_used(s);
            if (worst < 0)
                break;
            release(w, w->slot_of[worst]);
            w->slot_of[worst] = -1;
        }
        AheadRead *read = w->ahead_reads + w->ahead++;
        read->expert = expert;
        w->slot_of[expert] = w->free_slots[--w->free];
        read->count = start_reads(s, room, expert, w->slots + w->slot_of[expert] * w->slot_bytes, read->tickets);
    }
    free(memory);
    return w->ahead;
}

#endif
