"""TLS connections on OpenSSL itself: what the event loop's TLS transports do, with less memory and less work.

::

    epoll --> Poller --> Transport: recv --> SSL_read into the protocol's buffer
    protocol --> Transport.write: SSL_write --> send

* One epoll instance serves all connections and is itself watched by the event loop: one turn of the loop handles all
  that is ready, and errors of sockets are seen, which a reader of uvloop is not told of.
* What has come is received with one system call into one buffer that all connections share; OpenSSL takes record by
  record from there.  Its own buffers it frees when they are empty, so an idle connection has none.
* The contexts are Python's `ssl.SSLContext`, and the library is the one that Python's `ssl` has loaded, see `openssl`.
  Where there is none that can be used the import fails, and `transports` uses the loop's own.

For CPython with OpenSSL 3 on Linux.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from .openssl cimport (
    BIO_NOCLOSE,
    SSL_CTRL_SET_TLSEXT_HOSTNAME,
    SSL_ERROR_SSL,
    SSL_ERROR_SYSCALL,
    SSL_ERROR_WANT_READ,
    SSL_ERROR_WANT_WRITE,
    SSL_ERROR_ZERO_RETURN,
    Context,
    Inbox,
    new_inbox,
    openssl,
)

import os
import ssl

__all__ = ["Poller", "Transport"]


cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef extern from "<sys/socket.h>" nogil:
    ssize_t recv(int fd, void *buffer, size_t size, int flags)
    int setsockopt(int fd, int level, int name, const void *value, unsigned int size)
    int shutdown(int fd, int how)
    int SHUT_WR, SOL_SOCKET, SO_RCVBUF

cdef extern from *:
    """
    #ifndef SO_BUF_LOCK
    #define SO_BUF_LOCK 72  /* Linux 5.14; older headers, as those for portable wheels, do not have it */
    #endif
    """
    int SO_BUF_LOCK

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int operation, int fd, epoll_event *event)
    int epoll_wait(int epoll, epoll_event *events, int most, int timeout)
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD
    uint32_t EPOLLIN, EPOLLOUT, EPOLLERR, EPOLLHUP


cdef enum:
    TURN = 128 << 10  # bytes received at a time; then others have their turn
    QUEUE = 128 << 10  # bytes that may wait to be received when there is more than can be handled
    PATIENCE = 4  # turns
    EVENTS = 256  # connections handled in one turn of the loop
    HIGH_WATER = 64 << 10  # bytes
    CLOSE_SECONDS = 30  # for the other side to take what was written to it, and to close

cdef enum State:
    HANDSHAKE, OPEN, FLUSHING, LINGERING, CLOSED


@cython.no_gc_clear  # or what ends late, in a dying loop, would find None instead of a Poller
cdef class Poller:
    """Tells connections what their sockets are ready for."""

    cdef int epoll
    cdef object loop
    cdef dict transports  # descriptor -> Transport
    cdef char *received
    cdef Transport receiver  # whose bytes are in `received` now
    cdef char *clear

    def __cinit__(self, loop):
        self.epoll = -1
        self.loop = loop
        self.transports = {}
        self.received = <char *>malloc(2 * TURN)
        if self.received == NULL:
            raise MemoryError
        self.clear = self.received + TURN

    def __dealloc__(self):
        free(self.received)
        if self.epoll >= 0:
            close(self.epoll)

    cdef int _add(self, Transport transport) except -1:
        if self.epoll < 0:
            self.epoll = epoll_create1(EPOLL_CLOEXEC)
            if self.epoll < 0:
                raise OSError(errno, os.strerror(errno))
            self.loop.add_reader(self.epoll, self._ready)
        self.transports[transport.fd] = transport
        self._watch(EPOLL_CTL_ADD, transport.fd, EPOLLIN)
        return 0

    cdef int _remove(self, Transport transport) except -1:
        if self.transports.pop(transport.fd, None) is not None:
            epoll_ctl(self.epoll, EPOLL_CTL_DEL, transport.fd, NULL)
            if not self.transports:  # so nobody need close us
                self.loop.remove_reader(self.epoll)
                close(self.epoll)
                self.epoll = -1
        return 0

    cdef int _watch(self, int operation, int fd, uint32_t interest) except -1:
        cdef epoll_event event
        event.events = interest
        event.data.u64 = fd
        if epoll_ctl(self.epoll, operation, fd, &event) < 0:
            raise OSError(errno, os.strerror(errno))
        return 0

    def _ready(self):
        cdef epoll_event events[EVENTS]
        cdef int count = epoll_wait(self.epoll, events, EVENTS, 0)
        cdef int index
        cdef Transport transport
        for index in range(count):
            transport = <Transport>self.transports.get(events[index].data.u64)
            if transport is not None:
                transport._handle(events[index].events)


@cython.no_gc_clear
cdef class Transport:
    """An asyncio transport for an accepted socket, or with a `server_name` for a connected one; it owns the socket from
    `start` on.  An empty name is not sent.

    `done` is called once: with None when TLS is up and the protocol that `factory` made has been told so, or with the
    exception that tells why not.  There is no time-out of the handshake: `abort` it.
    """

    cdef Poller poller
    cdef Context context
    cdef void *ssl
    cdef object sock
    cdef int fd
    cdef State state
    cdef bint is_client
    cdef bint is_buffered  # the protocol has buffers of its own
    cdef bint is_paused  # the protocol wants no more bytes now
    cdef bint is_waiting  # the loop will call `_go_on`
    cdef bint needs_room  # OpenSSL cannot go on before the socket takes more
    cdef bint is_bounded  # its receive queue
    cdef int behind  # turns in a row in which a turn's worth was waiting, or, once it is bounded, was not
    cdef bint is_full  # the protocol was told to write no more
    cdef uint32_t interest
    cdef Inbox inbox
    cdef char *held  # the inbox's bytes, while others use the shared buffer
    cdef object factory
    cdef object done
    cdef object protocol
    cdef list backlog  # of bytes that the socket does not take now
    cdef Py_ssize_t backlog_size
    cdef Py_ssize_t high
    cdef Py_ssize_t low
    cdef object timer
    cdef object __weakref__

    def __cinit__(self, Poller poller, Context context, sock, factory, done, str server_name=None):
        cdef void *incoming
        cdef void *outgoing
        self.poller = poller
        self.context = context
        self.sock = sock
        self.fd = sock.fileno()
        self.factory = factory
        self.done = done
        self.interest = EPOLLIN
        self.high = HIGH_WATER
        self.low = HIGH_WATER // 4
        self.ssl = openssl.SSL_new(context.ctx)
        if self.ssl == NULL:
            raise MemoryError
        incoming, outgoing = new_inbox(&self.inbox), openssl.BIO_new_socket(self.fd, BIO_NOCLOSE)
        openssl.SSL_set_bio(self.ssl, incoming, outgoing)
        if incoming == NULL or outgoing == NULL:
            raise MemoryError
        self.is_client = server_name is not None
        if self.is_client:
            self._set_up_client(server_name.encode())
        else:
            openssl.SSL_set_accept_state(self.ssl)

    cdef int _set_up_client(self, bytes server_name) except -1:
        openssl.SSL_set_connect_state(self.ssl)
        if server_name:
            openssl.SSL_ctrl(self.ssl, SSL_CTRL_SET_TLSEXT_HOSTNAME, 0, PyBytes_AS_STRING(server_name))
        return 0

    def __dealloc__(self):
        if self.ssl != NULL:
            openssl.SSL_free(self.ssl)
        free(self.held)

    def start(self):
        """Begin the handshake: a server's with what the client has sent already."""
        self.needs_room = self.is_client  # nothing has to come first
        try:
            self.poller._add(self)
        except OSError as error:
            self._end(error)
        else:
            self._handle(EPOLLIN)

    # -- asyncio.Transport, for the protocol ---------------------------------------------------------------------------

    def get_extra_info(self, name, default=None):
        """`socket`, `peername`, `sockname`, `sslcontext`; `ssl_object` is this object."""
        if name == "ssl_object":
            return self
        if name == "socket":
            return self.sock
        if name == "sslcontext":
            return self.context.context
        try:
            if name == "peername":
                return self.sock.getpeername()
            if name == "sockname":
                return self.sock.getsockname()
        except OSError:
            pass
        return default

    def version(self):
        """As `ssl.SSLObject.version`, for example "TLSv1.3"."""
        return openssl.SSL_get_version(self.ssl).decode()

    def cipher(self):
        """As `ssl.SSLObject.cipher`, without the number of bits."""
        cdef void *cipher = openssl.SSL_get_current_cipher(self.ssl)
        return None if cipher == NULL else (openssl.SSL_CIPHER_get_name(cipher).decode(), self.version(), None)

    def get_unverified_chain(self):
        """As `ssl.SSLObject.get_unverified_chain` of Python 3.13, of a client's connection: the certificates, as DER."""
        cdef void *chain = openssl.SSL_get_peer_cert_chain(self.ssl)
        cdef int count = 0 if chain == NULL else openssl.OPENSSL_sk_num(chain)
        return [_encoded(openssl.OPENSSL_sk_value(chain, index)) for index in range(count)]

    def set_protocol(self, protocol):
        self.protocol = protocol
        self.is_buffered = hasattr(protocol, "get_buffer")

    def get_protocol(self):
        return self.protocol

    def is_closing(self):
        return self.state > OPEN

    def is_reading(self):
        return self.state <= OPEN and not self.is_paused

    def pause_reading(self):
        if self.state == OPEN and not self.is_paused:
            self.is_paused = True
            self._watch()

    def resume_reading(self):
        if self.state == OPEN and self.is_paused:
            self.is_paused = False
            self._watch()
            self._come_back()

    def set_write_buffer_limits(self, high=None, low=None):
        if high is None:
            high = HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not high >= low >= 0:
            raise ValueError(f"the limits of a write buffer must be high >= low >= 0, not {high} and {low}")
        self.high = high
        self.low = low
        self._tell_protocol()

    def get_write_buffer_limits(self):
        return self.low, self.high

    def get_write_buffer_size(self):
        return self.backlog_size

    def can_write_eof(self):
        return False

    def writelines(self, parts):
        self.write(b"".join(parts))

    cpdef write(self, data):
        """Send bytes.  Their buffer may be used anew at once."""
        cdef Py_buffer view
        cdef Py_ssize_t size, sent
        if self.state != OPEN:
            return
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            size = view.len
            sent = 0 if self.backlog_size else self._send(<char *>view.buf, size)
            if 0 <= sent < size:
                self._keep(PyBytes_FromStringAndSize(<char *>view.buf + sent, size - sent))
        finally:
            PyBuffer_Release(&view)

    def close(self):
        """Send what waits and say goodbye; close when the other side does so too."""
        if self.state == HANDSHAKE:
            self.abort()
        elif self.state == OPEN:
            self.state = FLUSHING
            self._drop_inbox()
            self.timer = self.poller.loop.call_later(CLOSE_SECONDS, self.abort)
            self._flush()

    def abort(self):
        """Close now.  `done` is not called any more."""
        self.done = None
        self._end(None)

    # -- events ----------------------------------------------------------------------------------------------------

    cdef int _handle(self, uint32_t events) except -1:
        try:
            if events & EPOLLOUT:
                self._writable()
            if not self.is_paused:
                if events & (EPOLLIN | EPOLLERR | EPOLLHUP):
                    self._readable()
            elif events & (EPOLLERR | EPOLLHUP):
                self._end(ConnectionResetError("the connection was reset"))
        except Exception as error:
            self._blame(error)
            self._end(error)
        return 0

    cdef int _readable(self) except -1:
        if self.state > OPEN:
            self._discard()
        elif self.needs_room or self._has_bytes() or self._receive():
            self.needs_room = False
            try:
                if self.state == HANDSHAKE:
                    self._handshake()
                if self.state == OPEN and not self.is_paused:
                    self._read()
            finally:
                self._hold()
            self._watch()
        return 0

    cdef int _writable(self) except -1:
        if self.state == FLUSHING:
            self._flush()
            self._tell_protocol()
        elif self.state <= OPEN:
            if self.needs_room:
                self._readable()
            if self.state == OPEN and self.backlog_size:
                self._send_backlog()
                self._tell_protocol()
            self._watch()
        return 0

    cdef int _watch(self) except -1:
        """Have epoll tell what can be used now, and nothing else: it tells again and again."""
        cdef uint32_t interest = 0
        if self.needs_room or self.backlog_size or self.state == FLUSHING:
            interest |= EPOLLOUT
        if not (self.needs_room or self.is_paused or self.state == FLUSHING):
            interest |= EPOLLIN
        if interest != self.interest and self.state != CLOSED:
            self.poller._watch(EPOLL_CTL_MOD, self.fd, interest)
            self.interest = interest
        return 0

    cdef bint _has_bytes(self) noexcept:
        """Whether something was received that the protocol has not got."""
        return self.inbox.size > 0 or openssl.SSL_pending(self.ssl) > 0

    cdef int _come_back(self) except -1:
        """Read on in the loop's next turn, if there is something of which epoll does not know."""
        if not self.is_waiting and self._has_bytes():
            self.is_waiting = True
            self.poller.loop.call_soon(self._go_on)
        return 0

    def _go_on(self):
        self.is_waiting = False
        if self.state == OPEN and not self.is_paused:
            self._handle(EPOLLIN)

    cdef int _blame(self, error) except -1:
        """A callback of the protocol raised it."""
        self.poller.loop.call_exception_handler(
            {"message": "Fatal error on a TLS connection", "exception": error, "transport": self}
        )
        return 0

    # -- the handshake ----------------------------------------------------------------------------------------------

    cdef int _handshake(self) except -1:
        openssl.ERR_clear_error()
        cdef int result = openssl.SSL_do_handshake(self.ssl)
        cdef int error = openssl.SSL_get_error(self.ssl, result)
        if result == 1:
            self._open()
        elif error == SSL_ERROR_WANT_WRITE:
            self.needs_room = True
        elif error != SSL_ERROR_WANT_READ:
            self._end(self._distrust() or _failure(error))
        return 0

    cdef object _distrust(self):
        """The exception for a certificate that is not trusted, as Python's ssl has it; None if that is not why."""
        cdef long result = openssl.SSL_get_verify_result(self.ssl)
        if result == 0:
            return None
        openssl.ERR_clear_error()
        error = ssl.SSLCertVerificationError(SSL_ERROR_SSL, "certificate verify failed")
        error.verify_code = result
        error.verify_message = openssl.X509_verify_cert_error_string(result).decode()
        return error

    cdef int _open(self) except -1:
        self.state = OPEN
        factory, self.factory = self.factory, None
        done, self.done = self.done, None  # if the protocol aborts, that is no failure of the handshake
        try:
            self.set_protocol(factory())
            self.protocol.connection_made(self)
        except BaseException:
            self.done = done
            raise
        done(None)
        return 0

    # -- bytes in -----------------------------------------------------------------------------------------------------

    cdef bint _receive(self) except -1:
        """Whether something came into the shared buffer."""
        cdef Poller poller = self.poller
        if poller.receiver is not None:  # we are called from within a callback of its
            poller.receiver._hold()
        self._drop_inbox()
        cdef ssize_t size = recv(self.fd, poller.received, TURN, 0)
        cdef int code = errno
        if size > 0:
            self.inbox.at = poller.received
            self.inbox.size = size
            poller.receiver = self
            if (size < TURN) == self.is_bounded:
                self._watch_queue()
            elif self.behind:
                self.behind = 0
            return True
        if size < 0:
            if code != EAGAIN and code != EINTR:
                self._end(OSError(code, os.strerror(code)))
        elif self.state == HANDSHAKE:
            self._end(self._closed_early())
        else:
            self.close()  # without a goodbye, but who says no more may still listen
        return False

    cdef int _watch_queue(self) except -1:
        """Keep the receive queue short while we cannot keep up: the system would let it grow to megabytes, and each
        packet would wait behind them.  So the sender notices, and its own queue drops what is old."""
        cdef int size = QUEUE, locked = 0
        self.behind += 1
        if self.behind < PATIENCE:
            return 0
        self.behind = 0
        self.is_bounded = not self.is_bounded
        if self.is_bounded:
            setsockopt(self.fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size))
        else:
            setsockopt(self.fd, SOL_SOCKET, SO_BUF_LOCK, &locked, sizeof(locked))
        return 0

    cdef int _hold(self) except -1:
        """The shared buffer is for the next connection: keep what is left in it."""
        if self.poller.receiver is self:
            self.poller.receiver = None
        if self.inbox.size == 0:
            self._drop_inbox()
        elif self.held == NULL:
            self.held = <char *>malloc(self.inbox.size)
            if self.held == NULL:
                raise MemoryError
            memcpy(self.held, self.inbox.at, self.inbox.size)
            self.inbox.at = self.held
        return 0

    cdef int _drop_inbox(self) noexcept:
        self.inbox.size = 0
        free(self.held)
        self.held = NULL
        return 0

    cdef int _read(self) except -1:
        cdef Py_buffer view
        cdef Py_ssize_t size
        cdef int end = 0
        cdef bytes data = None
        protocol, error = self.protocol, None
        if self.is_buffered:
            PyObject_GetBuffer(protocol.get_buffer(-1), &view, PyBUF_WRITABLE)
            size = self._fill(<char *>view.buf, view.len, &end) if view.len else -1
            PyBuffer_Release(&view)
            if size < 0:
                raise RuntimeError("get_buffer() returned an empty buffer")
        else:
            size = self._fill(self.poller.clear, TURN, &end)
            data = PyBytes_FromStringAndSize(self.poller.clear, size)
        if end != 0 and end != SSL_ERROR_WANT_READ:
            error = _failure(end)  # before a callback uses OpenSSL
        if size and data is not None:
            protocol.data_received(data)
        elif size:
            protocol.buffer_updated(size)
        if self.state != OPEN or end == SSL_ERROR_WANT_READ:
            return 0
        if end == 0:
            if not self.is_paused:
                self._come_back()
        elif end == SSL_ERROR_WANT_WRITE:
            self.needs_room = True
        elif end == SSL_ERROR_ZERO_RETURN:
            self.protocol.eof_received()
            self.close()
        else:
            self._end(error)
        return 0

    cdef Py_ssize_t _fill(self, char *into, Py_ssize_t space, int *end) noexcept:
        """Decrypt what has come.  `end` is OpenSSL's reason to stop, 0 if only the space was too small."""
        cdef Py_ssize_t total = 0
        cdef int size
        openssl.ERR_clear_error()
        while total < space:
            size = openssl.SSL_read(self.ssl, into + total, <int>min(space - total, 1 << 30))
            if size <= 0:
                end[0] = openssl.SSL_get_error(self.ssl, size)
                break
            total += size
        return total

    # -- bytes out ----------------------------------------------------------------------------------------------------

    cdef Py_ssize_t _send(self, const char *data, Py_ssize_t size) except -2:
        """How many bytes OpenSSL has taken; -1 if the connection is lost.  It must get the rest as it is."""
        cdef Py_ssize_t total = 0
        cdef int sent, error
        openssl.ERR_clear_error()
        while total < size:
            sent = openssl.SSL_write(self.ssl, data + total, <int>min(size - total, 1 << 30))
            if sent <= 0:
                error = openssl.SSL_get_error(self.ssl, sent)
                if error == SSL_ERROR_WANT_WRITE:
                    break
                # SSL_ERROR_WANT_READ: the client has sent half of a message of TLS, as no client does, and now nothing
                # can be sent before the rest is there.
                self._end(_failure(error))
                return -1
            total += sent
        return total

    cdef int _keep(self, bytes rest) except -1:
        if self.backlog is None:
            self.backlog = []
        self.backlog.append(rest)
        self.backlog_size += PyBytes_GET_SIZE(rest)
        self._watch()
        self._tell_protocol()
        return 0

    cdef int _send_backlog(self) except -1:
        cdef Py_ssize_t sent
        cdef bytes part
        cdef int done = 0
        for part in self.backlog or ():
            sent = self._send(PyBytes_AS_STRING(part), PyBytes_GET_SIZE(part))
            if sent < 0:
                return 0
            self.backlog_size -= sent
            if sent < PyBytes_GET_SIZE(part):
                self.backlog[done] = part[sent:]
                break
            done += 1
        if self.backlog_size:
            del self.backlog[:done]
        else:
            self.backlog = None
        return 0

    cdef int _tell_protocol(self) except -1:
        try:
            if self.backlog_size > self.high and not self.is_full and self.state == OPEN:
                self.is_full = True
                self.protocol.pause_writing()
            elif self.backlog_size <= self.low and self.is_full and self.state <= FLUSHING:
                self.is_full = False
                self.protocol.resume_writing()
        except Exception as error:  # it is no failure of whoever writes
            self._blame(error)
        return 0

    # -- the end --------------------------------------------------------------------------------------------------------

    cdef int _flush(self) except -1:
        """Send what waits, then the goodbye.  Unless the other side has said it too, wait until that closes: to close on
        unread bytes would be a reset, which destroys what is on its way."""
        cdef int result
        cdef int error = SSL_ERROR_WANT_WRITE
        self._send_backlog()
        if not self.backlog_size and self.state == FLUSHING:
            openssl.ERR_clear_error()
            result = openssl.SSL_shutdown(self.ssl)
            error = openssl.SSL_get_error(self.ssl, result)
            openssl.ERR_clear_error()  # Python's ssl would take it for its own
            if result == 1:
                self._end(None)
            elif error != SSL_ERROR_WANT_WRITE:
                self.state = LINGERING
                self.is_paused = self.needs_room = False
                shutdown(self.fd, SHUT_WR)
                self._discard()
        self._watch()
        return 0

    cdef int _discard(self) except -1:
        cdef ssize_t size = recv(self.fd, self.poller.clear, TURN, 0)
        if size == 0 or (size < 0 and errno != EAGAIN and errno != EINTR):
            self._end(None)
        return 0

    cdef int _end(self, error) except -1:
        if self.state != CLOSED:
            self.state = CLOSED
            self._drop_inbox()
            self.poller._remove(self)
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None
            self.poller.loop.call_soon(self._finish, error)
        return 0

    def _finish(self, error):
        protocol, self.protocol = self.protocol, None
        done, self.done = self.done, None
        self.factory = self.backlog = None
        try:
            if protocol is not None:
                protocol.connection_lost(error)
        finally:
            self.sock.close()
            if done is not None:
                done(error or self._closed_early())

    cdef object _closed_early(self):
        side = "server" if self.is_client else "client"
        return ConnectionResetError(f"the {side} closed the connection during the TLS handshake")


cdef bytes _encoded(void *certificate):
    cdef int size = openssl.i2d_X509(certificate, NULL)
    cdef bytes der = PyBytes_FromStringAndSize(NULL, size)
    cdef unsigned char *at = <unsigned char *>PyBytes_AS_STRING(der)
    openssl.i2d_X509(certificate, &at)
    return der


cdef object _failure(int error):
    """The exception for what OpenSSL says of the connection; None if it ended without a goodbye."""
    cdef int system = errno
    cdef unsigned long code = openssl.ERR_peek_last_error()
    cdef const char *reason = openssl.ERR_reason_error_string(code) if code else NULL
    openssl.ERR_clear_error()
    if error == SSL_ERROR_SYSCALL:
        return OSError(system, os.strerror(system)) if system else None
    return ssl.SSLError(error, "TLS failed" if reason == NULL else reason.decode())
