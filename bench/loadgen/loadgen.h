/* A DERP load generator: many clients on one thread, one core, over TLS 1.3.
 *
 * client.c     one DERP client: TCP, TLS, login, frames in and out
 * record.c     records of TLS 1.3
 * gcm.c        AES-GCM
 * load.c       what the clients send each other, when, and what arrived
 * histogram.c  times in logarithmic buckets
 * main.c       commands on stdin, one line of JSON per answer
 *
 * Why C: the generator shares a machine with the relay it measures and must be the faster of the two.
 */
#ifndef LOADGEN_H
#define LOADGEN_H

#include "../shared/wire.h"

#include <openssl/ssl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum { KEY_LEN = 32, FRAME_HEADER = 5, MAX_PACKET = 64 << 10 };

uint64_t now_ns(void);                       /* monotonic clock */

/* ---- gcm.c ---- */

enum { GCM_NONCE = 12, GCM_AAD = 5, GCM_TAG = 16 };
struct gcm;
struct gcm *gcm_new(const uint8_t *key, unsigned key_len);
void gcm_free(struct gcm *g);
/* Writes `len` bytes and the tag to `to`, which may be `from`. */
void gcm_seal(struct gcm *g, const uint8_t *nonce, const uint8_t *aad, const uint8_t *from, size_t len, uint8_t *to);
/* Reads `len` bytes and the tag behind them; tells whether the tag is right. */
bool gcm_open(struct gcm *g, const uint8_t *nonce, const uint8_t *aad, const uint8_t *from, size_t len, uint8_t *to);

/* ---- record.c ---- */

enum { RECORD_HEADER = 5, RECORD_DATA = 16 << 10, RECORD_HANDSHAKE = 22, RECORD_APPLICATION_DATA = 23 };
struct direction {                           /* from client to server, or back */
    struct gcm *gcm;
    uint64_t sequence;
    uint8_t iv[GCM_NONCE];
};
void record_keys(struct direction *d, const uint8_t *secret, size_t secret_len);
/* Writes a record of up to RECORD_DATA bytes to `to`, and returns its size. Needs one more byte behind `data`. */
size_t record_seal(struct direction *d, uint8_t *data, size_t len, uint8_t *to);
size_t record_size(const uint8_t *from, size_t len);     /* of the record at `from`, or 0 if it is not there as a whole */
/* Decrypts a whole record; returns its type, or -1 if it is broken. `to` needs room for all of it. */
int record_open(struct direction *d, const uint8_t *from, size_t size, uint8_t *to, size_t *len);

/* ---- client.c ---- */

enum client_state { UNUSED, TCP_CONNECTING, TLS_HANDSHAKE, DERP_LOGIN, READY, CLOSED };

struct client {
    uint32_t index;
    int fd;
    enum client_state state;
    SSL *ssl;                                /* until the end of the TLS handshake */
    struct direction to_relay, from_relay;
    uint8_t key[KEY_LEN];
    uint8_t server_key[KEY_LEN];
    uint8_t *login;                          /* the sealed ClientInfo frame, made by the caller */
    size_t login_len;
    uint8_t *half_record, *half_frame;       /* first parts of which the rest has not arrived */
    size_t half_record_len, half_frame_len;
    uint8_t *unsent;                         /* ciphertext that the socket has not taken yet */
    size_t unsent_len;
};

struct clients {
    struct client *at;
    uint32_t count, ready, closed;           /* closed: connections that ended although nobody asked for it */
    uint64_t unexpected;                     /* frames that a healthy relay does not send to idle or busy clients */
    uint64_t looked_before;                  /* when clients_poll looked the time before: what it finds now came later */
};
extern struct clients clients;

/* Called for every RecvPacket frame; `now` is the time at which its bytes were read from the socket. */
typedef void packet_handler(struct client *to, const uint8_t *from_key, const uint8_t *packet, size_t len, uint64_t now);

void clients_init(packet_handler *on_packet);
/* Connects `count` clients from `source` to 127.0.0.1:port, `parallel` at a time, with the logins of `file` ("serverkey
 * key frame" per line, hexadecimal). Returns how many reached the end of the DERP login; ends after `seconds` at the
 * latest. */
uint32_t clients_open(int port, const char *source, uint32_t count, uint32_t parallel, double seconds, const char *file);
bool clients_poll(int timeout_ms);           /* handles what is readable; tells whether anything was */
bool client_blocked(const struct client *c); /* closed, or its socket is full: a real client would drop now */
/* One TLS record per 16 KiB. Needs one more byte behind `data`. */
void client_write(struct client *c, uint8_t *data, size_t len);
void client_flush(struct client *c);         /* one send() for all records written since the last flush */

/* ---- histogram.c ---- */

enum { HISTOGRAM_BUCKETS = 64 * 64 };
struct histogram {
    uint64_t count, max, bucket[HISTOGRAM_BUCKETS];
};
void histogram_add(struct histogram *h, uint64_t value);
uint64_t histogram_quantile(const struct histogram *h, double q);

/* ---- load.c ---- */

void load_pace(uint32_t frames_per_record, uint32_t records_per_burst, uint32_t size, double rate, char *flows);
void load_ping(uint32_t size, char *flows);
/* Runs what was declared, then forgets it. */
void load_run(double warm_up, double seconds, double quiet, FILE *answer);
void load_packet(struct client *to, const uint8_t *from_key, const uint8_t *packet, size_t len, uint64_t now);

#endif
