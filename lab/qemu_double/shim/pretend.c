// SPDX-License-Identifier: Apache-2.0
/*
 * What a KVM without private memory is made to say.
 *
 * The VM is a plain one. guest_memfd is a memfd that no slot has, attributes are taken and
 * forgotten, and the guest always runs on the shared side. It asks for a conversion by OUT to
 * DOORBELL with rax, rbx, rcx, rsi as number, address, pages, attributes: a KVM may have no VMMCALL
 * for its guests (one with paravirtual paging hangs in it). QEMU sees KVM_EXIT_HYPERCALL, and rax
 * has the answer when the guest goes on.
 */
#define _GNU_SOURCE
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "shim.h"

enum { DOORBELL = 0x12b0, MAX_FD = 4096 };
enum { RAX = 0, RBX = 1, RCX = 2, RSI = 4, REGS = 18 }; /* struct kvm_regs */

/* By the vCPU's file descriptor: it has asked, and gets its answer when it goes on. */
static bool asked[MAX_FD];

static int run_vcpu(int fd)
{
    struct kvm_run *run = fd < MAX_FD ? vcpus_run(fd) : NULL;
    uint64_t regs[REGS];
    int result;

    if (run && asked[fd]) {
        asked[fd] = false;
        if (syscall(SYS_ioctl, fd, KVM_GET_REGS, regs))
            return -1;
        regs[RAX] = run->hypercall.ret;
        if (syscall(SYS_ioctl, fd, KVM_SET_REGS, regs))
            return -1;
    }
    result = syscall(SYS_ioctl, fd, KVM_RUN, NULL);
    if (result || !run || run->exit_reason != KVM_EXIT_IO)
        return result;
    if (run->io.port != DOORBELL || !run->io.direction)
        return result;
    if (syscall(SYS_ioctl, fd, KVM_GET_REGS, regs))
        return -1;
    run->exit_reason = KVM_EXIT_HYPERCALL;
    memset(&run->hypercall, 0, sizeof(run->hypercall));
    run->hypercall.nr = regs[RAX];
    run->hypercall.args[0] = regs[RBX];
    run->hypercall.args[1] = regs[RCX];
    run->hypercall.args[2] = regs[RSI];
    run->hypercall.flags = 1; /* KVM_EXIT_HYPERCALL_LONG_MODE */
    asked[fd] = true;
    return 0;
}

static int create_guest_memfd(const uint64_t *size)
{
    int fd = syscall(SYS_memfd_create, "guest_memfd", 0);

    if (fd >= 0 && ftruncate(fd, *size)) {
        close(fd);
        return -1;
    }
    return fd;
}

static int set_slot(int fd, const void *region)
{
    uint32_t plain[40];

    memcpy(plain, region, sizeof(plain));
    plain[1] &= ~(uint32_t)KVM_MEM_GUEST_MEMFD; /* flags */
    return syscall(SYS_ioctl, fd, KVM_SET_USER_MEMORY_REGION2, plain);
}

static bool check_extension(uintptr_t capability, int *result)
{
    switch (capability) {
    case KVM_CAP_MEMORY_ATTRIBUTES:
        *result = KVM_MEMORY_ATTRIBUTE_PRIVATE;
        return true;
    case KVM_CAP_EXIT_HYPERCALL:
        *result = 1 << KVM_HC_MAP_GPA_RANGE;
        return true;
    case KVM_CAP_USER_MEMORY2:
    case KVM_CAP_GUEST_MEMFD:
        *result = 1;
        return true;
    }
    return false;
}

bool pretend_ioctl(int fd, unsigned long request, void *argument, int *result)
{
    switch (request) {
    case KVM_CHECK_EXTENSION:
        return check_extension((uintptr_t)argument, result);
    case KVM_ENABLE_CAP:
        *result = 0;
        return *(uint32_t *)argument == KVM_CAP_EXIT_HYPERCALL;
    case KVM_RUN:
        *result = run_vcpu(fd);
        return true;
    case KVM_CREATE_GUEST_MEMFD:
        *result = create_guest_memfd(argument);
        return true;
    case KVM_SET_USER_MEMORY_REGION2:
        *result = set_slot(fd, argument);
        return true;
    case KVM_SET_MEMORY_ATTRIBUTES:
        *result = 0;
        return true;
    }
    return false;
}
