/* What the clients send each other, when, and what arrived.
 *
 * Paced flows are an open loop: burst k is due at start + k * interval, whatever the relay does, and the flows take turns.
 * A burst that is due while its client's socket is full is offered and dropped at the source, as a real client drops.
 * When the generator itself is late by more than MAX_LATE it skips, and the offered rate that it reports says so. While it
 * is late it looks for arrivals only every MAX_DEAF: many at once are cheaper. What a packet may have waited for that is
 * reported as `unread`, and is part of its latency: from the moment before its write to the return of the recv that had it.
 * Ping flows are a closed loop: one packet under way per flow, echoed by the receiver.
 *
 * Every packet carries run, flow, sequence number, time and a check of these, and a filling that follows from flow and
 * sequence number; the receiver compares all of it, and the sender's key with the flow's.
 */
#include "loadgen.h"

#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>

enum { SEND_PACKET = 0x04, MAX_FLOWS = 1 << 16, PATTERN_SHIFTS = 1024, MAX_BURSTS_PER_TURN = 16 };
static const uint64_t MAX_LATE = 1000000;              /* ns of schedule that may be caught up */
static const uint64_t MAX_DEAF = 250000;               /* ns between two looks at what arrived */
static const uint64_t MAX_DRAIN = 3000000000;

enum kind { PACED, PING, PONG };
struct stamp {
    uint32_t run, flow;
    uint64_t sequence, sent;
    uint32_t kind, size;
    uint64_t check;
};

struct flow {
    uint32_t from, to, size;
    bool ping;
    uint64_t sequence, expected, delivered;            /* delivered: within the window */
};

static struct {
    struct flow *flow;
    uint32_t flows, paced, run;                        /* the first `paced` flows are paced, the others ping */
    uint32_t frames_per_record, records_per_burst;
    double rate;
    uint64_t window_from, window_to;
    uint64_t offered, blocked, delivered, sent_total, delivered_total, blocked_total;
    uint64_t corrupt, misrouted, reordered, stale;
    struct histogram latency, unread, rtt;
    uint8_t pattern[MAX_PACKET + PATTERN_SHIFTS];
} load;

static uint64_t check_of(const struct stamp *s) {
    uint64_t mix = s->sequence * 0x9e3779b97f4a7c15ull ^ s->sent;
    return mix ^ ((uint64_t)s->run << 40 ^ (uint64_t)s->flow << 16 ^ (uint64_t)s->kind << 8 ^ s->size);
}

static const uint8_t *filling(const struct stamp *s) {
    return load.pattern + (s->sequence * 7 + s->flow * 13) % PATTERN_SHIFTS;
}

static bool in_window(uint64_t now) {
    return now >= load.window_from && now < load.window_to;
}

static void add_flows(char *text, uint32_t size, bool ping) {
    if (load.pattern[0] == 0)
        for (size_t i = 0; i < sizeof load.pattern; i++)
            load.pattern[i] = (uint8_t)(1 + (i * 2654435761u >> 13) % 255);
    if (size < sizeof(struct stamp) || size > MAX_PACKET)
        die("packets of %u bytes: must be %zu to %d", size, sizeof(struct stamp), MAX_PACKET);
    for (char *word = strtok(text, " \n"); word; word = strtok(NULL, " \n")) {
        uint32_t from, to;
        if (sscanf(word, "%u:%u", &from, &to) != 2 || from >= clients.count || to >= clients.count)
            die("a flow is FROM:TO, two indices of open clients; got %s", word);
        load.flow = realloc(load.flow, (load.flows + 1) * sizeof *load.flow);
        if (!load.flow || load.flows == MAX_FLOWS)
            die("too many flows");
        load.flow[load.flows++] = (struct flow){.from = from, .to = to, .size = size, .ping = ping};
    }
}

void load_pace(uint32_t frames_per_record, uint32_t records_per_burst, uint32_t size, double rate, char *flows) {
    if (load.flows)
        die("declare the paced flows first, and once");
    if (!frames_per_record || !records_per_burst || frames_per_record * (size + 64) > 128 << 10 || rate <= 0)
        die("%ux%u at %g packets/s is no load", frames_per_record, records_per_burst, rate);
    load.frames_per_record = frames_per_record;
    load.records_per_burst = records_per_burst;
    load.rate = rate;
    add_flows(flows, size, false);
    load.paced = load.flows;
}

