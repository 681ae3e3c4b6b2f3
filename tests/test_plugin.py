"""
The pytest plugin, as somebody else's tests use it: with a small program for a VMM, in a pytest of
its own.
"""

import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

# Arguments: the socket, and then what to do, one word each: map:ADDRESS:PAGES, unmap:ADDRESS:PAGES,
# say:TEXT, exit:CODE. At the end it waits to be ended. Whatever is refused it takes no notice of.
_VMM = """\
import os, signal, sys
from ramblock.dma.vfio_user import Link, Role
from ramblock.dma.vfio_user.link import connect
from ramblock.dma.vfio_user.messages import DmaMap, DmaUnmap, Version

link = Link(connect(sys.argv[1], 10), Role.CLIENT)
fd = os.memfd_create("guest")
os.truncate(fd, 1 << 20)
os.pwrite(fd, b"from the guest", 0x1000)

def ask(message, fds=()):
    link.send(link.connection.request(message, fds), 10)
    link.receive(10).close()

ask(Version(0, 0, link.connection.own))
for word in sys.argv[2:]:
    what, *values = word.split(":")
    match what:
        case "map":
            address, pages = (int(value, 0) for value in values)
            ask(DmaMap(3, 0, address, pages * 4096), [fd])
        case "unmap":
            address, pages = (int(value, 0) for value in values)
            ask(DmaUnmap(0, address, pages * 4096))
        case "say":
            print(values[0], flush=True)
        case "exit":
            sys.exit(int(values[0]))
signal.pause()
"""


@pytest.fixture
def their(pytester: pytest.Pytester) -> pytest.Pytester:
    """A folder with their conftest.py, their VMM, and a fixture of theirs that starts it."""
    pytester.makepyfile(vmm=_VMM)
    pytester.makeconftest(
        f"""
        import pytest

        pytest_plugins = ["ramblock.testing.plugin"]

        @pytest.fixture
        def start():
            def start(probe, *todo):
                return probe.run_vmm({sys.executable!r}, "vmm.py", probe.path, *todo)
            return start
        """
    )
    return pytester


def _run(their: pytest.Pytester, body: str) -> pytest.RunResult:
    their.makepyfile(body)
    return their.runpytest_subprocess("-p", "no:cacheprovider")


def test_what_is_mapped(their: pytest.Pytester) -> None:
    result = _run(
        their,
        """
        import pytest

        def test_it(ramblock_probe, start):
            probe = ramblock_probe()
            vmm = start(probe, "map:0x10000:2", "map:0x12000:2", "map:0x20000:4", "unmap:0x20000:4")
            probe.settle()
            assert probe.client == "client1"
            probe.assert_mapped(0x10000, 0x4000)
            probe.assert_mapped(0x11000, 0x2000)
            probe.assert_not_mapped(0x14000, 1 << 40)
            probe.assert_not_mapped(0, 0x10000)
            assert probe.total() == 0x4000
            assert probe.total(0x11000, 0x10000) == 0x3000
            assert probe.read(0x11000, 14) == b"from the guest"
            with pytest.raises(
                AssertionError,
                match=r"missing: \\[0xf000, 0x10000\\), \\[0x14000, 0x15000\\) \\(8 KiB\\)",
            ):
                probe.assert_mapped(0xf000, 0x6000)
            with pytest.raises(
                AssertionError,
                match=r"something is mapped: \\[0x13000, 0x14000\\) \\(4 KiB\\)",
            ):
                probe.assert_not_mapped(0x13000, 0x2000)
            vmm.stop()
            probe.wait_for(lambda: probe.client is None)
            assert probe.total() == 0
        """,
    )

    result.assert_outcomes(passed=1)


def test_broken_rule_is_an_error_of_the_test(their: pytest.Pytester) -> None:
    result = _run(
        their,
        """
        def test_it(ramblock_probe, start):
            probe = ramblock_probe(unmap="exact")
            start(probe, "map:0x10000:1", "map:0x11000:1", "unmap:0x10000:2")
            probe.settle()
        """,
    )

    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*found 1 broken rules and 2 stale windows:*",
            "*client1: [[]0x10000, 0x12000) unmap that is no window:*",
            "*client1: stale [[]0x10000, 0x11000)*",
        ]
    )


def test_broken_rule_may_be_what_is_tested(their: pytest.Pytester) -> None:
    result = _run(
        their,
        """
        def test_it(ramblock_probe, start):
            probe = ramblock_probe(unmap="exact", clean=False)
            start(probe, "map:0x10000:1", "map:0x11000:1", "unmap:0x10000:2")
            probe.wait_for(lambda: probe.record.stale_count == 2)
        """,
    )

    result.assert_outcomes(passed=1)


def test_vmm_that_ends_early_is_told_at_once_with_its_output(their: pytest.Pytester) -> None:
    result = _run(
        their,
        """
        def test_it(ramblock_probe, start):
            probe = ramblock_probe()
            start(probe, "say:cannot-go-on", "exit:7")
            probe.settle(timeout=3600)
        """,
    )

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*has ended with exit code 7*", "*cannot-go-on*"])


def test_output_of_the_vmm_is_shown_where_a_test_fails(their: pytest.Pytester) -> None:
    result = _run(
        their,
        """
        def test_it(ramblock_probe, start):
            probe = ramblock_probe()
            start(probe, "map:0:1", "say:all-is-well")
            probe.settle()
            assert not probe.windows
        """,
    )

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["*Captured stdout teardown*", "--- output of *vmm.py*", "all-is-well"]
    )


def test_everything_ends_with_the_test(their: pytest.Pytester, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    result = _run(
        their,
        f"""
        import os, pathlib, time

        SEEN = []

        def test_it(ramblock_probe, start):
            probe = ramblock_probe(trace=pathlib.Path({str(trace)!r}))
            SEEN.append((probe, start(probe, "map:0:1")))
            probe.settle()
            second = ramblock_probe()
            assert second.path != probe.path

        def test_after_it():
            (probe, vmm), = SEEN
            assert vmm.process.returncode is not None
            assert not probe.serving
            assert not probe.path.exists()
            assert not probe.path.parent.exists()
            assert "disconnect" in pathlib.Path({str(trace)!r}).read_text()
        """,
    )

    result.assert_outcomes(passed=2)


def test_time_that_is_over(their: pytest.Pytester) -> None:
    result = _run(
        their,
        """
        import pytest

        def test_it(ramblock_probe):
            with pytest.raises(TimeoutError, match="not within 0.1 s; 0 windows are there"):
                ramblock_probe().settle(timeout=0.1)
        """,
    )

    result.assert_outcomes(passed=1)
