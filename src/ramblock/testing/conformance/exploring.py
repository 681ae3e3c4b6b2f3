# SPDX-License-Identifier: Apache-2.0
"""Random examples for the checks of this package, and the story that a failure is told as."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

__all__ = ["Story", "explore", "sequences"]

Example = TypeVar("Example")


class Story:
    """
    What was done to a part, step by step, for the message of a failure.

    :param part: What is checked, in words.
    """

    def __init__(self, part: str) -> None:
        self._part = part
        self._steps: list[str] = []

    def step(self, text: str) -> None:
        """Note a step, before it is made."""
        self._steps.append(text)

    def fail(self, problem: str, cause: BaseException | None = None) -> NoReturn:
        """
        Say what is wrong.

        :raises AssertionError: Always.
        """
        steps = "".join(f"\n  {number}. {text}" for number, text in enumerate(self._steps, 1))
        raise AssertionError(f"{self._part}: {problem}{steps and ', after'}{steps}") from cause

    @contextmanager
    def no_error(self, what: str) -> Iterator[None]:
        """Fail with whatever is raised inside, which ought to be nothing."""
        try:
            yield
        except AssertionError:
            raise
        except Exception as error:
            self.fail(f"{what} raised {error!r}", error)


def sequences(step: st.SearchStrategy[Example], most: int) -> st.SearchStrategy[list[Example]]:
    """
    Give sequences of up to *most* steps, about two thirds of that.

    Lists of Hypothesis have five elements on average, which is too few to fill anything up. These
    shrink as well: a step becomes none.
    """
    slot = st.none() | step | step
    return st.lists(slot, min_size=most, max_size=most).map(
        lambda slots: [made for made in slots if made is not None]
    )


def explore(
    strategy: st.SearchStrategy[Example], check: Callable[[Example], None], examples: int | None
) -> None:
    """
    Call *check* with examples, and shrink what fails.

    :param examples: How many; None: as many as the current profile of Hypothesis says.
    :raises AssertionError: That of the smallest example that fails.
    """
    chosen = settings(
        max_examples=settings.default.max_examples if examples is None else examples,  # type: ignore[union-attr]
        # A target may be slow and may be one for all examples; a failure is told as a story, once.
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        print_blob=False,
    )

    @chosen
    @given(strategy)
    def play(example: Example) -> None:
        check(example)

    try:
        play()
    except AssertionError as error:
        # A new one: Hypothesis has noted on the old one how to call a function of ours again.
        raise AssertionError(str(error)) from error.__cause__
