/* What the benchmark's two programs have in common: OpenSSL that never touches a socket. What was received is put into one
 * buffer, where SSL_read finds it; SSL_write appends records to another one, which leaves in one send(). Both belong to
 * one connection at a time, so an idle one owns none. */
#ifndef WIRE_H
#define WIRE_H

#include <openssl/bio.h>
#include <stddef.h>
#include <stdint.h>

enum { WIRE_IN = 256 << 10, WIRE_OUT = 1 << 20 };

struct wire {
    size_t in_at, in_len, out_len;
    uint8_t in[WIRE_IN], out[WIRE_OUT];
};
extern struct wire wire;

/* Both ends of every connection's OpenSSL. Dies when `out` is too small for what is written. */
BIO *wire_bio(void);
uint8_t *copy_of(const uint8_t *data, size_t len);
/* One sentence on stderr, and the end of the program with status 1. */
void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

#endif