void load_ping(uint32_t size, char *flows) {
    add_flows(flows, size, true);
}

static size_t put_frame(uint8_t *to, const struct client *receiver, struct stamp *s) {
    uint32_t body = htonl(KEY_LEN + s->size);
    s->check = check_of(s);
    to[0] = SEND_PACKET;
    memcpy(to + 1, &body, 4);
    memcpy(to + FRAME_HEADER, receiver->key, KEY_LEN);
    memcpy(to + FRAME_HEADER + KEY_LEN, s, sizeof *s);
    memcpy(to + FRAME_HEADER + KEY_LEN + sizeof *s, filling(s), s->size - sizeof *s);
    return FRAME_HEADER + KEY_LEN + s->size;
}

static void send_burst(uint32_t index, uint64_t now) {
    static uint8_t record[256 << 10];
    struct flow *f = &load.flow[index];
    struct client *from = &clients.at[f->from], *to = &clients.at[f->to];
    uint32_t frames = load.frames_per_record * load.records_per_burst;
    bool blocked = client_blocked(from);
    if (in_window(now)) {
        load.offered += frames;
        load.blocked += blocked ? frames : 0;
    }
    if (blocked) {
        load.blocked_total += frames;
        return;
    }
    for (uint32_t r = 0; r < load.records_per_burst; r++) {
        size_t len = 0;
        for (uint32_t i = 0; i < load.frames_per_record; i++) {
            struct stamp s = {.run = load.run, .flow = index, .sequence = f->sequence++, .sent = now, .kind = PACED, .size = f->size};
            len += put_frame(record + len, to, &s);
        }
        client_write(from, record, len);
    }
    client_flush(from);
    load.sent_total += frames;
}

static void send_one(uint32_t index, enum kind kind, uint64_t sequence, uint64_t sent) {
    uint8_t frame[FRAME_HEADER + KEY_LEN + MAX_PACKET + 1];
    struct flow *f = &load.flow[index];
    struct client *from = &clients.at[kind == PING ? f->from : f->to], *to = &clients.at[kind == PING ? f->to : f->from];
    struct stamp s = {.run = load.run, .flow = index, .sequence = sequence, .sent = sent, .kind = kind, .size = f->size};
    if (from->state != READY)
        return;
    client_write(from, frame, put_frame(frame, to, &s));
    client_flush(from);
}

static void on_paced(struct flow *f, const struct stamp *s, uint64_t now) {
    if (s->sequence < f->expected)
        load.reordered++;
    f->expected = s->sequence + 1;
    load.delivered_total++;
    if (in_window(now)) {
        f->delivered++;
        load.delivered++;
        histogram_add(&load.latency, now - s->sent);
        histogram_add(&load.unread, now - clients.looked_before);
    }
}

static void on_ping(uint32_t index, const struct stamp *s, uint64_t now) {
    if (s->kind == PING) {
        send_one(index, PONG, s->sequence, s->sent);
        return;
    }
    if (in_window(now)) {
        load.flow[index].delivered++;
        histogram_add(&load.rtt, now - s->sent);
    }
    if (now < load.window_to)
        send_one(index, PING, s->sequence + 1, now_ns());
}

void load_packet(struct client *to, const uint8_t *from_key, const uint8_t *packet, size_t len, uint64_t now) {
    struct stamp s;
    if (len < sizeof s) {
        load.corrupt++;
        return;
    }
    memcpy(&s, packet, sizeof s);
    if (s.check != check_of(&s) || s.size != len) {
        load.corrupt++;
        return;
    }
    if (s.run != load.run || s.flow >= load.flows) {
        load.stale++;
        return;
    }
    struct flow *f = &load.flow[s.flow];
    uint32_t sender = s.kind == PONG ? f->to : f->from, receiver = s.kind == PONG ? f->from : f->to;
    if (to->index != receiver || memcmp(from_key, clients.at[sender].key, KEY_LEN) != 0)
        load.misrouted++;
    else if (memcmp(packet + sizeof s, filling(&s), len - sizeof s) != 0)
        load.corrupt++;
    else if (s.kind == PACED)
        on_paced(f, &s, now);
    else
        on_ping(s.flow, &s, now);
}

