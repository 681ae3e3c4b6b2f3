// SPDX-License-Identifier: Apache-2.0
/*
 * Calls that a test makes fail. The table is a file that the test has mapped too: it arms a fault
 * at any moment, and reads how many calls there were. lab/qemu_double/faults.py has the same
 * layout.
 */
#include <fcntl.h>
#include <stddef.h>
#include <sys/mman.h>
#include <unistd.h>

#include "shim.h"

struct entry {
    uint32_t skip;   /* calls that still go through */
    uint32_t count;  /* calls after them that fail */
    uint32_t error;  /* with this errno */
    uint32_t calls;  /* seen so far */
    uint32_t failed; /* of them */
};

static struct entry *table;

void faults_open(const char *path)
{
    void *at = MAP_FAILED;
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;

    if (fd >= 0) {
        at = mmap(NULL, FAULTS * sizeof(*table), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        close(fd);
    }
    table = at == MAP_FAILED ? NULL : at;
}

/* Counts one down unless it is zero. Several threads of QEMU may be here at once. */
static bool take(uint32_t *number)
{
    const int order = __ATOMIC_SEQ_CST;
    uint32_t now = __atomic_load_n(number, order);

    while (now)
        if (__atomic_compare_exchange_n(number, &now, now - 1, false, order, order))
            return true;
    return false;
}

int fault_of(enum fault fault)
{
    struct entry *entry = table ? &table[fault] : NULL;

    if (!entry)
        return 0;
    __atomic_fetch_add(&entry->calls, 1, __ATOMIC_SEQ_CST);
    if (take(&entry->skip) || !take(&entry->count))
        return 0;
    __atomic_fetch_add(&entry->failed, 1, __ATOMIC_SEQ_CST);
    log_call("fault %d: errno %u", fault, entry->error);
    return entry->error;
}
