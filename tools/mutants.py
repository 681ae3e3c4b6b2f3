# SPDX-License-Identifier: Apache-2.0
"""
Break the core on purpose, one line at a time, and see that the tests notice.

    python tools/mutants.py [NAME ...]

Each mutant is a textual change in a copy of ``src/``; the tests that should kill it run against the
copy. Exit code 1 if one survives, or if the text to change is not in the source any more (then the
list here has to follow the code).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

INJECTION = "tests/test_failure_injection.py"
INTERRUPTS = "tests/test_interrupts.py"
BLOCK = "tests/test_block.py"
GUEST = "tests/test_guest_memory.py"
IN_PLACE = "tests/test_in_place.py"
MANAGER = "tests/test_discard_manager.py"
MAPPER = "tests/test_mapper.py"
RECLAIM = "tests/test_reclaim.py"
SOFT = "tests/test_soft_iommu.py"
THREADS = "tests/test_threads.py"


class Mutant(NamedTuple):
    """One way to break the core."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTANTS = [
    # -- order -------------------------------------------------------------------------------------
    Mutant(
        "to private: attribute before unmap",
        "guest/conversion.py",
        "(_UNMAP, _PRIVATE, _ACCOUNT, _STATE)",
        "(_PRIVATE, _UNMAP, _ACCOUNT, _STATE)",
        (GUEST, INJECTION),
    ),
    Mutant(
        "to shared: map before attribute",
        "guest/conversion.py",
        "(_SHARED, _MAP, _ACCOUNT, _STATE)",
        "(_MAP, _SHARED, _ACCOUNT, _STATE)",
        (GUEST, INJECTION),
    ),
    Mutant(
        "to private: state before unmap",
        "guest/conversion.py",
        "(_UNMAP, _PRIVATE, _ACCOUNT, _STATE)",
        "(_STATE, _UNMAP, _PRIVATE, _ACCOUNT)",
        (GUEST, INJECTION),
    ),
    Mutant(
        "to private: attribute left out",
        "guest/conversion.py",
        "(_UNMAP, _PRIVATE, _ACCOUNT, _STATE)",
        "(_UNMAP, _ACCOUNT, _STATE)",
        (GUEST, INJECTION),
    ),
    Mutant(
        "free before the commit",
        "guest/conversion.py",
        "        self.change.tell()\n",
        "        self.free()\n        self.change.tell()\n",
        (GUEST, INJECTION),
    ),
    Mutant(
        "placing: slot before attributes",
        "guest/placement.py",
        '    Step("attribute", PlacedSection.set_attributes, PlacedSection.unset_attributes),\n'
        '    Step("slot", PlacedSection.add_slot, PlacedSection.unadd_slot),\n',
        '    Step("slot", PlacedSection.add_slot, PlacedSection.unadd_slot),\n'
        '    Step("attribute", PlacedSection.set_attributes, PlacedSection.unset_attributes),\n',
        (GUEST, INJECTION),
    ),
    # -- in place ----------------------------------------------------------------------------------
    Mutant(
        "in place, to private: attribute before unmap",
        "guest/conversion.py",
        "(_UNMAP, _PRIVATE, _ACCOUNT, _STATE)",
        "(_PRIVATE, _UNMAP, _ACCOUNT, _STATE)",
        (IN_PLACE,),
    ),
    Mutant(
        "in place, to shared: map before attribute",
        "guest/conversion.py",
        "(_SHARED, _MAP, _ACCOUNT, _STATE)",
        "(_MAP, _SHARED, _ACCOUNT, _STATE)",
        (IN_PLACE,),
    ),
    Mutant(
        "in place, undo of the attribute left out",
        "guest/conversion.py",
        "        for offset, size in self.change.changed_runs():\n",
        "        for offset, size in ():\n",
        (IN_PLACE,),
    ),
    Mutant(
        "in place, a conversion frees",
        "memory/sides.py",
        "        if block.in_place is not None:\n",
        "        if False:\n",
        (IN_PLACE,),
    ),
    Mutant(
        "in place, unplugging frees nothing",
        "memory/sides.py",
        "            self.both = Side(Reclaimer(name, size, unit, shared.discard,"
        " self._plugged))\n",
        "            self.both = Side()\n",
        (IN_PLACE, INJECTION),
    ),
    Mutant(
        "in place, what is plugged counts as unused",
        "memory/sides.py",
        "        return self._plugged_of(iter(((start, end),)))\n",
        "        return iter(())\n",
        (IN_PLACE, INJECTION),
    ),
    Mutant(
        "in place, a pin is tried once",
        "memory/in_place.py",
        "TRIES = 4\n",
        "TRIES = 1\n",
        (IN_PLACE,),
    ),
    Mutant(
        "in place, a pin that stays is ignored",
        "memory/in_place.py",
        "            return\n    backing.set_attributes(offset, size, private)\n",
        "            return\n",
        (IN_PLACE,),
    ),
    Mutant(
        "in place, any error is tried again",
        "memory/in_place.py",
        "            if error.errno != errno.EAGAIN:\n                raise\n",
        "            pass\n",
        (IN_PLACE,),
    ),
    Mutant(
        "in place, the VM is asked",
        "guest/page_attributes.py",
        "    if memory is None:\n",
        "    if True:\n",
        (IN_PLACE,),
    ),
    Mutant(
        "in place, placing makes all private first",
        "guest/page_attributes.py",
        "        private = complement(iter(shared), section.offset, section.end)\n",
        "        pass\n",
        (IN_PLACE,),
    ),
    Mutant(
        "in place, unmapping makes all shared",
        "guest/page_attributes.py",
        "    if section.block.in_place is None:\n        set_attribute(vm, section, section.offset,"
        " section.size, private=MAKE_SHARED)\n",
        "    if True:\n        set_attribute(vm, section, section.offset, section.size,"
        " private=MAKE_SHARED)\n",
        (IN_PLACE,),
    ),
    # -- closing -----------------------------------------------------------------------------------
    Mutant(
        "closing goes on by force after Ctrl-C",
        "guest/memory.py",
        "            elif not isinstance(failure.cause, Exception) and not guard.poisoned:\n",
        "            elif False:\n",
        (BLOCK, INTERRUPTS),
    ),
    Mutant(
        "closing by force does not poison when it is interrupted",
        "memory/guard.py",
        '            self.poison(f"{operation} did not come to its end: {error!r}")\n',
        "",
        (BLOCK,),
    ),
    # -- undo --------------------------------------------------------------------------------------
    Mutant(
        "undo of unmap and map left out",
        "guest/conversion.py",
        "        self.change.take_back()\n",
        "        return\n",
        (INJECTION,),
    ),
    Mutant(
        "undo of the attribute left out",
        "guest/conversion.py",
        "        for offset, size in self.change.changed_runs():\n",
        "        for offset, size in ():\n",
        (INJECTION,),
    ),
    Mutant(
        "undo of the attribute for all of the range",
        "guest/conversion.py",
        "        for offset, size in self.change.changed_runs():\n",
        "        for offset, size in ((self.section.offset, self.section.size),):\n",
        (INJECTION, GUEST),
    ),
    Mutant(
        "undo of the state left out",
        "guest/conversion.py",
        "        self.change.flip_back()\n",
        "        return\n",
        (INJECTION, INTERRUPTS),
    ),
    Mutant(
        "an undo goes on after it failed for a piece",
        "memory/transaction.py",
        "            stuck.append(piece)\n",
        "            pass\n",
        (INJECTION,),
    ),
    Mutant(
        "a failed undo does not poison",
        "memory/transaction.py",
        '            guard.poison(f"step {step.name!r} could not be put back: {error!r}")\n',
        "",
        (INJECTION,),
    ),
    Mutant(
        "the undo runs forwards",
        "memory/transaction.py",
        "    for step, piece in reversed(started):\n",
        "    for step, piece in started:\n",
        (INJECTION,),
    ),
    Mutant(
        "the intent is noted after the step",
        "memory/transaction.py",
        "                started.append((step, piece))\n                step.do(piece)\n",
        "                step.do(piece)\n                started.append((step, piece))\n",
        (INJECTION,),
    ),
    Mutant(
        "only Exception is a failure",
        "memory/transaction.py",
        "    except BaseException as cause:\n",
        "    except Exception as cause:\n",
        (INJECTION, INTERRUPTS),
    ),
    # -- telling listeners -------------------------------------------------------------------------
    Mutant(
        "an interrupted listener counts as one that refused",
        "memory/notification.py",
        "self._refused = isinstance(error, Exception)",
        "self._refused = True",
        (INTERRUPTS, INJECTION, MANAGER),
    ),
    Mutant(
        "the call in flight is never reversed",
        "memory/notification.py",
        "until = in_flight.offset if self._refused else in_flight.end",
        "until = in_flight.offset",
        (INTERRUPTS, INJECTION),
    ),
    Mutant(
        "the other sources are not asked",
        "memory/notification.py",
        "        for source in self._others:\n            runs = intersect(runs, source)\n",
        "",
        (MANAGER, INJECTION),
    ),
    Mutant(
        "a sparse discard over what stays populated",
        "memory/notification.py",
        "        if not (registration.sparse and self._change.hollow):\n",
        "        if not registration.sparse:\n",
        (INJECTION, MANAGER, GUEST),
    ),
    # -- the mapper --------------------------------------------------------------------------------
    Mutant(
        "a short unmap believed",
        "dma/mapper.py",
        "                if removed < expected:\n",
        "                if removed < 0:\n",
        (MAPPER, INJECTION),
    ),
    Mutant(
        "a short unmap believed in the undo",
        "dma/mapper.py",
        "        return None if removed >= size else",
        "        return None if removed >= 0 else",
        (INJECTION,),
    ),
    Mutant(
        "no second witness",
        "dma/mapper.py",
        "        if removed:\n            return f",
        "        if not removed:\n            return None\n        if removed:\n            return"
        " f",
        (INJECTION,),
    ),
    Mutant(
        "an error in doubt taken for a refusal",
        "dma/mapper.py",
        "    return isinstance(error, DmaError) and not error.in_doubt\n",
        "    return isinstance(error, DmaError)\n",
        (INJECTION,),
    ),
    Mutant(
        "the budget not checked",
        "dma/mapper.py",
        "        if needed > limit:\n",
        "        if needed > 2 * limit + 99:\n",
        (MAPPER, INJECTION),
    ),
    Mutant(
        "the budget not checked for the undo",
        "dma/mapper.py",
        "        return int(self._continues(start)) + int(self._continues(end))\n",
        "        return int(self._continues(end))\n",
        (INJECTION,),
    ),
    Mutant(
        "the rest behind a cut is not an entry",
        "dma/mapper.py",
        "        new_start = self.starts.set(end, end + 1) if self._continues(end) else 0\n",
        "        new_start = 0\n",
        (MAPPER, GUEST),
    ),
    Mutant(
        "an exact target gets one call for all",
        "dma/mapper.py",
        "        if not self.budget.exact:\n",
        "        if True:\n",
        (MAPPER, INJECTION),
    ),
    # -- lock and poison ---------------------------------------------------------------------------
    Mutant(
        "the lock removed",
        "memory/guard.py",
        "        with self._lock:\n            self._owner = me\n",
        "        if True:\n            self._owner = me\n",
        (THREADS,),
    ),
    Mutant(
        "a poisoned memory goes on",
        "memory/guard.py",
        "        if not even_poisoned and self._reason is not None:\n",
        "        if False:\n",
        (INJECTION,),
    ),
    Mutant(
        "an abandoned transaction forgotten",
        "memory/guard.py",
        "            self.poison(_ABANDONED)\n",
        "",
        ("tests/test_guard.py",),
    ),
    Mutant(
        "a doubt does not poison",
        "memory/guard.py",
        '        self.poison(\n            f"{describe_range(section.gpa',
        '        str(\n            f"{describe_range(section.gpa',
        ("tests/test_attachment.py", MAPPER, BLOCK),
    ),
    # -- freeing -----------------------------------------------------------------------------------
    Mutant(
        "a failed free forgotten",
        "memory/reclaim.py",
        "        if earlier:\n            self._retry(earlier)\n",
        "        self._settle(offset, end)\n",
        (RECLAIM, INJECTION),
    ),
    Mutant(
        "what is in use again is freed later",
        "memory/reclaim.py",
        "        for first, last in self._used(start, end):\n",
        "        for first, last in ():\n",
        (RECLAIM,),
    ),
    # -- the software IOMMU ------------------------------------------------------------------------
    Mutant(
        "an access does not hold off an unmap",
        "dma/soft.py",
        "        with self._lock:\n            parts = self._translate(iova, size, write=False)\n",
        "        if True:\n            parts = self._translate(iova, size, write=False)\n",
        (SOFT, THREADS),
    ),
    Mutant(
        "a write to read-only memory goes through",
        "dma/soft.py",
        "(write and not mapping.writable)",
        "(write and mapping is None)",
        (SOFT, GUEST),
    ),
]