/* Sends what is due; returns whether anything was. `done` counts bursts of the schedule, skipped ones too. */
static bool send_due(uint64_t start, uint64_t now, double interval, uint64_t *done) {
    uint64_t due = (uint64_t)((double)(now - start) / interval), late = (uint64_t)((double)MAX_LATE / interval) + 1;
    if (*done >= due)
        return false;
    if (due - *done > late)
        *done = due - late;
    for (int i = 0; i < MAX_BURSTS_PER_TURN && *done < due; i++)
        send_burst((uint32_t)((*done)++ % load.paced), i ? now_ns() : now);
    return true;
}

/* Lets the packets under way arrive: until all have, or nothing came for `quiet` seconds. */
static void drain(double quiet) {
    uint64_t start = now_ns(), last = start, now = start;
    while (load.delivered_total < load.sent_total && now - last < (uint64_t)(quiet * 1e9) && now - start < MAX_DRAIN) {
        bool any = clients_poll(1);
        now = now_ns();
        if (any)
            last = now;
    }
}

static void print_times(FILE *out, const char *name, const struct histogram *h) {
    static const double quantiles[] = {0.5, 0.9, 0.99, 0.999};
    fprintf(out, ", \"%s\": {\"count\": %lu", name, h->count);
    for (size_t i = 0; i < sizeof quantiles / sizeof *quantiles; i++)
        fprintf(out, ", \"p%g\": %.1f", quantiles[i] * 100, (double)histogram_quantile(h, quantiles[i]) / 1e3);
    fprintf(out, ", \"max\": %.1f}", (double)h->max / 1e3);
}

static double slowest_to_mean(uint32_t from, uint32_t to) {
    uint64_t least = UINT64_MAX, sum = 0;
    for (uint32_t i = from; i < to; i++) {
        sum += load.flow[i].delivered;
        if (load.flow[i].delivered < least)
            least = load.flow[i].delivered;
    }
    return sum ? (double)least * (to - from) / (double)sum : 0;
}

static void print_result(FILE *out, double seconds, double busy) {
    fprintf(out, "{\"seconds\": %.6f, \"busy\": %.4f, \"offered\": %lu, \"blocked\": %lu, \"delivered\": %lu",
            seconds, busy, load.offered, load.blocked, load.delivered);
    fprintf(out, ", \"sent_total\": %lu, \"blocked_total\": %lu, \"delivered_total\": %lu",
            load.sent_total, load.blocked_total, load.delivered_total);
    fprintf(out, ", \"corrupt\": %lu, \"misrouted\": %lu, \"reordered\": %lu, \"stale\": %lu, \"unexpected\": %lu",
            load.corrupt, load.misrouted, load.reordered, load.stale, clients.unexpected);
    fprintf(out, ", \"clients\": %u, \"closed\": %u, \"slowest_to_mean\": %.4f", clients.ready, clients.closed,
            slowest_to_mean(0, load.paced ? load.paced : load.flows));
    print_times(out, "latency", &load.latency);
    print_times(out, "unread", &load.unread);
    print_times(out, "rtt", &load.rtt);
    fprintf(out, "}\n");
}

static void forget(void) {
    struct flow *flow = load.flow;
    load.flows = load.paced = 0;
    load.offered = load.blocked = load.delivered = load.sent_total = load.delivered_total = load.blocked_total = 0;
    load.corrupt = load.misrouted = load.reordered = load.stale = 0;
    memset(&load.latency, 0, sizeof load.latency);
    memset(&load.unread, 0, sizeof load.unread);
    memset(&load.rtt, 0, sizeof load.rtt);
    load.flow = flow;
}

void load_run(double warm_up, double seconds, double quiet, FILE *answer) {
    double interval = load.paced ? 1e9 * load.frames_per_record * load.records_per_burst / load.rate : 0;
    uint64_t start = now_ns(), now = start, busy = 0, done = 0, polled = 0;
    load.run++;
    load.window_from = start + (uint64_t)(warm_up * 1e9);
    load.window_to = load.window_from + (uint64_t)(seconds * 1e9);
    for (uint32_t i = load.paced; i < load.flows; i++)
        send_one(i, PING, 0, now_ns());
    while (now < load.window_to) {
        bool worked = load.paced && send_due(start, now, interval, &done);
        if (!worked || now - polled >= MAX_DEAF) {
            polled = now;
            worked |= clients_poll(0);
        }
        uint64_t then = now;
        now = now_ns();
        if (worked && in_window(then))
            busy += now - then;
    }
    drain(quiet);
    print_result(answer, seconds, (double)busy / (seconds * 1e9));
    forget();
}
