/* What the bytes mean. SEND_PACKET and RECV_PACKET have one layout: type, length, 32-byte key, payload. So a packet is
 * relayed by overwriting its type and its key, and neighbours for one destination leave in one write. */
#define _GNU_SOURCE                          /* memmem */
#include "limit.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <string.h>

enum frame_type {                            /* derp/derp.go */
    SERVER_KEY = 0x01, CLIENT_INFO = 0x02, SERVER_INFO = 0x03, SEND_PACKET = 0x04, RECV_PACKET = 0x05,
    PING = 0x12, PONG = 0x13,
};
enum { HEADER = 5, KEYED = HEADER + KEY_LEN, MAX_HEAD = 8 << 10, MAX_BODY = 128 << 10, SLOTS = 1 << 16 };
static const char SWITCHING[] = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: DERP\r\nConnection: Upgrade\r\n\r\n";

static uint8_t greeting[HEADER + 8 + KEY_LEN] = {SERVER_KEY, 0, 0, 0, 8 + KEY_LEN, 'D', 'E', 'R', 'P', 0xf0, 0x9f, 0x94, 0x91};
static const uint8_t server_info[HEADER + 24 + 16 + 2] = {SERVER_INFO, 0, 0, 0, 24 + 16 + 2};
static struct peer *table[SLOTS];

void relay_init(const char *public_key) {
    for (size_t i = 0; i < KEY_LEN; i++)
        if (sscanf(public_key + 2 * i, "%2hhx", &greeting[HEADER + 8 + i]) != 1)
            die("the public key must be %d hexadecimal digits", 2 * KEY_LEN);
}

static struct peer **slot_of(const uint8_t *key) {
    uint16_t slot;                           /* keys are random */
    memcpy(&slot, key, sizeof slot);
    return &table[slot % SLOTS];
}

static struct peer *find(const uint8_t *key) {
    struct peer *p = *slot_of(key);
    while (p && memcmp(p->key, key, KEY_LEN) != 0)
        p = p->next;
    return p;
}

void relay_forget(struct peer *p) {
    for (struct peer **at = slot_of(p->key); *at; at = &(*at)->next)
        if (*at == p) {
            *at = p->next;
            return;
        }
}

static size_t upgrade(struct peer *p, uint8_t *data, size_t len) {
    uint8_t *end = memmem(data, len, "\r\n\r\n", 4);
    if (!end && len <= MAX_HEAD)
        return 0;
    if (!end || len < 10 || memcmp(data, "GET /derp ", 10) != 0) {
        peer_close(p);
        return len;
    }
    size_t head = (size_t)(end - data) + 4;
    if (!memmem(data, head, "\r\nDerp-Fast-Start: 1\r\n", 22))
        peer_write(p, (const uint8_t *)SWITCHING, sizeof SWITCHING - 1);
    peer_write(p, greeting, sizeof greeting);
    p->state = DERP_LOGIN;
    return head;
}

static void login(struct peer *p, const uint8_t *body, size_t len) {
    if (len < KEY_LEN) {
        peer_close(p);
        return;
    }
    memcpy(p->key, body, KEY_LEN);
    struct peer **slot = slot_of(p->key);
    p->next = *slot;
    *slot = p;
    p->state = READY;
    peer_write(p, server_info, sizeof server_info);
}

static void answer(struct peer *p, const uint8_t *ping) {
    uint8_t pong[HEADER + 8] = {PONG, 0, 0, 0, 8};
    memcpy(pong + HEADER, ping, 8);
    peer_write(p, pong, sizeof pong);
}

static size_t body_len(const uint8_t *frame) {
    uint32_t len;
    memcpy(&len, frame + 1, sizeof len);
    return ntohl(len);
}

static bool is_whole_packet(const uint8_t *frame, size_t len) {
    return len >= KEYED && frame[0] == SEND_PACKET && body_len(frame) >= KEY_LEN && body_len(frame) <= len - HEADER;
}

/* Sends the packets at the head of data that go to one destination; returns their length. */
static size_t relay_run(const struct peer *p, uint8_t *data, size_t len) {
    uint8_t key[KEY_LEN];
    size_t at = 0;
    memcpy(key, data + HEADER, KEY_LEN);
    do {
        data[at] = RECV_PACKET;
        memcpy(data + at + HEADER, p->key, KEY_LEN);
        at += HEADER + body_len(data + at);
    } while (is_whole_packet(data + at, len - at) && memcmp(data + at + HEADER, key, KEY_LEN) == 0);
    struct peer *to = find(key);
    if (to)
        peer_write(to, data, at);
    return at;
}

size_t relay_receive(struct peer *p, uint8_t *data, size_t len) {
    size_t at = p->state == HTTP_HEAD ? upgrade(p, data, len) : 0;
    while (p->state == DERP_LOGIN || p->state == READY) {
        uint8_t *frame = data + at;
        if (p->state == READY && is_whole_packet(frame, len - at)) {
            at += relay_run(p, frame, len - at);
            continue;
        }
        if (len - at < HEADER)
            break;
        size_t body = body_len(frame);
        if (body > MAX_BODY || (p->state == DERP_LOGIN) != (frame[0] == CLIENT_INFO)) {
            peer_close(p);
            break;
        }
        if (len - at - HEADER < body)
            break;
        if (frame[0] == CLIENT_INFO)
            login(p, frame + HEADER, body);
        else if (frame[0] == PING && body == 8)
            answer(p, frame + HEADER);
        at += HEADER + body;
    }
    return at;
}
