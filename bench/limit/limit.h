/* The yardstick: about the least that a single-threaded DERP relay in C with epoll and OpenSSL can do.
 *
 * net.c    connections: TCP, TLS 1.3, bytes in and out; the buffers are of ../shared
 * relay.c  what the bytes mean: HTTP upgrade, login, packets
 *
 * What it leaves out, so that it stays small; all of it is work that a real relay does:
 *   - the boxes of the login: the client's key is taken unproven, and ServerInfo is filled with zeros;
 *   - queues: what comes for a client whose socket is full is dropped;
 *   - accounting, metrics, limits, keep-alives, time-outs, mesh, duplicate keys, every page but /derp.
 * What it does as any relay must: TLS of every byte, order, sender's key in each packet, no packet to another client.
 * A busy client's connection is kept at most as full as the kernel lets sockets be by default.
 */
#ifndef LIMIT_H
#define LIMIT_H

#include "../shared/wire.h"

#include <openssl/ssl.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { KEY_LEN = 32 };

enum state { TLS_HANDSHAKE, HTTP_HEAD, DERP_LOGIN, READY, CLOSED };

struct peer {
    int fd;
    enum state state;
    SSL *ssl;
    uint8_t key[KEY_LEN];
    uint8_t *tail;                           /* the first part of a frame, or of the HTTP head, whose rest is missing */
    size_t tail_len;
    uint8_t *unsent;                         /* ciphertext that the socket has not taken yet */
    size_t unsent_len;
    struct peer *next;                       /* in the table of keys, then in the list of the dead */
};

/* ---- net.c ---- */

void net_init(const char *certificate, const char *key);
/* Serves 127.0.0.1:port until it is killed. */
void net_serve(int port) __attribute__((noreturn));
/* Encrypts and sends; drops everything if the socket is full. One record per 16 KiB. */
void peer_write(struct peer *p, const uint8_t *data, size_t len);
void peer_close(struct peer *p);

/* ---- relay.c ---- */

void relay_init(const char *public_key);     /* hexadecimal */
/* Handles all whole frames of data, in place; returns how many bytes that was. */
size_t relay_receive(struct peer *p, uint8_t *data, size_t len);
void relay_forget(struct peer *p);           /* no packet reaches it from now on */

#endif
