"""Finals as a tuning run calls them: on made rows through a fleet of paper, and once for real on this CPU."""

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from made_results import failed, made

from klab.harness.choose.choose import choose
from klab.harness.fleet.local import Summary
from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.read import iter_results
from klab.harness.store.result import Status
from klab.harness.tune import finals as module
from klab.harness.tune.finals import ROUNDS, finals
from klab.harness.tune.job import Job
from klab.harness.tune.objective import Objective
from klab.kernels.contract import Chip
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul

CONTESTANTS = Path(__file__).with_name("contestants")
CHIP = Chip("cpu", "CPU", "cpu", 1, 2000, 2000, {"float32": 0.05}, 8 << 30, 10.0, 1 << 18)
PROBLEM = Matmul(64, 512, 512, "float32")
SMALL = Matmul(32, 96, 128, "float32")
POLICY = Policy(warmup_ms=1.0, round_ms=0.3, min_rounds=6, max_rounds=12, limit_s=5.0, threads=1)


@pytest.fixture(autouse=True)
def _own_locks(tmp_path, monkeypatch):
    monkeypatch.setenv("KLAB_LOCK_DIR", str(tmp_path))


@pytest.fixture(scope="module")
def kernels():
    return discover([CONTESTANTS]).kernels


@pytest.fixture
def job(tmp_path):
    return Job(CHIP, tmp_path / "rows", kernel_dirs=[CONTESTANTS])


def of(kernels, name, place=0, problem=PROBLEM):
    """The default of a kernel, or another candidate of its space."""
    kernel = kernels[f"matmul/{name}"]
    config = next(c for n, c in enumerate(kernel.space(problem, CHIP)) if n == place)
    return Trial.of(kernel, problem, config, "cpu", POLICY)


class Paper:
    """Instead of devices: `levels` give a contender's time in microseconds, `joules` its energy, `fates` what becomes of it."""

    def __init__(self, levels, *, noise=0.003, joules=None, fates=None, clocks=None, block_s=0.0, size=1, window_noise=0.0, marked=False):
        self.levels, self.noise, self.joules, self.fates = levels, noise, joules or {}, fates or {}
        self.clocks, self.block_s, self.size = clocks or {}, block_s, size
        self.now, self.window_noise, self.marked = 0.0, window_noise, marked
        self.asked, self.rng = [], np.random.default_rng(0)

    def run(self, trials, store, *, deadline=None, stop=None):
        self.asked.append(list(trials))
        self.now += self.block_s
        for seed in dict.fromkeys(trial.policy.seed for trial in trials):
            drift = 1 + 0.1 * self.rng.random(ROUNDS)
            for trial in (t for t in trials if t.policy.seed == seed):
                store(self.row(trial, drift))
        return Summary()

    def row(self, trial, drift):
        name = who(trial)
        assert trial.policy.min_rounds == trial.policy.max_rounds == ROUNDS
        facts = {"chip": "cpu", "config": trial.config.to_json_full()}
        changes = {
            "key": trial.key,
            "policy": trial.policy.to_json(),
            "source_digest": trial.source_digest,
            "library": trial.kernel.endswith("torch_matmul"),
            "build": {"contest": {"id": f"contest {trial.policy.seed}"}},
        }
        fate = self.fates.get(name)
        if fate is not None and len(self.asked) >= fate[0]:
            return failed(PROBLEM, trial.kernel.partition("/")[2], fate[1], "as it happens", **facts, **changes)
        if trial.policy.energy:
            joules = self.joules.get(name)
            if joules is not None:
                joules *= float(np.exp(self.window_noise * self.rng.normal()))
                changes |= {"energy_j": joules, "energy_ci_low_j": joules * 0.99, "energy_ci_high_j": joules * 1.01}
            changes["energy_reason"] = "no energy counter" if joules is None else "cross-checked"
        samples = self.levels[name] * np.exp(self.noise * self.rng.normal(size=ROUNDS)) * drift
        if self.marked:
            changes["marked"] = (1,) * ROUNDS
        if name in self.clocks:
            changes["clocks_mhz"] = (self.clocks[name],) * ROUNDS
        return made(PROBLEM, trial.kernel.partition("/")[2], samples=samples.tolist(), **facts, **changes)


def who(trial):
    return f"{trial.kernel.partition('/')[2]} {trial.config.key}"


@pytest.fixture
def field(kernels):
    """The default, three candidates of the same kernel, and a library."""
    return {
        "default": of(kernels, "cpu_blocked"),
        **{name: of(kernels, "cpu_blocked", n + 1) for n, name in enumerate("abc")},
        "library": of(kernels, "torch_matmul"),
    }


