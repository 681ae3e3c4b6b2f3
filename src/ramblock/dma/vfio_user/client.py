# SPDX-License-Identifier: Apache-2.0
"""
A vfio-user server as a DMA target: the client's side, as a VMM has it.

The server's answers are believed, and checked: an answer to an unmap that names another range, an
answer that does not come, a connection that ends, leave the devices' reach in doubt. Then the
target has failed for good, every call says so at once, and nothing is connected again behind
anybody's back.

A server that was given the descriptor of guest memory can reach all of it, at any time: that it
honours windows and unmaps is trust. Its requests by message are checked against the windows.
"""

from __future__ import annotations

import errno
import os
import socket
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from ramblock.dma.soft import FaultRecord, Mapping
from ramblock.dma.target import DmaCapabilities, HostRange
from ramblock.dma.vfio_user.calls import Call, MapCall, UnmapAllCall, UnmapCall
from ramblock.dma.vfio_user.connection import OWN_CAPABILITIES, Role
from ramblock.dma.vfio_user.conversation import Conversation
from ramblock.dma.vfio_user.layout import Message
from ramblock.dma.vfio_user.link import Link, connect
from ramblock.dma.vfio_user.numbers import (
    PROTOCOL_MAJOR,
    PROTOCOL_MINOR,
    Command,
    command_name,
)
from ramblock.dma.vfio_user.replies import (
    DeviceInfoReply,
    ErrorReply,
    RegionInfoReply,
    RegionReadReply,
    RegionWriteReply,
    VersionReply,
)
from ramblock.dma.vfio_user.requests import (
    GetDeviceInfo,
    GetRegionInfo,
    RegionRead,
    RegionWrite,
    Reset,
    Version,
)
from ramblock.dma.vfio_user.serving import ServedMemory
from ramblock.errors import DmaError, ProtocolError, RemoteProtocolError, describe_range
from ramblock.process import OfOneProcess
from ramblock.units import ADDRESS_LIMIT, check_range

__all__ = ["VfioUserTarget"]

# As QEMU, against a server that would have us ask for ever (hw/vfio-user/device.c,
# VFIO_USER_MAX_REGIONS).
_MAX_REGIONS = 100
_CAPABILITIES = replace(OWN_CAPABILITIES, twin_socket=True)
# Room for a region's capabilities; a region of a device that is made of software has few.
_REGION_ARGSZ = 4096


