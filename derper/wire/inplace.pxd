from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.string cimport memcmp, memcpy

ctypedef const unsigned char* octets


cdef inline octets _at(bytearray buffer, Py_ssize_t at) noexcept:
    return <octets>PyByteArray_AS_STRING(buffer) + at


cdef inline unsigned int _word(octets at) noexcept:
    return (<unsigned int>at[0] << 24) | (at[1] << 16) | (at[2] << 8) | at[3]


cdef inline (int, Py_ssize_t) head_at(bytearray buffer, Py_ssize_t at) noexcept:
    cdef octets head = _at(buffer, at)
    return head[0], _word(head + 1)


cdef inline (int, Py_ssize_t, octets, unsigned int, int) packet_at(bytearray buffer, Py_ssize_t at) noexcept:
    cdef octets head = _at(buffer, at)
    return head[0], _word(head + 1), head + 5, _word(head + 37), (head[41] << 8) | head[42]


cdef inline (int, Py_ssize_t, octets, octets) forward_at(bytearray buffer, Py_ssize_t at) noexcept:
    cdef octets head = _at(buffer, at)
    return head[0], _word(head + 1), head + 5, head + 37


cdef inline bint same_key(octets key, bytes known) noexcept:
    return PyBytes_GET_SIZE(known) == 32 and memcmp(key, PyBytes_AS_STRING(known), 32) == 0


cdef inline bytes key_of(octets key):
    return PyBytes_FromStringAndSize(<const char*>key, 32)


cdef inline object set_head(bytearray buffer, Py_ssize_t at, int kind, Py_ssize_t length, object key):
    cdef unsigned char* head = <unsigned char*>PyByteArray_AS_STRING(buffer) + at
    head[0] = kind
    head[1] = length >> 24
    head[2] = length >> 16
    head[3] = length >> 8
    head[4] = length
    memcpy(head + 5, PyBytes_AS_STRING(key), 32)


cdef inline bytes cut(bytearray buffer, Py_ssize_t start, Py_ssize_t end):
    return PyBytes_FromStringAndSize(PyByteArray_AS_STRING(buffer) + start, end - start)
