"""A plan from a recording equals what the mapper really did in that run."""

import gzip
import json
from pathlib import Path

import pytest

from ramblock.errors import TraceError
from ramblock.plan import Limits, TracePlan, Verdict, plan_trace
from ramblock.plan.recorded import Recorded
from ramblock.plan.simulation import Counts
from ramblock.units import MIB
from trace_samples import DATA, recording

# The part of `ramblock run`'s guest that nothing converts: 4 MiB of BIOS, mapped when a device is
# attached.
_BIOS_PAGES = 1024
_BIOS_RUNS = 1


def _plan(name: str) -> TracePlan:
    return plan_trace(str(DATA / name), Limits())


def _same(plan: TracePlan, kind: str) -> None:
    """
    The mapper's calls, and how many mappings there were at the end and at most, on each of its
    targets.
    """
    made = plan.simulated.final[kind]
    assert plan.observed
    for seen in plan.observed:
        assert (seen.maps, seen.unmaps) == (made.maps, made.unmaps), seen.name
        assert (seen.entries, seen.peak_entries) == (made.entries, made.peak_entries), seen.name


@pytest.mark.parametrize(
    ("name", "kind", "targets"),
    [
        ("run-type1.jsonl.gz", "page", 2),
        ("run-iommufd.jsonl.gz", "run", 2),
        ("run-soft.jsonl.gz", "run", 2),
    ],
)
def test_our_own_runs(name: str, kind: str, targets: int) -> None:
    plan = _plan(name)
    _same(plan, kind)
    assert len(plan.observed) == targets
    assert plan.notes == []
    assert plan.seconds > 0


@pytest.mark.parametrize("run", ["type1", "iommufd", "uncoordinated"])
def test_the_kernels_recording_of_the_same_run(run: str) -> None:
    """It has no BIOS, which nothing converts; all else comes to the same."""
    from_run = _plan(f"run-{run}.jsonl.gz").simulated.final
    from_kernel = _plan(f"ftrace-{run}.txt.gz").simulated.final
    for kind, bios in (("page", _BIOS_PAGES), ("page-exact", _BIOS_PAGES), ("run", _BIOS_RUNS)):
        ours, kernels = from_run[kind], from_kernel[kind]
        assert kernels == Counts(
            entries=ours.entries - bios,
            peak_entries=ours.peak_entries - bios,
            maps=ours.maps - bios,
            unmaps=ours.unmaps,
            mapped=ours.mapped - 4 * MIB,
            tables=ours.tables - 2,
        )


@pytest.mark.parametrize(
    ("name", "coordinated"),
    [("run-uncoordinated", "run-type1"), ("run-soft-uncoordinated", "run-soft")],
)
def test_a_run_without_coordination_is_shown_beside_what_it_needed(
    name: str, coordinated: str
) -> None:
    """There is no mapper in it: everything is mapped at boot and stays. The guest is the same."""
    plan = _plan(f"{name}.jsonl.gz")
    assert {(seen.maps, seen.unmaps, seen.entries) for seen in plan.observed} == {(4, 0, 4)}
    assert plan.simulated.final == _plan(f"{coordinated}.jsonl.gz").simulated.final


@pytest.mark.parametrize(
    ("name", "idle_unmaps"),
    [
        ("probe-qemu-exact.jsonl.gz", 0),
        ("probe-qemu-lenient.jsonl.gz", 0),
        # One names what was not mapped; the mapper does not make such calls.
        ("qemu-exact.trace.gz", 1),
        ("qemu-lenient.trace.gz", 0),
        ("qemu-iommufd.trace.gz", 0),
        ("qemu-iommufd.simpletrace.gz", 0),
    ],
)
@pytest.mark.slow
def test_qemus_mappings(name: str, idle_unmaps: int) -> None:
    """
    These guests are not confidential: what QEMU maps is what is populated, and each of its calls is
    a run.
    """
    plan = _plan(name)
    (seen,) = plan.observed
    made = plan.simulated.final["run"]
    assert (seen.maps, seen.unmaps - idle_unmaps) == (made.maps, made.unmaps)
    assert (seen.entries, seen.peak_entries) == (made.entries, made.peak_entries)
    assert "no page states" in plan.notes[0]


