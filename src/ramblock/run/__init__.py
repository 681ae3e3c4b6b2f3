# SPDX-License-Identifier: Apache-2.0
"""The main job, ``ramblock run``: a guest, its devices, and a verifier that trusts neither."""

from ramblock.run.job import Progress, Run
from ramblock.run.report import RunReport
from ramblock.run.scenario import Scenario, load_scenario, load_workload, workload_names

__all__ = [
    "Progress",
    "Run",
    "RunReport",
    "Scenario",
    "load_scenario",
    "load_workload",
    "workload_names",
]
