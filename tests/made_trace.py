"""Traces that are written down event by event, and their audit."""

from ramblock.trace.audit import Audit
from ramblock.trace.events import Attributes, Event, Map, Source
from ramblock.trace.findings import Finding, FindingKind
from ramblock.trace.observer import AuditObserver
from ramblock.trace.result import AuditResult

__all__ = ["MS", "PAGE", "SOURCE", "Made", "kinds", "mapped_and_shared", "only", "ranges"]

SOURCE = Source("made", "made")
MS = 1_000_000
PAGE = 4096


class Made:
    """A trace that is written down event by event, at times in milliseconds."""

    def __init__(self, events: list[Event] | None = None, source: Source = SOURCE) -> None:
        self.events: list[Event] = [*(events or ())]
        self.source = source

    def at(self, ms: float | None, kind: type, *fields: object, **more: object) -> "Made":
        time = None if ms is None else round(ms * MS)
        self.events.append(kind(time, self.source, len(self.events) + 1, *fields, **more))
        return self

    def of(self, source: Source) -> "Made":
        """Go on with another source."""
        self.source = source
        return self

    def also(self) -> "Made":
        """Copy it, to go on in another way."""
        return Made(self.events, self.source)

    def audit(
        self,
        *,
        grace: int = 10 * MS,
        unmap: str | None = None,
        observer: AuditObserver | None = None,
    ) -> AuditResult:
        audit = Audit(grace=grace, unmap=unmap, observer=observer)
        audit.feed(self.events)
        return audit.finish()


def kinds(result: AuditResult) -> list[FindingKind]:
    return [finding.kind for finding in result.findings]


def only(result: AuditResult, kind: FindingKind) -> list[Finding]:
    return sorted(
        (f for f in result.findings if f.kind is kind), key=lambda f: (f.start, f.end, f.opened)
    )


def ranges(result: AuditResult, kind: FindingKind) -> list[tuple[int, int]]:
    """The ranges of all findings of a kind, in pages."""
    return [(f.start // PAGE, f.end // PAGE) for f in only(result, kind)]


def mapped_and_shared() -> Made:
    return Made().at(0, Attributes, 0, 16 * PAGE, False).at(1, Map, "t", 0, 16 * PAGE)
