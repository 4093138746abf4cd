"""What the transports share that are compiled: see poller.pyx."""

from libc.stdint cimport uint32_t

cdef extern from "<sys/epoll.h>" nogil:
    uint32_t EPOLLIN, EPOLLOUT, EPOLLERR, EPOLLHUP

cdef enum:
    TURN = 128 << 10  # bytes received at a time; then others have their turn

cdef enum State:
    HANDSHAKE, OPEN, FLUSHING, LINGERING, CLOSED

cdef class Poller:
    cdef int epoll
    cdef object loop
    cdef dict streams  # descriptor -> Stream
    cdef char *received  # for whoever receives, until it or another one does again
    cdef Stream receiver  # whose bytes are in `received` now
    cdef char *clear

    cdef int _add(self, Stream stream) except -1
    cdef int _remove(self, Stream stream) except -1
    cdef int _watch(self, int operation, int fd, uint32_t interest) except -1

cdef class Stream:
    cdef Poller poller
    cdef object sock
    cdef int fd
    cdef State state
    cdef bint is_buffered  # the protocol has buffers of its own
    cdef bint is_paused  # the protocol wants no more bytes now
    cdef bint needs_room  # it cannot read on before the socket takes more
    cdef bint is_full  # the protocol was told to write no more
    cdef uint32_t interest
    cdef object protocol
    cdef list backlog  # of bytes that the socket does not take now
    cdef Py_ssize_t backlog_size
    cdef Py_ssize_t high
    cdef Py_ssize_t low
    cdef object timer
    cdef object __weakref__

    # What a kind of stream does in its own way.
    cdef int _readable(self) except -1
    cdef int _writable(self) except -1
    cdef Py_ssize_t _fill(self, char *into, Py_ssize_t space) except -1
    cdef Py_ssize_t _send(self, const char *data, Py_ssize_t size) except -2
    cdef int _say_goodbye(self) except -1
    cdef int _drop_unread(self) except -1

    # What all have.
    cdef int _add(self) except -1
    cdef int _handle(self, uint32_t events) except -1
    cdef int _watch(self) except -1
    cdef int _blame(self, error) except -1
    cdef int _read(self) except -1
    cdef ssize_t _take(self, char *into, size_t space) except -2
    cpdef write(self, data)
    cdef int _keep(self, bytes rest) except -1
    cdef int _send_backlog(self) except -1
    cdef int _tell_protocol(self) except -1
    cdef int _flush(self) except -1
    cdef int _linger(self) except -1
    cdef int _discard(self) except -1
    cdef int _end(self, error) except -1
