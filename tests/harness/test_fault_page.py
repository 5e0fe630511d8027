"""docs/faults.md is what the declarations print, and every declared fault is injected by some test."""

import re
from pathlib import Path

from fault_table import COMMAND, FAULTS, KERNELS, PAGE, page

from klab.harness.store.result import Status
from klab.harness.watch.policy import Measure
from klab.harness.watch.series import Call

CAMPAIGN = ("test_fault_*.py", "test_fleet_ray.py")


def test_the_page_is_what_the_declarations_print():
    assert PAGE.read_text() == page(), f"docs/faults.md is stale: {COMMAND}"


def test_every_fault_is_injected():
    here = Path(__file__).parent
    texts = [path.read_text() for name in CAMPAIGN for path in here.glob(name) if path != Path(__file__)]
    named = {name for text in texts for name in re.findall(r'["\']([\w-]+)["\']', text) if name in FAULTS}
    assert named | {one.name for one in KERNELS} == set(FAULTS)


def test_the_outcomes_are_words_that_klab_uses():
    from fault_table import PROCESSES_A_NIGHT

    assert {one.row for one in FAULTS.values()} <= {"", *(status.value for status in Status)}
    assert {one.verdict for one in FAULTS.values()} <= {"", *(call.value for call in Call)}
    assert all("|" not in "".join((one.what, one.how, one.says, one.kept)) for one in FAULTS.values())
    assert Measure().processes == PROCESSES_A_NIGHT
