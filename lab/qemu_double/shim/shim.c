// SPDX-License-Identifier: Apache-2.0
/*
 * KVM's SEV-SNP and TDX interfaces, as far as QEMU uses them, on a KVM that has neither.
 *
 * Preloaded into an unchanged QEMU it lets "-object sev-snp-guest" and "-object tdx-guest" start on
 * an ordinary machine. Two ways:
 *
 *   real      The VM that QEMU asks for becomes a software-protected one (KVM_X86_SW_PROTECTED_VM).
 *             guest_memfd, memory attributes, slots, hypercall exits, VFIO and iommufd are the
 *             kernel's own; confidential.c, snp.c and tdx.c answer the rest.
 *   pretend   For any KVM: pretend.c. QEMU's own steps are the same; KVM's are not there.
 *
 * What differs from a host with either:
 *   - Nothing is encrypted or measured.
 *   - A software-protected VM has no way to fill private memory before it runs. The
 *     firmware's pages are made shared in KVM again, so that the guest runs it from QEMU's copy.
 *     QEMU takes them for private. Other pages that a launch fills stay private, and are zero.
 *
 * Environment: RAMBLOCK_SHIM_PRETEND=1, RAMBLOCK_SHIM_FAULTS=FILE (faults.c),
 * RAMBLOCK_SHIM_LOG=FILE (log.c).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "shim.h"

bool pretending;

__attribute__((constructor)) static void start(void)
{
    const char *way = getenv("RAMBLOCK_SHIM_PRETEND");

    pretending = way && !strcmp(way, "1");
    log_open(getenv("RAMBLOCK_SHIM_LOG"));
    faults_open(getenv("RAMBLOCK_SHIM_FAULTS"));
}

int kernel_ioctl(int fd, unsigned long request, void *argument)
{
    int result;

    if (!pretending || !pretend_ioctl(fd, request, argument, &result))
        result = syscall(SYS_ioctl, fd, request, argument);
    if (request == KVM_CREATE_VCPU)
        vcpus_add(result);
    if (request == KVM_RUN && !result)
        vcpus_note_exit(fd);
    return result;
}

/* The call that fails is not made: the kernel's state is what it was. */
static int fail(int error)
{
    errno = error;
    return -1;
}

static int fault_of_ioctl(unsigned long request, void *argument)
{
    switch (request) {
    case VFIO_IOMMU_MAP_DMA:
    case IOMMU_IOAS_MAP:
    case IOMMU_IOAS_MAP_FILE:
        return fault_of(FAULT_MAP);
    case VFIO_IOMMU_UNMAP_DMA:
    case IOMMU_IOAS_UNMAP:
        return fault_of(FAULT_UNMAP);
    case KVM_SET_MEMORY_ATTRIBUTES: {
        struct kvm_memory_attributes *set = argument;

        log_call("attributes %#lx size %#lx -> %#lx", set->address, set->size, set->attributes);
        return fault_of(set->attributes ? FAULT_TO_PRIVATE : FAULT_TO_SHARED);
    }
    }
    return 0;
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list list;
    void *argument;
    int error, result;

    va_start(list, request);
    argument = va_arg(list, void *);
    va_end(list);
    request &= 0xffffffffUL; /* QEMU passes an int, whose sign would be extended */

    error = fault_of_ioctl(request, argument);
    if (error)
        return fail(error);
    if (confidential_ioctl(fd, request, argument, &result))
        return result;
    return kernel_ioctl(fd, request, argument);
}

int fallocate64(int fd, int mode, off64_t offset, off64_t size)
{
    int error = mode & FALLOC_FL_PUNCH_HOLE ? fault_of(FAULT_PUNCH) : 0;

    return error ? fail(error) : syscall(SYS_fallocate, fd, mode, offset, size);
}

int fallocate(int fd, int mode, off_t offset, off_t size)
{
    return fallocate64(fd, mode, offset, size);
}

int madvise(void *address, size_t size, int advice)
{
    int error = advice == MADV_REMOVE || advice == MADV_DONTNEED ? fault_of(FAULT_MADVISE) : 0;

    return error ? fail(error) : syscall(SYS_madvise, address, size, advice);
}
