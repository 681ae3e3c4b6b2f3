"""Hypothesis's profiles, and what happens to a test whose requirement is missing."""

import os
import signal
from collections.abc import Generator, Iterator

import pytest
from hypothesis import HealthCheck, settings

from require import PROBES, missing, required_names

# What other people's tests use, ours use too; and pytest wants it here, not in a module.
pytest_plugins = ["ramblock.testing.plugin"]

settings.register_profile(
    "default",
    max_examples=100,
    # Both judge how busy the machine is, not whether the code is right.
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    # A change is judged by the same examples each time; new ones are for `thorough` and for
    # people's own machines.
    derandomize="CI" in os.environ,
)
settings.register_profile(
    "thorough",
    settings.get_profile("default"),
    max_examples=2_000,
    stateful_step_count=200,
    derandomize=False,
    print_blob=True,  # found on a machine that may not keep its example database
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# `-m kernel` and `-m lab` select by what a test asks for, so that no mark can be forgotten.
_IMPLIED_MARK = {
    "browser": "slow",
    "hugetlb": "kernel",
    "kvm": "kernel",
    "lab": "lab",
    "lab_host": "lab",
    "qemu": "lab",
    "root": "kernel",
}

_MUST_FAIL = pytest.StashKey[bool]()


def pytest_configure() -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell starts what it puts into the background with Ctrl-C ignored, and our children
        # would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if unknown := required_names() - PROBES.keys():
        # A misspelt name would require nothing, without a word.
        raise pytest.UsageError(
            f"RAMBLOCK_REQUIRE: unknown: {', '.join(sorted(unknown))} (known: {', '.join(PROBES)})"
        )


def _requirements(item: pytest.Item) -> Iterator[str]:
    for mark in item.iter_markers("require"):
        yield from mark.args


def pytest_itemcollected(item: pytest.Item) -> None:
    for name in _requirements(item):
        item.add_marker(_IMPLIED_MARK[name])


# First, so that no fixture stumbles over what is missing.
@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for name in _requirements(item):
        if (reason := missing(name)) is None:
            continue
        if name in required_names():
            item.stash[_MUST_FAIL] = True
            pytest.fail(f"RAMBLOCK_REQUIRE names {name}: {reason}", pytrace=False)
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and item.stash.get(_MUST_FAIL, False):
        # pytest calls what fails before the test's own code an error; this is the test's verdict.
        report.when = "call"
    return report
