# SPDX-License-Identifier: Apache-2.0
"""
The signal that takes a vCPU out of the guest.

It is blocked in the threads that run vCPUs and let through only inside KVM_RUN
(KVM_SET_SIGNAL_MASK), which it ends with EINTR. So it needs no handler, which Python would install
for the whole process and from the main thread only, and one that comes just before KVM_RUN is not
lost: it waits. The price, a few locks per KVM_RUN, does not show beside Python.
"""

from __future__ import annotations

import ctypes
import signal
import struct
from collections.abc import Iterable

from ramblock.kvm.descriptor import Descriptor
from ramblock.uapi.kvm import KVM_SET_SIGNAL_MASK

__all__ = ["discard_kick", "enter_thread", "send_kick", "set_mask"]

# The first that the C library leaves to programs; crosvm and Cloud Hypervisor use it for the same
# thing.
_KICK = signal.SIGRTMIN

# sizeof(sigset_t) of the kernel, not of the C library.
_MASK_BYTES = 8


def enter_thread() -> frozenset[int]:
    """
    Block the signal in the calling thread, from now on.

    Called before each run: somebody may have put an older mask back.

    :return: Other signals that are blocked there.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {_KICK})
    return frozenset(int(number) for number in before) - {_KICK}


def set_mask(vcpu: Descriptor, blocked: Iterable[int]) -> None:
    """Set which signals are blocked inside KVM_RUN."""
    mask = sum(1 << (number - 1) for number in blocked)
    data = struct.pack("=IQ", _MASK_BYTES, mask)
    vcpu.call(
        KVM_SET_SIGNAL_MASK, "KVM_SET_SIGNAL_MASK", ctypes.create_string_buffer(data, len(data))
    )


def send_kick(thread: int) -> None:
    """Send it to a live thread that has called :func:`enter_thread`, by ``get_ident()``."""
    signal.pthread_kill(thread, _KICK)


def discard_kick() -> None:
    """Take the signal off the calling thread, if it waits there."""
    signal.sigtimedwait({_KICK}, 0)
