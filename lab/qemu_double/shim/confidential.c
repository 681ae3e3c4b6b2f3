// SPDX-License-Identifier: Apache-2.0
/* What only a host with SEV-SNP or TDX could answer: the VM's type, and its commands. */
#include "shim.h"

enum { KVM_X86_GRP_SEV = 1 };

/* Of the VM that QEMU creates; it has one at a time. */
static uintptr_t vm_type;
static int kvm_fd = -1, vm_fd = -1;

static int vm_types(int fd)
{
    int result = kernel_ioctl(fd, KVM_CHECK_EXTENSION, (void *)KVM_CAP_VM_TYPES);

    return result < 0 ? result : result | 1 << KVM_X86_SNP_VM | 1 << KVM_X86_TDX_VM;
}

static int create_vm(int fd, uintptr_t type)
{
    uintptr_t real = type;

    if (type == KVM_X86_SNP_VM || type == KVM_X86_TDX_VM)
        real = pretending ? KVM_X86_DEFAULT_VM : KVM_X86_SW_PROTECTED_VM;
    vm_type = type;
    kvm_fd = fd;
    vm_fd = kernel_ioctl(fd, KVM_CREATE_VM, (void *)real);
    log_call("create_vm of type %lu for %lu: %d", real, type, vm_fd);
    return vm_fd;
}

/* TDX has commands for vCPUs too, so the descriptor is not always the VM's. */
static int encrypt_op(void *argument)
{
    if (!argument) /* "is there any memory encryption?" */
        return 0;
    if (vm_type == KVM_X86_TDX_VM)
        return tdx_command(kvm_fd, vm_fd, argument);
    return snp_command(vm_fd, argument);
}

bool confidential_ioctl(int fd, unsigned long request, void *argument, int *result)
{
    switch (request) {
    case KVM_CHECK_EXTENSION:
        if ((uintptr_t)argument != KVM_CAP_VM_TYPES)
            return false;
        *result = vm_types(fd);
        return true;
    case KVM_CREATE_VM:
        *result = create_vm(fd, (uintptr_t)argument);
        return true;
    case KVM_SET_USER_MEMORY_REGION2:
        tdx_note_slot(argument);
        return false;
    case KVM_MEMORY_ENCRYPT_OP:
        *result = encrypt_op(argument);
        return true;
    case KVM_MEMORY_ENCRYPT_REG_REGION:
    case KVM_MEMORY_ENCRYPT_UNREG_REGION:
        *result = 0;
        return true;
    case KVM_HAS_DEVICE_ATTR:
    case KVM_GET_DEVICE_ATTR:
        if (((struct kvm_device_attr *)argument)->group != KVM_X86_GRP_SEV)
            return false;
        *result = snp_device_attr(argument, request == KVM_GET_DEVICE_ATTR);
        return true;
    case SEV_ISSUE_CMD:
        *result = snp_issue_cmd(argument);
        return true;
    }
    return false;
}
