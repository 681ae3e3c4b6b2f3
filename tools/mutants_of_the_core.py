# SPDX-License-Identifier: Apache-2.0
"""
The mutants of the core: for each place the ways to break it, and the tests that notice.

A mutant that no test can notice, because the code does the same with it, is not here; a comment
says why it was considered.
"""

from __future__ import annotations

from collections.abc import Sequence

from tools.mutation import (
    Change,
    Mutant,
    drop,
    drop_keyword,
    insert,
    narrow,
    negate,
    prepend,
    replace,
    swap,
    unwrap,
)

__all__ = ["MUTANTS"]

ATTACHMENT = "tests/test_attachment.py"
ATTRIBUTES = "tests/test_attributes.py"
BATCHES = "tests/test_attach_in_batches.py"
BLOCK = "tests/test_block.py"
COORDINATION = "tests/test_coordination.py"
GUARD = "tests/test_guard.py"
GUEST = "tests/test_guest_memory.py"
IN_PLACE = "tests/test_in_place.py"
INJECTION = "tests/test_failure_injection.py"
INTERRUPTS = "tests/test_interrupts.py"
MANAGER = "tests/test_discard_manager.py"
MAPPER = "tests/test_mapper.py"
PROCESS = "tests/test_process.py"
RECLAIM = "tests/test_reclaim.py"
REGISTRY = "tests/test_registry.py"
RESET = "tests/test_reset.py"
RUNS = "tests/test_runs.py"
SECTION = "tests/test_section.py"
SOFT = "tests/test_soft_iommu.py"
UNDO = "tests/test_undo.py"
VIRTIO_MEM = "tests/test_virtio_mem.py"

# Parts of the failure injection, which is minutes long as a whole.
ONE_FAILURE = f"{INJECTION}::test_conversion_with_one_failure"
TWO_FAILURES = f"{INJECTION}::test_conversion_with_two_failures"
BY_PAGE_TWO = f"{INJECTION}::test_conversion_by_page_with_two_failures"
OTHER_LISTENER = f"{INJECTION}::test_conversion_with_a_listener_of_somebody_elses"
OTHER_SOURCE = f"{INJECTION}::test_conversion_with_a_source_of_somebody_elses"
BUDGETS = f"{INJECTION}::test_budget_of_a_conversion"
MAP = f"{INJECTION}::test_map"
UNMAP = f"{INJECTION}::test_unmap"
ATTACH = f"{INJECTION}::test_attach"
DETACH = f"{INJECTION}::test_detach"
INJECTED_RESET = f"{INJECTION}::test_reset"
INJECTED_RENEWAL = f"{INJECTION}::test_reset_with_a_new_vm_or_new_private_sides"
REGISTER = f"{INJECTION}::test_register_listener"
UNREGISTER = f"{INJECTION}::test_unregister_listener"
ADD_SOURCE = f"{INJECTION}::test_add_source"

MUTANTS: list[Mutant] = []


def _in(where: str, *mutants: tuple[str, Change, Sequence[str] | str]) -> None:
    """Add *mutants* of one place, as (name, change, tests)."""
    for name, change, tests in mutants:
        MUTANTS.append(Mutant(name, where, change, (tests,) if isinstance(tests, str) else tests))


# -- conversions: the tables, and what their steps do ----------------------------------------------

_UNMAP, _ATTRIBUTE = "('unmap', *_TELL, None)", "('attribute', *_ATTRIBUTE, ...)"
_MAP, _STATE = "('map', *_TELL, ...)", "('state', *_FLIP, ...)"

_in(
    "guest.conversion:TO_PRIVATE",
    ("to private: attribute before unmap", swap(_UNMAP, _ATTRIBUTE), (GUEST, ONE_FAILURE)),
    ("to private: state before attribute", swap(_ATTRIBUTE, _STATE), ONE_FAILURE),
    ("to private: unmap left out", drop(_UNMAP), GUEST),
    ("to private: attribute left out", drop(_ATTRIBUTE), GUEST),
    ("to private: state left out", drop(_STATE), GUEST),
    (
        "to private: a stuck attribute does not make the state private",
        replace("('attribute', *_ATTRIBUTE, _FLIP[0])", "('attribute', *_ATTRIBUTE, None)"),
        (IN_PLACE, TWO_FAILURES),
    ),
    (
        "in place, to private: attribute before unmap",
        swap(_UNMAP, _ATTRIBUTE),
        f"{IN_PLACE}::test_to_private_unmap_comes_first_and_to_shared_map_comes_last",
    ),
)
_in(
    "guest.conversion:TO_SHARED",
    ("to shared: map before attribute", swap(_ATTRIBUTE, _MAP), (GUEST, ONE_FAILURE)),
    ("to shared: attribute left out", drop(_ATTRIBUTE), GUEST),
    ("to shared: map left out", drop(_MAP), GUEST),
    (
        "to shared: a stuck map does not leave the state shared",
        replace("ConversionPiece.settle_in_doubt", "None"),
        (GUEST, TWO_FAILURES),
    ),
    (
        "in place, to shared: map before attribute",
        swap(_ATTRIBUTE, _MAP),
        f"{IN_PLACE}::test_to_private_unmap_comes_first_and_to_shared_map_comes_last",
    ),
)
_in(
    "guest.conversion:ConversionPiece.put_attribute_back",
    ("undo of the attribute left out", prepend("return"), ONE_FAILURE),
    ("in place: undo of the attribute left out", prepend("return"), IN_PLACE),
    (
        "undo of the attribute for all of the range",
        replace("self.change.changed_runs()", "((self.section.offset, self.section.end),)"),
        ONE_FAILURE,
    ),
)
_in(
    "guest.conversion:_TELL",
    (
        "undo of map and unmap left out",
        replace("piece.change.notification.take_back()", "None"),
        ONE_FAILURE,
    ),
)
_in(
    "guest.conversion:_FLIP",
    ("undo of the state left out", replace("it.change.flip_back()", "None"), ONE_FAILURE),
)
_in(
    "guest.conversion:ConversionPiece.settle_in_doubt",
    (
        "what is stuck mapped is not in doubt",
        drop("self.change.notification.doubt(...)"),
        TWO_FAILURES,
    ),
)
_in(
    "guest.conversion:ConversionPiece.free",
    (
        "a conversion does not note that a side is used again",
        drop("used.keep_used(...)"),
        f"{INJECTION}::test_what_waits_to_be_freed_is_kept_when_it_is_used_again",
    ),
    ("a conversion frees the side that is used", negate("self.change.populate"), BLOCK),
)
_in(
    "guest.conversion:convert_pieces",
    (
        "conversion: the intent is noted after the step",
        swap("begun.append(...)", "do(piece)"),
        ONE_FAILURE,
    ),
    (
        "conversion: only Exception is a failure",
        narrow("for step, do, undo, stuck in ...: ..."),
        (GUEST, ONE_FAILURE),
    ),
    ("conversion: the budget is not asked", drop("reserve(...)"), (GUEST, BUDGETS)),
    ("conversion: nothing is put back", drop("put_back(guard, begun)"), (GUEST, ONE_FAILURE)),
    (
        "conversion: a failed undo is called a failure like any other",
        drop("if guard.poisoned: ..."),
        (GUEST, TWO_FAILURES),
    ),
)
_in(
    "guest.memory:GuestMemory._convert",
    (
        "conversion: freed before the commit",
        insert("free_each(p.free for p in pieces)", before="try: ...\nfinally: ..."),
        (GUEST, ONE_FAILURE),
    ),
)

