# SPDX-License-Identifier: Apache-2.0
"""Audits of many files on a Dask cluster: one task for each file, the same result as here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ramblock.check.job import CheckOptions, check_one_of_several, not_checked
from ramblock.errors import RamblockError, UsageError, describe_error
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
    :raises RamblockError: The scheduler does not answer. If workers were lost too often, that is
        the result of their file.
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
        futures = [client.submit(check_one_of_several, path, options, pure=False) for path in paths]
        for path, future in zip(paths, futures, strict=True):
            try:
                result: AuditResult = future.result()
            except Exception as error:
                result = not_checked(path, f"{path}: its worker was lost: {describe_error(error)}")
            yield result
