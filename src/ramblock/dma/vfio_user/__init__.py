# SPDX-License-Identifier: Apache-2.0
"""
vfio-user: VFIO over a UNIX socket, both ways.

A vfio-user *server* is a device in a process of its own; the *client* is the VMM that it is plugged
into. The client tells the server which memory it may reach (DMA_MAP, DMA_UNMAP), with the
descriptor of that memory or without; without one the server reads and writes by message. The
specification is QEMU's docs/interop/vfio-user.rst; libvfio-user and SPDK's devices are servers,
QEMU and Cloud Hypervisor clients.

Three layers, each usable alone:

- Messages are frozen values (:mod:`~ramblock.dma.vfio_user.messages`), and :class:`Connection` is
  the protocol without input and output: it takes bytes and descriptors in any chunking and yields
  events, takes messages and yields bytes and descriptors. No sockets, no clock, no threads. All
  bytes of a peer become an event or a ``RemoteProtocolError``.
- :class:`Link` is a connection on its socket, for either role::

      link = Link(sock, Role.SERVER)
      while (event := link.receive(timeout=1.0)) is not None:
          with event:  # closes the descriptors that nobody took
              if isinstance(event, Request) and isinstance(event.message, Reset):
                  link.send(link.connection.reply(event, ResetReply()))

- :class:`VfioUserTarget` is a client as a DMA target, for ``GuestMemory.attach``::

      with closing(VfioUserTarget("/run/device.sock")) as target:
          memory.attach(target)

Who owns a descriptor: a received one belongs to the connection, then to the event, then to the
taker; its last owner closes it, at the latest when the object is gone. A sent descriptor stays the
caller's.
"""

from ramblock.dma.vfio_user.capabilities import Capabilities
from ramblock.dma.vfio_user.client import VfioUserTarget
from ramblock.dma.vfio_user.connection import OWN_CAPABILITIES, Connection, Role
from ramblock.dma.vfio_user.descriptors import Descriptors
from ramblock.dma.vfio_user.events import CLOSED, NEED_DATA, Event, Outgoing, Reply, Request
from ramblock.dma.vfio_user.link import Link

__all__ = [
    "CLOSED",
    "NEED_DATA",
    "OWN_CAPABILITIES",
    "Capabilities",
    "Connection",
    "Descriptors",
    "Event",
    "Link",
    "Outgoing",
    "Reply",
    "Request",
    "Role",
    "VfioUserTarget",
]