# -- the undo log ----------------------------------------------------------------------------------

_in(
    "discard.undo:UndoLog.do",
    (
        "undo log: the intent is noted after the step",
        swap("self._entries.append(...)", "do(*arguments)"),
        UNDO,
    ),
    (
        "map: the intent is noted after the step",
        swap("self._entries.append(...)", "do(*arguments)"),
        MAP,
    ),
)
_in(
    "discard.undo:UndoLog.drop_last",
    ("undo log: a refused step is put back", drop("self._entries.pop()"), UNDO),
)
_in(
    "discard.undo:UndoLog.__exit__",
    ("undo log: nothing is put back", drop("put_back(self._guard, self._entries)"), UNDO),
    ("undo log: a failed undo is not said", drop("if self._guard.poisoned: ..."), UNDO),
)
_STUCK_PIECE = "piece is other and step != name"
_in(
    "discard.undo:put_back",
    ("undo log: earliest first", replace("reversed(entries)", "entries"), UNDO),
    ("conversion: put back from the front", replace("reversed(entries)", "entries"), ONE_FAILURE),
    ("undo log: the piece goes on after a stuck step", drop("if any(...): ..."), UNDO),
    (
        "in place: pages are mapped whose attribute is stuck",
        drop("if any(...): ..."),
        f"{IN_PLACE}::test_if_it_cannot_be_put_back_the_memory_is_poisoned_and_nothing_is_mapped",
    ),
    (
        "undo log: siblings of a stuck step are left alone",
        replace(_STUCK_PIECE, "piece is other"),
        UNDO,
    ),
    ("undo log: other pieces are left alone", replace(_STUCK_PIECE, "step != name"), UNDO),
    ("undo log: stuck is not called", replace("stuck is None", "True"), UNDO),
    (
        "undo log: a failed undo does not poison",
        drop("guard.poison(f'step {step!r} could not be put back: {describe_error(error)}')"),
        UNDO,
    ),
    ("undo log: only Exception stops an undo", narrow("undo(*arguments)"), UNDO),
    ("undo log: what stuck raises leaves the rest", narrow("stuck(*arguments)"), UNDO),
    # Not here: the poison of a stuck function that fails. The undo before it has poisoned already,
    # and the first reason is the one that is kept.
)
_in(
    "discard.bitmap_source:BitmapSource.change",
    (
        "a source's change: nothing is put back",
        replace("notification.take_back", "int"),
        (ATTRIBUTES, VIRTIO_MEM),
    ),
    (
        "a source's change: bits before listeners",
        swap("undo.do('notify', ...)", "undo.do('state', ...)"),
        (ATTRIBUTES, VIRTIO_MEM),
    ),
    ("a source's change: no budget", replace("manager.registry.limited", "False"), VIRTIO_MEM),
    (
        "a source's change: the undo of the bits is left out",
        replace("change.flip_back", "int"),
        f"{INJECTION}::test_plug",
    ),
)
_in(
    "discard.bitmap_source:BitmapChange.flip",
    ("bits change the other way", negate("self.populate"), ATTRIBUTES),
)
_in(
    "discard.bitmap_source:BitmapChange.flip_back",
    (
        "a mixture is put back as if it were uniform",
        replace("self.saved is not None", "False"),
        ONE_FAILURE,
    ),
)

# -- telling listeners, and taking it back ---------------------------------------------------------

_NOTIFICATION = "discard.notification:Notification"