def play(job, kernels, field, levels, contenders="abc", **how):
    paper = Paper({who(field[name]): level for name, level in levels.items()}, **how.pop("paper", {}))
    told = finals(
        job, [field[c] for c in contenders], default=field["default"], libraries=[field["library"]], kernels=kernels, fleet=paper, **how
    )
    return told, paper


def test_the_winner_is_told_with_its_evidence_and_every_row_is_stored(job, kernels, field):
    levels = {"default": 100.0, "a": 97.0, "b": 96.0, "c": 99.0, "library": 130.0}
    told, paper = play(job, kernels, field, levels)
    assert told.winner == field["b"] and told.ties == (field["b"],) and told.fastest == told.winner and told.confirmed
    assert "takes 0.9" in told.reason and told.reason.endswith("of the default's time (not confirmed in cycles: no clock)")
    ratio, low, high = told.ratios[field["a"].key]
    assert low <= 97 / 96 <= high and low > 1.0 and ratio == pytest.approx(97 / 96, rel=0.003)
    assert told.ratios[field["b"].key] == (1.0, 1.0, 1.0)
    assert sorted(row.key for row in iter_results(job.folder)) == sorted(row.key for row in told.results)
    assert told.rounds == ROUNDS * len(told.results)
    seeds = [{trial.policy.seed for trial in trials} for trials in paper.asked]
    assert all(len(s) == 1 for s in seeds) and len(set.union(*seeds)) == len(seeds), "other data in every block"
    assert len({tuple(map(who, trials)) for trials in paper.asked}) > 1, "in an order drawn anew"
    lines = [json.loads(json.dumps(row, allow_nan=False)) for row in told.to_json()]
    assert [line["type"] for line in lines] == ["final"] + ["contender"] * 5
    # `klab choose` comes to the same choice from the rows in the store.
    (choice,) = choose(iter_results(job.folder), None).choices
    assert dict(choice.config) == field["b"].config.to_json_full() and choice.evidence.runner_up.how == "same rounds"


def test_the_default_wins_a_tie_and_without_it_the_simpler(job, kernels, field):
    told, _ = play(job, kernels, field, {"default": 100.0, "a": 100.0, "b": 99.95, "c": 104.0, "library": 130.0})
    assert told.winner == field["default"] and {field["a"], field["b"]} <= set(told.ties) and field["c"] not in told.ties
    assert told.reason.startswith("the default: nothing is")
    told, _ = play(job, kernels, field, {"default": 110.0, "a": 100.0, "b": 100.0, "c": 104.0, "library": 100.0})
    assert told.winner == field["library"] and set(told.ties) == {field["a"], field["b"], field["library"]}


def test_a_tie_goes_to_the_lower_energy_where_that_is_known(job, kernels, field):
    levels = {"default": 110.0, "a": 100.0, "b": 100.0, "c": 104.0, "library": 140.0}
    plain = Paper({who(field[name]): level for name, level in levels.items()}, joules={who(field["a"]): 0.05, who(field["b"]): 0.04})
    known = [plain.row(field[n].with_policy(min_rounds=ROUNDS, max_rounds=ROUNDS, energy=True), 1.0) for n in "ab"]
    told, _ = play(job, kernels, field, levels, known=known)
    assert told.winner == field["b"] and set(told.ties) == {field["a"], field["b"]}


def test_a_win_by_a_luckier_clock_is_a_tie(job, kernels, field):
    levels = {"default": 100.0, "a": 98.0, "b": 101.0, "c": 104.0, "library": 130.0}
    clocks = {who(trial): 1700.0 for trial in field.values()} | {who(field["a"]): 1760.0}
    told, _ = play(job, kernels, field, levels, paper={"clocks": clocks})
    assert told.winner == field["default"] and "in cycles: a tie" in told.reason
    told, _ = play(job, kernels, field, levels, paper={"clocks": dict.fromkeys(clocks, 1700.0)})
    assert told.winner == field["a"] and told.cycles == "confirmed" and "in cycles)" in told.reason


@pytest.mark.parametrize("status", [Status.INCORRECT, Status.CRASHED, Status.TIMEOUT])
def test_one_that_fails_in_the_final_is_out_and_the_others_go_on(job, kernels, field, status):
    levels = {"default": 100.0, "a": 90.0, "b": 96.0, "c": 99.0, "library": 130.0}
    told, paper = play(job, kernels, field, levels, paper={"fates": {who(field["a"]): (3, status)}})
    assert told.winner == field["b"]
    states = dict(told.standings)
    assert states[field["a"]].state == "out" and states[field["a"]].reason == f"{status}: as it happens"
    assert all(who(field["a"]) not in map(who, trials) for trials in paper.asked[3:])


