cimport cython

from ..wire cimport inplace
from .counters cimport Counters

cdef Py_ssize_t HEADER_LEN
cdef Py_ssize_t KEY_LEN
cdef Py_ssize_t KEYED
cdef Py_ssize_t _FORWARD_LEN
cdef Py_ssize_t _SEND_LEN
cdef Py_ssize_t _SHORTEST
cdef Py_ssize_t _LONGEST
cdef Py_ssize_t _DISCO_MIN
cdef unsigned int _MAGIC
cdef int _MORE_MAGIC
cdef int _SEND_PACKET
cdef int _RECV_PACKET
cdef int _FORWARD_PACKET
cdef int _CHATTER


cdef class Session:
    cdef public object router
    cdef public Counters counters
    cdef public object sink
    cdef public object write
    cdef readonly object key
    cdef public object info
    cdef public object remote
    cdef public bint can_mesh
    cdef public bint not_ideal
    cdef public object connected_at
    cdef public bint preferred
    cdef public bint is_duplicate
    cdef public bint closed
    cdef public object paused_since
    cdef public object sources
    cdef public Py_ssize_t read_limit
    cdef public object _queue
    cdef public object _disco_queue
    cdef public object _bucket
    cdef public object _gone_bucket
    cdef public Py_ssize_t _skip
    cdef public Py_ssize_t _left
    cdef public object _control
    cdef public Py_ssize_t _control_size
    cdef public bint _pong_waiting

    @cython.locals(pos=Py_ssize_t, handled=int, kind=int, length=Py_ssize_t, body=Py_ssize_t)
    cpdef Py_ssize_t receive(self, bytearray buffer, Py_ssize_t start, Py_ssize_t end, object now) except -1

    cdef bint _begins_frame(self, bytearray buffer, Py_ssize_t pos, Py_ssize_t end)

    @cython.locals(count=Py_ssize_t)
    cdef Py_ssize_t _skipped(self, Py_ssize_t start, Py_ssize_t end)

    @cython.locals(
        begin=Py_ssize_t, start=Py_ssize_t, count=Py_ssize_t, total=Py_ssize_t, disco=Py_ssize_t, after=Py_ssize_t,
        kind=int, length=Py_ssize_t, magic=cython.uint, more_magic=int, dst=bytes, key=inplace.octets,
        counters=Counters,
    )
    cdef Py_ssize_t _packets(self, bytearray buffer, Py_ssize_t pos, Py_ssize_t end, object now) except -1

    @cython.locals(chunk=bytes, target=Session)
    cdef _dispatch(self, bytearray buffer, Py_ssize_t start, Py_ssize_t end, bytes dst, Py_ssize_t count, object now)

    @cython.locals(
        total=Py_ssize_t, kind=int, length=Py_ssize_t, after=Py_ssize_t, head=Py_ssize_t, src=inplace.octets,
        dst=inplace.octets, run_src=bytes, run_dst=bytes, run=list,
    )
    cdef Py_ssize_t _forwarded(self, bytearray buffer, Py_ssize_t pos, Py_ssize_t end, object now) except -1

    cdef _arrived(self, bytes src, bytes dst, list run, object now)

    @cython.locals(counters=Counters)
    cpdef deliver(self, object src, bytes chunk, Py_ssize_t count, object now)
