/* SPDX-License-Identifier: Apache-2.0 */
/* The interface between a fuzz target and the engine, and the functions that targets share. */
#ifndef FUZZ_H
#define FUZZ_H

#include "virtio/virtio.h"

#include <poll.h> /* whose ppoll() is fuzz_ppoll() here: see fuzzer.py */

/* A target. The first is called once, the second with every input. It must depend on the input alone. */
void fuzz_begin(void);
void fuzz_one(const uint8_t *data, size_t size);

/* Ends the process and keeps the input, because an invariant is broken. */
#define HOLDS(condition) ((condition) ? (void)0 : fuzz_fail(#condition, __FILE__, __LINE__))
void fuzz_fail(const char *what, const char *file, int line);

/* An input that is read to its end. Then zeros follow. */
struct input { const uint8_t *at, *end; };
uint8_t next8(struct input *input);
uint16_t next16(struct input *input);
uint32_t next32(struct input *input);

/* ---- guest.c: two slots side by side, one that the host cannot read, and a driver that may do anything */

enum { PAGES = 24, OPS = 6 };
#define RAM UINT64_C(0x80000000)

struct guest {
    struct pv_vm vm;
    struct pv_interrupt interrupt;
};
extern struct guest guest;

void guest_begin(void);
/* All memory is zero and open, and all slots exist. */
void guest_reset(void);
/* Configures a queue as the input says, and starts it. */
void guest_queue(struct input *input, struct pv_queue *queue);
/* One thing that a driver or a vCPU may do: write descriptors, make requests available, take memory away. */
void guest_act(struct input *input, struct pv_queue *queue);
/* Checks what must hold for every popped chain. */
void guest_check(const struct pv_queue *queue, const struct pv_chain *chain);

#endif