def test_the_default_may_fail_and_so_may_everybody(job, kernels, field):
    levels = {"default": 100.0, "a": 90.0, "b": 96.0, "c": 99.0, "library": 130.0}
    told, _ = play(job, kernels, field, levels, paper={"fates": {who(field["default"]): (1, Status.CRASHED)}})
    assert told.winner == field["a"] and told.reason.startswith("the default is out (crashed: as it happens)")
    told, paper = play(job, kernels, field, levels, paper={"fates": {who(t): (1, Status.INCORRECT) for t in field.values()}})
    assert told.winner is None and told.reason.startswith("nobody came through the final: ") and len(paper.asked) == 1
    told, paper = play(job, kernels, field, levels, paper={"fates": {who(t): (1, Status.THROTTLED) for t in field.values()}})
    assert not told.confirmed and "throttled" in told.reason and len(paper.asked) == 5


def test_no_time_leaves_the_ranking_of_the_search(job, kernels, field):
    levels = {"default": 100.0, "a": 90.0, "b": 96.0, "c": 99.0, "library": 130.0}
    told, paper = play(job, kernels, field, levels, deadline=time.monotonic() - 1)
    assert (told.winner, told.confirmed, paper.asked, told.results) == (field["a"], False, [], ())
    assert told.reason == "no time for a final: the ranking of the search stands, not confirmed"
    job.stop = threading.Event()
    job.stop.set()
    assert not play(job, kernels, field, levels)[0].confirmed


def test_time_that_is_up_in_the_midst_is_said(job, kernels, field, monkeypatch):
    levels = {"default": 100.0, "a": 99.9, "b": 100.0, "c": 100.0, "library": 130.0}
    paper = Paper({who(field[name]): level for name, level in levels.items()}, noise=0.05, block_s=2.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: paper.now, time_ns=time.time_ns))
    told = finals(job, [field[c] for c in "abc"], default=field["default"], libraries=[], kernels=kernels, fleet=paper, deadline=7.0)
    assert told.winner == field["default"] and len(paper.asked) == 3, "a fourth block of 2 s would not end by then"
    assert told.reason.endswith("tie, not confirmed: 3 blocks in the time, 5 are the least")


def test_too_few_blocks_confirm_nothing(job, kernels, field, monkeypatch):
    """However plain it looks: the same after five blocks is a win."""
    for deadline, winner in ((7.0, "default"), (11.0, "a")):
        paper = Paper({who(field["default"]): 100.0, who(field["a"]): 90.0}, block_s=2.0)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda now=paper: now.now, time_ns=time.time_ns))
        told = finals(job, [field["a"]], default=field["default"], libraries=[], kernels=kernels, fleet=paper, deadline=deadline)
        assert told.winner == field[winner] and ("not confirmed: 3 blocks" in told.reason) == (winner == "default")


def test_noise_that_stays_is_said(job, kernels, field):
    levels = {"default": 100.0, "a": 99.9, "b": 100.0, "c": 100.0, "library": 130.0}
    told, paper = play(job, kernels, field, levels, "a", paper={"noise": 0.2})
    assert (
        told.winner == field["default"] and told.reason.endswith("the intervals are still wide after 40 blocks") and len(paper.asked) == 40
    )


def test_several_devices_take_a_block_each(job, kernels, field):
    levels = {"default": 100.0, "a": 90.0, "b": 96.0, "c": 99.0, "library": 130.0}
    told, paper = play(job, kernels, field, levels, paper={"size": 4})
    assert told.winner == field["a"] and [len({t.policy.seed for t in trials}) for trials in paper.asked] == [4, 1]


def test_by_energy_the_near_ones_are_metered_and_the_value_decides(job, kernels, field):
    levels = {"default": 100.0, "a": 95.0, "b": 99.0, "c": 140.0, "library": 104.0}
    joules = {who(field[name]): j for name, j in {"default": 0.05, "a": 0.06, "b": 0.04, "c": 0.01, "library": 0.05}.items()}
    told, paper = play(job, kernels, field, levels, objective=Objective("energy"), paper={"joules": joules})
    assert told.winner == field["b"] and told.fastest == field["a"]
    metered = [t for trials in paper.asked for t in trials if t.policy.energy]
    assert {who(t) for t in metered} == {who(field[n]) for n in ("default", "a", "b", "library")}, "40% slower is not worth 6 s"
    told, _ = play(job, kernels, field, levels, objective=Objective("cost", 1000.0, 0.0), paper={"joules": joules})
    assert told.winner == field["a"] and told.reason.endswith(" USD (5 windows)") and "of the default's" in told.reason
    equal = dict.fromkeys(joules, 0.05)
    told, _ = play(job, kernels, field, levels, objective=Objective("energy"), paper={"joules": equal})
    assert told.winner == field["default"] and "nothing is clearly lower" in told.reason
    told, _ = play(job, kernels, field, levels, objective=Objective("energy-delay"))
    assert told.winner is None and told.fastest == field["a"]
    assert told.reason.startswith("nobody has a value by energy-delay: no energy counter; by time cpu_blocked ")


