#define _GNU_SOURCE                          /* program_invocation_short_name */
#include "wire.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct wire wire;

void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "%s: ", program_invocation_short_name);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

uint8_t *copy_of(const uint8_t *data, size_t len) {
    uint8_t *copy = malloc(len);
    if (!copy)
        die("out of memory");
    return memcpy(copy, data, len);
}

static int bio_read(BIO *bio, char *to, int len) {
    size_t n = wire.in_len - wire.in_at;
    BIO_clear_retry_flags(bio);
    if (n == 0) {
        BIO_set_retry_read(bio);
        return -1;
    }
    if (n > (size_t)len)
        n = (size_t)len;
    memcpy(to, wire.in + wire.in_at, n);
    wire.in_at += n;
    return (int)n;
}

static int bio_write(BIO *bio, const char *from, int len) {
    BIO_clear_retry_flags(bio);
    if (wire.out_len + (size_t)len > WIRE_OUT)
        die("a burst does not fit into %d bytes: send smaller bursts", WIRE_OUT);
    memcpy(wire.out + wire.out_len, from, (size_t)len);
    wire.out_len += (size_t)len;
    return len;
}

static long bio_ctrl(BIO *bio, int command, long number, void *pointer) {
    (void)bio, (void)number, (void)pointer;
    return command == BIO_CTRL_FLUSH;
}

BIO *wire_bio(void) {
    static BIO_METHOD *method;
    if (!method) {
        method = BIO_meth_new(BIO_TYPE_SOURCE_SINK | BIO_get_new_index(), "shared buffers");
        if (!method)
            die("out of memory");
        BIO_meth_set_read(method, bio_read);
        BIO_meth_set_write(method, bio_write);
        BIO_meth_set_ctrl(method, bio_ctrl);
    }
    BIO *bio = BIO_new(method);
    if (!bio)
        die("out of memory");
    BIO_set_init(bio, 1);
    return bio;
}
