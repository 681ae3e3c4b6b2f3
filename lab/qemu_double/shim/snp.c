// SPDX-License-Identifier: Apache-2.0
/*
 * Answers that only a host with SEV-SNP could give: the VM's type, the launch of a guest, the
 * firmware's state.
 */
#include <errno.h>
#include <string.h>

#include "shim.h"

enum {
    KVM_SEV_INIT2 = 22,
    KVM_SEV_SNP_LAUNCH_START = 100,
    KVM_SEV_SNP_LAUNCH_UPDATE = 101,
    KVM_SEV_SNP_LAUNCH_FINISH = 102,
};
enum { KVM_SEV_SNP_PAGE_TYPE_NORMAL = 1 };
enum { KVM_X86_GRP_SEV = 1, KVM_X86_SEV_VMSA_FEATURES = 0, KVM_X86_SNP_POLICY_BITS = 1 };
enum { SEV_PLATFORM_STATUS = 1, SEV_STATE_INIT = 1, SEV_CONFIG_ES = 1 << 8 };
enum { SEV_FEATURES_SNP_ACTIVE = 1 };

struct kvm_sev_cmd {
    uint32_t id, pad;
    uint64_t data;
    uint32_t error, sev_fd;
};
struct kvm_sev_snp_launch_update {
    uint64_t gfn_start, uaddr, len;
    uint8_t type, pad0;
    uint16_t flags;
    uint32_t pad1;
    uint64_t pad2[4];
};
struct kvm_device_attr {
    uint32_t flags, group;
    uint64_t attr, addr;
};
struct __attribute__((packed)) sev_issue_cmd {
    uint32_t cmd;
    uint64_t data;
    uint32_t error;
};
struct __attribute__((packed)) sev_user_data_status {
    uint8_t api_major, api_minor, state;
    uint32_t flags;
    uint8_t build;
    uint32_t guest_count;
};

/*
 * What KVM would take from the caller's buffer it counts off there: the caller goes on until
 * nothing is left.
 */
static int launch_update(int vm, struct kvm_sev_snp_launch_update *update)
{
    struct kvm_memory_attributes shared = {
        .address = update->gfn_start << 12,
        .size = update->len,
    };

    log_call("launch_update %#lx size %#lx type %u", shared.address, shared.size, update->type);
    if (update->type == KVM_SEV_SNP_PAGE_TYPE_NORMAL) {
        int result = kernel_ioctl(vm, KVM_SET_MEMORY_ATTRIBUTES, &shared);

        if (result)
            return result;
    }
    update->gfn_start += update->len >> 12;
    update->uaddr += update->len;
    update->len = 0;
    return 0;
}

static int encrypt_op(int vm, struct kvm_sev_cmd *command)
{
    if (!command) /* "is there any memory encryption?" */
        return 0;
    command->error = 0;
    switch (command->id) {
    case KVM_SEV_INIT2:
    case KVM_SEV_SNP_LAUNCH_START:
    case KVM_SEV_SNP_LAUNCH_FINISH:
        log_call("encrypt_op %u", command->id);
        return 0;
    case KVM_SEV_SNP_LAUNCH_UPDATE:
        return launch_update(vm, (void *)(uintptr_t)command->data);
    }
    log_call("encrypt_op %u is unknown", command->id);
    errno = EINVAL;
    return -1;
}

static int device_attr(const struct kvm_device_attr *attr, bool get)
{
    if (get && attr->attr == KVM_X86_SEV_VMSA_FEATURES)
        *(uint64_t *)(uintptr_t)attr->addr = SEV_FEATURES_SNP_ACTIVE;
    if (get && attr->attr == KVM_X86_SNP_POLICY_BITS)
        *(uint64_t *)(uintptr_t)attr->addr = ~0UL;
    return 0;
}

static int issue_cmd(struct sev_issue_cmd *issue)
{
    /* A version that QEMU takes for SNP. */
    const struct sev_user_data_status status = {
        .api_major = 1,
        .api_minor = 55,
        .state = SEV_STATE_INIT,
        .flags = SEV_CONFIG_ES,
        .build = 21,
    };

    log_call("sev_issue_cmd %u", issue->cmd);
    issue->error = 0;
    if (issue->cmd == SEV_PLATFORM_STATUS)
        memcpy((void *)(uintptr_t)issue->data, &status, sizeof(status));
    return 0;
}

bool snp_ioctl(int fd, unsigned long request, void *argument, int *result)
{
    uintptr_t number = (uintptr_t)argument;

    switch (request) {
    case KVM_CHECK_EXTENSION:
        if (number != KVM_CAP_VM_TYPES)
            return false;
        *result = kernel_ioctl(fd, request, argument);
        if (*result >= 0)
            *result |= 1 << KVM_X86_SNP_VM;
        return true;
    case KVM_CREATE_VM:
        if (number != KVM_X86_SNP_VM)
            return false;
        number = pretending ? KVM_X86_DEFAULT_VM : KVM_X86_SW_PROTECTED_VM;
        *result = kernel_ioctl(fd, request, (void *)number);
        log_call("create_vm of type %lu: %d", (unsigned long)number, *result);
        return true;
    case KVM_MEMORY_ENCRYPT_OP:
        *result = encrypt_op(fd, argument);
        return true;
    case KVM_MEMORY_ENCRYPT_REG_REGION:
    case KVM_MEMORY_ENCRYPT_UNREG_REGION:
        *result = 0;
        return true;
    case KVM_HAS_DEVICE_ATTR:
    case KVM_GET_DEVICE_ATTR:
        if (((struct kvm_device_attr *)argument)->group != KVM_X86_GRP_SEV)
            return false;
        *result = device_attr(argument, request == KVM_GET_DEVICE_ATTR);
        return true;
    case SEV_ISSUE_CMD:
        *result = issue_cmd(argument);
        return true;
    }
    return false;
}