_in(
    f"{_NOTIFICATION}._exact",
    (
        "runs of a source leave the section",
        replace("clip(self._runs(start, end), start, end)", "self._runs(start, end)"),
        VIRTIO_MEM,
    ),
    (
        "runs begin in front of the section",
        replace("start if start > self._start else self._start", "self._start"),
        (MANAGER, VIRTIO_MEM),
    ),
    (
        "runs end behind the section",
        replace("end if end < self._end else self._end", "self._end"),
        (MANAGER, VIRTIO_MEM),
    ),
    (
        "the other sources are not asked",
        replace("joint_runs(runs, self._others)", "runs"),
        (MANAGER, VIRTIO_MEM),
    ),
)
_in(
    f"{_NOTIFICATION}._heard",
    (
        "a sparse discard over what stays populated",
        replace(
            "registration.sparse and self._hollow and (not populate)",
            "registration.sparse and not populate",
        ),
        MANAGER,
    ),
    (
        "a mapper is told less than it may have mapped",
        drop("if registration.budgeted is not None and self._hollow and not populate: ..."),
        GUEST,
    ),
    (
        "a mapper unmaps pages that stay populated",
        replace(
            "registration.budgeted is not None and self._hollow and (not populate)",
            "registration.budgeted is not None and not populate",
        ),
        (GUEST, MANAGER, ONE_FAILURE),
    ),
)
_in(
    f"{_NOTIFICATION}.tell",
    (
        "an interrupted listener counts as one that refused",
        replace("isinstance(error, Exception)", "True"),
        (OTHER_LISTENER, REGISTER),
    ),
    (
        "a second device hears of the first one's section",
        replace("registration.section is not whole", "whole is None"),
        (ATTRIBUTES, MANAGER),
    ),
    ("who was told is not counted", drop("self._told += 1"), (MANAGER, ONE_FAILURE)),
    (
        "the call in flight is not noted",
        drop("self._in_flight = section"),
        (MANAGER, OTHER_LISTENER),
    ),
    (
        "the call in flight is noted for the next listener",
        drop("self._in_flight = None"),
        (OTHER_LISTENER, OTHER_SOURCE),
    ),
)
_IN_FLIGHT = "at.offset if self._refused else at.end"
_in(
    f"{_NOTIFICATION}.take_back",
    ("the call in flight is never reversed", replace(_IN_FLIGHT, "at.offset"), OTHER_LISTENER),
    (
        "a call that was refused is reversed",
        replace(_IN_FLIGHT, "at.end"),
        (MANAGER, OTHER_LISTENER),
    ),
    (
        "those told before keep what they were told",
        drop("for registration in reversed(...): ..."),
        (MANAGER, ONE_FAILURE),
    ),
    (
        "told in front, put back in front",
        replace("reversed(self._registrations[:self._told])", "self._registrations[:self._told]"),
        MANAGER,
    ),
    (
        "a doubt that came while telling lets the undo go on",
        drop("for section, _ in self._board.guard.doubts: ..."),
        TWO_FAILURES,
    ),
)
_in(
    f"{_NOTIFICATION}._reverse",
    (
        "what cannot be put back is not in doubt",
        drop("self._board.guard.doubt(section, ...)"),
        (MANAGER, OTHER_LISTENER),
    ),
    ("one that fails stops the undo", narrow("notify(section)"), MANAGER),
    (
        "a source that does not answer in an undo leaves no doubt",
        drop("self._doubt_all(...)"),
        (OTHER_SOURCE, f"{INJECTION}::test_conversion_with_three_failures"),
    ),
)
_in(
    f"{_NOTIFICATION}.needs",
    (
        "budget: what a discard needs is not counted",
        replace("sum(map(...))", "0"),
        (MAPPER, BUDGETS),
    ),
)
_in(
    "discard.notification:reserve",
    (
        "budget: only the last section counts",
        replace("total[budget] += extra", "total[budget] = extra"),
        f"{INJECTION}::test_budget_of_a_conversion_across_blocks",
    ),
)

# -- ranges, sources, sections ---------------------------------------------------------------------

_in(
    "ranges:clip",
    ("clip: not at the start", replace("max(run_start, start)", "run_start"), (RUNS, VIRTIO_MEM)),
    ("clip: not at the end", replace("min(run_end, end)", "run_end"), (RUNS, VIRTIO_MEM)),
    ("clip: empty runs", replace("low < high", "low <= high"), RUNS),
)
_in("ranges:complement", ("complement: without its last run", drop("if position < end: ..."), RUNS))
_in(
    "ranges:merge",
    ("runs that touch are not joined", replace("run_start > end", "True"), RUNS),
    ("a run inside the one before cuts it short", replace("run_end > end", "True"), RUNS),
)
_in(
    "discard.sources:populated_in",
    ("a source's answer: not clipped at the start", replace("max(offset, start)", "offset"), RUNS),
    (
        "a source's answer: not clipped at the end",
        replace("min(offset + size, end)", "offset + size"),
        RUNS,
    ),
    (
        "a source's answer: overlaps are believed",
        replace("low < position or size <= 0 or cut", "size <= 0 or cut"),
        RUNS,
    ),
    (
        "a source's answer: empty runs are believed",
        replace("low < position or size <= 0 or cut", "low < position or cut"),
        RUNS,
    ),
    (
        "a source's answer: granules may be cut",
        replace("low < position or size <= 0 or cut", "low < position or size <= 0"),
        MANAGER,
    ),
    ("a source's answer: any order is believed", drop("position = high"), RUNS),
)
_in(
    "discard.sources:_granules",
    (
        "granules: the last one is not clipped",
        replace(
            "min(end, (start // granularity + 1) * granularity)",
            "(start // granularity + 1) * granularity",
        ),
        (RUNS, MANAGER),
    ),
)
_in(
    "discard.section:RamSection.intersect",
    ("intersect: not clipped at the start", replace("max(offset, self.offset)", "offset"), SECTION),
    (
        "intersect: not clipped at the end",
        replace("min(offset + size, self.end)", "offset + size"),
        SECTION,
    ),
    ("intersect: empty sections", replace("start < end", "start <= end"), SECTION),
)
_in(
    "discard.section:RamSection.part",
    (
        "a part's guest address is not moved along",
        replace("self.gpa + start - self.offset", "self.gpa"),
        SECTION,
    ),
    ("a part of a ROM can be written", replace("self.readonly", "False"), SECTION),
)

# -- who listens where -----------------------------------------------------------------------------

_in(
    "discard.listeners:Registry.overlapping",
    ("overlapping: long sections are not found", replace("1 << shift", "1 << shift - 1"), REGISTRY),
    (
        "overlapping: the section behind",
        replace("bisect_left(offsets, end, first)", "bisect_right(offsets, end, first)"),
        REGISTRY,
    ),
    (
        "overlapping: the section in front",
        replace(
            "offsets[index] + registration.section.size > start",
            "offsets[index] + registration.section.size >= start",
        ),
        REGISTRY,
    ),
    ("overlapping: in any order", drop("if len(found) > 1: ..."), REGISTRY),
    # Not here: one byte more or less in `start - (1 << shift)`. Sections are whole pages, so that
    # no section begins there.
)
_in(
    "discard.listeners:Registry.discard",
    (
        "registry: another section of the same offset goes",
        replace("registrations.index(...)", "bisect_left(offsets, section.offset)"),
        REGISTRY,
    ),
)
_in(
    "discard.listeners:Registry.add",
    ("registry: a listener is there twice", drop("self.discard(registration.listener)"), REGISTRY),
    (
        "registry: budgets are not counted",
        drop("self.limited += registration.limited"),
        (GUEST, MAPPER),
    ),
)

# -- the discard manager ---------------------------------------------------------------------------

_MANAGER = "discard.manager:RamDiscardManager"

