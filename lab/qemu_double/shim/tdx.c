// SPDX-License-Identifier: Apache-2.0
/*
 * Answers that only a host with TDX could give: what the module supports, and the launch of a
 * guest.
 *
 * KVM would copy the firmware into private memory, and QEMU frees its own copy before the guest
 * runs. Here the guest has only that copy. So it is kept, and put back when the launch ends.
 */
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "shim.h"

#define KVM_GET_SUPPORTED_CPUID IOC(3, 0xAE, 0x05, 8)

enum {
    KVM_TDX_CAPABILITIES = 0,
    KVM_TDX_INIT_VM = 1,
    KVM_TDX_INIT_VCPU = 2,
    KVM_TDX_INIT_MEM_REGION = 3,
    KVM_TDX_FINALIZE_VM = 4,
    KVM_TDX_GET_CPUID = 5,
};
enum { PAGE_SIZE = 4096, MAX_ENTRIES = 256, MAX_SLOTS = 64 };

struct kvm_tdx_cmd {
    uint32_t id, flags;
    uint64_t data, hw_error;
};
struct kvm_cpuid2 {
    uint32_t nent, padding;
    struct {
        uint32_t function, index, flags, eax, ebx, ecx, edx, padding[3];
    } entries[MAX_ENTRIES];
};
struct kvm_tdx_capabilities {
    uint64_t supported_attrs, supported_xfam, tdvmcallinfo[4], reserved[250];
    struct kvm_cpuid2 cpuid; /* with as many entries as the caller has room for */
};
struct kvm_tdx_init_mem_region {
    uint64_t source_addr, gpa, nr_pages;
};
struct kvm_userspace_memory_region2 {
    uint32_t slot, flags;
    uint64_t guest_phys_addr, memory_size, userspace_addr;
};

static struct kvm_userspace_memory_region2 slots[MAX_SLOTS];
static struct {
    uint64_t gpa, size;
    void *bytes;
} firmware;

static int fail(int error)
{
    errno = error;
    return -1;
}

/* The caller tries again with the number of entries that it is told. */
static int cpuid(int kvm, struct kvm_cpuid2 *answer, bool every_bit)
{
    static struct kvm_cpuid2 found;

    found.nent = MAX_ENTRIES;
    if (syscall(SYS_ioctl, kvm, KVM_GET_SUPPORTED_CPUID, &found))
        return -1;
    if (answer->nent < found.nent) {
        answer->nent = found.nent;
        return fail(E2BIG);
    }
    for (uint32_t i = 0; every_bit && i < found.nent; i++) {
        found.entries[i].eax = found.entries[i].ebx = ~0U;
        found.entries[i].ecx = found.entries[i].edx = ~0U;
    }
    memcpy(answer, &found, offsetof(struct kvm_cpuid2, entries[found.nent]));
    return 0;
}

static int capabilities(int kvm, struct kvm_tdx_capabilities *answer)
{
    answer->supported_attrs = answer->supported_xfam = ~0UL;
    return cpuid(kvm, &answer->cpuid, true);
}

static int init_mem_region(int vm, const struct kvm_tdx_init_mem_region *region)
{
    uint64_t size = region->nr_pages * PAGE_SIZE;
    struct kvm_memory_attributes shared = { .address = region->gpa, .size = size };

    log_call("init_mem_region %#lx size %#lx", region->gpa, size);
    if (region->gpa + size != 1UL << 32)
        return 0; /* not the firmware, which alone ends there: it stays private, and zero */
    free(firmware.bytes);
    firmware.bytes = malloc(size);
    if (!firmware.bytes)
        return fail(ENOMEM);
    firmware.gpa = region->gpa;
    firmware.size = size;
    memcpy(firmware.bytes, (void *)(uintptr_t)region->source_addr, size);
    return kernel_ioctl(vm, KVM_SET_MEMORY_ATTRIBUTES, &shared);
}

static void *host_address(uint64_t gpa)
{
    for (int i = 0; i < MAX_SLOTS; i++) {
        uint64_t offset = gpa - slots[i].guest_phys_addr;

        if (slots[i].memory_size && offset < slots[i].memory_size)
            return (void *)(uintptr_t)(slots[i].userspace_addr + offset);
    }
    return NULL;
}

static int finalize(void)
{
    void *at = firmware.bytes ? host_address(firmware.gpa) : NULL;

    if (!at)
        return fail(EINVAL);
    memcpy(at, firmware.bytes, firmware.size);
    return 0;
}

void tdx_note_slot(const void *argument)
{
    const struct kvm_userspace_memory_region2 *region = argument;

    /* The upper half of the number is the address space. */
    if (region->slot < MAX_SLOTS)
        slots[region->slot] = *region;
}

int tdx_command(int kvm, int vm, void *argument)
{
    struct kvm_tdx_cmd *command = argument;
    void *data = (void *)(uintptr_t)command->data;

    command->hw_error = 0;
    switch (command->id) {
    case KVM_TDX_CAPABILITIES:
        return capabilities(kvm, data);
    case KVM_TDX_GET_CPUID:
        return cpuid(kvm, data, false);
    case KVM_TDX_INIT_MEM_REGION:
        return init_mem_region(vm, data);
    case KVM_TDX_FINALIZE_VM:
        return finalize();
    case KVM_TDX_INIT_VM:
    case KVM_TDX_INIT_VCPU:
        log_call("tdx command %u", command->id);
        return 0;
    }
    log_call("tdx command %u is unknown", command->id);
    return fail(EINVAL);
}
