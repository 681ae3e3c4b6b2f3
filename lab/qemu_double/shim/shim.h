/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The parts of the shim, and the numbers of the kernel's interfaces that it answers for.
 *
 * The numbers stand here rather than come from the machine's headers, which may be older than
 * guest_memfd (Linux 6.8), SEV-SNP (6.11) and IOMMU_IOAS_MAP_FILE. Names and sources:
 * include/uapi/linux/kvm.h, psp-sev.h, vfio.h and iommufd.h, arch/x86/include/uapi/asm/kvm.h.
 */
#ifndef SHIM_H
#define SHIM_H

#include <stdbool.h>
#include <stdint.h>

#define IOC(dir, type, nr, size) \
    (((unsigned long)(dir) << 30) | ((unsigned long)(size) << 16) | ((type) << 8) | (nr))
#define KVM_CREATE_VM IOC(0, 0xAE, 0x01, 0)
#define KVM_CHECK_EXTENSION IOC(0, 0xAE, 0x03, 0)
#define KVM_CREATE_VCPU IOC(0, 0xAE, 0x41, 0)
#define KVM_SET_USER_MEMORY_REGION2 IOC(1, 0xAE, 0x49, 160)
#define KVM_RUN IOC(0, 0xAE, 0x80, 0)
#define KVM_GET_REGS IOC(2, 0xAE, 0x81, 144)
#define KVM_SET_REGS IOC(1, 0xAE, 0x82, 144)
#define KVM_ENABLE_CAP IOC(1, 0xAE, 0xa3, 104)
#define KVM_MEMORY_ENCRYPT_OP IOC(3, 0xAE, 0xba, 8)
#define KVM_MEMORY_ENCRYPT_REG_REGION IOC(2, 0xAE, 0xbb, 16)
#define KVM_MEMORY_ENCRYPT_UNREG_REGION IOC(2, 0xAE, 0xbc, 16)
#define KVM_SET_MEMORY_ATTRIBUTES IOC(1, 0xAE, 0xd2, 32)
#define KVM_CREATE_GUEST_MEMFD IOC(3, 0xAE, 0xd4, 64)
#define KVM_GET_DEVICE_ATTR IOC(1, 0xAE, 0xe2, 24)
#define KVM_HAS_DEVICE_ATTR IOC(1, 0xAE, 0xe3, 24)
#define SEV_ISSUE_CMD IOC(3, 'S', 0, 16)
/* VFIO and iommufd encode neither direction nor size. */
#define VFIO_IOMMU_MAP_DMA IOC(0, ';', 113, 0)
#define VFIO_IOMMU_UNMAP_DMA IOC(0, ';', 114, 0)
#define IOMMU_IOAS_MAP IOC(0, ';', 0x85, 0)
#define IOMMU_IOAS_UNMAP IOC(0, ';', 0x86, 0)
#define IOMMU_IOAS_MAP_FILE IOC(0, ';', 0x8f, 0)

enum {
    KVM_CAP_EXIT_HYPERCALL = 201,
    KVM_CAP_USER_MEMORY2 = 231,
    KVM_CAP_MEMORY_ATTRIBUTES = 233,
    KVM_CAP_GUEST_MEMFD = 234,
    KVM_CAP_VM_TYPES = 235,
};
enum {
    KVM_X86_DEFAULT_VM = 0,
    KVM_X86_SW_PROTECTED_VM = 1,
    KVM_X86_SNP_VM = 4,
    KVM_X86_TDX_VM = 5,
};
enum {
    KVM_MEM_GUEST_MEMFD = 1 << 2,
    KVM_MEMORY_ATTRIBUTE_PRIVATE = 1 << 3,
    KVM_HC_MAP_GPA_RANGE = 12,
};

struct kvm_memory_attributes {
    uint64_t address, size, attributes, flags;
};

struct kvm_device_attr {
    uint32_t flags, group;
    uint64_t attr, addr;
};

enum {
    KVM_EXIT_IO = 2,
    KVM_EXIT_HYPERCALL = 3,
    KVM_EXIT_SHUTDOWN = 8,
    KVM_EXIT_FAIL_ENTRY = 9,
    KVM_EXIT_INTERNAL_ERROR = 17,
    KVM_EXIT_SYSTEM_EVENT = 24,
};

struct kvm_run {
    uint8_t head[8];
    uint32_t exit_reason, more;
    uint64_t cr8, apic_base;
    union {
        struct {
            uint8_t direction, size;
            uint16_t port;
            uint32_t count;
            uint64_t offset;
        } io;
        struct {
            uint64_t nr, args[6], ret, flags;
        } hypercall;
        uint64_t entry_failure;
        uint32_t suberror, system_event;
    };
};

/* vcpus.c: what a vCPU and the kernel share, and the exits that end a guest. */
void vcpus_add(int fd);
struct kvm_run *vcpus_run(int fd); /* NULL: fd is no vCPU */
void vcpus_note_exit(int fd);

/* faults.c: calls that a test makes fail. The order is that of the table shared with faults.py. */
enum fault {
    FAULT_MAP,
    FAULT_UNMAP,
    FAULT_TO_PRIVATE,
    FAULT_TO_SHARED,
    FAULT_PUNCH,
    FAULT_MADVISE,
    FAULTS,
};
void faults_open(const char *path);
int fault_of(enum fault fault); /* the errno that this call has to fail with; 0: none */

/* log.c: a line about a VM, a launch, attributes, a fault or a vCPU's end. */
void log_open(const char *path);
void log_call(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* shim.c: the real system calls, or what a plain KVM is made to say. */
int kernel_ioctl(int fd, unsigned long request, void *argument);
extern bool pretending;

/* pretend.c: 1: *result is the answer. */
bool pretend_ioctl(int fd, unsigned long request, void *argument, int *result);

/* confidential.c: answers that only a host with SEV-SNP or TDX could give. */
bool confidential_ioctl(int fd, unsigned long request, void *argument, int *result);

/* snp.c */
int snp_command(int vm, void *argument);
int snp_device_attr(const void *argument, bool get);
int snp_issue_cmd(void *argument);

/* tdx.c */
int tdx_command(int kvm, int vm, void *argument);
void tdx_note_slot(const void *region);

#endif
