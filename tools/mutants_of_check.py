# SPDX-License-Identifier: Apache-2.0
"""Mutants of `ramblock check`: telling ones, and the modules that tools/mechanical.py breaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tools.mutation import Change, Mutant, drop, negate, prepend, replace

__all__ = ["MUTANTS", "PARTS", "Part"]

AUDIT = "tests/trace/test_audit.py"
CONVERSIONS = "tests/trace/test_conversions.py"
FAULTS = "tests/trace/test_faults.py"
GUESTS = "tests/trace/test_guests.py"
JOINED = "tests/trace/test_joined.py"
LIMITS = "tests/trace/test_limits.py"
MODEL = "tests/trace/test_audit_model.py::test_any_order_of_any_events"

MUTANTS: list[Mutant] = []


def _in(where: str, *mutants: tuple[str, Change, str]) -> None:
    """Add *mutants* of one place, as (name, change, tests)."""
    MUTANTS.extend(Mutant(name, where, change, (tests,)) for name, change, tests in mutants)


# -- places and guests

_in(
    "trace.places:_part_of",
    (
        "audit: a slot's offset is not subtracted",
        replace(
            "return [(block.start + low - block.offset, block.start + high - block.offset)]",
            "return [(block.start + low, block.start + high)]",
        ),
        GUESTS,
    ),
    (
        "audit: the end of a slot does not end a state change",
        replace("min(end, block.offset + block.end - block.start)", "end"),
        GUESTS,
    ),
)
_in(
    "trace.places:Places.note",
    ("audit: a removed slot is kept", drop("self._remove(block)"), GUESTS),
)
_in(
    "trace.places:Places.note_host",
    (
        "audit: the first place of a host address counts",
        replace("old.guest - old.host != start - host", "False"),
        LIMITS,
    ),
)
_in(
    "trace.places:_key",
    (
        "audit: slots of one guest_memfd are blocks of their own",
        prepend("return block.name"),
        GUESTS,
    ),
)
_in(
    "trace.audit:Audit._is_another",
    ("audit: logs of two programs are one guest", prepend("return False"), GUESTS),
    (
        "audit: a place that goes is of another guest",
        replace("not event.removed", "True"),
        GUESTS,
    ),
)
_in(
    "trace.audit:Audit._meet",
    (
        "audit: each process that appears is a second guest",
        replace("before is None", "False"),
        GUESTS,
    ),
    (
        "audit: guests beyond the bound are taken for one that is known, in silence",
        drop("self._judge.evidence.not_compared = True"),
        GUESTS,
    ),
)
_in(
    "trace.guest_audit:GuestAudit._private_side",
    (
        "audit: a guest_memfd that comes again is private again",
        drop("seen.set(low, high, True)"),
        GUESTS,
    ),
    (
        "audit: the private part of a slot is placed by its offset",
        replace("block.start - block.offset", "block.start"),
        GUESTS,
    ),
)
_in(
    "trace.guest_audit:GuestAudit.reset",
    ("audit: a reset leaves pages shared", drop("self._become_private(...)"), GUESTS),
    ("audit: a reset keeps the old guest_memfd", drop("self._seen.clear()"), GUESTS),
)
_in(
    "trace.guest_audit:GuestAudit.viommu",
    (
        "audit: states stay behind a virtual IOMMU",
        drop("reasons.clear()"),
        GUESTS,
    ),
)
_in(
    "trace.guest_audit:GuestAudit._decide",
    (
        "audit: a state change is placed wherever it fits",
        replace("len(places) == 1", "places"),
        GUESTS,
    ),
)

# -- conversions

_in(
    "trace.conversions:Conversions.begin",
    (
        "audit: the next conversion of a vCPU does not end the one before",
        drop("self._end_of_vcpu(vcpu)"),
        CONVERSIONS,
    ),
    (
        "audit: the next conversion does not take patience away",
        drop("before.told = False"),
        CONVERSIONS,
    ),
)
_in(
    "trace.conversions:Conversions._has_end",
    ("audit: time ends a conversion whose end will be told", prepend("return False"), CONVERSIONS),
)
_in(
    "trace.conversions:Conversions._expire",
    ("audit: time ends a plugging", replace("conversion.held", "False"), AUDIT),
    (
        "audit: steps do not keep a conversion",
        replace("conversion.last >= limit", "False"),
        CONVERSIONS,
    ),
    ("audit: a guess is not marked", drop("conversion.guessed = True"), CONVERSIONS),
)
_in(
    "trace.guest_audit:GuestAudit.conversion_end",
    (
        "audit: a conversion that failed is taken for done",
        replace("event.result != 'done'", "False"),
        CONVERSIONS,
    ),
)
_in(
    "trace.guest_audit:GuestAudit.discard",
    ("audit: a failed discard is taken for done", replace("not event.done", "False"), MODEL),
    (
        "audit: giving back ends no conversion",
        drop("self.conversions.end_unless_told(...)"),
        CONVERSIONS,
    ),
)

# -- mappings

_in(
    "trace.guest_audit:GuestAudit._short_unmap",
    (
        "audit: the wrong page of a short unmap is left",
        replace("min(end, start + left)", "end"),
        LIMITS,
    ),
    ("audit: what a short unmap left is not refused", drop("target.refuse(...)"), LIMITS),
)
_in(
    "trace.guest_audit:GuestAudit._is_refused",
    ("audit: an unmap that failed is taken for done", replace("not event.done", "False"), AUDIT),
    (
        "audit: no rule has a call that unmaps everything",
        replace("start == 0 and end >= _EVERYTHING - 1", "False"),
        LIMITS,
    ),
)
_in(
    "trace.guest_audit:GuestAudit._judge_refused",
    (
        "audit: what an unmap left is told twice",
        replace("for low, high, private in ...: ...", "pass"),
        MODEL,
    ),
)
_in(
    "trace.guest_audit:GuestAudit.map",
    ("audit: a map that failed is taken for done", replace("not event.done", "False"), AUDIT),
)
_in(
    "trace.guest_audit:GuestAudit.detach",
    ("audit: a target that goes is not judged", drop("self._judge_piece(...)"), LIMITS),
)
_in(
    "trace.guest_audit:GuestAudit.attach",
    ("audit: members of one name are one", drop("target.members += 1"), LIMITS),
    (
        "audit: a device that joins is a further target",
        replace("known and event.device is None and target.complete", "known"),
        LIMITS,
    ),
)
_in(
    "trace.mappings:Mapping.is_copy",
    ("audit: whatever is mapped again is a copy", prepend("return True"), LIMITS),
    ("audit: nothing is another domain's copy", prepend("return False"), LIMITS),
)
_in(
    "trace.mappings:TargetState.free",
    (
        "audit: a second discard hides the first",
        replace("self.freed.gaps(start, end)", "[(start, end)]"),
        MODEL,
    ),
)
_in(
    "trace.mappings:TargetState.add",
    ("audit: memory that was mapped anew counts as freed", drop("self.freed.set(...)"), MODEL),
)
_in(
    "trace.mappings:Mapping.origin",
    (
        "audit: all calls of a run have the line of the first",
        replace("if self.stride: ...", "pass"),
        JOINED,
    ),
)
_in(
    "trace.judge:Judge.window",
    (
        "audit: mapping a private page is excused by its conversion",
        replace("mapping.born > reason.born", "False"),
        AUDIT,
    ),
    (
        "audit: a private page that is mapped beside an unplugged one is excused",
        replace("mapping.excuse if kind is FindingKind.UNPLUGGED else None", "mapping.excuse"),
        MODEL,
    ),
    (
        "audit: a log that ends in a conversion accuses nobody",
        replace("_stopped(conversion)", "False"),
        CONVERSIONS,
    ),
    (
        "audit: the rest behind a bound is not counted",
        drop("if rest: ..."),
        LIMITS,
    ),
)
_in(
    "trace.guest_audit:GuestAudit._judge_mapped",
    (
        "audit: mappings behind a bound are not judged",
        replace("len(pieces) > _MOST", "False"),
        LIMITS,
    ),
)
_in(
    "trace.guest_audit:GuestAudit._plugged_parts",
    ("audit: what virtio-mem has withdrawn is missing", negate("not self._pluggable"), MODEL),
)
_in(
    "trace.join:_continues",
    (
        "audit: unmaps that came short join",
        replace("first.unmapped == size == event.unmapped", "True"),
        JOINED,
    ),
    (
        "audit: maps of other memory join",
        replace("key - first.key != move", "False"),
        JOINED,
    ),
)
_in(
    "trace.guest_audit:GuestAudit.map_run",
    ("audit: a run over mappings is one call", replace("there is None", "True"), JOINED),
)

# -- faults and limits

_in(
    "trace.faults:Faults.finish",
    (
        "audit: what came later is a fault's cause",
        replace("reason.since <= storm.began", "True"),
        FAULTS,
    ),
)
_in(
    "trace.faults:Faults._unmapped",
    ("audit: an unmap that failed is a fault's cause", replace("unmap.done", "True"), FAULTS),
)
_in(
    "trace.limits:why_not_judged",
    ("audit: a trace without maps is clean", replace("not evidence.maps", "False"), LIMITS),
    ("audit: a trace without states is clean", replace("not followed", "False"), LIMITS),
    (
        "audit: targets that were not compared are clean",
        replace("evidence.not_compared", "False"),
        LIMITS,
    ),
)
_in(
    "trace.guest_audit:GuestAudit._forget_undecided",
    (
        "audit: a state change without a place is not counted",
        drop("self._evidence.unplaced_states += 1"),
        GUESTS,
    ),
)

# -- the modules, for tools/mechanical.py


class Part(NamedTuple):
    """Modules that have their tests in common."""

    modules: Sequence[str]
    tests: Sequence[str]
    """The quickest first."""
    equivalent: Mapping[str, str] = {}
    """Mutants that nobody can tell from the code as it is, by name, with the reason."""


_SHORT_WAY = "a short way: the long one comes to the same"
_EMPTY = "of an empty range, of which nothing comes"
_VALUE = "any value but None will do"

_AS_IT_IS = "sets what is so already"
_TWICE = "a conversion is in the list of its vCPU twice, and is ended once"
_REFILLED = "an empty layer is filled again before another is made"
_FEW_MORE = "there may be a few more anyway"
_KEPT = "one more is kept, and dropped later"
_APART = "taken apart, a run comes to the same (tests/trace/test_joined.py)"

EQUIVALENT_IN_THE_AUDIT = {
    f"trace.{name}": reason
    for name, reason in (
        ("audit:Audit._take: time > judge.now -> time >= judge.now", _AS_IT_IS),
        (
            (
                "conversions:Conversions.step:"
                " found.vcpu is None and vcpu is not None -> vcpu is not None"
            ),
            _TWICE,
        ),
        ("guest_audit:GuestAudit._private_side: True -> False", _VALUE),
        ("mappings:TargetState.remove_copy: if not copy: ... -> pass", _REFILLED),
        (
            (
                "guest_audit:GuestAudit.unmap_run:"
                " (end - start) // event.count -> (end - start) * event.count"
            ),
            _APART,
        ),
        (
            (
                "judge:Judge._inside: if self.observer is None"
                " and (not self.log.keeps(kind, length)): ... -> pass"
            ),
            _SHORT_WAY,
        ),
        ("guest_audit:GuestAudit._judge_piece: continue -> pass", _SHORT_WAY),
        (
            (
                "guest_audit:GuestAudit.unmap: if isinstance(only, Mapping) and event.done and"
                " (event.unmapped is None or event.unmapped >= end - start)"
                " and only.is_exactly(start, end, (end - start) // count): ... -> pass"
            ),
            _SHORT_WAY,
        ),
        ("guest_audit:GuestAudit._unmap_of_nothing: 1 -> 2", _FEW_MORE),
        ("mappings:is_exact: 2 -> 3", _FEW_MORE),
        (
            "ranges:RangeMap.gaps: if most is not None and len(found) > most: ... -> pass",
            _FEW_MORE,
        ),
        ("places:Places.is_told_by_another: 0 -> 1", "a place is no single byte"),
        ("ranges:RangeMap.covered: low < high -> low <= high", _EMPTY),
        ("result:FindingLog.keeps: duration > shortest -> duration >= shortest", _KEPT),
        ("result:Lengths.add: length > self.longest -> length >= self.longest", _AS_IT_IS),
        ("ranges:RangeMap._blocks_with: high - low -> high + low", _SHORT_WAY),
        ("ranges:RangeMap._blocks_with: start >= end -> start > end", _EMPTY),
        ("ranges:RangeMap.pieces: starts[at + 1] >= end -> starts[at + 1] > end", _SHORT_WAY),
        ("ranges:RangeMap.pieces: stop > end -> stop >= end", _AS_IT_IS),
    )
}

PARTS = {
    "audit": Part(
        modules=(
            "trace.audit",
            "trace.conversions",
            "trace.faults",
            "trace.guest_audit",
            "trace.join",
            "trace.judge",
            "trace.limits",
            "trace.mappings",
            "trace.places",
            "trace.ranges",
            "trace.result",
        ),
        tests=(
            "tests/trace/test_audit.py",
            "tests/trace/test_limits.py",
            "tests/trace/test_guests.py",
            "tests/trace/test_conversions.py",
            "tests/trace/test_faults.py",
            "tests/trace/test_ranges.py",
            "tests/trace/test_audit_model.py::test_any_order_of_any_events",
            "tests/trace/test_joined.py",
            "tests/test_qemu_verdicts.py",
        ),
        equivalent=EQUIVALENT_IN_THE_AUDIT,
    ),
}
