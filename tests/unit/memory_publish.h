/* SPDX-License-Identifier: Apache-2.0 */
/* Makes whoever looks at the map lose its CPU now and then, before it has counted itself and while it looks: what could
   go wrong just there then does. */
#include <unistd.h>

static inline void pause_now_and_then(void)
{
    static __thread unsigned passed;

    if (++passed % 5 == 0)
        usleep(1);
}
#define __atomic_fetch_add(p, v, order) (pause_now_and_then(), __atomic_fetch_add(p, v, order))
#define __atomic_load_n(p, order) \
    ({ __typeof__(*(p) + 0) loaded = __atomic_load_n(p, order); \
       if (order == __ATOMIC_SEQ_CST) pause_now_and_then(); \
       loaded; })
