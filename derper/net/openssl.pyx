"""The OpenSSL that Python's `ssl` has loaded: its functions are looked up there at run time.

So there is one OpenSSL in the process, with one state and one set of contexts.  Where the functions cannot be found the
import fails, with the reason.
"""

from cpython.object cimport PyObject
from libc.string cimport memcpy

import _ssl
import os
import ssl
import sys

__all__ = ["Context"]

cdef extern from "<dlfcn.h>" nogil:
    void *dlopen(const char *path, int flags)
    void *dlsym(void *handle, const char *name)
    int RTLD_NOW

cdef extern from *:
    """
    /* How CPython's PySSLContext begins (Modules/_ssl.h); the same in 3.11 to 3.14. */
    typedef struct { PyObject_HEAD void *ctx; } derper_ssl_context;
    """
    ctypedef struct derper_ssl_context:
        void *ctx

cdef void *inbox_methods


cdef void *_library() except NULL:
    if sys.implementation.name != "cpython" or sys.platform != "linux" or ssl.OPENSSL_VERSION_INFO < (3,):
        raise ImportError("this is for CPython with OpenSSL 3 on Linux")
    if sys.version_info >= (3, 15):
        raise ImportError("how this Python lays out its TLS contexts has not been looked at")
    path = getattr(_ssl, "__file__", None)
    if path is None:
        raise ImportError("OpenSSL is a part of this Python, and its functions cannot be found")
    cdef bytes name = os.fsencode(path)
    cdef void *library = dlopen(name, RTLD_NOW)
    if library == NULL:
        raise ImportError("Python's OpenSSL cannot be opened")
    return library


cdef void *_find(void *library, bytes name) except NULL:
    cdef void *found = dlsym(library, name)
    if found == NULL:
        raise ImportError(f"Python's OpenSSL has no {name.decode()} that can be found")
    return found


cdef int _load() except -1:
    cdef void *library = _library()
    openssl.SSL_new = <new_f>_find(library, b"SSL_new")
    openssl.SSL_free = <free_f>_find(library, b"SSL_free")
    openssl.SSL_set_bio = <set_bio_f>_find(library, b"SSL_set_bio")
    openssl.SSL_set_accept_state = <free_f>_find(library, b"SSL_set_accept_state")
    openssl.SSL_set_connect_state = <free_f>_find(library, b"SSL_set_connect_state")
    openssl.SSL_ctrl = <ctrl_f>_find(library, b"SSL_ctrl")
    openssl.SSL_get_peer_cert_chain = <new_f>_find(library, b"SSL_get_peer_cert_chain")
    openssl.SSL_get_verify_result = <result_f>_find(library, b"SSL_get_verify_result")
    openssl.X509_verify_cert_error_string = <result_text_f>_find(library, b"X509_verify_cert_error_string")
    openssl.OPENSSL_sk_num = <state_f>_find(library, b"OPENSSL_sk_num")
    openssl.OPENSSL_sk_value = <item_f>_find(library, b"OPENSSL_sk_value")
    openssl.i2d_X509 = <encode_f>_find(library, b"i2d_X509")
    openssl.SSL_do_handshake = <state_f>_find(library, b"SSL_do_handshake")
    openssl.SSL_shutdown = <state_f>_find(library, b"SSL_shutdown")
    openssl.SSL_pending = <state_f>_find(library, b"SSL_pending")
    openssl.SSL_read = <read_f>_find(library, b"SSL_read")
    openssl.SSL_write = <write_f>_find(library, b"SSL_write")
    openssl.SSL_get_error = <get_error_f>_find(library, b"SSL_get_error")
    openssl.SSL_get_version = <text_f>_find(library, b"SSL_get_version")
    openssl.SSL_get_current_cipher = <new_f>_find(library, b"SSL_get_current_cipher")
    openssl.SSL_CIPHER_get_name = <text_f>_find(library, b"SSL_CIPHER_get_name")
    openssl.SSL_CTX_get_options = <options_f>_find(library, b"SSL_CTX_get_options")
    openssl.SSL_CTX_ctrl = <ctrl_f>_find(library, b"SSL_CTX_ctrl")
    openssl.ERR_clear_error = <clear_f>_find(library, b"ERR_clear_error")
    openssl.ERR_peek_last_error = <code_f>_find(library, b"ERR_peek_last_error")
    openssl.ERR_reason_error_string = <reason_f>_find(library, b"ERR_reason_error_string")
    openssl.BIO_meth_new = <meth_new_f>_find(library, b"BIO_meth_new")
    openssl.BIO_meth_set_read = <meth_set_read_f>_find(library, b"BIO_meth_set_read")
    openssl.BIO_meth_set_ctrl = <meth_set_ctrl_f>_find(library, b"BIO_meth_set_ctrl")
    openssl.BIO_new = <new_f>_find(library, b"BIO_new")
    openssl.BIO_new_socket = <new_socket_f>_find(library, b"BIO_new_socket")
    openssl.BIO_set_data = <set_data_f>_find(library, b"BIO_set_data")
    openssl.BIO_get_data = <new_f>_find(library, b"BIO_get_data")
    openssl.BIO_set_init = <set_flags_f>_find(library, b"BIO_set_init")
    openssl.BIO_set_flags = <set_flags_f>_find(library, b"BIO_set_flags")
    openssl.BIO_clear_flags = <set_flags_f>_find(library, b"BIO_clear_flags")
    return 0


