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
enum { KVM_X86_SEV_VMSA_FEATURES = 0, KVM_X86_SNP_POLICY_BITS = 1 };
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
 * KVM counts the pages that it has taken off the caller's range. The caller repeats until none is
 * left.
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

int snp_command(int vm, void *argument)
{
    struct kvm_sev_cmd *command = argument;

    command->error = 0;
    switch (command->id) {
    case KVM_SEV_INIT2:
    case KVM_SEV_SNP_LAUNCH_START:
    case KVM_SEV_SNP_LAUNCH_FINISH:
        log_call("sev command %u", command->id);
        return 0;
    case KVM_SEV_SNP_LAUNCH_UPDATE:
        return launch_update(vm, (void *)(uintptr_t)command->data);
    }
    log_call("sev command %u is unknown", command->id);
    errno = EINVAL;
    return -1;
}

int snp_device_attr(const void *argument, bool get)
{
    const struct kvm_device_attr *attr = argument;

    if (get && attr->attr == KVM_X86_SEV_VMSA_FEATURES)
        *(uint64_t *)(uintptr_t)attr->addr = SEV_FEATURES_SNP_ACTIVE;
    if (get && attr->attr == KVM_X86_SNP_POLICY_BITS)
        *(uint64_t *)(uintptr_t)attr->addr = ~0UL;
    return 0;
}

int snp_issue_cmd(void *argument)
{
    struct sev_issue_cmd *issue = argument;
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
