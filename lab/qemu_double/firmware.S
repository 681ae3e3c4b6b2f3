# SPDX-License-Identifier: Apache-2.0
# A firmware of 64 KiB that carries out orders from COM1.
#
# It runs in 64-bit mode, identity-mapped (8 GiB), out of its own image: page tables, stack and code
# are all in it, so that the guest's RAM holds nothing but what it was ordered to put there. QEMU
# gives the firmware of a confidential guest writable memory.
#
# An order is a letter and four numbers a, b, c, d, each as one byte that counts the bytes that
# follow, and those, little-endian: most orders fit into the 16 bytes that the port takes at once.
# The answer has 8 bytes. At the start, and after each reset, the firmware writes "W_ready\n" once.
# orders.py has the other side.
#
#   letter  order                                                        answer
#   p       ping                                                         a
#   c       VMMCALL: rax=a rbx=b rcx=c rdx=d                              rax
#   d       OUT to port 0x12b0: rax=a rbx=b rcx=c rsi=d (shim/pretend.c)  rax
#   i       IN from port a, b bytes                                      what was read
#   o       OUT to port a, b bytes: c                                    -
#   r       read b bytes (4, 8) at a                                     what was read
#   w       write b bytes (1, 2, 4, 8) at a: c                           -
#   f       write c + its own address to the first word of b pages at a  -
#   s       count those of b pages at a whose first word is still that   count
#   z       count those of b pages at a whose first word is zero         count
#   other                                                                -1

    .set BASE, 0xffff0000             # the last 64 KiB below 4 GiB, where the processor starts
    .set COM1, 0x3f8
    .set DOORBELL, 0x12b0

    .code16
    .section .text
    .globl _start
_start:

    .org 0x0000                       # page map level 4
    .quad BASE + 0x1000 + 0x3
    .org 0x1000                       # page directory pointers: 8 GiB
    .set i, 0
    .rept 8
    .quad BASE + 0x2000 + (i << 12) + 0x3
    .set i, i + 1
    .endr
    .org 0x2000                       # page directories: 2 MiB a page, as a KVM may have no 1 GiB
    .set i, 0
    .rept 4096
    .quad (i << 21) + 0x83
    .set i, i + 1
    .endr

    .org 0xa000
    .p2align 4
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff          # 0x08: code, 32 bits
    .quad 0x00cf93000000ffff          # 0x10: data
    .quad 0x00af9b000000ffff          # 0x18: code, 64 bits
gdtr:
    .word . - gdt - 1
    .long BASE + 0xa000

start16:
    cli
    lgdtl %cs:(gdtr)
    movl %cr0, %eax
    orl $1, %eax                      # protected mode
    andl $0x9fffffff, %eax            # caches on
    movl %eax, %cr0
    ljmpl $0x08, $(BASE + start32)

    .code32
start32:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $0x20, %eax                  # CR4.PAE
    movl %eax, %cr4
    movl $BASE, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx            # EFER.LME
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl %cr0, %eax
    orl $0x80000000, %eax             # CR0.PG
    movl %eax, %cr0
    ljmpl $0x18, $(BASE + start64)

    .code64
start64:
    movl $(BASE + 0xe000), %esp
    movw $COM1 + 3, %dx               # divisor 1, 8N1, FIFO
    movb $0x80, %al
    outb %al, %dx
    movw $COM1, %dx
    movb $1, %al
    outb %al, %dx
    incl %edx
    movb $0, %al
    outb %al, %dx
    movw $COM1 + 3, %dx
    movb $3, %al
    outb %al, %dx
    movw $COM1 + 2, %dx
    movb $1, %al
    outb %al, %dx
    movw $COM1 + 4, %dx
    movb $3, %al
    outb %al, %dx
    movq $0x0a79646165725f57, %rax    # "W_ready\n"
    call put8

next_order:
    call get1
    movb %al, %r12b                   # letter
    call get_number
    movq %rax, %r8                    # a
    call get_number
    movq %rax, %r9                    # b
    call get_number
    movq %rax, %r10                   # c
    call get_number
    movq %rax, %r11                   # d
    leaq orders(%rip), %rsi
1:  movzbl (%rsi), %eax               # letter, offset of the code from `orders`
    testb %al, %al
    jz unknown
    cmpb %r12b, %al
    je 2f
    addq $5, %rsi
    jmp 1b
2:  movslq 1(%rsi), %rax
    leaq orders(%rip), %rcx
    addq %rcx, %rax
    jmp *%rax

    .macro order letter, code
    .byte \letter
    .long \code - orders
    .endm
orders:
    order 'p', ping
    order 'c', vmmcall_
    order 'd', doorbell
    order 'i', port_in
    order 'o', port_out
    order 'r', read_memory
    order 'w', write_memory
    order 'f', fill_pages
    order 's', count_filled
    order 'z', count_zero
    .byte 0

unknown:
    movq $-1, %rax
answer:
    call put8
    jmp next_order

ping:
    movq %r8, %rax
    jmp answer

vmmcall_:
    movq %r8, %rax
    movq %r9, %rbx
    movq %r10, %rcx
    movq %r11, %rdx
    xorl %esi, %esi
    vmmcall
    jmp answer

doorbell:
    movq %r8, %rax
    movq %r9, %rbx
    movq %r10, %rcx
    movq %r11, %rsi
    movw $DOORBELL, %dx
    outb %al, %dx
    jmp answer

port_in:
    movw %r8w, %dx
    xorl %eax, %eax
    cmpb $1, %r9b
    je 1f
    cmpb $2, %r9b
    je 2f
    inl %dx, %eax
    jmp answer
