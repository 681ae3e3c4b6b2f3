# SPDX-License-Identifier: Apache-2.0
"""
The lab: a virtual machine in which the whole stack runs for real, on any x86-64 machine.

QEMU emulates everything (no KVM of the host is used): a CPU with SVM, so that the guest's kernel
has a real KVM; a VT-d or AMD-Vi; two PCI devices that do DMA. The guest's root is the host's file
system, read-only.

``python -m lab build`` makes what is needed in the user's cache: a kernel (``kernel``), a QEMU
(``emulator``) and virtme-ng (``virtme``). ``boot`` runs one command in it and ``test`` the tests of
``tests/lab`` in each variant (``variants``).

Nothing here imports ramblock, and nothing but the standard library is needed.
"""