def test_text_and_binary_trace_of_one_run_come_to_the_same() -> None:
    text, binary = _plan("qemu-iommufd.trace.gz"), _plan("qemu-iommufd.simpletrace.gz")
    assert text.simulated.final == binary.simulated.final
    assert text.observed == binary.observed


def test_limits_are_held_against_the_peak() -> None:
    plan = plan_trace(str(DATA / "run-type1.jsonl.gz"), Limits(dma_entry_limit=3716))
    verdicts = {(row.policy, row.target): row.verdict for row in plan.rows}
    assert verdicts["page", "type1"] is Verdict.FITS
    assert verdicts["page", "vhost-vdpa"] is Verdict.REFUSED
    assert verdicts["run", "type1"] is Verdict.IMPOSSIBLE
    plan = plan_trace(str(DATA / "run-type1.jsonl.gz"), Limits(dma_entry_limit=3715))
    row = next(each for each in plan.rows if each.target == "type1")
    assert (row.verdict, row.why) == (Verdict.REFUSED, "3,716 mappings, limit 3,715")


def test_a_recording_that_is_cut_is_an_error(tmp_path: Path) -> None:
    cut = tmp_path / "cut.gz"
    cut.write_bytes(gzip.compress(recording("run-soft.jsonl.gz"))[:-2000])
    with pytest.raises(TraceError, match="the file ends in the middle"):
        plan_trace(str(cut), Limits())


def _own_trace(tmp_path: Path, *lines: dict[str, object]) -> str:
    start = {"t": 0, "event": "start", "version": 1, "targets": {"iommu0": "soft"},
             "blocks": [{"name": "ram", "gpa": 0, "size": 1 << 20, "confidential": True}],
    }  # fmt: skip
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (start, *lines)))
    return str(path)


def _conversion(gpa: int, size: int, to: str, result: str = "done") -> dict[str, object]:
    return {"t": 1, "event": "conversion", "gpa": gpa, "size": size, "to": to, "action": "alloc",
            "result": result, "took": 1}  # fmt: skip


def _attributes(gpa: int, size: int, *, private: bool) -> dict[str, object]:
    return {"t": 1, "event": "attributes", "gpa": gpa, "size": size, "private": private}


def test_conversions_that_were_put_back_are_left_out(tmp_path: Path) -> None:
    path = _own_trace(
        tmp_path,
        _attributes(0, 0x4000, private=False),
        _conversion(0, 0x4000, "shared"),
        _attributes(0x8000, 0x4000, private=False),
        _attributes(0x8000, 0x4000, private=True),
        _conversion(0x8000, 0x4000, "shared", "rolled back"),
    )
    plan = plan_trace(path, Limits())
    assert (plan.simulated.conversions, plan.simulated.shared) == (1, 0x4000)


def test_conversions_outside_of_memory_are_left_out_and_said(tmp_path: Path) -> None:
    path = _own_trace(
        tmp_path,
        _attributes(0, 0x1000, private=False),
        _conversion(0, 0x1000, "shared"),
        _conversion(1 << 62, 0x1000, "shared"),
    )
    plan = plan_trace(path, Limits())
    assert plan.simulated.conversions == 1
    assert plan.notes == [
        "1 conversions are left out: they are not in one piece of memory that the trace tells of"
    ]


def test_a_trace_without_anything(tmp_path: Path) -> None:
    plan = plan_trace(_own_trace(tmp_path), Limits())
    assert plan.simulated.conversions == 0
    assert all(row.verdict is not Verdict.REFUSED for row in plan.rows)


def test_what_is_kept_of_a_step_is_little() -> None:
    recorded = Recorded()
    recorded._attributes.add(1.5, 0x1234, 0x2001, private=True)
    ((time, request),) = recorded.steps
    assert (time, request.gpa, request.size) == (1.5, 0x1000, 0x2000)