_in(
    f"{_MANAGER}._add_source",
    (
        "virtio-mem that comes back frees nothing",
        drop("if getattr(source, 'withholds', False): ..."),
        VIRTIO_MEM,
    ),
    (
        "virtio-mem that comes back frees all",
        replace("held_back_by(...)", "iter(((0, self.block.size),))"),
        VIRTIO_MEM,
    ),
    (
        "a source may be finer than a page of a target",
        drop("for registration in self.registry: ..."),
        MANAGER,
    ),
    (
        "a source that is refused does not hear of it",
        drop("getattr(source, 'on_removed', _nothing)()"),
        (COORDINATION, MANAGER),
    ),
)
_in(
    f"{_MANAGER}._change_sources",
    (
        "what a source that goes gives back still waits to be freed",
        drop("self.freeing.keep_used(0, size)"),
        (RECLAIM, VIRTIO_MEM),
    ),
)
_in(
    f"{_MANAGER}._tell",
    ("adding a source: no budget", drop("reserve(...)"), MANAGER),
    (
        "adding a source: its undo is left out",
        replace("change.take_back", "int"),
        (MANAGER, ADD_SOURCE),
    ),
)
_in(
    f"{_MANAGER}.join",
    (
        "a listener is not registered",
        replace("undo.do('map', ...)", "undo.do('map', replay.tell, unjoin)\nreturn"),
        MANAGER,
    ),
)
_in(
    f"{_MANAGER}.join.unjoin",
    (
        "a batch that is undone takes the earlier ones off the list",
        drop("if before is not None: ..."),
        BATCHES,
    ),
    (
        "a listener that may hold something is forgotten",
        drop("if registration.budgeted is not None: ..."),
        (MAP, ATTACH, BATCHES),
    ),
    ("a refused listener stays", prepend("return replay.take_back()"), MAP),
)
_in(
    f"{_MANAGER}.leave",
    ("a listener that left is told of changes", drop("self.registry.discard(...)"), MANAGER),
)
_in(
    f"{_MANAGER}.leave.rejoin",
    (
        "a listener that cannot leave is off the list",
        drop("self.registry.add(registration)"),
        (UNMAP, DETACH),
    ),
    ("leaving: its undo is left out", drop("farewell.take_back()"), (MANAGER, UNREGISTER)),
)
_in(
    f"{_MANAGER}.leave_regardless",
    (
        "by force: nothing is let go",
        drop("registration.budgeted.let_go()"),
        (BLOCK, DETACH),
    ),
    ("by force: what is not let go is not in doubt", drop("self.guard.doubt(...)"), BLOCK),
    ("by force: one that fails stops it", narrow("listener.notify_discard(part)"), BLOCK),
    ("by force: the listener stays", drop("self.registry.discard(listener)"), (GUARD, BLOCK)),
)
_in(
    f"{_MANAGER}._unregister",
    ("a poisoned block keeps its listeners", drop("if self.guard.poisoned: ..."), GUARD),
)
_in(
    f"{_MANAGER}.run",
    (
        "a block that moves to another lock is changed under the old one",
        replace(
            "self.guard.run(..., home=self)",
            "self.guard.run(operation, work, *arguments, even_poisoned=even_poisoned)",
        ),
        GUARD,
    ),
)

# -- the lock, the poison --------------------------------------------------------------------------

_in(
    "discard.guard:Guard.run",
    ("calling back in waits for itself", drop("if self._owner == get_ident(): ..."), GUARD),
    ("fork: the memory does not refuse", drop("if self._process != process.current: ..."), PROCESS),
    (
        "interrupts come in the middle of an operation",
        replace(
            "uninterrupted(...)",
            "self._run_locked(operation, work, arguments, even_poisoned, home)",
        ),
        INTERRUPTS,
    ),
)
_in(
    "discard.guard:Guard._run_locked",
    ("the lock: removed", prepend("return work(*arguments)"), GUARD),
    ("the lock: the owner stays noted", drop("self._owner = None"), GUARD),
    (
        "the lock: a waiter is not let in",
        drop("self._gates.popleft().release()"),
        f"{GUARD}::test_whoever_waits_has_the_lock_in_turn_and_before_whoever_comes_later",
    ),
    (
        "the lock: the last one in is the first",
        replace("self._gates.popleft()", "self._gates.pop()"),
        GUARD,
    ),
    # Not here: a release that opens a gate afterwards in place of handing over. The thread that
    # releases takes the lock for the next one itself, before another one runs.
    (
        "the lock: whoever comes while it is given back waits forever",
        drop("if self._gates:\n self._open_a_gate()"),
        GUARD,
    ),
    (
        "a poisoned memory goes on",
        replace("self._reason is not None and not even_poisoned", "False"),
        GUARD,
    ),
    (
        "a poisoned memory cannot be unmapped",
        replace("self._reason is not None and not even_poisoned", "self._reason is not None"),
        GUARD,
    ),
    (
        "a block is changed under the lock that it left",
        drop("if home is not None and home.guard is not self: ..."),
        GUARD,
    ),
)
_in(
    "discard.guard:Guard._wait",
    (
        "the lock: whoever runs next gets it",
        prepend("self._lock.acquire()\nreturn"),
        GUARD,
    ),
    (
        "the lock: whoever came too late to be seen waits forever",
        drop("self._open_a_gate()"),
        GUARD,
    ),
)
_in(
    "discard.guard:Guard.poison",
    ("poison: the last reason is kept", unwrap("if first: ..."), GUARD),
)
_in(
    "discard.guard:Guard.doubt",
    (
        "a doubt does not poison",
        drop("self.poison(...)"),
        (ATTACHMENT, MAPPER, BLOCK),
    ),
)
_in(
    "discard.guard:Guard.leave_with",
    ("a block leaves its poison behind", drop("other._reason = self._reason"), GUARD),
    ("a block leaves its doubts behind", drop("other.doubts = ..."), (GUARD, BLOCK)),
)

# -- interrupts ------------------------------------------------------------------------------------