def test_energy_is_measured_in_windows_apart_in_alternating_order(job, kernels, field):
    levels = {"default": 100.0, "a": 95.0, "b": 99.0, "c": 140.0, "library": 104.0}
    joules = {who(field[name]): 0.04 if name == "b" else 0.05 for name in levels}
    told, paper = play(job, kernels, field, levels, objective=Objective("energy"), paper={"joules": joules, "window_noise": 0.003})
    windows = [trials for trials in paper.asked if trials[0].policy.energy]
    assert told.winner == field["b"] and len(windows) == 5
    assert len({t.policy.seed for trials in windows for t in trials}) == 5, "data of its own in each"
    assert list(map(who, windows[0])) == list(map(who, windows[1]))[::-1] == list(map(who, windows[2]))


def test_fewer_windows_than_four_leave_the_default(job, kernels, field, monkeypatch):
    """20% less energy, in so many windows as there is time for: 5 blocks take 5 s, windows 1 s each as well."""
    levels = {"default": 100.0, "a": 80.0}
    joules = {who(field["default"]): 0.05, who(field["a"]): 0.04}
    for deadline, winner, said in ((7.0, "default", "energy not confirmed: 2 windows of 4"), (15.0, "a", "5 windows")):
        paper = Paper({who(field[name]): level for name, level in levels.items()}, joules=joules, block_s=1.0)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda now=paper: now.now, time_ns=time.time_ns))
        monkeypatch.setattr(module, "TIMES_SHARE", 1.0)
        by = {"objective": Objective("energy"), "deadline": deadline}
        found = finals(job, [field["a"]], default=field["default"], libraries=[], kernels=kernels, fleet=paper, **by)
        assert found.winner == field[winner] and said in found.reason


def test_a_final_without_a_block_that_counts_says_what_happened(job, kernels, field):
    told, paper = play(job, kernels, field, dict.fromkeys(field, 100.0), paper={"marked": True})
    assert told.winner == field["a"] and not told.confirmed and len(paper.asked) == 5
    assert told.reason.startswith("the final ended without a block that counts: 5 of 5 contenders were timed, none in 5 unmarked rounds")


def test_the_field_is_one_group_of_one_problem(job, kernels, field):
    many = [of(kernels, "cpu_blocked", n) for n in range(1, 10)]
    levels = {who(t): 100.0 + n for n, t in enumerate([field["default"], field["library"], *many])}
    told = finals(job, many, default=field["default"], libraries=[field["library"]], kernels=kernels, fleet=Paper(levels))
    assert len(told.standings) == 8 and told.left_out == tuple(many[6:])
    other = of(kernels, "cpu_blocked", 1, Matmul(4, 48, 64, "float32"))
    with pytest.raises(UsageError, match="one problem"):
        finals(job, [other], default=field["default"], libraries=[], kernels=kernels, fleet=Paper(levels))
    alone = finals(job, [field["default"]], default=field["default"], libraries=[], kernels=kernels, fleet=Paper(levels))
    assert alone.winner == field["default"] and alone.reason == "nobody else came to the final" and not alone.results


def test_a_final_on_this_machine(job, kernels):
    """Twice the work is seen, one that is wrong is out, and the rows are as any others."""
    slow, good, wrong = (of(kernels, name, 0, SMALL) for name in ("half_speed", "good", "wrong"))
    told = finals(job, [wrong, slow], default=slow, libraries=[good], kernels=kernels, target=0.2, deadline=time.monotonic() + 240.0)
    assert told.winner == good and told.cycles == "no clock"
    states = {trial.kernel: standing.state for trial, standing in told.standings}
    assert states == {"matmul/wrong": "out", "matmul/half_speed": "slower", "matmul/good": "winner"}
    rows = list(iter_results(job.folder))
    assert {row.run_id for row in rows} == {job.run_id} and len(rows) == len(told.results)
    assert choose(rows, None).choices[0].kernel == "matmul/good"
