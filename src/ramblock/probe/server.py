# SPDX-License-Identifier: Apache-2.0
"""The probe: listens, serves one client after the other, and touches their windows."""

from __future__ import annotations

import errno
import logging
import os
import random
import select
import socket
import stat
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from math import ceil
from pathlib import Path
from time import monotonic, sleep

from ramblock.dma.vfio_user import Link, Role
from ramblock.errors import IommuFault, UsageError, describe_range
from ramblock.probe.engine import DmaRefusedError
from ramblock.probe.record import Record
from ramblock.probe.session import CAPABILITIES, Session, SessionEnded
from ramblock.probe.windows import UnmapRule, Window
from ramblock.trace import TraceWriter
from ramblock.units import PAGE_SIZE

__all__ = ["Probe"]

_log = logging.getLogger(__name__)

# Pages per second that are touched, in rounds: a modest device.
_ROUNDS_PER_SECOND = 20
_TOUCHES_PER_ROUND = 10
_TOUCHED_BYTES = 64
_POLL_SECONDS = 0.01
# Until one is tried again that could not be accepted: there are no descriptors left.
_ACCEPT_AGAIN_SECONDS = 0.1
# sun_path of struct sockaddr_un, with the NUL (unix(7)).
_LONGEST_PATH = 107


class Probe:
    """
    A vfio-user server that shows and checks its client's windows.

    Used as a context manager it serves on a thread of its own::

        with Probe("/tmp/probe.sock", touch=True) as probe:
            ...  # start a VMM with a vfio-user device on that socket
            probe.wait_for(lambda: probe.windows)
        assert probe.record.clean

    It serves one client at a time; others wait. :attr:`record` has its observations.

    :param path: Where to listen. The socket of a probe that is gone is replaced.
    :param unmap: The rule for an unmap.
    :param touch: Read random pages of the windows all the time.
    :param scribble: Write to them as well. The guest's data is lost.
    :param trace: Where events go; they stay the caller's to close.
    :param seed: Of the choice of pages.
    :param max_windows: Refuse a map with ENOSPC where there are so many windows already: a fault on
        purpose, of which the client is told nothing before. None: as many as it is told.
    :raises UsageError: Somebody listens there, or it is no socket, or the path is too long for one.
    :raises OSError: The kernel refused the socket.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        unmap: UnmapRule = UnmapRule.LENIENT,
        touch: bool = False,
        scribble: bool = False,
        trace: tuple[TraceWriter, ...] = (),
        seed: int = 1,
        max_windows: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.unmap = unmap
        self.record = Record(*trace)
        self._touch = touch or scribble
        self._scribble = scribble
        self._random = random.Random(seed)
        self._session: Session | None = None
        self._max_windows = max_windows
        self._next_touch = monotonic()
        #: Why serving ended, where it was not told to.
        self.error: BaseException | None = None
        self._listener = _listen(self.path)
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._wanted: deque[tuple[int, int, Future[bytes]]] = deque()
        self._thread = threading.Thread(target=self._run, name="probe", daemon=True)
        self.record.start(str(self.path), unmap.value)

    # -- for other threads -------------------------------------------------------------------------

    @property
    def windows(self) -> list[Window]:
        """The windows of the client that is there now, ascending; empty where there is none."""
        session = self._session
        return [] if session is None else list(session.table.windows)

    @property
    def client(self) -> str | None:
        """The name of the client that is there now."""
        session = self._session
        return None if session is None else session.name

    @property
    def max_windows(self) -> int | None:
        """How many windows a client may have; a change counts for one that is there as well."""
        return self._max_windows

    @max_windows.setter
    def max_windows(self, limit: int | None) -> None:
        self._max_windows = limit
        if (session := self._session) is not None:
            session.table.limit = self._limit

    @property
    def _limit(self) -> int:
        return CAPABILITIES.max_dma_maps if self._max_windows is None else self._max_windows

    def wait_for(self, condition: Callable[[], object], timeout: float = 30.0) -> None:
        """
        Wait until *condition* holds; it is asked again and again.

        :raises TimeoutError: It does not within *timeout* seconds.
        :raises RuntimeError: The probe has ended by an error of its own.
        """
        deadline = monotonic() + timeout
        while not condition():
            if self.error is not None:
                raise RuntimeError(f"the probe has ended: {self.error!r}")
            if monotonic() > deadline:
                raise TimeoutError(
                    f"not within {timeout:g} s; {len(self.windows)} windows are there"
                )
            sleep(_POLL_SECONDS)

    def read(self, address: int, size: int) -> bytes:
        """
        Read as the device: memory behind the windows of the present client.

        :raises IommuFault: A byte of it is not mapped, or is and cannot be had; or there is no
            client.
        :raises RuntimeError: The probe does not serve.
        """
        future: Future[bytes] = Future()
        self._wanted.append((address, size, future))
        if self._bell >= 0:
            os.eventfd_write(self._bell, 1)
        while self.serving or future.done():
            with suppress(TimeoutError):
                return future.result(_POLL_SECONDS)
        raise RuntimeError("the probe does not serve")

    def start(self) -> None:
        """Serve on a thread of its own."""
        self._thread.start()

    @property
    def serving(self) -> bool:
        """Whether it serves."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """
        Stop serving, let go of the client, and remove the socket.

        Nothing happens the second time.
        """
        self._stopping = True
        if self._bell >= 0:
            os.eventfd_write(self._bell, 1)
        if self._thread.is_alive():
            self._thread.join()
        if self._bell >= 0:
            os.close(self._bell)
            self._bell = -1
            self._listener.close()
            with suppress(FileNotFoundError):
                self.path.unlink()

    def __enter__(self) -> Probe:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- serving -----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wait()
                self._read_what_is_wanted()
                if self._session is None:
                    self._accept()
                else:
                    self._serve(self._session)
        except BaseException as error:
            self.error = error
        finally:
            if self._session is not None:
                self._end(self._session, "the probe stops", bad=False)

    def _wait(self) -> None:
        """Wait for the first event."""
        session = self._session
        if session is not None and session.has_more:
            return
        poller = select.poll()
        poller.register(self._bell, select.POLLIN)
        poller.register(self._listener if session is None else session, select.POLLIN)
        times = [] if session is None or session.deadline is None else [session.deadline]
        if session is not None and self._touch:
            times.append(self._next_touch)
        # Rounded up, or poll() would be asked again and again in the last millisecond.
        poller.poll(ceil(max(0.0, min(times) - monotonic()) * 1000) if times else None)
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            sleep(_ACCEPT_AGAIN_SECONDS)
            return
        link = Link(sock, Role.SERVER, CAPABILITIES)
        self._session = Session(link, self.record, self.unmap, self._limit)

    def _serve(self, session: Session) -> None:
        with self._ending(session):
            while session.serve() and not self._stopping:
                self._touch_if_time(session)
            self._touch_if_time(session)

    @contextmanager
    def _ending(self, session: Session) -> Iterator[None]:
        """End *session* with any error that comes out of it, and nothing but it."""
        try:
            yield
        except SessionEnded as end:
            self._end(session, str(end), bad=end.bad)
        except Exception as error:
            _log.exception("%s: the session fails", session.name)
            self._end(session, f"the session fails: {error!r}", bad=True)

    def _end(self, session: Session, reason: str, *, bad: bool) -> None:
        self._session = None
        try:
            session.close(reason, bad=bad)
        except Exception:
            _log.exception("%s: its end fails", session.name)

    def _read_what_is_wanted(self) -> None:
        while self._wanted:
            address, size, future = self._wanted.popleft()
            session = self._session
            if session is None:
                future.set_exception(_fault(address, size, os.strerror(errno.EFAULT)))
                continue
            with self._ending(session):
                try:
                    future.set_result(session.read(address, size))
                except DmaRefusedError as error:
                    future.set_exception(_fault(address, size, os.strerror(error.errno)))
                except Exception as error:
                    future.set_exception(_fault(address, size, str(error)))
                    raise

    def _touch_if_time(self, session: Session) -> None:
        now = monotonic()
        if not self._touch or now < self._next_touch:
            return
        self._next_touch = now + 1 / _ROUNDS_PER_SECOND
        windows = session.table.windows
        if not windows:
            return
        sizes = [window.size for window in windows]
        for window in self._random.choices(windows, sizes, k=_TOUCHES_PER_ROUND):
            self._touch_page(session, window)

    def _touch_page(self, session: Session, window: Window) -> None:
        if window.file is None and not session.bus_master:
            return  # a client refuses the requests of a device that may not do DMA yet
        address = window.address + self._random.randrange(0, window.size, PAGE_SIZE)
        # A window that cannot be reached is on record; the next one may be all right.
        with suppress(DmaRefusedError):
            if window.readable:
                session.read(address, _TOUCHED_BYTES)
                self.record.counts["touch"] += 1
            if self._scribble and window.writable:
                session.write(address, self._random.randbytes(_TOUCHED_BYTES))
                self.record.counts["scribble"] += 1


def _fault(address: int, size: int, why: str) -> IommuFault:
    text = f"{describe_range(address, size)} cannot be read: {why}"
    return IommuFault(text, iova=address, size=size, write=False)


def _listen(path: Path) -> socket.socket:
    """
    Listen at *path*, which is there only when one can connect.

    A socket that nobody listens at any more is removed first.
    """
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise UsageError(
            f"{path}: too long for a socket",
            value=str(path),
            expected=f"{_LONGEST_PATH} bytes at most",
        )
    _remove_if_dead(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        _bind(listener, path)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, error.strerror, str(path)) from None
    except BaseException:
        listener.close()
        raise
    return listener


def _bind(listener: socket.socket, path: Path) -> None:
    # The file appears with bind(2), and a connection before listen(2) is refused. So it gets its
    # name last, if there is room for another.
    first = path.with_name(f".{os.getpid():x}.{id(listener) & 0xFFFF:x}")
    if len(os.fsencode(first)) > _LONGEST_PATH:
        listener.bind(str(path))
        listener.listen()
        return
    listener.bind(str(first))
    try:
        listener.listen()
        os.link(first, path)
    finally:
        first.unlink()


def _remove_if_dead(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise UsageError(f"{path} exists and is no socket", value=str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probing:
        try:
            probing.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # its queue is full: it is alive
    raise UsageError(f"somebody listens at {path}", value=str(path), expected="another --socket")
