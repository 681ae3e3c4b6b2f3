# SPDX-License-Identifier: Apache-2.0
"""Audits of many files on a Dask cluster: one task for each file, the same result as here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ramblock.check.job import CheckOptions, check_file
from ramblock.errors import RamblockError, UsageError
from ramblock.trace.result import AuditResult

__all__ = ["check_on_cluster"]

_CONNECT_SECONDS = 10


def check_on_cluster(
    paths: Sequence[str], options: CheckOptions, address: str
) -> Iterator[AuditResult]:
    """
    Audit recordings on the workers of a cluster; in the order of *paths*.

    The workers open the files themselves, so they have to see them under the same names, and
    ramblock has to be installed there.

    :param address: Of the scheduler, as ``tcp://10.0.0.1:8786``.
    :raises UsageError: The extra ``dask`` is not installed.
    :raises RamblockError: The scheduler does not answer, or a worker was lost too often.
    """
    try:
        from distributed import Client
    except ImportError:
        raise UsageError(
            f"--scheduler {address} needs Dask", expected="pip install 'ramblock[dask]'"
        ) from None
    try:
        client = Client(address, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise RamblockError(f"the scheduler at {address} does not answer: {error}") from error
    with client:
        # Not pure: a file may have changed since another client asked for the same.
        futures = [client.submit(check_file, path, options, pure=False) for path in paths]
        for future in futures:
            yield future.result()
