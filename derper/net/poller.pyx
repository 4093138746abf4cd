"""One epoll instance for many connections, and what all its connections do: transports without asyncio's overhead.

::

    epoll --> Poller --> Stream: recv --> the protocol's buffer
    protocol --> Stream.write --> send, or for what the socket does not take: the backlog

The epoll instance is itself watched by the event loop: one turn of the loop handles all that is ready, and errors of
sockets are seen, which a reader of uvloop is not told of.  For Linux.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc

import os

__all__ = ["Poller", "Stream"]


cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef extern from "<sys/socket.h>" nogil:
    ssize_t recv(int fd, void *buffer, size_t size, int flags)
    int shutdown(int fd, int how)
    int SHUT_WR

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


cdef enum:
    EVENTS = 256  # connections handled in one turn of the loop
    HIGH_WATER = 64 << 10  # bytes
    CLOSE_SECONDS = 30  # for the other side to take what was written to it, and to close


@cython.no_gc_clear  # or what ends late, in a dying loop, would find None instead of a Poller
cdef class Poller:
    """Tells connections what their sockets are ready for."""

    def __cinit__(self, loop):
        self.epoll = -1
        self.loop = loop
        self.streams = {}
        self.received = <char *>malloc(2 * TURN)
        if self.received == NULL:
            raise MemoryError
        self.clear = self.received + TURN

    def __dealloc__(self):
        free(self.received)
        if self.epoll >= 0:
            close(self.epoll)

    cdef int _add(self, Stream stream) except -1:
        if self.epoll < 0:
            self.epoll = epoll_create1(EPOLL_CLOEXEC)
            if self.epoll < 0:
                raise OSError(errno, os.strerror(errno))
            self.loop.add_reader(self.epoll, self._ready)
        self.streams[stream.fd] = stream
        self._watch(EPOLL_CTL_ADD, stream.fd, EPOLLIN)
        return 0

    cdef int _remove(self, Stream stream) except -1:
        if self.streams.pop(stream.fd, None) is not None:
            epoll_ctl(self.epoll, EPOLL_CTL_DEL, stream.fd, NULL)
            if not self.streams:  # so nobody need close us
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
        cdef Stream stream
        for index in range(count):
            stream = <Stream>self.streams.get(events[index].data.u64)
            if stream is not None:
                stream._handle(events[index].events)


@cython.no_gc_clear
cdef class Stream:
    """An asyncio transport on a connected socket, which it owns, but for how bytes are read and written: see `tlsio`."""

    def __cinit__(self, Poller poller, sock, *more, **others):
        self.poller = poller
        self.sock = sock
        self.fd = sock.fileno()
        self.interest = EPOLLIN
        self.high = HIGH_WATER
        self.low = HIGH_WATER // 4

    cdef int _add(self) except -1:
        """Begin."""
        try:
            self.poller._add(self)
        except OSError as error:
            self._end(error)
        else:
            self._handle(EPOLLIN)
        return 0

    # -- asyncio.Transport, for the protocol ---------------------------------------------------------------------------

    def get_extra_info(self, name, default=None):
        """`socket`, `peername`, `sockname`."""
        if name == "socket":
            return self.sock
        try:
            if name == "peername":
                return self.sock.getpeername()
            if name == "sockname":
                return self.sock.getsockname()
        except OSError:
            pass
        return default

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
            self._drop_unread()
            self.timer = self.poller.loop.call_later(CLOSE_SECONDS, self.abort)
            self._flush()

    def abort(self):
        """Close now."""
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
        else:
            self._read()
        return 0

    cdef int _writable(self) except -1:
        if self.state == FLUSHING:
            self._flush()
            self._tell_protocol()
        elif self.state <= OPEN:
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

    cdef int _blame(self, error) except -1:
        """A callback of the protocol raised it."""
        self.poller.loop.call_exception_handler(
            {"message": "Fatal error on a connection", "exception": error, "transport": self}
        )
        return 0

    # -- bytes in -----------------------------------------------------------------------------------------------------

    cdef int _read(self) except -1:
        """Hand the protocol what there is."""
        cdef Py_buffer view
        cdef Py_ssize_t size
        cdef bytes data = None
        protocol = self.protocol
        if self.is_buffered:
            PyObject_GetBuffer(protocol.get_buffer(-1), &view, PyBUF_WRITABLE)
            try:
                if view.len == 0:
                    raise RuntimeError("get_buffer() returned an empty buffer")
                size = self._fill(<char *>view.buf, view.len)
            finally:
                PyBuffer_Release(&view)
            if size:
                protocol.buffer_updated(size)
        else:
            size = self._fill(self.poller.clear, TURN)
            if size:
                data = PyBytes_FromStringAndSize(self.poller.clear, size)
                protocol.data_received(data)
        return 0

    cdef Py_ssize_t _fill(self, char *into, Py_ssize_t space) except -1:
        """How many bytes have come; if 0, whatever follows from that is done."""
        raise NotImplementedError

    cdef ssize_t _take(self, char *into, size_t space) except -2:
        """Receive.  0: the other side says no more; -1: nothing has come, or the connection is lost."""
        cdef ssize_t size = recv(self.fd, into, space, 0)
        cdef int code = errno
        if size < 0 and code != EAGAIN and code != EINTR:
            self._end(OSError(code, os.strerror(code)))
        return size

    cdef int _drop_unread(self) except -1:
        """The protocol gets no more bytes."""
        return 0

    # -- bytes out ----------------------------------------------------------------------------------------------------

    cdef Py_ssize_t _send(self, const char *data, Py_ssize_t size) except -2:
        """How many bytes were taken; -1 if the connection is lost.  The rest must be sent later as it is."""
        raise NotImplementedError

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
        """Send what waits, then the goodbye."""
        self._send_backlog()
        if not self.backlog_size and self.state == FLUSHING:
            self._say_goodbye()
        self._watch()
        return 0

    cdef int _say_goodbye(self) except -1:
        """Say that no more follows, then `_linger`."""
        raise NotImplementedError

    cdef int _linger(self) except -1:
        """Wait until the other side closes: to close on unread bytes would be a reset, which destroys what is on its
        way."""
        self.state = LINGERING
        self.is_paused = self.needs_room = False
        shutdown(self.fd, SHUT_WR)
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
            self._drop_unread()
            self.poller._remove(self)
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None
            self.poller.loop.call_soon(self._finish, error)
        return 0

    def _finish(self, error):
        protocol, self.protocol = self.protocol, None
        self.backlog = None
        try:
            if protocol is not None:
                protocol.connection_lost(error)
        finally:
            self.sock.close()
