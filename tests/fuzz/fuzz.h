/* SPDX-License-Identifier: Apache-2.0 */
/* What a fuzz target and the engine owe each other, and what targets share. */
#ifndef FUZZ_H
#define FUZZ_H

#include "virtio/virtio.h"

/* A target: once, before anything; then with every input. Whatever it does must depend on the input alone. */
void fuzz_begin(void);
void fuzz_one(const uint8_t *data, size_t size);

/* Ends the process with the input kept: what must always hold does not. */
#define HOLDS(condition) ((condition) ? (void)0 : fuzz_fail(#condition, __FILE__, __LINE__))
void fuzz_fail(const char *what, const char *file, int line);

/* An input, read to its end; zeros follow. */
struct input { const uint8_t *at, *end; };
uint8_t next8(struct input *input);
uint16_t next16(struct input *input);
uint32_t next32(struct input *input);

/* ---- guest.c: two slots side by side, one that the host cannot look at, and a driver that does anything */

enum { PAGES = 24, OPS = 6 };
#define RAM UINT64_C(0x80000000)

struct guest {
    struct pv_vm vm;
    struct pv_interrupt interrupt;
};
extern struct guest guest;

void guest_begin(void);
/* All memory zero and open, all slots there. */
void guest_reset(void);
/* Sets a queue up as the input says, and starts it. */
void guest_queue(struct input *input, struct pv_queue *queue);
/* One thing that a driver or a vCPU may do: write descriptors, make requests available, take memory away. */
void guest_act(struct input *input, struct pv_queue *queue);
/* What holds for every chain that was popped. */
void guest_check(const struct pv_queue *queue, const struct pv_chain *chain);

#endif