_in(
    "interrupts:_note",
    ("a signal is dropped", drop("_waiting.append((number, frame))"), INTERRUPTS),
    (
        "a signal is delivered inside",
        prepend("return _handlers[number](number, frame)"),
        INTERRUPTS,
    ),
    (
        "patience is ignored: a second signal never kills",
        replace("now - _since >= PATIENCE_SECONDS", "False"),
        INTERRUPTS,
    ),
    (
        "patience is ignored: a second signal always kills",
        replace("now - _since >= PATIENCE_SECONDS", "True"),
        INTERRUPTS,
    ),
    ("patience: counted from long ago", drop("_since = now"), INTERRUPTS),
    ("a handler that was left swallows signals", drop("if not _depth: ..."), INTERRUPTS),
    ("a handler that was left stays", drop("_put_back_all()"), INTERRUPTS),
)
_in(
    "interrupts:_hand_over",
    ("a second handler is not called", replace("error = raised", "raise"), INTERRUPTS),
    (
        "signals are handled latest first",
        replace("_waiting.pop(0)", "_waiting.pop()"),
        INTERRUPTS,
    ),
    (
        "the exception of an earlier handler is lost",
        drop("raised.__context__ = error or raised.__context__"),
        INTERRUPTS,
    ),
)
_in(
    "interrupts:_hand_over",
    (
        "the error of the work takes the place of earlier signals",
        drop("error.__context__ = context"),
        INTERRUPTS,
    ),
)
_in(
    "interrupts:uninterrupted",
    ("SIGINT is not held back", drop("signal(SIGINT, _note)"), INTERRUPTS),
    ("SIGTERM is not held back", drop("signal(SIGTERM, _note)"), INTERRUPTS),
    ("SIGINT's handler is not put back", drop("_restore(SIGINT)"), INTERRUPTS),
    ("SIGTERM's handler is not put back", drop("_restore(SIGTERM)"), INTERRUPTS),
    (
        "a handler that was left is taken for the application's",
        replace(
            "if handler is not _note:\n _handlers[SIGINT] = handler", "_handlers[SIGINT] = handler"
        ),
        INTERRUPTS,
    ),
    ("handlers of other threads' operations", drop("if get_ident() != _main: ..."), INTERRUPTS),
    ("nested operations: the inner one hands over", drop("if _depth: ..."), INTERRUPTS),
    ("nested operations: the inner one is not counted", drop("_depth += 1"), INTERRUPTS),
    ("what waits is not handed over", drop("while _waiting: ..."), INTERRUPTS),
)
_in(
    "interrupts:_restore",
    (
        "a handler that set another one is put back over it",
        replace("found is not _note", "False"),
        INTERRUPTS,
    ),
)
_in(
    "interrupts:hand_over",
    ("an operation that could be left goes on", prepend("return"), INTERRUPTS),
    ("an operation inside another is left", replace("_depth == 1", "True"), INTERRUPTS),
)
_in(
    "discard.attributes:RamBlockAttributes._state_change",
    (
        "states change without the VM's attributes",
        replace("manager.guard.has_vm", "False"),
        ATTRIBUTES,
    ),
)
_in(
    "discard.attributes:RamBlockAttributes.observe",
    ("an observer can stop a conversion", narrow("observer(event)"), GUEST),
)
_in(
    "interrupts:_find_main_thread",
    ("fork: the thread that forked is not the main one", prepend("return"), PROCESS),
    ("fork: signals are held back for ever", drop("if get_ident() != _main: ..."), INTERRUPTS),
)

# -- one process -----------------------------------------------------------------------------------

_in("process:_note_fork", ("fork: not noticed", prepend("return"), PROCESS))
_in(
    "process:OfOneProcess.__reduce_ex__",
    ("copies are allowed", prepend("return object.__reduce_ex__(self, protocol)"), PROCESS),
)
_in(
    "guest.block:RamBlock.close",
    ("fork: closing asks for the lock", replace("self.guard.forked", "False"), PROCESS),
)

# -- placing ---------------------------------------------------------------------------------------

_MEMORY = "guest.memory:GuestMemory"
_SLOT = "change_slot(...)"

_in(
    f"{_MEMORY}._map",
    (
        "map: a slot that stays is no doubt",
        replace("partial(self._guard.doubt, section, self._vm, 'the VM keeps its slot')", "int"),
        GUEST,
    ),
    ("placing: slot before attributes", swap("undo.do('attribute', ...)", _SLOT), (GUEST, MAP)),
    (
        "placing: targets before the slot",
        swap(_SLOT, "for registration, replay in zip(...): ..."),
        (GUEST, MAP),
    ),
    (
        "placing: attributes are not put back",
        replace("self._try_to_withdraw", "id"),
        (GUEST, MAP),
    ),
    (
        "placing: no budget",
        drop("reserve(replays)"),
        (GUEST, f"{INJECTION}::test_budget_of_attaching_and_of_placing"),
    ),
    (
        "placing: listeners of a section that did not come are kept",
        drop("if not self._guard.poisoned: ..."),
        (GUEST, MAP),
    ),
    (
        "placing: a block that did not come stays under the memory's lock",
        drop("self._release_unplaced(block)"),
        (GUEST, MAP),
    ),
)
_in(
    f"{_MEMORY}._remove",
    (
        "removing: slot before targets",
        swap("for registration in leaving:\n manager.leave(...)", _SLOT),
        GUEST,
    ),
    (
        "removing: attributes before the slot",
        swap(_SLOT, "undo.do('attribute', ...)"),
        (GUEST, UNMAP),
    ),
    (
        "removing: a slot that does not come back is no doubt",
        drop_keyword("stuck", of=_SLOT),
        UNMAP,
    ),
    (
        "removing: attributes that do not come back are no doubt",
        drop_keyword("stuck", of="undo.do('attribute', ...)"),
        UNMAP,
    ),
    (
        "removing: attributes are not put back",
        replace("self._set_attributes", "id"),
        UNMAP,
    ),
)
_in(
    f"{_MEMORY}.forget",
    (
        "closing: attributes that the VM does not reset stop it",
        replace("self._try_to_withdraw", "partial(withdraw, self._vm)"),
        BLOCK,
    ),
    ("closing stops at what a VM raises", narrow("if not self._guard.poisoned: ..."), BLOCK),
)
_in(
    "guest.vm:change_slot",
    ("placing: any error of a slot is a refusal", replace("OSError", "Exception"), GUEST),
    ("placing: a slot that was refused is removed", drop("undo.drop_last()"), (GUEST, MAP)),
    ("reset: a slot that was refused is put back", drop("undo.drop_last()"), RESET),
    (
        "placing: the slot is not put back",
        replace("partial(put_back, place.section)", "int"),
        (GUEST, MAP),
    ),
    (
        "reset: slots are not put back",
        replace("partial(put_back, place.section)", "int"),
        RESET,
    ),
    (
        "reset: a slot of a new VM that is not put back poisons",
        drop("if dropped: ..."),
        RESET,
    ),
)
_in(
    f"{_MEMORY}._set_attributes",
    (
        "ordinary RAM over attributes that stayed private",
        replace("any(...)", "False"),
        f"{INJECTION}::test_attributes_that_could_not_be_reset_are_set_for_ordinary_memory",
    ),
    (
        "attributes that stayed private are set for ever",
        drop("if place.block.in_place is None: ..."),
        f"{INJECTION}::test_attributes_that_were_set_meanwhile_are_not_set_again",
    ),
)
_in(
    f"{_MEMORY}._try_to_withdraw",
    (
        "attributes that stayed private are forgotten",
        drop("self._not_reset.append(...)"),
        f"{INJECTION}::test_attributes_that_could_not_be_reset_are_set_for_ordinary_memory",
    ),
)
_in(
    f"{_MEMORY}._force_out",
    ("by force: a slot that stays is no doubt", drop("self._guard.doubt(...)"), BLOCK),
    ("by force: targets are not told", drop("attachment.force_out(place)"), GUARD),
)
_in(
    "guest.vm:establish",
    ("placing: pages are not made private", drop("make_private(vm, place)"), GUEST),
    ("placing: shared pages are not made shared", drop("share(vm, place)"), (GUEST, MAP)),
    (
        "in place: placing makes all private first",
        replace("place.block.in_place is None", "True"),
        IN_PLACE,
    ),
)
_in(
    "guest.vm:withdraw",
    (
        "in place: unmapping asks the VM",
        replace(
            "vm is not None and place.block.private is not None and place.block.in_place is None",
            "vm is not None and place.block.private is not None",
        ),
        IN_PLACE,
    ),
)
_in(
    "guest.vm:set_attribute",
    (
        "in place: the VM is asked",
        replace("place.block.in_place is not None", "False"),
        IN_PLACE,
    ),
)