def test_a_trace_of_terabytes_is_no_more_work(tmp_path: Path) -> None:
    """Whoever wrote it chose the sizes: one call for each page would take days."""

    def line(event: str, iova: int, size: int) -> dict[str, object]:
        more = {"writable": True} if event == "map" else {"unmapped": size}
        return {"t": 1, "event": event, "target": "t", "iova": iova, "size": size, **more}

    path = tmp_path / "trace.jsonl"
    start = {"t": 0, "event": "start", "version": 1, "targets": {}, "blocks": []}
    lines = [
        start,
        line("map", 0, 1 << 45),
        line("unmap", 0, 1 << 44),
        line("map", 1 << 63, 1 << 30),
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    plan = plan_trace(str(path), Limits())
    assert plan.simulated.final["page"].entries == (1 << 44) // 4096
    assert plan.simulated.final["page-exact"].unmaps == (1 << 44) // 4096
    assert plan.simulated.final["run"].entries == 1
    assert "1 conversions are left out" in plan.notes[1]


def _qemu(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "qemu.trace"
    path.write_text("".join(f"64@1795510755.{n:06}:{line}\n" for n, line in enumerate(lines)))
    return str(path)


def test_a_recording_that_begins_in_the_middle(tmp_path: Path) -> None:
    """Nothing tells where the guest has memory; what is converted is no less."""
    path = _qemu(
        tmp_path,
        "kvm_convert_memory start 0x2000000 size 0x200000 private_to_shared",
        "ram_block_attributes_state_change offset 0x2000000 size 0x200000 from 'discarded' to"
        " 'populated'",
        "kvm_convert_memory start 0x2200000 size 0x200000 private_to_shared",
        "ram_block_attributes_state_change offset 0x2200000 size 0x200000 from 'discarded' to"
        " 'populated'",
        "kvm_convert_memory start 0x2000000 size 0x200000 shared_to_private",
        "ram_block_attributes_state_change offset 0x2000000 size 0x200000 from 'populated' to"
        " 'discarded'",
    )
    plan = plan_trace(path, Limits())
    assert plan.simulated.conversions == 3
    assert plan.simulated.final["page"].peak_entries == 1024
    assert plan.simulated.final["run"].entries == 1
    assert any("may begin in the middle" in note for note in plan.notes)


def test_many_places_are_few_descriptors(tmp_path: Path) -> None:
    lines = [_attributes(n << 24, 0x1000, private=False) for n in range(3000)]
    start = {"t": 0, "event": "start", "version": 1, "targets": {}, "blocks": []}
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (start, *lines)))
    plan = plan_trace(str(path), Limits())
    assert plan.simulated.final["run"].entries == 3000


@pytest.mark.parametrize(
    "event",
    [
        {"event": "map", "target": "t", "iova": (1 << 64) - 4096, "size": 4096, "writable": True},
        {"event": "unmap", "target": "t", "iova": 4096, "size": (1 << 64) - 4096, "unmapped": 4096},
        {"event": "attributes", "gpa": (1 << 64) - 4096, "size": 4096, "private": False},
        {"event": "attributes", "gpa": 4096, "size": 0, "private": False},
    ],
)
def test_ranges_at_the_ends(event: dict[str, object], tmp_path: Path) -> None:
    first = {"event": "map", "target": "t", "iova": 0, "size": 8192, "writable": True}
    start = {"t": 0, "event": "start", "version": 1, "targets": {}, "blocks": []}
    path = tmp_path / "trace.jsonl"
    lines = [start, {"t": 1, **first}, {"t": 2, **event}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plan = plan_trace(str(path), Limits())
    assert plan.simulated.final["page"].entries in (0, 1, 2)


def test_a_block_that_is_not_aligned_is_rounded(tmp_path: Path) -> None:
    start = {"t": 0, "event": "start", "version": 1, "targets": {},
             "blocks": [{"name": "ram", "gpa": 0x800, "size": 0x10000, "confidential": True}],
    }  # fmt: skip
    path = tmp_path / "trace.jsonl"
    lines = [
        start,
        _attributes(0x1000, 0x1000, private=False),
        _conversion(0x1000, 0x1000, "shared"),
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plan_trace(str(path), Limits()).simulated.final["page"].entries == 1
