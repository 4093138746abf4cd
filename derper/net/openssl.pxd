"""OpenSSL's functions, as far as they are used here, and its numbers (openssl/ssl.h, openssl/bio.h)."""

from libc.stdint cimport uint64_t

ctypedef void *(*new_f)(const void *) noexcept nogil
ctypedef void (*free_f)(void *) noexcept nogil
ctypedef int (*state_f)(void *) noexcept nogil
ctypedef int (*read_f)(void *, void *, int) noexcept nogil
ctypedef int (*write_f)(void *, const void *, int) noexcept nogil
ctypedef int (*get_error_f)(const void *, int) noexcept nogil
ctypedef const char *(*text_f)(const void *) noexcept nogil
ctypedef uint64_t (*options_f)(const void *) noexcept nogil
ctypedef long (*ctrl_f)(void *, int, long, void *) noexcept nogil
ctypedef void (*clear_f)() noexcept nogil
ctypedef unsigned long (*code_f)() noexcept nogil
ctypedef const char *(*reason_f)(unsigned long) noexcept nogil
ctypedef void (*set_bio_f)(void *, void *, void *) noexcept nogil
ctypedef void *(*meth_new_f)(int, const char *) noexcept nogil
ctypedef int (*meth_set_read_f)(void *, read_f) noexcept nogil
ctypedef int (*meth_set_ctrl_f)(void *, ctrl_f) noexcept nogil
ctypedef void *(*new_socket_f)(int, int) noexcept nogil
ctypedef void (*set_data_f)(void *, void *) noexcept nogil
ctypedef void (*set_flags_f)(void *, int) noexcept nogil
ctypedef void *(*item_f)(const void *, int) noexcept nogil
ctypedef int (*encode_f)(const void *, unsigned char **) noexcept nogil
ctypedef long (*result_f)(const void *) noexcept nogil
ctypedef const char *(*result_text_f)(long) noexcept nogil

cdef struct OpenSSL:
    new_f SSL_new, SSL_get_current_cipher, SSL_get_peer_cert_chain, BIO_new, BIO_get_data
    free_f SSL_free, SSL_set_accept_state, SSL_set_connect_state
    state_f SSL_do_handshake, SSL_shutdown, SSL_pending, OPENSSL_sk_num
    read_f SSL_read
    write_f SSL_write
    get_error_f SSL_get_error
    text_f SSL_get_version, SSL_CIPHER_get_name
    options_f SSL_CTX_get_options
    ctrl_f SSL_CTX_ctrl, SSL_ctrl
    item_f OPENSSL_sk_value
    encode_f i2d_X509
    result_f SSL_get_verify_result
    result_text_f X509_verify_cert_error_string
    set_bio_f SSL_set_bio
    clear_f ERR_clear_error
    code_f ERR_peek_last_error
    reason_f ERR_reason_error_string
    meth_new_f BIO_meth_new
    meth_set_read_f BIO_meth_set_read
    meth_set_ctrl_f BIO_meth_set_ctrl
    new_socket_f BIO_new_socket
    set_data_f BIO_set_data
    set_flags_f BIO_set_flags, BIO_clear_flags, BIO_set_init

cdef enum:
    SSL_ERROR_SSL = 1
    SSL_ERROR_WANT_READ = 2
    SSL_ERROR_WANT_WRITE = 3
    SSL_ERROR_SYSCALL = 5
    SSL_ERROR_ZERO_RETURN = 6
    SSL_CTRL_MODE = 33
    SSL_CTRL_SET_TLSEXT_HOSTNAME = 55
    SSL_MODE_ENABLE_PARTIAL_WRITE = 0x01
    SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER = 0x02
    SSL_MODE_RELEASE_BUFFERS = 0x10
    BIO_TYPE_SOURCE_SINK = 0x0400
    BIO_CTRL_FLUSH = 11
    BIO_NOCLOSE = 0
    BIO_READ_AGAIN = 0x01 | 0x08  # BIO_FLAGS_READ | BIO_FLAGS_SHOULD_RETRY

cdef OpenSSL openssl


cdef struct Inbox:  # bytes that were received, and that OpenSSL has not taken yet
    const char *at
    Py_ssize_t size

cdef void *new_inbox(Inbox *inbox) noexcept

cdef class Context:
    cdef object context  # the ssl.SSLContext
    cdef void *ctx