# -- in place --------------------------------------------------------------------------------------

_in("hostmem.in_place:TRIES", ("in place: a pin is tried once", replace("4", "1"), IN_PLACE))
_in(
    "hostmem.in_place:set_attributes",
    (
        "in place: any error is tried again",
        replace("error.errno != errno.EAGAIN or not left", "not left"),
        IN_PLACE,
    ),
    (
        "in place: a pin that stays is ignored",
        prepend(
            "for _ in range(TRIES):\n"
            " try:\n"
            "  return backing.set_attributes(offset, size, private)\n"
            " except OSError as error:\n"
            "  if error.errno != errno.EAGAIN:\n"
            "   raise\n"
            "return None"
        ),
        IN_PLACE,
    ),
)
_in(
    "guest.freeing:Sides.__init__",
    (
        "in place: a conversion frees",
        replace("return", "self.shared = self.private = self._all[0]\nreturn"),
        IN_PLACE,
    ),
    (
        "in place: unplugging frees nothing",
        replace("return", "self._all = []\nreturn"),
        IN_PLACE,
    ),
)

# -- attaching in batches --------------------------------------------------------------------------

_ATTACHMENT = "guest.devices:Attachment"

_in(
    f"{_ATTACHMENT}._map_some",
    (
        "attach: only the latest batch is registered",
        replace("section.part(section.offset, stop)", "section.part(start, stop)"),
        BATCHES,
    ),
    (
        "attach: the next batch begins a page too late",
        replace("before.section.end", "before.section.end + 4096"),
        BATCHES,
    ),
    (
        "attach: the next batch begins in front of the border",
        replace("before.section.end", "before.section.end - 4096"),
        BATCHES,
    ),
    (
        "attach: all of the section is registered at once",
        replace("section.part(section.offset, stop)", "section"),
        BATCHES,
    ),
    ("attach: no budget for a batch", drop("reserve((replay,))"), BATCHES),
    (
        "attach: a batch that fails takes the earlier ones off the list",
        drop_keyword("before", of="manager.join(...)"),
        BATCHES,
    ),
    (
        "attach: a section that went meanwhile is mapped",
        drop("if self._places.look_up(section) is not place: ..."),
        BATCHES,
    ),
)
_in(
    f"{_ATTACHMENT}._end_of_batch",
    ("attach: all in one batch", prepend("return None"), BATCHES),
)
_in(
    f"{_ATTACHMENT}._map_all",
    (
        "attach: what is behind the first runs is not counted",
        replace("runs[-1].end if len(runs) == _COUNTED else end", "end"),
        BATCHES,
    ),
    (
        "attach: the budget is not asked in advance",
        drop("if self.mapper.limit is not None: ..."),
        BATCHES,
    ),
    (
        "attach: cannot be left between batches",
        replace("while self._map_some(place): ...", "while self._map_some(place): pass"),
        BATCHES,
    ),
    ("attach: it is never complete", drop("self.complete = True"), GUEST),
)
_in(
    f"{_ATTACHMENT}.give_up",
    ("attach: the batches before are not unmapped", drop("self.force_out(place)"), BATCHES),
    (
        "attach: a listener in doubt is forgotten",
        drop("if registration is not None and listener is not None and listener.in_doubt: ..."),
        (BATCHES, ATTACH),
    ),
    ("attach: it stays on the list", drop("self._siblings.remove(self)"), BATCHES),
)
_in(
    "guest.memory:GuestMemory._attach",
    ("attach: interrupts wait for all batches", drop("hand_over()"), BATCHES),
)
_in(
    f"{_ATTACHMENT}._close",
    ("attach: a claim stays", drop("self._hold.release()"), (COORDINATION, GUEST)),
    (
        "a target in doubt does not keep the memory alive",
        replace(
            "self._anchor is not None and not self._guard.poisoned", "self._anchor is not None"
        ),
        ATTACHMENT,
    ),
)
_in(
    f"{_ATTACHMENT}.leave_all",
    (
        "detach: by force also where nothing is poisoned",
        replace("self._guard.poisoned", "True"),
        (GUEST, DETACH),
    ),
    (
        "detach: all or nothing also where it is poisoned",
        replace("self._guard.poisoned", "False"),
        (GUARD, MAPPER, TWO_FAILURES),
    ),
)

# -- reset -----------------------------------------------------------------------------------------

_RESET = "guest.reset:reset_guest"
_RESETS = (RESET, INJECTED_RESET)
_NO_BACK = (
    "undo.do('attribute', make_private, lambda *_: None, new_vm, place, piece=block, stuck=settle)"
)

