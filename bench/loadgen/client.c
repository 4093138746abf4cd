/* One DERP client: TCP, TLS 1.3, the login of tailscale's derphttp client (fast start), frames.
 *
 * A read event takes all waiting bytes with one recv() into a shared buffer, and records are decrypted from there; records
 * to be sent are made in another shared buffer, and client_flush() hands them over in one send(). So a burst costs one
 * system call in each direction, and an idle client owns no buffer.
 */
#include "loadgen.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum frame_type {                            /* derp/derp.go */
    SERVER_KEY = 0x01, SERVER_INFO = 0x03, RECV_PACKET = 0x05, KEEP_ALIVE = 0x06, NOTE_PREFERRED = 0x07,
    PING = 0x12, PONG = 0x13,
};
enum { NEW_SESSION_TICKET = 4 };             /* RFC 8446, 4 */
static const char MAGIC[] = "DERP\xf0\x9f\x94\x91";
static const char REQUEST[] =                /* one record with the login frame, as a stock client's first flush */
    "GET /derp HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: Go-http-client/1.1\r\n"
    "Connection: Upgrade\r\nDerp-Fast-Start: 1\r\nUpgrade: DERP\r\n\r\n";

/* A sender's own kernel would take megabytes that the relay does not read yet: time in there is not the relay's. */
enum { MAX_UNSENT = 64 << 10 };
enum { EVENTS_PER_TURN = 256, PLAIN_SIZE = 1 << 20, MAX_FRAME = 128 << 10 };

struct clients clients;

static struct {
    int epoll;
    SSL_CTX *tls;
    packet_handler *on_packet;
    uint64_t looked;
    uint8_t plain[PLAIN_SIZE];
} net;

static size_t unhex(const char *text, uint8_t *to, size_t room) {
    size_t n = strlen(text) / 2;
    for (size_t i = 0; i < n && i < room; i++)
        if (sscanf(text + 2 * i, "%2hhx", &to[i]) != 1)
            die("not hexadecimal: %s", text);
    return n;
}

/* A line of NSS's key log format: label, client random, secret. */
static void on_secret(const SSL *ssl, const char *line) {
    struct client *c = &clients.at[(uintptr_t)SSL_get_app_data(ssl)];
    char label[64], secret[2 * EVP_MAX_MD_SIZE + 1];
    uint8_t bytes[EVP_MAX_MD_SIZE];
    if (sscanf(line, "%63s %*s %128s", label, secret) != 2)
        die("OpenSSL's key log is not understood");
    size_t len = unhex(secret, bytes, sizeof bytes);
    if (strcmp(label, "CLIENT_TRAFFIC_SECRET_0") == 0)
        record_keys(&c->to_relay, bytes, len);
    else if (strcmp(label, "SERVER_TRAFFIC_SECRET_0") == 0)
        record_keys(&c->from_relay, bytes, len);
}

void clients_init(packet_handler *on_packet) {
    net.on_packet = on_packet;
    net.epoll = epoll_create1(EPOLL_CLOEXEC);
    net.tls = SSL_CTX_new(TLS_client_method());
    if (net.epoll < 0 || !net.tls)
        die("cannot set up epoll and OpenSSL");
    SSL_CTX_set_min_proto_version(net.tls, TLS1_3_VERSION);
    SSL_CTX_set_verify(net.tls, SSL_VERIFY_NONE, NULL);      /* the relay is the caller's own child */
    SSL_CTX_set_keylog_callback(net.tls, on_secret);
    SSL_CTX_set_session_cache_mode(net.tls, SSL_SESS_CACHE_OFF);
    /* In the order in which Go's clients, hence Tailscale's, offer them; they offer ChaCha20 last. */
    SSL_CTX_set_ciphersuites(net.tls, "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384");
    SSL_CTX_set1_groups_list(net.tls, "X25519:P-256:P-384");
}

static void watch(struct client *c, int operation, uint32_t events) {
    struct epoll_event event = {.events = events, .data.u32 = c->index};
    if (epoll_ctl(net.epoll, operation, c->fd, &event) < 0)
        die("epoll_ctl: %s", strerror(errno));
}