1:  inb %dx, %al
    jmp answer
2:  inw %dx, %ax
    jmp answer

port_out:
    movw %r8w, %dx
    movl %r10d, %eax
    cmpb $1, %r9b
    je 1f
    cmpb $2, %r9b
    je 2f
    outl %eax, %dx
    jmp answer
1:  outb %al, %dx
    jmp answer
2:  outw %ax, %dx
    jmp answer

read_memory:
    cmpb $8, %r9b
    je 1f
    movl (%r8), %eax
    jmp answer
1:  movq (%r8), %rax
    jmp answer

write_memory:
    cmpb $1, %r9b
    je 1f
    cmpb $2, %r9b
    je 2f
    cmpb $8, %r9b
    je 3f
    movl %r10d, (%r8)
    jmp answer
1:  movb %r10b, (%r8)
    jmp answer
2:  movw %r10w, (%r8)
    jmp answer
3:  movq %r10, (%r8)
    jmp answer

fill_pages:
    testq %r9, %r9
    jz answer
    leaq (%r8, %r10), %rax
    movq %rax, (%r8)
    addq $4096, %r8
    decq %r9
    jmp fill_pages

count_filled:
    xorl %ebx, %ebx
1:  testq %r9, %r9
    jz 3f
    leaq (%r8, %r10), %rax
    cmpq %rax, (%r8)
    jne 2f
    incq %rbx
2:  addq $4096, %r8
    decq %r9
    jmp 1b
3:  movq %rbx, %rax
    jmp answer

count_zero:
    xorl %ebx, %ebx
1:  testq %r9, %r9
    jz 3f
    cmpq $0, (%r8)
    jne 2f
    incq %rbx
2:  addq $4096, %r8
    decq %r9
    jmp 1b
3:  movq %rbx, %rax
    jmp answer

get1:                                 # -> al
    movw $COM1 + 5, %dx
1:  inb %dx, %al
    testb $1, %al
    jz 2f
    movw $COM1, %dx
    inb %dx, %al
    ret
2:  movl $20, %ecx                    # each look at the port leaves the guest, and costs the host
3:  pause
    loop 3b
    jmp 1b

get_number:                           # -> rax; changes rbx, rcx, rdx, rdi
    call get1
    movzbl %al, %edi                  # bytes that follow
    leal (, %edi, 8), %ebp            # bits
    xorl %ebx, %ebx
    testl %edi, %edi
    jz 2f
1:  call get1
    movzbl %al, %eax
    rorq $8, %rbx
    shlq $56, %rax
    orq %rax, %rbx
    decl %edi
    jnz 1b
    movl $64, %ecx                    # the number is in the upper bytes
    subl %ebp, %ecx
    shrq %cl, %rbx
2:  movq %rbx, %rax
    ret

put8:                                 # rax
    movw $COM1, %dx
    movl $8, %ecx
1:  outb %al, %dx
    shrq $8, %rax
    decl %ecx
    jnz 1b
    ret

    # QEMU looks for a table of GUIDs before the last 32 bytes of the image (OVMF's,
    # hw/i386/pc_sysfw_ovmf.c) and refuses an SNP guest without metadata (target/i386/sev.c): here
    # one page of RAM as SNP_SEC_MEMORY.
    .org 0xe000
metadata:
    .ascii "ASEV"
    .long metadata_end - metadata
    .long 1                           # version
    .long 1                           # entries
    .long 0x1000, 0x1000, 1           # base, size, type
metadata_end:

    # TDX's metadata (TDVF design guide): the firmware itself, a place for the hand-off block that
    # nobody reads, and a page. QEMU insists on the first two.
    .org 0xe100
tdvf:
    .ascii "TDVF"
    .long tdvf_end - tdvf
    .long 1                           # version
    .long 3                           # sections: offset, size; address, size; type, attributes
    .long 0, 0x10000
    .quad BASE, 0x10000
    .long 0, 1                        # BFV, measured
    .long 0, 0
    .quad 0x10000, 0x2000
    .long 2, 0                        # TD_HOB
    .long 0, 0
    .quad 0x20000, 0x1000
    .long 3, 0                        # TEMP_MEM
tdvf_end:

    .org 0x10000 - 48 - 2 - 3 * (4 + 2 + 16)
table:
    .long 0x10000 - 0xe100            # offset of TDX's metadata from the end
    .word 4 + 2 + 16
    .byte 0x35,0x65,0x7a,0xe4,0x4a,0x98,0x98,0x47,0x86,0x5e,0x46,0x85,0xa7,0xbf,0x8e,0xc2
    .long 0x10000 - 0xe000            # offset of SNP's metadata from the end
    .word 4 + 2 + 16
    .byte 0x66,0x65,0x88,0xdc,0x4a,0x98,0x98,0x47,0xa7,0x5e,0x55,0x85,0xa7,0xbf,0x67,0xcc
    .long BASE + 0xfff0               # where other processors start
    .word 4 + 2 + 16
    .byte 0xde,0x71,0xf7,0x00,0x7e,0x1a,0xcb,0x4f,0x89,0x0e,0x68,0xc7,0x7e,0x2f,0xb4,0x4e
    .word . - table + 2 + 16          # the table's length, footer included
    .byte 0xde,0x82,0xb5,0x96,0xb2,0x1f,0xf7,0x45,0xba,0xea,0xa3,0x66,0xc5,0x5a,0x08,0x2d

    .org 0x10000 - 16
    .code16
reset:
    jmp start16
    .org 0x10000