class VfioUserTarget(OfOneProcess):
    """
    A vfio-user server that maps and unmaps, and its device. For any number of threads.

    :param server: Path of the UNIX socket where it listens, or a connected socket, which is the
        target's from now on.
    :param timeout: How long the server may take for anything, in seconds. When they are over the
        target has failed.
    :raises DmaError: Nobody listens there, or the server does not answer in time, or refuses the
        version. Nothing is held.
    :raises RemoteProtocolError: It speaks something else. Nothing is held.
    """

    def __init__(
        self, server: str | os.PathLike[str] | socket.socket, *, timeout: float = 10.0
    ) -> None:
        self._timeout = timeout
        self._name = "a socket" if isinstance(server, socket.socket) else os.fspath(server)
        try:
            sock = server if isinstance(server, socket.socket) else connect(server, timeout)
            link = Link(sock, Role.CLIENT, _CAPABILITIES)
            twin = None
            try:
                twin = self._negotiate(link)
                peer = link.connection.peer
                self._capabilities = DmaCapabilities(
                    page_size=peer.page_size, max_mappings=peer.max_dma_maps, exact=True
                )
                self._takes_descriptors = peer.max_msg_fds > 0
                self._chunk = min(peer.max_data_xfer_size, _CAPABILITIES.max_data_xfer_size)
                self._memory = ServedMemory(peer.max_dma_maps)
                self._talk = Conversation(link, self._memory, twin)
            except BaseException:
                link.close()
                if twin is not None:
                    twin.close()
                raise
        except OSError as error:
            if isinstance(error, DmaError):
                raise
            text = f"vfio-user server at {self._name}: {error.strerror or error}"
            raise DmaError(_errno_of(error), text) from error
        self._finalizer = weakref.finalize(self, self._talk.close)

    def _negotiate(self, link: Link) -> Link | None:
        """Agree upon the version; return the link for the server's commands, if it is another."""
        version = Version(PROTOCOL_MAJOR, PROTOCOL_MINOR, link.connection.own)
        link.send(link.connection.request(version), self._timeout)
        reply = link.receive(self._timeout)
        if reply is None:
            raise DmaError(
                errno.ECONNRESET,
                f"vfio-user server at {self._name} closed the connection instead of answering"
                " VERSION",
            )
        with reply:
            if not isinstance(reply.message, VersionReply):
                assert isinstance(
                    reply.message, ErrorReply
                )  # a connection takes nothing else for it
                raise _refusal(reply.message, f"version {PROTOCOL_MAJOR}.{PROTOCOL_MINOR}")
            index = reply.message.capabilities.twin_fd_index
            if not reply.message.capabilities.twin_socket or index is None:
                return None
            return link.twin(_socket_of(reply.fds.take(index)))

    # -- state -------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> DmaCapabilities:
        """Its abilities: an unmap has to name one window exactly, as for libvfio-user's servers."""
        return self._capabilities

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._talk.closed

    @property
    def failure(self) -> Exception | None:
        """Why it is of no more use; None: it is not known to be broken."""
        return self._talk.failure

    @property
    def violations(self) -> int:
        """
        How often the server sent a command that makes no sense.

        Or asked by message for memory that it may not reach that way.
        """
        return self._memory.violation_count

    @property
    def violation_records(self) -> Sequence[FaultRecord]:
        """The latest of these attempts to reach memory."""
        return tuple(self._memory.violations)

    def mappings(self) -> list[Mapping]:
        """
        List the windows, ascending.

        Those too that the server was told of and has not answered.
        """
        return self._memory.mappings()

    # -- the target --------------------------------------------------------------------------------

    def map(self, iova: int, memory: HostRange, *, writable: bool = True) -> None:
        """
        Open a window: with its descriptor, if it has one and the server takes any.

        Else the server asks by message.

        The memory and its descriptor stay the caller's, who keeps both as long as the window may be
        there.

        :raises DmaError: EINVAL: misaligned, empty, past 2**64. EEXIST, ENOSPC: a window is there,
            or no more may be. EBADF: the descriptor is none. Any other: the server's. Nothing has
            changed, unless it is ``in_doubt``: then the target has failed.
        """
        self._check("map", iova, memory.size)
        mapping = Mapping(iova, memory.size, memory, writable)
        _check_descriptor(iova, memory)
        call = MapCall(mapping, with_descriptor=self._takes_descriptors)
        self._ask(call, "map", iova, memory.size)

    def unmap(self, iova: int, size: int) -> int:
        """
        Close the window that is exactly this one.

        None of the server's accesses by message is under way on return.

        :return: *size*.
        :raises DmaError: EINVAL: misaligned, empty, past 2**64. ENOENT: it is not one whole window.
            Any other: the server's. Nothing has changed, unless it is ``in_doubt``: then the target
            has failed.
        """
        self._check("unmap", iova, size)
        self._ask(UnmapCall(iova, size), "unmap", iova, size)
        return size

    def close(self) -> None:
        """
        Close all windows and the connection. Nothing happens the second time.

        :raises DmaError: The server did not let go of a window. The connection is closed all the
            same.
        """
        try:
            if not self.closed and self.failure is None:
                self._unmap_all()
        finally:
            self._finalizer()

    def _unmap_all(self) -> None:
        if len(self.mappings()) > 1:
            # With one call, where the server knows that one; the specification does not.
            with suppress(DmaError):
                self._ask(UnmapAllCall(), "unmap of all windows")
        for mapping in self.mappings():
            self.unmap(mapping.iova, mapping.size)

    def _check(self, what: str, iova: int, size: int) -> None:
        page_size = self._capabilities.page_size
        if size <= 0 or iova < 0 or iova + size > ADDRESS_LIMIT or (iova | size) % page_size:
            raise DmaError(
                errno.EINVAL,
                f"{what} {describe_range(iova, size)}: "
                f"not made of pages of {page_size:#x} bytes below 2**64",
                iova=iova, size=size,
            )  # fmt: skip

    # -- the device --------------------------------------------------------------------------------

    def device_info(self) -> DeviceInfoReply:
        """
        Ask for the device's description.

        :raises DmaError: The server refused, or the target has failed.
        """
        answer = self._ask(Call(GetDeviceInfo()), "device info")
        assert isinstance(answer, DeviceInfoReply)
        return answer

    def regions(self) -> list[RegionInfoReply]:
        """
        Ask for the device's regions, those of size 0 too.

        :raises DmaError: The server refused, or the target has failed. EPROTO: so many regions
            cannot be meant.
        """
        number = self.device_info().num_regions
        if number > _MAX_REGIONS:
            raise DmaError(errno.EPROTO, f"{number} regions, at most {_MAX_REGIONS} are believed")
        return [self.region(index) for index in range(number)]

    def region(self, index: int) -> RegionInfoReply:
        """
        Ask for one region.

        Its descriptor, if it has one, is closed; raises as :meth:`device_info`.
        """
        answer = self._ask(Call(GetRegionInfo(_REGION_ARGSZ, index)), f"region {index}")
        assert isinstance(answer, RegionInfoReply)
        return answer

    def region_read(self, index: int, offset: int, size: int) -> bytes:
        """
        Read from a region.

        :raises UsageError: Negative, empty, or past 2**64.
        :raises DmaError: The server refused, or the target has failed. EIO: it read less.
        """
        what = f"read of region {index}"
        check_range(offset, size, limit=ADDRESS_LIMIT, align=1, what=what)
        parts = []
        for start in range(offset, offset + size, self._chunk):
            count = min(self._chunk, offset + size - start)
            answer = self._ask(Call(RegionRead(index, start, count)), what, start, count)
            assert isinstance(answer, RegionReadReply)
            _check_done(what, start, count, answer.amount)
            parts.append(answer.data)
        return b"".join(parts)

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """Write to a region; raises as :meth:`region_read`, and some of it may be written then."""
        what = f"write to region {index}"
        check_range(offset, len(data), limit=ADDRESS_LIMIT, align=1, what=what)
        for done in range(0, len(data), self._chunk):
            part = bytes(data[done : done + self._chunk])
            start = offset + done
            answer = self._ask(Call(RegionWrite(index, start, part)), what, start, len(part))
            assert isinstance(answer, RegionWriteReply)
            _check_done(what, start, len(part), answer.amount)

    def reset(self) -> None:
        """
        Reset the device. Windows stay.

        :raises DmaError: The server refused, or the target has failed.
        """
        self._ask(Call(Reset()), "reset")

    # -- asking ------------------------------------------------------------------------------------

    def _ask(
        self, call: Call, what: str, iova: int | None = None, size: int | None = None
    ) -> Message:
        """Have a call carried out; its answer, or the error in our words."""
        where = what if iova is None or size is None else f"{what} {describe_range(iova, size)}"
        self._talk.carry_out(call, self._timeout)
        if isinstance(call.answer, Message):
            return call.answer
        if isinstance(call.answer, ErrorReply):
            raise _refusal(call.answer, where, iova, size)
        failure = self.failure
        if failure is None:
            raise DmaError(
                errno.EBADF, f"{where}: the target was closed",
                iova=iova, size=size, in_doubt=call.sent,
            )  # fmt: skip
        # Never in doubt about one call only: without the server nobody knows its devices' reach.
        raise DmaError(
            _errno_of(failure), f"{where}: vfio-user server at {self._name} is lost",
            iova=iova, size=size, in_doubt=True,
        ) from failure  # fmt: skip

    def __repr__(self) -> str:
        state = "closed" if self.closed else "failed" if self.failure else "connected"
        return f"<VfioUserTarget at {self._name}, {state}>"