static void client_close(struct client *c) {
    if (c->state == CLOSED)
        return;
    if (c->state == READY)
        clients.ready--;
    clients.closed++;
    close(c->fd);
    SSL_free(c->ssl);
    gcm_free(c->to_relay.gcm);
    gcm_free(c->from_relay.gcm);
    free(c->half_record);
    free(c->half_frame);
    free(c->unsent);
    free(c->login);
    c->ssl = NULL;
    c->to_relay.gcm = c->from_relay.gcm = NULL;
    c->half_record = c->half_frame = c->unsent = c->login = NULL;
    c->half_record_len = c->half_frame_len = c->unsent_len = 0;
    c->state = CLOSED;
}

bool client_blocked(const struct client *c) {
    return c->state != READY || c->unsent_len > 0;
}

void client_write(struct client *c, uint8_t *data, size_t len) {
    for (size_t at = 0, n; c->state != CLOSED && at < len; at += n) {
        n = len - at < RECORD_DATA ? len - at : RECORD_DATA;
        if (wire.out_len + RECORD_HEADER + n + 1 + GCM_TAG > WIRE_OUT)
            die("a burst does not fit into %d bytes: send smaller bursts", WIRE_OUT);
        wire.out_len += record_seal(&c->to_relay, data + at, n, wire.out + wire.out_len);
    }
}

static void keep_unsent(struct client *c, const uint8_t *data, size_t len) {
    c->unsent = realloc(c->unsent, c->unsent_len + len);
    if (!c->unsent)
        die("out of memory");
    memcpy(c->unsent + c->unsent_len, data, len);
    c->unsent_len += len;
}

