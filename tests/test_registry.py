"""Who listens where: found by place, in the order of registration."""

from hypothesis import given
from hypothesis import strategies as st

from doubles import PAGE, RecordingListener
from ramblock import RamBlock, RamSection
from ramblock.discard.listeners import Registry

COUNT = 64

sections = st.tuples(st.integers(0, COUNT - 1), st.integers(1, COUNT)).map(
    lambda pair: (pair[0], min(pair[1], COUNT - pair[0]))
)


@given(
    st.lists(st.tuples(sections, st.booleans()), max_size=30),
    st.lists(sections, max_size=10),
)
def test_overlapping_is_found_in_the_order_of_registration(
    steps: list[tuple[tuple[int, int], bool]], questions: list[tuple[int, int]]
) -> None:
    with RamBlock.create("ram", COUNT * PAGE) as block:
        registry = Registry()
        there: list[tuple[RecordingListener, tuple[int, int]]] = []
        for (first, count), goes in steps:
            if goes and there:
                listener, _ = there.pop(first % len(there))
                registry.discard(listener)
            else:
                listener = RecordingListener()
                section = RamSection(block, first * PAGE, count * PAGE)
                registry.add(registry.make(listener, section))
                there.append((listener, (first, count)))
        assert [entry.listener for entry in registry] == [listener for listener, _ in there]
        for first, count in questions:
            found = registry.overlapping(first * PAGE, (first + count) * PAGE)
            assert [entry.listener for entry in found] == [
                listener
                for listener, (start, size) in there
                if start < first + count and first < start + size
            ]


def test_a_registration_takes_the_place_of_the_one_before() -> None:
    with RamBlock.create("ram", COUNT * PAGE) as block:
        registry = Registry()
        listener = RecordingListener()
        small = registry.make(listener, RamSection(block, 0, PAGE))
        registry.add(small)
        registry.add(small._replace(section=RamSection(block, 0, 9 * PAGE)))
        assert len(list(registry)) == 1
        assert registry.overlapping(8 * PAGE, 9 * PAGE)[0].listener is listener
        registry.discard(listener)
        registry.discard(listener)
        assert list(registry) == registry.overlapping(0, COUNT * PAGE) == []


def test_finding_does_not_look_at_every_section() -> None:
    with RamBlock.create("ram", 4096 * PAGE) as block:
        registry = Registry()
        looked = 0

        class Counting(RamSection):
            @property
            def size(self) -> int:
                nonlocal looked
                looked += 1
                return PAGE

        for page in range(4096):
            registry.add(registry.make(RecordingListener(), RamSection(block, page * PAGE, PAGE)))
        for shelf in registry._shelves.values():
            for index, entry in enumerate(shelf[1]):
                part = object.__new__(Counting)
                for name in ("block", "offset", "gpa", "readonly"):
                    object.__setattr__(part, name, getattr(entry.section, name))
                shelf[1][index] = entry._replace(section=part)
        assert len(registry.overlapping(100 * PAGE, 102 * PAGE)) == 2
        assert looked <= 8