def _errno_of(error: Exception) -> int:
    if isinstance(error, ProtocolError):
        return errno.EPROTO
    if isinstance(error, TimeoutError):
        return errno.ETIMEDOUT
    number = error.errno if isinstance(error, OSError) else None
    # The mapper takes ENOENT for "there is no such mapping".
    return errno.ENOTCONN if number in (None, errno.ENOENT) else number


def _check_descriptor(iova: int, memory: HostRange) -> None:
    """Refuse a message that cannot be sent, before it ends the connection."""
    if memory.fd is None:
        return
    try:
        os.fstat(memory.fd)
    except OSError as error:
        raise DmaError(
            error.errno or 0,
            f"map {describe_range(iova, memory.size)}: descriptor {memory.fd}: {error.strerror}",
            iova=iova, size=memory.size,
        ) from error  # fmt: skip


def _refusal(
    answer: ErrorReply, where: str, iova: int | None = None, size: int | None = None
) -> DmaError:
    text = f"{where}: the server refused {command_name(answer.command)}"
    if answer.errno == 0:
        return DmaError(f"{text} and did not say why", iova=iova, size=size)
    text += f": {os.strerror(answer.errno)}"
    if (answer.command, answer.errno) == (Command.DMA_MAP, errno.EINVAL):
        # lib/dma.c, dma_controller_add_region(): "hit max regions".
        text += " (libvfio-user says so too at its limit of windows, which it does not announce)"
    return DmaError(answer.errno, text, iova=iova, size=size)


def _socket_of(fd: int) -> socket.socket:
    """Make a socket of the descriptor for the server's commands, or close it."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        os.close(fd)
        raise RemoteProtocolError(f"VERSION: twin_socket is no socket: {error.strerror}") from None
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        sock.close()
        raise RemoteProtocolError("VERSION: twin_socket is no UNIX stream socket")
    return sock


def _check_done(what: str, offset: int, size: int, done: int) -> None:
    if done != size:
        raise DmaError(
            errno.EIO, f"{what}: {done:#x} bytes of {describe_range(offset, size)} transferred"
        )
