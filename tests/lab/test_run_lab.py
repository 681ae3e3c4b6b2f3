"""
`ramblock run` on real parts: a guest that asks by hypercall, attributes that KVM enforces, devices
behind a real IOMMU.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from ramblock.cli import main
from ramblock.vfio import EduDevice, IommuTestdev, driver_of, find_devices


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    """Run the command in this process: starting another takes longer than the run."""
    code = main(["run", "--json", "-q", *arguments])
    output = capsys.readouterr().out
    return code, json.loads(output) if output else None


@pytest.fixture
def drivers() -> dict[str, str | None]:
    """What the devices are bound to."""
    return {
        str(address): driver_of(address)
        for kind in (EduDevice, IommuTestdev)
        for address in find_devices(kind.VENDOR, kind.DEVICE)
    }


def assert_clean(code: int, report: Any) -> None:
    assert report["violations"] == {"count": 0, "by_kind": {}, "ranges": []}
    assert report["device_errors"] == []
    assert code == report["exit_code"] == 0
    assert report["enforced_by"] == "KVM"
    assert report["guest"]["kind"] == "kvm"
    assert report["guest"]["call"] in ("vmcall", "vmmcall")
    assert report["guest"]["private"] == "guest_memfd"
    assert report["memory"]["freed_bytes"] > 0


@pytest.mark.lab_variant("intel-iommu", "amd-iommu", "no-iommu", "one-vcpu")
def test_auto_takes_a_vcpu_where_kvm_enforces(capsys: pytest.CaptureFixture[str]) -> None:
    code, report = run(capsys, "--memory", "64M", "--conversions", "60")
    assert_clean(code, report)
    assert report["guest"]["why"] == "this KVM enforces page attributes"
    _, script = run(capsys, "--guest", "script", "--memory", "64M", "--conversions", "60")
    assert script["state_hash"] == report["state_hash"]
    assert script["conversions"]["outcomes"] == report["conversions"]["outcomes"]


@pytest.mark.parametrize(
    ("iommu", "mode", "policy"),
    [
        ("type1", "type1", "page"),
        ("iommufd", "iommufd, cutting", "run"),
        ("iommufd-cutting", "iommufd, cutting", "run"),
        ("iommufd-native", "iommufd, native", "page"),
    ],
)
def test_real_devices_reach_what_is_shared_and_nothing_else(
    capsys: pytest.CaptureFixture[str],
    drivers: dict[str, str | None],
    iommu: str,
    mode: str,
    policy: str,
) -> None:
    sizes = ("--memory", "64M", "--conversions", "80")
    code, report = run(capsys, "--guest", "kvm", "--iommu", iommu, *sizes)
    assert_clean(code, report)
    assert report["mappings"]["policy"] == policy
    assert {text.partition(" at ")[0] for text in report["targets"].values()} == {
        f"{mode}, edu",
        f"{mode}, iommu-testdev",
    }
    devices = report["devices"]
    assert devices["accesses"] > 0
    assert devices["faults_own"] == 0
    assert devices["forbidden"] == devices["forbidden_faulted"] > 0
    assert devices["probes"] == devices["probes_faulted"] > 0
    assert devices["audited"] == 2 * devices["audited_faulted"] > 0
    if iommu == "type1":
        assert report["mappings"]["kernel_entries"] == report["mappings"]["entries"]
    # The devices are bound to what they were bound to, and the software IOMMU had come to the same.
    assert {str(address): driver_of(address) for address in _addresses()} == drivers
    _, script = run(capsys, "--guest", "script", *sizes)
    assert script["state_hash"] == report["state_hash"]


def _addresses() -> Any:
    for kind in (EduDevice, IommuTestdev):
        yield from find_devices(kind.VENDOR, kind.DEVICE)


@pytest.mark.lab_variant("intel-iommu")
@pytest.mark.parametrize("iommu", ["type1", "iommufd"])
def test_half_a_gigabyte(capsys: pytest.CaptureFixture[str], iommu: str) -> None:
    arguments = ("--guest", "kvm", "--iommu", iommu, "--memory", "512M", "--conversions", "80")
    assert_clean(*run(capsys, *arguments))


def test_one_device_is_enough(capsys: pytest.CaptureFixture[str]) -> None:
    (address,) = find_devices(IommuTestdev.VENDOR, IommuTestdev.DEVICE)
    arguments = ("--iommu", "iommufd", "--device", str(address), "--memory", "64M")
    code, report = run(capsys, "--guest", "script", *arguments, "--conversions", "60")
    assert code == 0, report["violations"]
    assert list(report["targets"]) == ["iommu0"]
    assert report["enforced_by"] == "tracked only: no KVM in this run"


def test_without_coordination_a_real_device_reaches_private_memory(
    capsys: pytest.CaptureFixture[str], drivers: dict[str, str | None]
) -> None:
    arguments = ("--guest", "kvm", "--iommu", "iommufd", "--uncoordinated", "--memory", "64M")
    code, report = run(capsys, *arguments, "--conversions", "120")
    assert code == 1
    kinds = report["violations"]["by_kind"]
    assert kinds["stale"]
    assert kinds["device_reached_private"]
    assert report["devices"]["forbidden_faulted"] == 0
    assert {str(address): driver_of(address) for address in _addresses()} == drivers


def test_faults_on_purpose_are_put_back_in_the_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--guest", "kvm", "--iommu", "type1", "--memory", "64M", "--conversions", "80")
    code, report = run(capsys, *arguments, "--inject", "map:30,unmap:3,attribute:11,free:2")
    assert_clean(code, report)
    assert report["injected"] == {"map": 1, "unmap": 1, "attribute": 1, "free": 1}
    assert report["mappings"]["kernel_entries"] == report["mappings"]["entries"]


def test_poison_keeps_the_pages_and_gives_the_devices_back(
    capsys: pytest.CaptureFixture[str], drivers: dict[str, str | None]
) -> None:
    arguments = ("--guest", "kvm", "--iommu", "iommufd", "--memory", "64M", "--conversions", "80")
    code, report = run(capsys, *arguments, "--inject", "unmap:short:3")
    assert code == 1
    assert report["poisoned"]
    assert report["violations"]["count"] == 0
    assert {str(address): driver_of(address) for address in _addresses()} == drivers


@pytest.mark.lab_variant("no-iommu")
@pytest.mark.parametrize("iommu", ["type1", "iommufd"])
def test_without_an_iommu_it_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], iommu: str
) -> None:
    assert main(["run", "--guest", "kvm", "--iommu", iommu]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(f"ramblock: error: --iommu {iommu} cannot work on this host:\n")
    assert "no IOMMU is active: switch it on in firmware" in errors
    assert "intel_iommu=on" in errors