_in(
    _RESET,
    ("reset: nothing is unmapped", drop("undo.do('unmap', ...)"), RESET),
    ("reset: undo of unmap left out", replace("farewell.take_back", "int"), RESET),
    (
        "reset: the slot stays with the old side",
        drop("change_slot(undo, old_vm, place, ...)"),
        RESET,
    ),
    (
        "reset: a slot that does not come back is no doubt",
        drop_keyword("stuck", of="change_slot(undo, old_vm, ...)"),
        INJECTED_RENEWAL,
    ),
    ("reset: the new private side is not taken", drop("undo.do('private side', ...)"), RESET),
    (
        "reset: undo of the private side left out",
        replace("partial(swap, block.private)", "int"),
        INJECTED_RENEWAL,
    ),
    ("reset: attributes are not made private", drop("undo.do('attribute', ...)"), RESET),
    (
        "reset: undo of attributes left out",
        replace("undo.do('attribute', make_private, back, ...)", _NO_BACK),
        _RESETS,
    ),
    (
        "reset: attributes that stay private leave the state shared",
        drop_keyword("stuck", of="undo.do('attribute', ...)"),
        _RESETS,
    ),
    (
        "reset: a new VM that is not taken keeps private attributes",
        replace("partial(try_to, withdraw)", "partial(try_to, share)"),
        RESET,
    ),
    (
        "reset: a new VM that is not put back poisons",
        replace("partial(try_to, withdraw)", "withdraw"),
        RESET,
    ),
    (
        "reset: slots before attributes",
        swap("for place in places: ...", "for place in again: ..."),
        INJECTED_RENEWAL,
    ),
    ("reset: a new VM gets no slots", drop("change_slot(undo, new_vm, ...)"), RESET),
    (
        "reset: a slot that stays with the new side leaves the state shared",
        drop_keyword("stuck", of="change_slot(undo, new_vm, ...)"),
        INJECTED_RENEWAL,
    ),
    ("reset: the states stay", drop("undo.do('state', ...)"), RESET),
    ("reset: undo of the state left out", replace("change.flip_back", "int"), _RESETS),
    (
        "reset: a state that is stuck is not settled",
        replace(
            "undo.do('state', change.flip, change.flip_back, piece=block, stuck=settle)",
            "undo.do('state', change.flip, change.flip_back, piece=block)",
        ),
        INJECTED_RESET,
    ),
    ("reset: nothing is told to the observer", drop("change.source.observe(...)"), RESET),
    (
        "reset: the guest's private bytes survive",
        replace("block.sides.free", "block.sides.shared.free"),
        RESET,
    ),
    (
        "reset: the shared bytes survive",
        replace("block.sides.free", "block.sides.private.free"),
        RESET,
    ),
    (
        "reset: the old private side is not emptied",
        drop("frees.append(partial(block.retire_private, side))"),
        RESET,
    ),
    (
        "reset: what is no VM is taken",
        replace("hasattr(vm, 'set_memory_attributes')", "True"),
        RESET,
    ),
    ("reset: any private side is taken", drop("check_private(...)"), RESET),
)
_in(
    "guest.reset:_resettable",
    (
        "reset: virtio-mem stays plugged",
        replace("(RamBlockAttributes, VirtioMem)", "RamBlockAttributes"),
        RESET,
    ),
)
_in("guest.reset:_settle", ("reset: stuck does nothing", prepend("return"), _RESETS))
_in(
    "guest.memory:GuestMemory._reset",
    ("reset: the new VM is not taken", replace("vm is not None", "False"), RESET),
    ("reset: nothing is freed", replace("free_each(frees)", "0"), RESET),
)
_in(
    "guest.block:RamBlock.retire_private",
    ("reset: the old private side keeps its bytes", drop("old.discard(0, self.size)"), RESET),
    ("reset: an old side that is not emptied is not said", drop("not_freed = self.size"), RESET),
    ("reset: the old side stays open", drop("self._own_private.close()"), RESET),
)

# -- virtio-mem ------------------------------------------------------------------------------------

_in(
    "discard.virtio_mem:VirtioMem.withholds",
    ("virtio-mem withholds nothing", replace("True", "False"), VIRTIO_MEM),
)
_KEEP_OR_FREE = "manager.freeing.keep_used if populate else manager.freeing.free"
_in(
    "discard.virtio_mem:VirtioMem._change",
    (
        "unplug: freed before the listeners have let go",
        swap("self.change(operation, change)", "keep_or_free(offset, size)"),
        VIRTIO_MEM,
    ),
    (
        "unplug: nothing is freed",
        replace(_KEEP_OR_FREE, "manager.freeing.keep_used"),
        VIRTIO_MEM,
    ),
    (
        "plug: what is plugged again still waits to be freed",
        replace(_KEEP_OR_FREE, "(lambda *_: None) if populate else manager.freeing.free"),
        (VIRTIO_MEM, RECLAIM),
    ),
    (
        "plug: what is plugged in part is plugged",
        replace("change is None or change.changed_bytes < size", "change is None"),
        VIRTIO_MEM,
    ),
)
_in(
    "discard.virtio_mem:VirtioMem.on_removed",
    ("virtio-mem that goes keeps its claim", drop("self._hold.release()"), COORDINATION),
)
# -- the mapper ------------------------------------------------------------------------------------

_SECTION_MAPPER = "dma.mapper:SectionMapper"