cdef class Context:
    """An `ssl.SSLContext` for connections that are no `ssl.SSLObject`; how it buffers is changed.

    Raises ValueError if it has a callback: Python's `ssl` would look for its own object behind the connection.
    """

    def __cinit__(self, context):
        if not isinstance(context, ssl.SSLContext):
            raise TypeError("a Context is made from an ssl.SSLContext")
        if context.sni_callback or context.keylog_filename or context._msg_callback:
            raise ValueError("a TLS context with callbacks of Python's ssl can serve only that")
        self.context = context
        self.ctx = (<derper_ssl_context *><PyObject *>context).ctx
        if openssl.SSL_CTX_get_options(self.ctx) & 0xFFFFFFFF != int(context.options) & 0xFFFFFFFF:
            raise RuntimeError("this Python has TLS contexts of another form")
        openssl.SSL_CTX_ctrl(
            self.ctx,
            SSL_CTRL_MODE,
            SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_RELEASE_BUFFERS,
            NULL,
        )


cdef void *new_inbox(Inbox *inbox) noexcept:
    """A BIO that gives what is in `inbox`, which must live longer; NULL if there is no memory."""
    cdef void *bio = openssl.BIO_new(inbox_methods)
    if bio != NULL:
        openssl.BIO_set_data(bio, inbox)
        openssl.BIO_set_init(bio, 1)
    return bio


cdef int _take(void *bio, void *into, int most) noexcept nogil:
    cdef Inbox *inbox = <Inbox *>openssl.BIO_get_data(bio)
    openssl.BIO_clear_flags(bio, BIO_READ_AGAIN)
    if inbox.size == 0:
        openssl.BIO_set_flags(bio, BIO_READ_AGAIN)
        return -1
    if most > inbox.size:
        most = <int>inbox.size
    memcpy(into, inbox.at, most)
    inbox.at += most
    inbox.size -= most
    return most


cdef long _control(void *bio, int command, long number, void *pointer) noexcept nogil:
    return command == BIO_CTRL_FLUSH


cdef void *_inbox_methods() except NULL:
    cdef void *methods = openssl.BIO_meth_new(BIO_TYPE_SOURCE_SINK, b"inbox")
    if methods == NULL:
        raise MemoryError
    openssl.BIO_meth_set_read(methods, _take)
    openssl.BIO_meth_set_ctrl(methods, _control)
    return methods


_load()
inbox_methods = _inbox_methods()