void client_flush(struct client *c) {
    size_t len = wire.out_len, sent = 0;
    wire.out_len = 0;
    if (len == 0 || c->state == CLOSED)
        return;
    if (c->unsent_len > 0) {                 /* behind what waits already, else the records change places */
        keep_unsent(c, wire.out, len);
        return;
    }
    ssize_t n = send(c->fd, wire.out, len, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN) {
        client_close(c);
        return;
    }
    if (n > 0)
        sent = (size_t)n;
    if (sent < len) {
        keep_unsent(c, wire.out + sent, len - sent);
        watch(c, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
    }
}

static void send_unsent(struct client *c) {
    ssize_t n = send(c->fd, c->unsent, c->unsent_len, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN) {
        client_close(c);
        return;
    }
    if (n <= 0)
        return;
    c->unsent_len -= (size_t)n;
    memmove(c->unsent, c->unsent + n, c->unsent_len);
    if (c->unsent_len == 0) {
        free(c->unsent);
        c->unsent = NULL;
        watch(c, EPOLL_CTL_MOD, EPOLLIN);
    }
}

static void send_login(struct client *c) {
    uint8_t first[sizeof REQUEST + 1024 + 1];
    uint8_t preferred[] = {NOTE_PREFERRED, 0, 0, 0, 1, 1, 0};
    size_t head = sizeof REQUEST - 1;
    if (c->login_len >= sizeof first - head)
        die("client %u: a login frame of %zu bytes is too long", c->index, c->login_len);
    memcpy(first, REQUEST, head);
    memcpy(first + head, c->login, c->login_len);
    client_write(c, first, head + c->login_len);
    client_write(c, preferred, sizeof preferred - 1);
    client_flush(c);
    free(c->login);
    c->login = NULL;
}

static void on_frame(struct client *c, uint8_t type, const uint8_t *body, size_t len, uint64_t now) {
    if (type == RECV_PACKET && c->state == READY && len >= KEY_LEN) {
        net.on_packet(c, body, body + KEY_LEN, len - KEY_LEN, now);
    } else if (type == SERVER_KEY && c->state == DERP_LOGIN && len >= 8 + KEY_LEN) {
        if (memcmp(body, MAGIC, 8) != 0 || memcmp(body + 8, c->server_key, KEY_LEN) != 0)
            die("client %u: the relay introduced itself with another key", c->index);
    } else if (type == SERVER_INFO && c->state == DERP_LOGIN) {
        c->state = READY;
        clients.ready++;
    } else if (type == PING && len == 8) {
        uint8_t pong[FRAME_HEADER + 8 + 1] = {PONG, 0, 0, 0, 8};
        memcpy(pong + FRAME_HEADER, body, 8);
        client_write(c, pong, sizeof pong - 1);
        client_flush(c);
    } else if (type != KEEP_ALIVE) {
        clients.unexpected++;
    }
}

static void on_plain(struct client *c, const uint8_t *data, size_t len, uint64_t now) {
    size_t at = 0;
    while (c->state != CLOSED && len - at >= FRAME_HEADER) {
        uint32_t body;
        memcpy(&body, data + at + 1, 4);
        body = ntohl(body);
        if (body > MAX_FRAME)
            die("client %u: the relay sent a frame of %u bytes, type 0x%02x", c->index, body, data[at]);
        if (len - at - FRAME_HEADER < body)
            break;
        on_frame(c, data[at], data + at + FRAME_HEADER, body, now);
        at += FRAME_HEADER + body;
    }
    if (c->state == CLOSED || at == len)
        return;
    c->half_frame_len = len - at;
    c->half_frame = copy_of(data + at, len - at);
}

/* Puts what is left of the last time to the head of a buffer; returns its length. */
static size_t take_back(uint8_t **rest, size_t *rest_len, uint8_t *to) {
    size_t len = *rest_len;
    if (len > 0)
        memcpy(to, *rest, len);
    free(*rest);
    *rest = NULL;
    *rest_len = 0;
    return len;
}

/* Decrypts all whole records, behind half a frame of the last time; frames are handled only afterwards, because their
 * handlers write, and wire.out belongs to one client at a time. */
static size_t decrypt(struct client *c) {
    size_t len = take_back(&c->half_frame, &c->half_frame_len, net.plain), size, data;
    while ((size = record_size(wire.in + wire.in_at, wire.in_len - wire.in_at)) > 0) {
        if (len + size > PLAIN_SIZE)
            die("client %u: half a frame of %zu bytes", c->index, len);
        int type = record_open(&c->from_relay, wire.in + wire.in_at, size, net.plain + len, &data);
        wire.in_at += size;
        if (type == RECORD_APPLICATION_DATA) {
            len += data;
        } else if (type != RECORD_HANDSHAKE || data == 0 || net.plain[len] != NEW_SESSION_TICKET) {
            client_close(c);                 /* an alert, a broken record, or a message that no relay has reason to send */
            return 0;
        }
    }
    if (wire.in_at < wire.in_len) {
        c->half_record_len = wire.in_len - wire.in_at;
        c->half_record = copy_of(wire.in + wire.in_at, c->half_record_len);
    }
    return len;
}

static bool handshake(struct client *c) {
    int done = SSL_do_handshake(c->ssl);
    bool failed = done != 1 && SSL_get_error(c->ssl, done) != SSL_ERROR_WANT_READ;
    client_flush(c);
    if (failed)
        client_close(c);
    if (done != 1 || c->state == CLOSED)
        return false;
    if (!c->to_relay.gcm || !c->from_relay.gcm)
        die("OpenSSL did not give away the secrets of TLS");
    SSL_free(c->ssl);
    c->ssl = NULL;
    c->state = DERP_LOGIN;
    send_login(c);
    return c->state != CLOSED;
}

static void on_readable(struct client *c) {
    size_t half = take_back(&c->half_record, &c->half_record_len, wire.in);
    ssize_t n = recv(c->fd, wire.in + half, WIRE_IN - half, MSG_DONTWAIT);
    uint64_t now = now_ns();
    if (n == 0 || (n < 0 && errno != EAGAIN)) {
        client_close(c);
        return;
    }
    ERR_clear_error();
    wire.in_at = 0;
    wire.in_len = half + (n > 0 ? (size_t)n : 0);
    if (c->state == TLS_HANDSHAKE && !handshake(c))
        return;
    size_t len = decrypt(c);
    if (c->state != CLOSED)
        on_plain(c, net.plain, len, now);
}

static void on_connected(struct client *c) {
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        client_close(c);
        return;
    }
    c->state = TLS_HANDSHAKE;
    watch(c, EPOLL_CTL_MOD, EPOLLIN);
    wire.in_at = wire.in_len = 0;
    handshake(c);
}

