"""`klab accept` as a user types it, on machines that are not there; and the page that goes to the provider."""

import html
import html.parser
import json
import re
from pathlib import Path

import pytest
from fake_node import Board, FakeRunner, node_of

from klab.harness.catalog.chips import find_chip
from klab.harness.report.accept_page import accept_page, device_rows, finding_rows
from klab.harness.watch import accept as acceptance
from klab.harness.watch.reference_nodes import find_reference

H200 = find_chip("h200")
MARKUP = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(autouse=True)
def a_good_host(monkeypatch):
    monkeypatch.setattr("klab.harness.watch.accept.host", lambda folder: {"governor": "performance", "quota": None, "cpus": 192})
    monkeypatch.setattr("klab.harness.measure.environment.checkout", lambda: {"commit": "0123456789abcdef", "dirty": False})


@pytest.fixture
def machine(monkeypatch):
    """Let the verb find these boards."""

    def put(*boards):
        runner = FakeRunner(list(boards), seconds=200.0)
        monkeypatch.setattr(acceptance, "find_node", lambda chip, only=None: node_of(list(boards)))
        monkeypatch.setattr(acceptance, "ProcessRunner", lambda chip: runner)
        return runner

    return put


def found_of(*boards):
    boards = list(boards)
    return acceptance.accept(H200, find_reference("h200"), minutes=10, node=node_of(boards), runner=FakeRunner(boards, seconds=200.0))


class Reader(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action")]

    def handle_data(self, data):
        self.text += data


def test_a_good_machine_ends_with_zero_and_leaves_a_page(klab, machine, tmp_path):
    machine(*(Board(i) for i in range(2)))
    code, out, err = klab("accept", "--chip", "h200", "--gpus", "2", "--results", tmp_path)
    assert code == 0
    assert "accepted; what is expected of h200: published figures (h200.toml)" in out
    (page,) = tmp_path.glob("acceptance/reports/*/accept.html")
    assert str(page.parent) in err.replace("\n", "")
    read = json.loads(page.with_name("accept.json").read_text())
    assert (read["outcome"], len(read["devices"])) == ("accepted", 2)


def test_the_name_of_a_reference_may_be_in_capitals(klab, machine, tmp_path):
    machine(Board(0))
    assert klab("accept", "--chip", "h200", "--reference", "H200", "--results", tmp_path)[0] == 0


def test_a_bad_machine_ends_with_one_and_says_why(klab, machine, tmp_path):
    machine(Board(0), Board(1, facts={"rows": (0, 0, 0, 1)}))
    code, out, err = klab("accept", "--chip", "h200", "--out", tmp_path / "report", "--results", tmp_path, "--record")
    assert code == 1
    assert "a remapping failed" in out
    assert "nothing was recorded" in err
    assert (tmp_path / "report/accept.html").exists()
    assert not (tmp_path / "acceptance/h200").exists()


def test_warnings_end_with_zero_or_with_three_where_they_are_to_count(klab, machine, tmp_path):
    machine(Board(0, facts={"persistence": 0}))
    words = ("accept", "--chip", "h200", "--results", tmp_path)
    assert klab(*words)[0] == 0
    assert klab(*words, "--strict")[0] == 3


def test_what_cannot_be_decided_ends_with_three(klab, machine, tmp_path):
    machine(Board(0, facts={"rows": None}))
    assert klab("accept", "--chip", "h200", "--results", tmp_path)[0] == 3


def test_json_is_nothing_but_json(klab, machine, tmp_path):
    machine(Board(0))
    code, out, _ = klab("accept", "--chip", "h200", "--results", tmp_path, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert {row["type"] for row in rows} == {"check", "outcome"}
    assert rows[-1]["outcome"] == "accepted"


def test_recorded_devices_are_expected_of_the_next_machine(klab, machine, tmp_path):
    for i in range(3):
        machine(Board(0, 2 * i, tflops=780.0), Board(1, 2 * i + 1, tflops=782.0))
        assert klab("accept", "--chip", "h200", "--results", tmp_path, "--record")[0] == 0
    assert len(list((tmp_path / "acceptance/h200").glob("gpu-*.json"))) == 6
    machine(Board(0, 99, tflops=700.0))
    code, out, _ = klab("accept", "--chip", "h200", "--results", tmp_path)
    assert code == 1
    assert "6 recorded devices" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--minutes", "0"], "--minutes 0"),
        (["--minutes", "99999"], "no more than a day"),
        (["--gpus", "0"], "--gpus 0"),
        (["--reference", "nowhere.toml"], "no such file"),
        (["--reference", "h2000"], "nothing is published or recorded"),
        (["--chip", "h300"], "unknown chip"),
    ],
)
def test_bad_input_is_one_line_and_two(klab, machine, tmp_path, words, said):
    machine(Board(0))
    chip = [] if "--chip" in words else ["--chip", "h200"]
    code, out, err = klab("accept", *chip, *words, "--results", tmp_path)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_a_folder_that_cannot_be_written_is_told_before_the_minutes_are_spent(klab, machine, tmp_path):
    runner = machine(Board(0))
    (tmp_path / "file").write_text("")
    code, _, err = klab("accept", "--chip", "h200", "--results", tmp_path, "--out", tmp_path / "file" / "report")
    assert code == 2
    assert "cannot write" in err
    assert runner.jobs == []