def _tests(mutant: Mutant, source: Path) -> tuple[bool, float]:
    began = time.monotonic()
    for tests in mutant.tests:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", tests],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(source), "RAMBLOCK_STRESS_SECONDS": "4"},
            capture_output=True,
            check=False,
        )
        if done.returncode not in (0, 5):
            return True, time.monotonic() - began
    return False, time.monotonic() - began


def main(names: list[str]) -> int:
    """Run the mutants whose names contain one of *names*, or all; return the exit code."""
    chosen = [
        mutant for mutant in MUTANTS if not names or any(name in mutant.name for name in names)
    ]
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        for mutant in chosen:
            source = Path(folder) / "src"
            shutil.rmtree(source, ignore_errors=True)
            shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
            file = source / "ramblock" / mutant.file
            text = file.read_text(encoding="utf-8")
            if mutant.old not in text:
                print(f"OUTDATED  {mutant.name}: its text is not in {mutant.file}", flush=True)
                survived.append(mutant)
                continue
            file.write_text(text.replace(mutant.old, mutant.new, 1), encoding="utf-8")
            killed, seconds = _tests(mutant, source)
            print(
                f"{'killed  ' if killed else 'SURVIVED'}  {mutant.name} ({seconds:.0f} s)",
                flush=True,
            )
            if not killed:
                survived.append(mutant)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} mutants killed")
    return int(bool(survived))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
