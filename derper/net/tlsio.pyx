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

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t
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
    enum:
        SO_BUF_LOCK

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        int fd
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


cdef class Poller:
    """Tells connections what their sockets are ready for."""

    cdef int epoll
    cdef object loop
    cdef dict transports  # descriptor -> Transport
    cdef list again  # those that have more to read than one turn allows
    cdef char *received
    cdef char *clear

    def __cinit__(self, loop):
        self.epoll = -1
        self.loop = loop
        self.transports = {}
        self.again = []
        self.received = <char *>malloc(2 * TURN)
        if self.received == NULL:
            raise MemoryError
        self.clear = self.received + TURN

    def __dealloc__(self):
        free(self.received)

    cdef int _add(self, Transport transport) except -1:
        if self.epoll < 0:
            self.epoll = epoll_create1(EPOLL_CLOEXEC)
            if self.epoll < 0:
                raise OSError(errno, os.strerror(errno))
            self.loop.add_reader(self.epoll, self._ready)
        self._watch(EPOLL_CTL_ADD, transport.fd, EPOLLIN)
        self.transports[transport.fd] = transport
        return 0

    cdef int _remove(self, Transport transport) except -1:
        if self.transports.pop(transport.fd, None) is not None:
            self._watch(EPOLL_CTL_DEL, transport.fd, 0)
            if not self.transports:  # so nobody need close us
                self.loop.remove_reader(self.epoll)
                close(self.epoll)
                self.epoll = -1
        return 0

    cdef int _watch(self, int operation, int fd, uint32_t interest) except -1:
        cdef epoll_event event
        event.events = interest
        event.data.fd = fd
        if epoll_ctl(self.epoll, operation, fd, &event) < 0:
            raise OSError(errno, os.strerror(errno))
        return 0

    def _ready(self):
        cdef epoll_event events[EVENTS]
        cdef int count = epoll_wait(self.epoll, events, EVENTS, 0)
        cdef int index
        cdef Transport transport
        for index in range(count):
            transport = <Transport>self.transports.get(events[index].data.fd)
            if transport is not None:
                transport._handle(events[index].events)

    cdef int _later(self, Transport transport) except -1:
        if not self.again:
            self.loop.call_soon(self._go_on)
        self.again.append(transport)
        return 0

    def _go_on(self):
        cdef Transport transport
        waiting, self.again = self.again, []
        for transport in waiting:
            transport.is_waiting = False
            if transport.state == OPEN and not transport.is_paused:
                transport._handle(EPOLLIN)


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
    cdef bint is_waiting  # in the poller's list
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
        self.poller._add(self)
        if self.is_client:
            self._handshake()
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
            self._want(self.interest & ~EPOLLIN)

    def resume_reading(self):
        if self.state == OPEN and self.is_paused:
            self.is_paused = False
            self._want(self.interest | EPOLLIN)
            self._come_back()  # for what was received already

    def set_write_buffer_limits(self, high=None, low=None):
        if high is None:
            high = HIGH_WATER if low is None else 4 * low
        self.high = high
        self.low = high // 4 if low is None else low
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
            if self.is_paused:
                if events & (EPOLLERR | EPOLLHUP):
                    self._end(ConnectionResetError("the connection was reset"))
            elif events & (EPOLLIN | EPOLLERR | EPOLLHUP):
                self._readable()
        except Exception as error:  # of the protocol
            self.poller.loop.call_exception_handler(
                {"message": "Fatal error on a TLS connection", "exception": error, "transport": self}
            )
            self._end(error)
        return 0

    cdef int _readable(self) except -1:
        if self.state > OPEN:
            self._discard()
        elif self.inbox.size or openssl.SSL_pending(self.ssl) or self._receive():
            try:
                if self.state == HANDSHAKE:
                    self._handshake()
                if self.state == OPEN and not self.is_paused:
                    self._read()
            finally:
                self._hold()
        return 0

    cdef int _writable(self) except -1:
        if self.state == HANDSHAKE:
            self._handshake()
        elif self.state == FLUSHING:
            self._flush()
        elif self.state == OPEN:
            self._send_backlog()
            if not self.backlog_size:
                self._want(self.interest & ~EPOLLOUT)
                self._come_back()  # it may have been for OpenSSL to read that there had to be room
            self._tell_protocol()
        return 0

    cdef int _want(self, uint32_t interest) except -1:
        if interest != self.interest and self.state != CLOSED:
            self.interest = interest
            self.poller._watch(EPOLL_CTL_MOD, self.fd, interest)
        return 0

    cdef int _come_back(self) except -1:
        if not self.is_waiting:
            self.is_waiting = True
            self.poller._later(self)
        return 0

    # -- the handshake ----------------------------------------------------------------------------------------------

    cdef int _handshake(self) except -1:
        openssl.ERR_clear_error()
        cdef int result = openssl.SSL_do_handshake(self.ssl)
        if result == 1:
            self._open()
            return 0
        cdef int error = openssl.SSL_get_error(self.ssl, result)
        if error == SSL_ERROR_WANT_READ:
            self._want(EPOLLIN)
        elif error == SSL_ERROR_WANT_WRITE:
            self._want(EPOLLOUT)
        else:
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
        self._want(EPOLLIN)
        factory, self.factory = self.factory, None
        done, self.done = self.done, None
        self.set_protocol(factory())
        self.protocol.connection_made(self)
        done(None)
        return 0

    # -- bytes in -----------------------------------------------------------------------------------------------------

    cdef bint _receive(self) except -1:
        """Whether something came into the shared buffer."""
        cdef ssize_t size = recv(self.fd, self.poller.received, TURN, 0)
        if size > 0:
            self.inbox.at = self.poller.received
            self.inbox.size = size
            if (size < TURN) == self.is_bounded:
                self._watch_queue()
            elif self.behind:
                self.behind = 0
            return True
        if size == 0:
            self._end(self._closed_early() if self.state == HANDSHAKE else None)
        elif errno != EAGAIN and errno != EINTR:
            self._end(OSError(errno, os.strerror(errno)))
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
        if self.inbox.size == 0:
            free(self.held)
            self.held = NULL
        elif self.held == NULL:
            self.held = <char *>malloc(self.inbox.size)
            if self.held == NULL:
                raise MemoryError
            memcpy(self.held, self.inbox.at, self.inbox.size)
            self.inbox.at = self.held
        return 0

    cdef int _read(self) except -1:
        cdef int end = 0
        if self.is_buffered:
            self._read_into_protocol(&end)
        else:
            self._read_copied(&end)
        if self.state != OPEN or end == SSL_ERROR_WANT_READ:
            return 0
        if end == 0:
            if not self.is_paused:
                self._come_back()
        elif end == SSL_ERROR_WANT_WRITE:
            self._want(self.interest | EPOLLOUT)
        elif end == SSL_ERROR_ZERO_RETURN:
            self.protocol.eof_received()
            self.close()
        else:
            self._end(_failure(end))
        return 0

    cdef int _read_into_protocol(self, int *end) except -1:
        cdef Py_buffer view
        PyObject_GetBuffer(self.protocol.get_buffer(-1), &view, PyBUF_WRITABLE)
        cdef Py_ssize_t size = self._fill(<char *>view.buf, view.len, end)
        PyBuffer_Release(&view)
        if size:
            self.protocol.buffer_updated(size)
        return 0

    cdef int _read_copied(self, int *end) except -1:
        cdef Py_ssize_t size = self._fill(self.poller.clear, TURN, end)
        if size:
            self.protocol.data_received(PyBytes_FromStringAndSize(self.poller.clear, size))
        return 0

    cdef Py_ssize_t _fill(self, char *into, Py_ssize_t space, int *end) except -1:
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
                if error != SSL_ERROR_WANT_WRITE and error != SSL_ERROR_WANT_READ:
                    self._end(_failure(error))
                    return -1
                break
            total += sent
        return total

    cdef int _keep(self, bytes rest) except -1:
        if self.backlog is None:
            self.backlog = []
        self.backlog.append(rest)
        self.backlog_size += PyBytes_GET_SIZE(rest)
        self._want(self.interest | EPOLLOUT)
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
        if self.state == OPEN:
            if self.backlog_size > self.high and not self.is_full:
                self.is_full = True
                self.protocol.pause_writing()
            elif self.backlog_size <= self.low and self.is_full:
                self.is_full = False
                self.protocol.resume_writing()
        return 0

    # -- the end --------------------------------------------------------------------------------------------------------

    cdef int _flush(self) except -1:
        """Send what waits, then the goodbye.  Then wait for the other side: to close on unread bytes would be a reset,
        which destroys what is on its way."""
        self._send_backlog()
        if self.state != FLUSHING:
            return 0
        openssl.ERR_clear_error()
        cdef int result = 0 if self.backlog_size else openssl.SSL_shutdown(self.ssl)
        if self.backlog_size or (
            result < 0 and openssl.SSL_get_error(self.ssl, result) == SSL_ERROR_WANT_WRITE
        ):
            self._want(EPOLLOUT)
            return 0
        self.state = LINGERING
        self.is_paused = False
        shutdown(self.fd, SHUT_WR)
        self._want(EPOLLIN)
        self._discard()
        return 0

    cdef int _discard(self) except -1:
        cdef ssize_t size = recv(self.fd, self.poller.clear, TURN, 0)
        if size == 0 or (size < 0 and errno != EAGAIN and errno != EINTR):
            self._end(None)
        return 0

    cdef int _end(self, error) except -1:
        if self.state != CLOSED:
            self.state = CLOSED
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
            if done is not None:
                done(error or self._closed_early())
            if protocol is not None:
                protocol.connection_lost(error)
        finally:
            self.sock.close()


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
    cdef unsigned long code = openssl.ERR_peek_last_error()
    cdef const char *reason = openssl.ERR_reason_error_string(code) if code else NULL
    openssl.ERR_clear_error()
    if error == SSL_ERROR_SYSCALL:
        return OSError(errno, os.strerror(errno)) if errno else None
    return ssl.SSLError(error, "TLS failed" if reason == NULL else reason.decode())
