/* Connections, on the buffers of ../shared: a read event takes what waits with one recv(), and decrypts all of it before
 * anything is handled. An idle connection owns no buffer of ours, and OpenSSL releases its own. */
#define _GNU_SOURCE                          /* accept4 */
#include "limit.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { IN_SIZE = 64 << 10, PLAIN_SIZE = 256 << 10, EVENTS_PER_TURN = 64, ACCEPTS_PER_TURN = 16 };

static struct {
    int epoll, listener;
    SSL_CTX *tls;
    struct peer *dead;                       /* freed at the end of a turn: events may still point to them */
    uint8_t plain[PLAIN_SIZE];
} net;

void net_init(const char *certificate, const char *key) {
    net.epoll = epoll_create1(EPOLL_CLOEXEC);
    net.tls = SSL_CTX_new(TLS_server_method());
    if (net.epoll < 0 || !net.tls)
        die("cannot set up epoll and OpenSSL");
    SSL_CTX_set_min_proto_version(net.tls, TLS1_3_VERSION);
    SSL_CTX_set_mode(net.tls, SSL_MODE_RELEASE_BUFFERS);
    SSL_CTX_set_session_cache_mode(net.tls, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_num_tickets(net.tls, 0);
    SSL_CTX_set_read_ahead(net.tls, 1);
    if (SSL_CTX_use_certificate_file(net.tls, certificate, SSL_FILETYPE_PEM) != 1 ||
        SSL_CTX_use_PrivateKey_file(net.tls, key, SSL_FILETYPE_PEM) != 1)
        die("%s and %s are no certificate and its key", certificate, key);
}

static void watch(struct peer *p, int operation, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = p};
    if (epoll_ctl(net.epoll, operation, p ? p->fd : net.listener, &event) < 0)
        die("epoll_ctl: %s", strerror(errno));
}

void peer_close(struct peer *p) {
    if (p->state == CLOSED)
        return;
    if (p->state == READY)
        relay_forget(p);
    p->state = CLOSED;
    p->next = net.dead;
    net.dead = p;
}

static void bury_the_dead(void) {
    while (net.dead) {
        struct peer *p = net.dead;
        net.dead = p->next;
        close(p->fd);
        SSL_free(p->ssl);
        free(p->tail);
        free(p->unsent);
        free(p);
    }
}

/* Sends what OpenSSL has written. Only its own messages (a key update) can meet a full socket: that ends the connection. */
static void flush(struct peer *p) {
    size_t len = wire.out_len;
    wire.out_len = 0;
    if (len > 0 && p->unsent)
        peer_close(p);
    if (len == 0 || p->state == CLOSED)
        return;
    ssize_t n = send(p->fd, wire.out, len, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN) {
        peer_close(p);
        return;
    }
    size_t sent = n > 0 ? (size_t)n : 0;
    if (sent < len) {
        p->unsent = copy_of(wire.out + sent, len - sent);
        p->unsent_len = len - sent;
        watch(p, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
    }
}

void peer_write(struct peer *p, const uint8_t *data, size_t len) {
    if (p->unsent || p->state == CLOSED)
        return;
    if (SSL_write(p->ssl, data, (int)len) != (int)len)
        peer_close(p);
    flush(p);
}

static void send_unsent(struct peer *p) {
    ssize_t n = send(p->fd, p->unsent, p->unsent_len, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN)
        peer_close(p);
    if (n <= 0)
        return;
    p->unsent_len -= (size_t)n;
    memmove(p->unsent, p->unsent + n, p->unsent_len);
    if (p->unsent_len == 0) {
        free(p->unsent);
        p->unsent = NULL;
        watch(p, EPOLL_CTL_MOD, EPOLLIN);
    }
}

/* Decrypts all that was received, behind the tail of the last time; returns the length of both. */
static size_t decrypt(struct peer *p) {
    size_t len = p->tail_len;
    if (len > 0) {
        memcpy(net.plain, p->tail, len);
        free(p->tail);
        p->tail = NULL;
        p->tail_len = 0;
    }
    for (;;) {
        int n = SSL_read(p->ssl, net.plain + len, (int)(PLAIN_SIZE - len));
        if (n <= 0) {
            if (SSL_get_error(p->ssl, n) != SSL_ERROR_WANT_READ)
                peer_close(p);
            return len;
        }
        len += (size_t)n;
    }
}

static bool handshake(struct peer *p) {
    int done = SSL_do_handshake(p->ssl);
    bool failed = done != 1 && SSL_get_error(p->ssl, done) != SSL_ERROR_WANT_READ;
    flush(p);
    if (failed)
        peer_close(p);
    else if (done == 1)
        p->state = HTTP_HEAD;
    return p->state == HTTP_HEAD;
}

static void on_readable(struct peer *p) {
    ssize_t n = recv(p->fd, wire.in, IN_SIZE, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0) {
        peer_close(p);
        return;
    }
    wire.in_at = 0;
    wire.in_len = (size_t)n;
    if (p->state == TLS_HANDSHAKE && !handshake(p))
        return;
    size_t len = decrypt(p);
    flush(p);
    size_t used = relay_receive(p, net.plain, len);
    if (used < len && p->state != CLOSED) {
        p->tail = copy_of(net.plain + used, len - used);
        p->tail_len = len - used;
    }
}

static void accept_some(void) {
    for (int i = 0; i < ACCEPTS_PER_TURN; i++) {
        int fd = accept4(net.listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), on = 1;
        if (fd < 0 && (errno == EAGAIN || errno == ECONNABORTED))
            return;
        struct peer *p = calloc(1, sizeof *p);
        BIO *bio = wire_bio();
        if (fd < 0 || !p || !(p->ssl = SSL_new(net.tls)))
            die("accept: %s", strerror(errno));
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        SSL_set_bio(p->ssl, bio, bio);
        SSL_set_accept_state(p->ssl);
        p->fd = fd;
        watch(p, EPOLL_CTL_ADD, EPOLLIN);
    }
}

static void turn(void) {
    struct epoll_event events[EVENTS_PER_TURN];
    int n = epoll_wait(net.epoll, events, EVENTS_PER_TURN, -1);
    ERR_clear_error();
    for (int i = 0; i < n; i++) {
        struct peer *p = events[i].data.ptr;
        if (!p) {
            accept_some();
            continue;
        }
        if (p->state != CLOSED && (events[i].events & EPOLLOUT) && p->unsent)
            send_unsent(p);
        if (p->state != CLOSED && (events[i].events & ~(uint32_t)EPOLLOUT))
            on_readable(p);
    }
    bury_the_dead();
}

void net_serve(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int on = 1;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    net.listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(net.listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(net.listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(net.listener, SOMAXCONN) < 0)
        die("127.0.0.1:%d: %s", port, strerror(errno));
    watch(NULL, EPOLL_CTL_ADD, EPOLLIN);
    for (;;)
        turn();
}

int main(int count, char **arguments) {
    if (count != 5)
        die("usage: limit PORT PUBLIC-KEY CERTIFICATE KEY");
    relay_init(arguments[2]);
    net_init(arguments[3], arguments[4]);
    net_serve(atoi(arguments[1]));
}