def test_a_chip_that_is_not_here_ends_with_four(klab, tmp_path):
    code, _, err = klab("accept", "--chip", "h200", "--results", tmp_path)
    assert code == 4
    assert "is not in this machine" in err


def test_the_page_is_whole_and_asks_nobody():
    found = found_of(Board(0), Board(1, drop=0.15, wrong=1, reasons=0x44))
    text = accept_page(found)
    read = Reader(text)
    assert read.addresses == []
    assert "script" not in read.tags
    assert "default-src 'none'" in html.unescape(text)
    assert read.tags.count("svg") == 4
    for said in ("not accepted", "silent corruption", "No setting was changed", "00000000:18:00.0", found.devices[0].id, "0123456789ab"):
        assert said in read.text, said
    assert "GPU-00000000-aaaa" not in text
    assert len(text) < 200_000


def test_every_check_is_on_the_page():
    found = found_of(Board(0), Board(1))
    assert Reader(accept_page(found)).text.count("pass") >= len(found.checks)


def test_names_of_others_are_text():
    board = Board(0, facts={"name": MARKUP, "vbios": MARKUP, "rows": (0, 0, 0, 1)}, error="")
    found = found_of(board, Board(1, error=MARKUP))
    text = accept_page(found)
    assert MARKUP not in text
    assert "img" not in Reader(text).tags


def test_a_page_without_any_reading_still_stands():
    text = accept_page(found_of(Board(0), Board(1, error="hung")))
    assert "hung" in text
    bare = acceptance.Acceptance(
        "h200", "NVIDIA H200", "h200", "nothing", acceptance.Outcome.UNDECIDED, "2026-11-22T00:00:00+00:00", 1.0, (), (), {}
    )
    assert "cannot be decided" in accept_page(bare)


def test_the_documentation_names_every_check():
    text = (Path(__file__).parents[2] / "docs/acceptance.md").read_text(encoding="utf-8")
    found = found_of(Board(0), Board(1))
    assert [name for name in dict.fromkeys(check.name for check in found.checks) if f"| {name} |" not in text] == []


def test_rows_for_a_terminal():
    found = found_of(Board(0), Board(1, facts={"persistence": 0}))
    columns, rows = device_rows(found)
    assert len(columns) == len(rows[0])
    assert re.match(r"0 gpu-[0-9a-f]{8}", rows[0][0])
    assert [row[:3] for row in finding_rows(found)] == [("warn", "1", "persistence"), ("not known", "machine", "devices")]
