// SPDX-License-Identifier: Apache-2.0
/* Checksums of guest memory in a snapshot. CRC-32 has a table here, and an instruction on most arm64 CPUs. */
#include "loop/loop.h"

#include <pthread.h>
#ifdef __aarch64__
#include <sys/auxv.h>
#ifndef HWCAP_CRC32
#define HWCAP_CRC32 (1 << 7)
#endif
#endif

enum { POLYNOMIAL = 0xedb88320 }; /* IEEE 802.3, reflected */

static uint32_t table[8][256]; /* [n][byte]: of the byte with n zeros behind it */
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void fill(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? (uint32_t)POLYNOMIAL : 0);
        table[0][byte] = crc;
    }
    for (int n = 1; n < 8; n++)
        for (int byte = 0; byte < 256; byte++)
            table[n][byte] = table[n - 1][byte] >> 8 ^ table[0][table[n - 1][byte] & 0xff];
}

/* The words are little-endian, as every arm64 and x86 host of pyvmm is. */
static uint32_t by_table(const uint8_t *page)
{
    uint32_t crc = 0;

    pthread_once(&once, fill);
    for (uint32_t at = 0; at < PV_GUEST_PAGE; at += 8) {
        uint64_t word;
        memcpy(&word, page + at, 8);
        word ^= crc;
        crc = table[7][word & 0xff] ^ table[6][word >> 8 & 0xff] ^ table[5][word >> 16 & 0xff]
            ^ table[4][word >> 24 & 0xff] ^ table[3][word >> 32 & 0xff] ^ table[2][word >> 40 & 0xff]
            ^ table[1][word >> 48 & 0xff] ^ table[0][word >> 56];
    }
    return crc;
}

#ifdef __aarch64__
static uint32_t by_instruction(const uint8_t *page)
{
    uint32_t crc = 0;

    for (uint32_t at = 0; at < PV_GUEST_PAGE; at += 8) {
        uint64_t word;
        memcpy(&word, page + at, 8);
        __asm__(".arch_extension crc\n\tcrc32x %w0, %w0, %x1" : "+r"(crc) : "r"(word));
    }
    return crc;
}

static uint32_t checksum(const uint8_t *page)
{
    return getauxval(AT_HWCAP) & HWCAP_CRC32 ? by_instruction(page) : by_table(page);
}
#else
static uint32_t checksum(const uint8_t *page) { return by_table(page); }
#endif

void pv_checksums(const uint8_t *pages, uint64_t count, uint32_t *sums)
{
    for (uint64_t i = 0; i < count; i++)
        sums[i] = checksum(pages + i * PV_GUEST_PAGE);
}

uint64_t pv_first_damaged(const uint8_t *pages, uint64_t count, const uint32_t *sums)
{
    uint64_t i = 0;

    while (i < count && checksum(pages + i * PV_GUEST_PAGE) == sums[i])
        i++;
    return i;
}