_in(
    "dma.mapper:Mapper.require",
    ("budget: not checked", replace("needed > limit", "False"), MAPPER),
    ("budget: off by one", replace("needed > limit", "needed > limit + 1"), MAPPER),
)
_in(
    "dma.mapper:Mapper.remove",
    ("entries of a section that went stay counted", drop("self.entries -= ..."), GUARD),
)
_in(
    f"{_SECTION_MAPPER}._unmap",
    (
        "a short unmap is believed",
        replace("removed < pages * PAGE_SIZE", "False"),
        (MAPPER, ONE_FAILURE),
    ),
    (
        "an exact target gets one call for all",
        replace("self._pieces(start, end) if exact else ((start, end),)", "((start, end),)"),
        MAPPER,
    ),
    ("an unmap that fails is not put back", drop("self._map_after_failure(...)"), ONE_FAILURE),
)
_in(
    f"{_SECTION_MAPPER}._try_unmap",
    (
        "a short unmap is believed in the undo",
        replace("removed >= size or perhaps", "True"),
        TWO_FAILURES,
    ),
    (
        "pages that are perhaps mapped: the word that there are none is a failure",
        replace("perhaps and getattr(error, 'errno', None) == errno.ENOENT", "False"),
        BY_PAGE_TWO,
    ),
)
_in(
    f"{_SECTION_MAPPER}.entries_to_discard",
    (
        "budget: the part in front of a cut is not counted",
        replace("self._continues(start)", "0"),
        (MAPPER, BUDGETS),
    ),
    (
        "budget: the part behind a cut is not counted",
        replace("self._continues(start + section.size // PAGE_SIZE)", "0"),
        (MAPPER, BUDGETS),
    ),
)
_in(
    f"{_SECTION_MAPPER}._erase",
    (
        "the rest behind a cut is no entry",
        replace("self.starts.set(end, end + 1) if goes_on else 0", "0"),
        (MAPPER, ONE_FAILURE),
    ),
)
_in(
    f"{_SECTION_MAPPER}._unmap_after_failure",
    (
        "an exact target: what was mapped is unmapped in one call",
        replace(
            "self._step if self.mapper.exact and self._step else position - start",
            "position - start",
        ),
        ONE_FAILURE,
    ),
    (
        "a map in doubt is taken for a refusal",
        replace(
            "isinstance(error, DmaError) and not error.in_doubt", "isinstance(error, DmaError)"
        ),
        ONE_FAILURE,
    ),
    (
        "a map that may have happened is not unmapped",
        replace("position == stop", "True"),
        ONE_FAILURE,
    ),
    (
        "no second witness",
        replace("if not removed: ...", "problem = None if not removed else problem"),
        BY_PAGE_TWO,
    ),
)
_in(
    f"{_SECTION_MAPPER}._map_after_failure",
    (
        "an unmap in doubt is taken for a refusal",
        replace(
            "not isinstance(error, DmaError) or error.in_doubt", "not isinstance(error, DmaError)"
        ),
        ONE_FAILURE,
    ),
    (
        "pieces that were unmapped stay unmapped",
        drop("for run in list(runs.runs(start, position)): ..."),
        ONE_FAILURE,
    ),
    (
        "a short unmap is no doubt",
        drop("if problem is not None: ..."),
        ONE_FAILURE,
    ),
)
_in(
    f"{_SECTION_MAPPER}._report",
    ("pages in doubt are off the books", drop("self._record(start, end)"), BY_PAGE_TWO),
    (
        "pages in doubt are like any others",
        drop("self.uncertain.set(start, end)"),
        (ATTACHMENT, TWO_FAILURES),
    ),
)
_in(
    f"{_SECTION_MAPPER}.let_go",
    (
        "by force: pages in doubt are not tried",
        replace("(*certain.runs(0, self.pages), *uncertain)", "tuple(certain.runs(0, self.pages))"),
        TWO_FAILURES,
    ),
)
_in(
    f"{_SECTION_MAPPER}.notify_populate",
    (
        "what is mapped in front of a refused gap stays",
        drop("for before in gaps[:number]: ..."),
        MAPPER,
    ),
    (
        "what is mapped already is mapped again",
        replace("self.mapped.count(start, end)", "0"),
        (BATCHES, OTHER_LISTENER, TWO_FAILURES),
    ),
)
_in(
    f"{_SECTION_MAPPER}._map_piece",
    ("a ROM is mapped for writing", replace("not section.readonly", "True"), (MAPPER, GUEST, SOFT)),
)

# -- the software IOMMU ----------------------------------------------------------------------------

_LOCK = "with self._lock: ..."

_in("dma.soft:SoftIommu.read", ("a read does not hold off an unmap", unwrap(_LOCK), SOFT))
_in("dma.soft:SoftIommu.write", ("a write does not hold off an unmap", unwrap(_LOCK), SOFT))
_in("dma.soft:SoftIommu.unmap", ("an unmap does not wait for accesses", unwrap(_LOCK), SOFT))
_in(
    "dma.soft:SoftIommu._translate",
    (
        "a write to read-only memory goes through",
        replace("write and not mapping.writable", "False"),
        SOFT,
    ),
    ("an access over a hole goes through", replace("mapping.iova > position", "False"), SOFT),
)
_in(
    "dma.soft:MappingTable.overlapping",
    ("what touches overlaps", replace("iova + size > start", "iova + size >= start"), SOFT),
)

# -- freeing and closing ---------------------------------------------------------------------------

_RECLAIMER = "guest.freeing:Reclaimer"

_in(
    f"{_RECLAIMER}._free",
    ("a failed free is not accounted", drop("self._wait(start, end)"), RECLAIM),
    ("a free that worked stays on the account", drop("if self.not_freed_bytes: ..."), RECLAIM),
)
_in(
    f"{_RECLAIMER}.free",
    ("a failed free is forgotten", drop("self._queue.append((offset, end))"), RECLAIM),
    ("earlier failures are not tried again", drop("if earlier: ..."), RECLAIM),
)
_in(
    f"{_RECLAIMER}._retry",
    (
        "the latest failure is tried again first",
        replace("self._queue.popleft()", "self._queue.pop()"),
        RECLAIM,
    ),
    ("all earlier failures are tried again", replace("min(_RETRIES, waiting)", "waiting"), RECLAIM),
    ("the rest of a failure is forgotten", drop("if run[1] < end: ..."), RECLAIM),
)
_in(
    f"{_RECLAIMER}._unused",
    (
        "what is in use again is freed later",
        replace("complement(self._used_pages(*run), *run)", "iter((run,))"),
        RECLAIM,
    ),
)
_in(
    f"{_RECLAIMER}._free_huge",
    ("a part of a huge page does not wait", drop("for run in complement(...): ..."), RECLAIM),
    (
        "a huge page that is in use in part is freed",
        replace("next(self._used(edge, edge + unit), None) is None", "True"),
        RECLAIM,
    ),
)
_in(
    "guest.freeing:free_each",
    (
        "an interrupt keeps others from being freed",
        replace("failure = error", "raise"),
        (RECLAIM, ONE_FAILURE),
    ),
)
_in(
    "guest.freeing:Sides._used",
    (
        "the shared pages count as private ones",
        drop("if side == 'private': ..."),
        (RECLAIM, BLOCK),
    ),
    (
        "in place: what is plugged counts as unused",
        replace("joint_runs(runs, sources)", "joint_runs(runs, sources) if side else iter(())"),
        (IN_PLACE, f"{INJECTION}::test_virtio_mem_in_place"),
    ),
    (
        "what a source withholds from devices counts as unused",
        replace("getattr(each, 'withholds', False)", "True"),
        (RECLAIM, MANAGER),
    ),
)
_in(
    "guest.block:RamBlock._close",
    ("pages in doubt are given back", replace("manager.guard.doubts_of(self)", "False"), BLOCK),
    ("closing tells no listener", drop("manager.dismiss_all()"), BLOCK),
    ("closing keeps claims", drop("for hold in manager.holds: ..."), (BLOCK, COORDINATION)),
)
