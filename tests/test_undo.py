"""The undo log: what it puts back, in which order, and what it leaves alone when that fails."""

from __future__ import annotations

import logging

import pytest

from ramblock.discard.guard import Guard
from ramblock.discard.undo import UndoLog
from ramblock.errors import PoisonedError


class World:
    """Notes what is done and undone; some of it raises."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.raises: dict[str, BaseException] = {}

    def _tell(self, verb: str, thing: str) -> None:
        self.told.append(f"{verb} {thing}")
        if (error := self.raises.get(self.told[-1])) is not None:
            raise error

    def do(self, thing: str) -> None:
        self._tell("do", thing)

    def undo(self, thing: str) -> None:
        self._tell("undo", thing)

    def stuck(self, thing: str) -> None:
        self._tell("stuck", thing)

    def since(self, mark: str) -> list[str]:
        return self.told[self.told.index(mark) + 1 :]


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1)


def run(world: World, guard: Guard, *steps: tuple[str, str | None]) -> None:
    """Make the steps, as (step, piece); then something else fails."""
    with UndoLog(guard, "operate") as undo:
        for step, piece in steps:
            thing = step if piece is None else f"{step} of {piece}"
            undo.do(step, world.do, world.undo, thing, piece=piece, stuck=world.stuck)
        world.do("fail")


def test_all_is_put_back_latest_first(world: World) -> None:
    guard = Guard()
    world.raises["do fail"] = error = RuntimeError("no")
    with pytest.raises(RuntimeError) as caught:
        run(world, guard, ("one", None), ("two", None), ("three", None))
    assert caught.value is error
    assert world.since("do fail") == ["undo three", "undo two", "undo one"]
    assert not guard.poisoned


def test_nothing_is_put_back_where_nothing_fails(world: World) -> None:
    run(world, Guard(), ("one", None), ("two", None))
    assert world.told == ["do one", "do two", "do fail"]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_step_that_failed_half_way_is_put_back_too(
    world: World, kind: type[BaseException]
) -> None:
    world.raises["do two"] = kind()
    with pytest.raises(kind):
        run(world, Guard(), ("one", None), ("two", None), ("three", None))
    assert world.since("do two") == ["undo two", "undo one"]


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_behind_a_stuck_step_its_piece_is_left_alone(
    world: World, kind: type[BaseException]
) -> None:
    guard = Guard()
    world.raises["do fail"] = error = RuntimeError("no")
    world.raises["undo map of a"] = kind("stuck")
    pieces = ("a", "b")
    steps = [(step, piece) for step in ("attribute", "map", "state") for piece in pieces]
    with pytest.raises(
        PoisonedError, match="operate: the memory is poisoned: step 'map'"
    ) as caught:
        run(world, guard, *steps)
    assert caught.value.__cause__ is error
    assert world.since("do fail") == [
        "undo state of b",
        "undo state of a",
        "undo map of b",
        "undo map of a",
        "stuck map of a",
        "undo attribute of b",
    ]


def test_siblings_of_a_stuck_step_are_put_back(world: World) -> None:
    world.raises["do fail"] = RuntimeError("no")
    world.raises["undo unmap of a"] = RuntimeError("stuck")
    with pytest.raises(PoisonedError):
        run(world, Guard(), ("slot", "a"), *[("unmap", "a")] * 3)
    assert world.since("do fail") == ["undo unmap of a", "stuck unmap of a"] * 3


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_rest_is_put_back_whatever_stuck_raises(
    world: World, kind: type[BaseException]
) -> None:
    world.raises["do fail"] = RuntimeError("no")
    world.raises["undo map of b"] = RuntimeError("stuck")
    world.raises["stuck map of b"] = kind("and not even that")
    with pytest.raises(PoisonedError, match="step 'map' could not be put back"):
        run(world, Guard(), ("map", "a"), ("map", "b"))
    assert world.since("do fail") == ["undo map of b", "stuck map of b", "undo map of a"]


def test_a_step_that_is_certain_not_to_have_happened_can_be_dropped(world: World) -> None:
    world.raises["do two"] = RuntimeError("refused")

    def operate() -> None:
        with UndoLog(Guard(), "operate") as undo:
            undo.do("one", world.do, world.undo, "one")
            try:
                undo.do("two", world.do, world.undo, "two")
            except RuntimeError:
                undo.drop_last()
                raise

    with pytest.raises(RuntimeError):
        operate()
    assert world.since("do two") == ["undo one"]
