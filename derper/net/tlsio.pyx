"""TLS connections on OpenSSL itself: what the event loop's TLS transports do, with less memory and less work.

::

    Poller --> Transport: recv --> SSL_read into the protocol's buffer
    protocol --> Transport.write: SSL_write --> send

* What has come is received with one system call into one buffer that all connections share; OpenSSL takes record by
  record from there.  Its own buffers it frees when they are empty, so an idle connection has none.
* The contexts are Python's `ssl.SSLContext`, and the library is the one that Python's `ssl` has loaded, see `openssl`.
  Where there is none that can be used the import fails, and `transports` uses the loop's own.

For CPython with OpenSSL 3 on Linux.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport errno
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
from .poller cimport EPOLLIN, FLUSHING, HANDSHAKE, OPEN, TURN, Poller, Stream

import os
import ssl

__all__ = ["Transport"]


cdef extern from "<sys/socket.h>" nogil:
    int setsockopt(int fd, int level, int name, const void *value, unsigned int size)
    int SOL_SOCKET, SO_RCVBUF

cdef extern from *:
    """
    #ifndef SO_BUF_LOCK
    #define SO_BUF_LOCK 72  /* Linux 5.14; older headers, as those for portable wheels, do not have it */
    #endif
    """
    int SO_BUF_LOCK

cdef enum:
    RECORD = 16 << 10  # bytes, the most that one has
    QUEUE = 128 << 10  # bytes that may wait to be received when there is more than can be handled
    PATIENCE = 4  # turns


@cython.no_gc_clear
cdef class Transport(Stream):
    """An asyncio transport for an accepted socket, or with a `server_name` for a connected one; it owns the socket from
    `start` on.  An empty name is not sent.

    `done` is called once: with None when TLS is up and the protocol that `factory` made has been told so, or with the
    exception that tells why not.  There is no time-out of the handshake: `abort` it.
    """

    cdef Context context
    cdef void *ssl
    cdef bint is_client
    cdef bint is_waiting  # the loop will call `_go_on`
    cdef bint is_bounded  # its receive queue
    cdef Py_ssize_t room  # of the protocol's last buffer
    cdef int behind  # turns in a row in which a turn's worth was waiting, or, once it is bounded, was not
    cdef int stop  # why OpenSSL reads no more for now, 0 if only the protocol's space was too small
    cdef object failure  # the exception for that, if it is one
    cdef Inbox inbox
    cdef char *held  # the inbox's bytes, while others use the shared buffer
    cdef object factory
    cdef object done

    def __cinit__(self, Poller poller, sock, Context context, factory, done, str server_name=None):
        cdef void *incoming
        cdef void *outgoing
        self.context = context
        self.factory = factory
        self.done = done
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
        self._add()

    # -- asyncio.Transport, for the protocol ---------------------------------------------------------------------------

    def get_extra_info(self, name, default=None):
        """`socket`, `peername`, `sockname`, `sslcontext`; `ssl_object` is this object."""
        if name == "ssl_object":
            return self
        if name == "sslcontext":
            return self.context.context
        return Stream.get_extra_info(self, name, default)

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

    def resume_reading(self):
        Stream.resume_reading(self)
        if self.state == OPEN:
            self._come_back()

    def abort(self):
        """Close now.  `done` is not called any more."""
        self.done = None
        self._end(None)

    # -- events ----------------------------------------------------------------------------------------------------

    cdef int _readable(self) except -1:
        if self.state > OPEN:
            self._discard()
        elif self.needs_room or self._has_bytes() or self._receive():
            self.needs_room = False
            try:
                if self.state == HANDSHAKE:
                    self._handshake()
                if self.state == OPEN and not self.is_paused:
                    self._decrypt()
            finally:
                self._hold()
            self._watch()
        return 0

    cdef int _writable(self) except -1:
        if self.needs_room and self.state <= OPEN:
            self._readable()
        Stream._writable(self)
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
            (<Transport>poller.receiver)._hold()
        self._drop_unread()
        # A small buffer takes little now, and the rest would have to be held.
        cdef Py_ssize_t most = self.room + RECORD if self.room <= RECORD else TURN
        cdef ssize_t size = self._take(poller.received, most)
        if size > 0:
            self.inbox.at = poller.received
            self.inbox.size = size
            poller.receiver = self
            if (size < most) == self.is_bounded:
                self._watch_queue()
            elif self.behind:
                self.behind = 0
            return True
        if size == 0 and self.state == HANDSHAKE:
            self._end(self._closed_early())
        elif size == 0:
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
            self._drop_unread()
        elif self.held == NULL:
            self.held = <char *>malloc(self.inbox.size)
            if self.held == NULL:
                raise MemoryError
            memcpy(self.held, self.inbox.at, self.inbox.size)
            self.inbox.at = self.held
        return 0

    cdef int _drop_unread(self) except -1:
        self.inbox.size = 0
        free(self.held)
        self.held = NULL
        return 0

    cdef int _decrypt(self) except -1:
        """Hand the protocol what there is, and see to what OpenSSL said then."""
        self._read()
        failure, self.failure = self.failure, None
        if self.state != OPEN or self.stop == SSL_ERROR_WANT_READ:
            return 0
        if self.stop == 0:
            if not self.is_paused:
                self._come_back()
        elif self.stop == SSL_ERROR_WANT_WRITE:
            self.needs_room = True
        elif self.stop == SSL_ERROR_ZERO_RETURN:
            self.protocol.eof_received()
            self.close()
        else:
            self._end(failure)
        return 0

    cdef Py_ssize_t _fill(self, char *into, Py_ssize_t space) except -1:
        """Decrypt what has come."""
        cdef Py_ssize_t total = 0
        cdef int size
        self.room = space
        self.stop = 0
        openssl.ERR_clear_error()
        while total < space:
            size = openssl.SSL_read(self.ssl, into + total, <int>min(space - total, 1 << 30))
            if size <= 0:
                self.stop = openssl.SSL_get_error(self.ssl, size)
                if self.stop != SSL_ERROR_WANT_READ:
                    self.failure = _failure(self.stop)  # before a callback uses OpenSSL
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

    # -- the end --------------------------------------------------------------------------------------------------------

    cdef int _say_goodbye(self) except -1:
        """Unless the other side has said it too, wait until that closes."""
        openssl.ERR_clear_error()
        cdef int result = openssl.SSL_shutdown(self.ssl)
        cdef int error = openssl.SSL_get_error(self.ssl, result)
        openssl.ERR_clear_error()  # Python's ssl would take it for its own
        if result == 1:
            self._end(None)
        elif error != SSL_ERROR_WANT_WRITE:
            self._linger()
        return 0

    def _finish(self, error):
        done, self.done = self.done, None
        self.factory = None
        try:
            Stream._finish(self, error)
        finally:
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
