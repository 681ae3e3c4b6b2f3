"""
`ramblock doctor` in the lab, where KVM knows private pages and iommufd cuts: line by line, looked
up another way.
"""

import json

import pytest

from doctor_checks import check_lines
from ramblock.cli import main

pytestmark = pytest.mark.lab_variant("intel-iommu", "amd-iommu", "no-iommu", "one-vcpu")


def test_every_line(capsys: pytest.CaptureFixture[str], lab_iommu: str) -> None:
    assert main(["doctor", "--json"]) == 0
    lines = {line["name"]: line for line in json.loads(capsys.readouterr().out)["lines"]}
    check_lines(lines)
    assert lines["VM types"]["found"].startswith("default, software-protected")
    assert lines["page attributes"]["status"] == "good"
    assert lines["cutting"]["found"] == "a scratch mapping was cut"
    assert (lines["IOMMU"]["status"] == "good") == (lab_iommu != "none")


@pytest.mark.parametrize("purpose", ["vfio", "iommufd"])
def test_what_the_lab_is_ready_for(
    capsys: pytest.CaptureFixture[str], lab_iommu: str, purpose: str
) -> None:
    code = main(["doctor", "--for", purpose])
    out = capsys.readouterr().out
    if lab_iommu == "none":
        assert code == 1
        assert "IOMMU: no IOMMU groups" in out
    else:
        assert (code, out.splitlines()[-1]) == (0, f"Ready for {purpose}.")


def test_the_lab_is_ready_for_kvm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--for", "kvm"]) == 0
    assert capsys.readouterr().out.endswith("Ready for kvm.\n")
