/* Records of TLS 1.3 after the handshake (RFC 8446, 5.2 and 7.3): OpenSSL shakes hands, then hands over the two secrets,
 * and is not asked again. Its record layer costs more than the encryption of a packet. */
#include "loadgen.h"

#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <string.h>

enum { APPLICATION_DATA = 23, VERSION_HIGH = 3, VERSION_LOW = 3 };

/* HKDF-Expand-Label without context, for results that one HMAC fills. */
static void expand(const uint8_t *secret, size_t secret_len, const char *label, uint8_t *to, size_t len) {
    uint8_t info[64] = {0, (uint8_t)len, (uint8_t)(6 + strlen(label))}, hash[EVP_MAX_MD_SIZE];
    size_t at = 3 + (size_t)sprintf((char *)info + 3, "tls13 %s", label);
    info[at + 1] = 1;                        /* behind the empty context: the number of the block */
    HMAC(secret_len == 32 ? EVP_sha256() : EVP_sha384(), secret, (int)secret_len, info, at + 2, hash, NULL);
    memcpy(to, hash, len);
}

void record_keys(struct direction *d, const uint8_t *secret, size_t secret_len) {
    uint8_t key[32];
    unsigned key_len = secret_len == 32 ? 16 : 32;       /* AES-128 comes with SHA-256, AES-256 with SHA-384 */
    expand(secret, secret_len, "key", key, key_len);
    expand(secret, secret_len, "iv", d->iv, GCM_NONCE);
    d->gcm = gcm_new(key, key_len);
    d->sequence = 0;
}

static void next_nonce(struct direction *d, uint8_t *nonce) {
    memcpy(nonce, d->iv, GCM_NONCE);
    for (int i = 0; i < 8; i++)
        nonce[4 + i] ^= (uint8_t)(d->sequence >> (56 - 8 * i));
    d->sequence++;
}

size_t record_seal(struct direction *d, uint8_t *data, size_t len, uint8_t *to) {
    size_t body = len + 1 + GCM_TAG;
    uint8_t header[RECORD_HEADER] = {APPLICATION_DATA, VERSION_HIGH, VERSION_LOW, (uint8_t)(body >> 8), (uint8_t)body};
    uint8_t nonce[GCM_NONCE], behind = data[len];
    next_nonce(d, nonce);
    data[len] = APPLICATION_DATA;
    memcpy(to, header, sizeof header);
    gcm_seal(d->gcm, nonce, header, data, len + 1, to + RECORD_HEADER);
    data[len] = behind;
    return RECORD_HEADER + body;
}

size_t record_size(const uint8_t *from, size_t len) {
    size_t size = len < RECORD_HEADER ? 0 : RECORD_HEADER + ((size_t)from[3] << 8 | from[4]);
    return size <= len ? size : 0;
}

int record_open(struct direction *d, const uint8_t *from, size_t size, uint8_t *to, size_t *len) {
    uint8_t nonce[GCM_NONCE];
    if (from[0] != APPLICATION_DATA || size < RECORD_HEADER + 1 + GCM_TAG)
        return -1;
    size_t n = size - RECORD_HEADER - GCM_TAG;
    next_nonce(d, nonce);
    if (!gcm_open(d->gcm, nonce, from, from + RECORD_HEADER, n, to))
        return -1;
    while (n > 0 && to[n - 1] == 0)          /* padding */
        n--;
    if (n == 0)
        return -1;
    *len = n - 1;
    return to[n - 1];
}
