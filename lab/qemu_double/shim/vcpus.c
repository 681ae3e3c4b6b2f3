// SPDX-License-Identifier: Apache-2.0
/*
 * The exits of vCPUs that end a guest, told in the log: QEMU itself ends with exit code 0 and no word
 * at a triple fault.
 */
#define _GNU_SOURCE
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "shim.h"

enum { MAX_FD = 4096 };
enum { RSP = 7, RIP = 16, RFLAGS = 17, REGS = 18 }; /* struct kvm_regs */

/* By file descriptor. Each is used by its own vCPU's thread. */
static struct kvm_run *runs[MAX_FD];

void vcpus_add(int fd)
{
    void *run;

    if (fd < 0 || fd >= MAX_FD)
        return;
    run = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    runs[fd] = run == MAP_FAILED ? NULL : run;
}

struct kvm_run *vcpus_run(int fd)
{
    return fd >= 0 && fd < MAX_FD ? runs[fd] : NULL;
}

void vcpus_note_exit(int fd)
{
    const struct kvm_run *run = vcpus_run(fd);
    uint64_t regs[REGS];

    if (!run)
        return;
    switch (run->exit_reason) {
    case KVM_EXIT_SHUTDOWN:
        /* On AMD the registers are those of a vCPU that was reset: KVM has nothing better. */
        memset(regs, 0, sizeof(regs));
        syscall(SYS_ioctl, fd, KVM_GET_REGS, regs);
        log_call("vcpu %d: triple fault; now rip %#lx rsp %#lx rflags %#lx", fd, regs[RIP],
                 regs[RSP], regs[RFLAGS]);
        break;
    case KVM_EXIT_FAIL_ENTRY:
        log_call("vcpu %d: entry failed: %#lx", fd, run->entry_failure);
        break;
    case KVM_EXIT_INTERNAL_ERROR:
        log_call("vcpu %d: internal error %u", fd, run->suberror);
        break;
    case KVM_EXIT_SYSTEM_EVENT:
        log_call("vcpu %d: system event %u", fd, run->system_event);
        break;
    }
}
