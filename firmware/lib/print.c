// SPDX-License-Identifier: Apache-2.0
/* The UART, lines, boot arguments, and the few string functions a compiler expects. */
#include "lib.h"

#define UART_DATA 0x00
#define UART_FLAGS 0x18
#define UART_FLAGS_TXFF 0x20

void *memset(void *to, int byte, size_t n)
{
    for (u8 *at = to; n; n--)
        *at++ = (u8)byte;
    return to;
}

void *memcpy(void *to, const void *from, size_t n)
{
    const u8 *source = from;
    for (u8 *at = to; n; n--)
        *at++ = *source++;
    return to;
}

int same(const char *a, const char *b)
{
    for (; *a && *a == *b; a++, b++)
        ;
    return *a == *b;
}

void put(char c)
{
    if (!board.uart)
        return;
    while (mmio_read32(board.uart + UART_FLAGS) & UART_FLAGS_TXFF)
        ;
    mmio_write32(board.uart + UART_DATA, (u8)c);
}

static void put_number(u64 value, u64 base)
{
    char digits[20];
    int n = 0;
    do
        digits[n++] = "0123456789abcdef"[value % base];
    while (value /= base);
    while (n)
        put(digits[--n]);
}

void print(const char *format, ...)
{
    static u32 guard;
    va_list list;

    lock(&guard);
    va_start(list, format);
    for (; *format; format++) {
        if (*format != '%') {
            put(*format);
            continue;
        }
        if (*++format == 'l')
            format++;
        if (*format == 's') {
            for (const char *s = va_arg(list, const char *); *s; s++)
                put(*s);
        } else if (*format == 'c') {
            put((char)va_arg(list, int));
        } else if (*format == 'd') {
            s64 value = va_arg(list, s64);
            if (value < 0)
                put('-');
            put_number(value < 0 ? -(u64)value : (u64)value, 10);
        } else if (*format == 'u' || *format == 'x') {
            put_number(va_arg(list, u64), *format == 'x' ? 16 : 10);
        } else {
            put(*format);
        }
    }
    va_end(list);
    unlock(&guard);
}

size_t argument(const char *key, const char **value)
{
    const char *at = board.bootargs;
    while (*at) {
        const char *k = key;
        size_t n = 0;
        while (*k && *at == *k)
            at++, k++;
        if (!*k && *at == '=') {
            for (*value = ++at; *at && *at != ' '; at++)
                n++;
            return n;
        }
        while (*at && *at != ' ')
            at++;
        while (*at == ' ')
            at++;
    }
    *value = at;
    return 0;
}

int argument_is(const char *key, const char *expected)
{
    const char *value;
    size_t n = argument(key, &value);
    for (; n && *value == *expected; n--)
        value++, expected++;
    return !n && !*expected;
}

u64 argument_number(const char *key, u64 otherwise)
{
    const char *at;
    size_t n = argument(key, &at);
    u64 value = 0, base = 10;
    if (!n)
        return otherwise;
    if (n > 2 && at[0] == '0' && at[1] == 'x')
        at += 2, n -= 2, base = 16;
    for (; n; n--, at++) {
        u64 digit = *at <= '9' ? (u64)(*at - '0') : (u64)((*at | 32) - 'a' + 10);
        if (digit >= base)
            return otherwise;
        value = value * base + digit;
    }
    return value;
}