bool clients_poll(int timeout_ms) {
    struct epoll_event events[EVENTS_PER_TURN];
    clients.looked_before = net.looked;
    net.looked = now_ns();
    int n = epoll_wait(net.epoll, events, EVENTS_PER_TURN, timeout_ms);
    for (int i = 0; i < n; i++) {
        struct client *c = &clients.at[events[i].data.u32];
        if (c->state == TCP_CONNECTING) {
            on_connected(c);
            continue;
        }
        if (c->state != CLOSED && (events[i].events & EPOLLOUT) && c->unsent_len > 0)
            send_unsent(c);
        if (c->state != CLOSED && (events[i].events & ~(uint32_t)EPOLLOUT))
            on_readable(c);
    }
    return n > 0;
}

static void start(struct client *c, int port, const char *source) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)}, from = {.sin_family = AF_INET};
    struct linger reset = {.l_onoff = 1};    /* no TIME_WAIT: thousands of clients would use up the ports */
    int on = 1, unsent = MAX_UNSENT;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0)
        die("socket: %s (raise the limit of open files: ulimit -n)", strerror(errno));
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent, sizeof unsent);
    setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    setsockopt(c->fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
    if (inet_pton(AF_INET, source, &from.sin_addr) != 1 || bind(c->fd, (struct sockaddr *)&from, sizeof from) < 0)
        die("%s is no address to connect from: %s", source, strerror(errno));
    c->ssl = SSL_new(net.tls);
    BIO *bio = wire_bio();
    if (!c->ssl)
        die("out of memory");
    SSL_set_bio(c->ssl, bio, bio);
    SSL_set_connect_state(c->ssl);
    SSL_set_app_data(c->ssl, (void *)(uintptr_t)c->index);
    c->state = TCP_CONNECTING;
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS)
        die("connect to 127.0.0.1:%d: %s", port, strerror(errno));
    watch(c, EPOLL_CTL_ADD, EPOLLOUT);
}

static void read_logins(const char *file, uint32_t from, uint32_t count) {
    FILE *in = fopen(file, "r");
    char server[2 * KEY_LEN + 1], key[2 * KEY_LEN + 1], frame[2049];
    if (!in)
        die("%s: %s", file, strerror(errno));
    for (uint32_t i = from; i < from + count; i++) {
        struct client *c = &clients.at[i];
        if (fscanf(in, "%64s %64s %2048s", server, key, frame) != 3)
            die("%s has %u logins, %u are needed", file, i - from, count);
        *c = (struct client){.index = i, .fd = -1, .login_len = strlen(frame) / 2};
        c->login = malloc(c->login_len);
        if (!c->login || unhex(server, c->server_key, KEY_LEN) != KEY_LEN || unhex(key, c->key, KEY_LEN) != KEY_LEN)
            die("%s: login %u is broken", file, i - from);
        unhex(frame, c->login, c->login_len);
    }
    fclose(in);
}

uint32_t clients_open(int port, const char *source, uint32_t count, uint32_t parallel, double seconds, const char *file) {
    uint64_t deadline = now_ns() + (uint64_t)(seconds * 1e9);
    uint32_t first = clients.count, started = 0;
    uint32_t ready = clients.ready, closed = clients.closed;
    clients.at = realloc(clients.at, (first + count) * sizeof *clients.at);
    if (!clients.at)
        die("out of memory");
    read_logins(file, first, count);
    clients.count += count;
    for (;;) {
        uint32_t finished = (clients.ready - ready) + (clients.closed - closed);
        while (started < count && started - finished < parallel)
            start(&clients.at[first + started++], port, source);
        if (finished >= count || now_ns() > deadline)
            return clients.ready - ready;
        clients_poll(100);
    }
}
