"""What a night is written as: JUnit, Markdown, annotations, badge, JSON. Names that try to break out are in all of them."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest
from made_nights import eventful, history, night, series, verdict
from markdown_it import MarkdownIt

from klab.harness.watch.badge import badge
from klab.harness.watch.junit import junit
from klab.harness.watch.night import exit_code
from klab.harness.watch.night_json import night_json, read_night
from klab.harness.watch.series import Call, Lapsed, Metric, Night, Point, Series, Verdict
from klab.harness.watch.summary import ANNOTATIONS, LIMIT_BYTES, github_annotations, summary
from klab.harness.watch.wording import change, change_of, headline, line, ordered, quantity
from klab.kernels.errors import UsageError

NASTY = "<script>alert(1)</script> | `x` ![i](http://evil/i.png) ]]> &amp; \x1b[31m\x00\u202e\ud800\ufffe\n::error::%0A # * _ \"'"
LONG = "n" * 300

# What Ant's schema and Jenkins' both allow: attributes that must and may be there, and children in order.
SCHEMA: dict[str, tuple[set[str], set[str], list[str]]] = {
    "testsuites": (set(), set(), ["testsuite"]),
    "testsuite": (
        {"id", "package", "name", "timestamp", "hostname", "tests", "failures", "errors", "time"},
        {"skipped"},
        ["properties", "testcase", "system-out", "system-err"],
    ),
    "properties": (set(), set(), ["property"]),
    "property": ({"name", "value"}, set(), []),
    "testcase": ({"name", "classname", "time"}, set(), ["failure", "error", "skipped"]),
    "failure": ({"type", "message"}, set(), []),
    "error": ({"type", "message"}, set(), []),
    "skipped": ({"message"}, set(), []),
    "system-out": (set(), set(), []),
    "system-err": (set(), set(), []),
}


def valid(text: str) -> ET.Element:
    root = ET.fromstring(text.encode())
    assert root.tag == "testsuites"
    for element in root.iter():
        must, may, children = SCHEMA[element.tag]
        assert must <= set(element.attrib) <= must | may, (element.tag, element.attrib)
        places = [children.index(child.tag) for child in element]
        assert places == sorted(places)
        if element.tag == "testcase":
            assert len(element) <= 1
    suite = root[0]
    assert [child.tag for child in suite].count("system-out") == [child.tag for child in suite].count("system-err") == 1
    for kind, attribute in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        assert int(suite.attrib[attribute]) == len(list(suite.iter(kind)))
    assert int(suite.attrib["tests"]) == len(list(suite.iter("testcase")))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.attrib["timestamp"])
    assert re.fullmatch(r"\d+(\.\d{0,3})?", suite.attrib["time"])
    names = [(case.attrib["classname"], case.attrib["name"]) for case in suite.iter("testcase")]
    assert len(set(names)) == len(names)
    return suite


def hostile(count: int = 6) -> Night:
    calls = (Call.SLOWER, Call.BROKEN, Call.MISSING, Call.SUSPECT, Call.FASTER, Call.OK)
    made = []
    for n in range(count):
        one = Series(NASTY, NASTY + str(n), f"key{n}", NASTY + LONG, NASTY, Metric.TIME.value, (NASTY,))
        bad = Point((math.inf, 1.0), status=NASTY, reason=NASTY, kernel=NASTY, config={NASTY: NASTY}, device_uuid=NASTY, epoch=NASTY)
        waiver = NASTY if n % 5 == 4 else ""
        made.append(Verdict(one, calls[n % 6].value, NASTY, bad, ratio=math.nan, low=math.inf, high=1.0, waiver=waiver))
    odd = {NASTY: {"device": NASTY}}
    return night(made, chip=NASTY, commit=NASTY, policy=NASTY, notes=(NASTY,), at=NASTY, devices=odd, epochs=odd)


def test_an_expired_waiver_is_in_every_output_and_fails_a_night_that_is_well() -> None:
    waivers = (Lapsed("h200 * time", "ann", "2026-09-30", "known"), Lapsed(NASTY + LONG, NASTY, "2026-09-29", NASTY))
    fine = history(2, 2)[-1]
    tonight = dataclasses.replace(fine, lapsed=waivers)
    told = "the waiver of ann for 'h200 * time' (known) expired on 2026-09-30: renew it in the policy or remove it"
    suite = valid(junit(tonight))
    cases = [case for case in suite.iter("testcase") if case.attrib["classname"] == "klab.h200.waivers"]
    assert len(cases) == 2 and suite.attrib["failures"] == "2" and cases[0][0].attrib["message"] == told
    assert cases[0].attrib["name"].startswith("waiver of ann for h200 * time ")
    again = dataclasses.replace(tonight, lapsed=waivers[:1])
    text = summary(tonight)
    assert ": failed" in text and "**2 expired waivers; 2 series: all ok**" in text and "the waiver of ann for 'h200 &#42; time'" in text
    assert json.loads(badge(tonight)) | {"label": ""} == {
        "schemaVersion": 1, "label": "", "message": "2 expired waivers", "color": "red", "isError": True,
    }  # fmt: skip
    said = json.loads(night_json(tonight))
    assert said["fails"] and said["lapsed"][0] == {"series": "h200 * time", "owner": "ann", "expires": "2026-09-30", "reason": "known"}
    assert read_night(night_json(again)) == again
    assert github_annotations(tonight)[0] == f"::error title=expired waiver::{told}"
    slower, _ = eventful()
    both = dataclasses.replace(slower, lapsed=waivers[:1])
    assert json.loads(badge(both))["message"].endswith(", 1 expired waiver") and headline(both).startswith("1 expired waiver; ")


def test_junit_says_what_failed_and_what_was_not_judged() -> None:
    tonight, _ = eventful()
    suite = valid(junit(tonight))
    assert {k: suite.attrib[k] for k in ("tests", "failures", "errors", "skipped", "time")} == {
        "tests": "20", "failures": "1", "errors": "2", "skipped": "2", "time": "5400.000",
    }  # fmt: skip
    failure = next(suite.iter("failure"))
    assert failure.attrib["type"] == "slower" and "+6.0% (+5.2% to +6.7%)" in (failure.text or "")
    assert {error.attrib["type"] for error in suite.iter("error")} == {"broken", "missing"}
    assert any("waived: ada" in skipped.attrib["message"] for skipped in suite.iter("skipped"))
    output = suite.find("system-out")
    assert output is not None and "not reached within the budget" in (output.text or "") and (output.text or "").count("\n") >= 20
    assert valid(junit(tonight, strict=True)).attrib["failures"] == "2", "a suspect fails a strict night"


def test_two_cases_never_share_a_name() -> None:
    one = series(0)
    twin = dataclasses.replace(one, problem_key="another")
    far = [dataclasses.replace(one, label=LONG * 2 + str(n), problem_key=str(n)) for n in range(2)]
    tonight = night([verdict(each, Call.OK) for each in (one, twin, *far)])
    names = [case.attrib["name"] for case in valid(junit(tonight)).iter("testcase")]
    again = dataclasses.replace(tonight, verdicts=tonight.verdicts[::-1])
    assert sorted(names) == sorted(case.attrib["name"] for case in valid(junit(again)).iter("testcase")), "the same in any order"


def test_no_name_breaks_an_output() -> None:
    tonight = hostile()
    suite = valid(junit(tonight))
    assert len(suite.attrib["name"]) <= 300 and all(len(case.attrib["name"]) <= 300 for case in suite.iter("testcase"))
    text = summary(tonight, [tonight])
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert "<script" not in html and "<img" not in html and "<a " not in html and "evil" in html
    rows = re.findall(r"<tr>(.*?)</tr>", html, flags=re.DOTALL)
    assert len(rows) == 6 + 2 and {row.count("<td>") for row in rows} == {0, 6}, "no name makes a column or a row"
    for command in github_annotations(tonight):
        assert re.match(r"::(error|warning) title=[^:,\n]*::[^\n]*$", command) and "%0A" not in command.replace("%250A", "")
    told = json.loads(badge(tonight))
    assert told["isError"] is True and "\x1b" not in told["label"]
    json.loads(night_json(tonight), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    for output in (junit(tonight), text, *github_annotations(tonight)):
        output.encode()
        assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e\ud800-\udfff\ufffe]", output)


@pytest.mark.parametrize("calls", [(), (Call.UNKNOWN,), (Call.OK,), (Call.OK, Call.SUSPECT), (Call.SLOWER,)])
def test_a_night_that_ended_early_is_green_nowhere(calls: tuple[Call, ...]) -> None:
    early = night([verdict(series(n), call) for n, call in enumerate(calls)], incomplete="GPU-1 fell off the bus")
    suite = valid(junit(early))
    assert int(suite.attrib["errors"]) == 1 and int(suite.attrib["tests"]) == len(calls) + 1
    assert exit_code(early) == (1 if Call.SLOWER in calls else 4)
    told = json.loads(badge(early))
    assert told["color"] in ("yellow", "red") and (Call.SLOWER in calls or told["message"].startswith("ended early"))
    assert "ended early" in headline(early) and "ended early" in summary(early) and "passed" not in summary(early)
    assert json.loads(night_json(early))["outcome"] == ("failed" if Call.SLOWER in calls else "ended early")
    assert read_night(night_json(early)) == early


def test_every_output_counts_the_same_failures() -> None:
    tonight, earlier = eventful()
    for strict in (False, True):
        told = json.loads(night_json(tonight, strict=strict))
        failed = sum(one["fails"] for one in told["verdicts"])
        suite = valid(junit(tonight, strict=strict))
        assert failed == int(suite.attrib["failures"]) + int(suite.attrib["errors"]) == 3 + strict
        assert failed == sum(line.startswith("| **") for line in summary(tonight, earlier, strict=strict).splitlines())
        assert failed == sum(line.startswith("::error") for line in github_annotations(tonight, strict=strict))
        assert failed == sum(
            int(n) for n in re.findall(r"(\d+) [a-z]", json.loads(badge(tonight, strict=strict))["message"].partition(" of ")[0])
        )
        assert told["fails"] is True and told["outcome"] == "failed" and exit_code(tonight, strict=strict) == 1
    doubtful = night([verdict(series(0), Call.SUSPECT, "4% above")])
    assert [exit_code(doubtful, strict=strict) for strict in (False, True)] == [0, 3]
    assert [json.loads(night_json(doubtful, strict=strict))["verdicts"][0]["fails"] for strict in (False, True)] == [False, True]


def test_an_empty_night_is_told_as_such() -> None:
    empty = night()
    assert valid(junit(empty)).attrib["tests"] == "0"
    assert "no series was watched" in summary(empty) and "judged nothing" in summary(empty)
    assert json.loads(badge(empty)) == {"schemaVersion": 1, "label": "klab h200", "message": "nothing watched", "color": "lightgrey"}
    assert "judged nothing" in summary(night([verdict(series(0), Call.UNKNOWN, "its first night")])), "it has not passed"
    assert json.loads(night_json(empty))["fails"] is False and github_annotations(empty) == []


def test_the_summary_puts_failures_first_and_folds_the_rest() -> None:
    tonight, earlier = eventful()
    text = summary(tonight, earlier)
    assert text.index("**broken** (new)") < text.index("**slower** (new)") < text.index("**missing**") < text.index("| suspect |")
    assert text.index("| suspect |") < text.index("<details><summary>1 unknown, 13 ok</summary>") < text.index("| ok |")
    assert "| slower |" in text, "a waived one is not bold"
    assert "klab nightly on h200: failed" in text and "not reached within the budget" in text


def test_a_standing_failure_says_for_how_long() -> None:
    tonight, earlier = eventful()
    broken = verdict(series(1), Call.BROKEN, "wrong")
    before = [dataclasses.replace(n, verdicts=(n.verdicts[0], broken, *n.verdicts[2:])) for n in earlier[-3:]]
    assert "**broken** (night 4 of it)" in summary(tonight, earlier[:-3] + before)
    mended = [before[0], earlier[-2], before[2]]
    assert "**broken** (night 2 of it)" in summary(tonight, mended), "a night that was fine ends the count"


@pytest.mark.parametrize("limit", [3_000, 20_000, LIMIT_BYTES])
def test_the_summary_stays_below_the_limit_and_says_what_it_cut(limit: int) -> None:
    verdicts = [verdict(series(n), Call.OK, NASTY * 4, point=Point((1.0,), kernel=NASTY)) for n in range(1500)]
    verdicts += [verdict(series(1500 + n), Call.SLOWER, NASTY * 20, ratio=1.05) for n in range(30)]
    tonight = night(verdicts, notes=(NASTY * 50,) * 2)
    text = summary(tonight, limit_bytes=limit)
    assert len(text.encode()) <= limit
    shown = text.count("| **slower** |")
    assert shown == 30 or f"{30 - shown} of these 30 rows are cut here: {30 - shown} slower" in text
    assert "of these 1500 rows are cut here" in text, "what is fine is cut first"
    assert shown == 30 or "| ok |" not in text
    assert text.count("<details>") == text.count("</details>") == 1


def test_annotations_are_ten_at_most_and_say_what_is_left_out() -> None:
    many = night([verdict(series(n), Call.SLOWER, "5% above") for n in range(12)] + [verdict(series(20), Call.SUSPECT, "4% above")])
    told = github_annotations(many)
    assert len(told) == ANNOTATIONS == 10 and told[-1] == "::error title=klab nightly h200::4 more; the job summary has them"
    ten = night([verdict(series(n), Call.SLOWER, "5% above") for n in range(10)])
    assert len(github_annotations(ten)) == 10 and "more" not in github_annotations(ten)[-1]
    assert github_annotations(night([verdict(series(0), Call.SUSPECT, "100%")]))[0].startswith("::warning title=suspect%3A h200")
    assert github_annotations(night([verdict(series(0), Call.SUSPECT, "x")]), strict=True)[0].startswith("::error")
    assert github_annotations(night([verdict(series(0), Call.SLOWER, "x", waiver="ada")])) == []


@pytest.mark.parametrize(
    ("calls", "waived", "colour", "message"),
    [
        ((Call.OK, Call.FASTER), "", "brightgreen", "2 series ok"),
        ((Call.OK, Call.UNKNOWN), "", "brightgreen", "1 of 2 judged ok"),
        ((Call.UNKNOWN, Call.UNKNOWN), "", "lightgrey", "0 of 2 judged"),
        ((Call.OK, Call.SUSPECT), "", "yellow", "1 suspect of 2"),
        ((Call.OK, Call.SLOWER), "ada", "yellow", "1 waived of 2"),
        ((Call.MISSING, Call.SLOWER), "", "red", "1 slower, 1 missing of 2"),
    ],
)
def test_the_badge(calls: tuple[Call, ...], waived: str, colour: str, message: str) -> None:
    made = night([verdict(series(n), call, "", waiver=waived if call.fails else "") for n, call in enumerate(calls)])
    told = json.loads(badge(made))
    assert (told["color"], told["message"], told.get("isError", False)) == (colour, message, colour == "red")
    if Call.SUSPECT in calls:
        assert json.loads(badge(made, strict=True))["color"] == "red"


def test_json_comes_back_as_the_night_it_was() -> None:
    tonight, earlier = eventful()
    text = night_json(tonight)
    assert read_night(text) == tonight and read_night(night_json(earlier[0])) == earlier[0]
    told = json.loads(text)
    assert told["fails"] is True and told["counts"]["slower"] == 2 and told["counts"]["waived"] == 1
    slower = next(v for v in told["verdicts"] if v["call"] == "slower")
    assert slower["unit"] == "us" and slower["value"] == pytest.approx(21.2, rel=0.02) and slower["fails"] is True
    assert slower["name"] == "h200 matmul m16 n4096 k4096 bf16 chosen time" and slower["judged_value"] == pytest.approx(0.53, rel=0.02)
    plain = json.dumps({**dataclasses.asdict(earlier[0])})
    assert read_night(plain) == earlier[0], "a Night's own JSON is read too"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"verdicts": 3}', '{"verdicts": [3]}', '{"verdicts": [{"call": "odd"}]}', "[" * 100_000])
def test_what_is_no_night_is_one_clear_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"not a|needs|no field"):
        read_night(text)


def test_the_order_is_by_what_a_reader_must_know_first() -> None:
    said = [(Call.OK, 1.0), (Call.SLOWER, 1.03), (Call.UNKNOWN, None), (Call.SLOWER, 1.2), (Call.BROKEN, None), (Call.SLOWER, math.nan)]
    found = [verdict(series(n), call, "", ratio=ratio) for n, (call, ratio) in enumerate(said)]
    found.append(verdict(series(9), Call.BROKEN, "", waiver="ada"))
    assert [(one.call, one.ratio if one.ratio == one.ratio else 0, bool(one.waiver)) for one in ordered(found)] == [
        ("broken", None, False), ("slower", 1.2, False), ("slower", 1.03, False), ("slower", 0, False), ("broken", None, True),
        ("unknown", None, False), ("ok", 1.0, False),
    ]  # fmt: skip


def test_figures_and_words() -> None:
    assert [quantity(v, "time") for v in (0.5, 21.234, 1500.0, 2.5e6)] == ["500 ns", "21.23 us", "1.5 ms", "2.5 s"]
    assert [quantity(v, "energy") for v in (2.0, 0.0123, 3.4e-5, 0.0)] == ["2 J", "12.3 mJ", "34 uJ", "0 uJ"]
    assert [change(r) for r in (1.052, 0.92, 1.0, None, math.inf)] == ["+5.2%", "-8.0%", "+0.0%", "", ""]
    assert change_of(verdict(series(0), Call.OK, "", ratio=1.05)) == "+5.0%", "no interval, no brackets"
    assert line("a\tb\n\x00\u202e", 20) == "a b \\x00\\u202e" and line("x" * 50, 10) == "xxxxxxx..."
    assert headline(history(3, 1)[0]) == "3 series: all ok"
