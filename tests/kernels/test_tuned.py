"""`klab.kernels.apply`: what a profile chose runs in a caller's own code, at the nearest size that was measured."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from made_results import made

from klab.harness.catalog import find_chip
from klab.harness.choose.decide import decide, limits_of
from klab.kernels import apply
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul
from klab.kernels.prefill_attention.problem import PrefillAttention
from klab.kernels.scaled_matmul.problem import ScaledMatmul

FEW, MANY = {"block_n": 32, "block_k": 16}, {"block_m": 64, "block_n": 32}


@pytest.fixture(scope="module")
def pack() -> dict:
    """A profile of made-up times: the blocked kernel with other blocks at 4 and at 256 rows, torch at 4,096."""
    chip, catalogue = find_chip("cpu"), discover(only=("matmul", "decode_attention"))

    def row(problem, kernel, config, us):
        found = catalogue.kernels[f"{problem.operator}/{kernel}"]
        config = {**found.default(problem, chip).to_json_full(), **config}
        return made(problem, kernel, chip="cpu", config=config, level_us=us, source_digest=found.source_digest, backend=found.backend)

    def shape(m):
        return Matmul(m, 96, 64, "float32")

    decode = DecodeAttention((100,) * 4, 4, 2, 32, dtype="float32")
    rows = [row(shape(4), "cpu_blocked", FEW, 5.0), row(shape(256), "cpu_blocked", MANY, 50.0), row(shape(4096), "torch_matmul", {}, 500.0)]
    rows += [row(shape(4), "torch_matmul", {}, 9.0), row(decode, "cpu_split_kv", {}, 30.0)]
    return json.loads(decide(rows, None, "cpu", catalogue=catalogue, limits=chip).to_text())


@pytest.fixture(scope="module")
def tuned(pack):
    return apply(pack)


SERVED = [(4, 4, "cpu_blocked"), (1, 4, "cpu_blocked"), (20, 4, "cpu_blocked"), (70, 256, "cpu_blocked"), (90_000, 4096, "torch_matmul")]


@pytest.mark.parametrize(("m", "bucket", "kernel"), SERVED)
def test_the_nearest_bucket_serves_and_is_right(tuned, m, bucket, kernel):
    problem = Matmul(m, 96, 64, "float32")
    served = tuned.served(problem)
    assert (served.kernel, served.measured_at) == (f"matmul/{kernel}", Matmul(bucket, 96, 64, "float32").label())
    assert served.distance == pytest.approx(abs(math.log((1 + m) / (1 + bucket)))) and (served.distance == 0) == (m == bucket)
    if kernel == "cpu_blocked":
        wanted = FEW if bucket == 4 else MANY
        assert {name: getattr(served.config, name) for name in wanted} == wanted
    if m < 100:
        inputs = problem.inputs(seed=m)
        torch.testing.assert_close(tuned(problem, inputs)["out"], problem.reference(inputs)["out"].float(), rtol=1e-4, atol=1e-4)


def test_lengths_are_loads_and_heads_are_not(tuned):
    longer = DecodeAttention((300, 17, 64), 4, 2, 32, dtype="float32")
    assert tuned.served(longer).measured_at == DecodeAttention((100,) * 4, 4, 2, 32, dtype="float32").label()
    inputs = longer.inputs(seed=1)
    torch.testing.assert_close(tuned(longer, inputs)["out"].double(), longer.reference(inputs)["out"].double(), rtol=1e-3, atol=1e-3)
    for other in (dataclasses.replace(longer, heads=8), dataclasses.replace(longer, shared_prefix=16), Matmul(4, 96, 65, "float32")):
        with pytest.raises(UsageError, match=r"has no choice for .* at any size"):
            tuned.launch(other)
    with pytest.raises(UsageError, match="nothing for prefill_attention"):
        tuned.launch(PrefillAttention((64,), 4, 2, 32))


def test_a_launch_is_built_once(tuned):
    assert tuned.launch(Matmul(7, 96, 64, "float32")) is tuned.launch(Matmul(7, 96, 64, "float32"))


def test_a_bucket_whose_configuration_does_not_fit_gives_way(pack):
    """The blocks of the nearest two are longer than the matrix: the third serves."""
    broken = json.loads(json.dumps(pack))
    next(c for c in broken["choices"] if c["wanted"]["problem"].get("m") == 4)["config"]["block_n"] = 4096
    assert apply(broken).served(Matmul(4, 96, 64, "float32")).measured_at == Matmul(4096, 96, 64, "float32").label()


def test_what_no_chosen_configuration_fits_runs_with_the_default(pack):
    """Five tokens of context, and nothing but blocks for longer ones was chosen."""
    problem = DecodeAttention((2, 1), 4, 2, 32, page_size=1, dtype="float32")
    chip, kernel = find_chip("cpu"), discover(only=("decode_attention",)).kernels["decode_attention/cpu_split_kv"]
    bucket = dataclasses.replace(problem, kv_lens=(300,) * 4)
    big = next(c for c in kernel.space(bucket, chip) if kernel.fits(problem, c, chip))
    rows = [made(bucket, "cpu_split_kv", chip="cpu", config=big.to_json_full(), source_digest=kernel.source_digest, backend="cpu")]
    tuned = apply(json.loads(decide(rows, None, "cpu", catalogue=discover(only=("decode_attention",)), limits=chip).to_text()))
    assert tuned.served(bucket).config == big and tuned.served(bucket).gave_way == ""
    served = tuned.served(problem)
    assert served.config == kernel.default(problem, chip) and kernel.fits(problem, big, chip) in served.gave_way
    inputs = problem.inputs(seed=1)
    torch.testing.assert_close(tuned(problem, inputs)["out"].double(), problem.reference(inputs)["out"].double(), rtol=1e-3, atol=1e-3)


def lengths(pack_of, *problems):
    """A profile with these problems, and that each was measured."""
    chip, catalogue = find_chip("cpu"), discover(only=(problems[0].operator,))
    found = catalogue.kernels[f"{problems[0].operator}/{pack_of}"]
    rows = [
        made(p, pack_of, chip="cpu", config=found.default(p, chip).to_json_full(), source_digest=found.source_digest, backend="cpu")
        for p in problems
    ]
    return apply(json.loads(decide(rows, None, "cpu", catalogue=catalogue, limits=chip).to_text()))


def test_prefixes_of_zero_are_no_prefixes():
    plain = PrefillAttention((64,), 4, 2, 32, dtype="float32")
    tuned = lengths("cpu_flash", plain, dataclasses.replace(plain, prefix_lens=(512,)))
    served = tuned.served(dataclasses.replace(plain, prefix_lens=(0,)))
    assert (served.measured_at, served.distance) == (plain.label(), 0)
    assert "cached" in tuned.served(dataclasses.replace(plain, prefix_lens=(9,))).measured_at


def test_the_very_problem_comes_before_one_with_the_same_mean_length():
    even = DecodeAttention((200,) * 4, 4, 2, 32, dtype="float32")
    for kv_lens in ((50, 350, 200, 200), (399, 1, 200, 200)):
        uneven = dataclasses.replace(even, kv_lens=kv_lens)
        tuned = lengths("cpu_split_kv", even, uneven)
        assert [tuned.served(p).measured_at for p in (even, uneven)] == [even.label(), uneven.label()]


def test_a_choice_in_a_narrower_format_says_what_to_ask_for():
    chip, catalogue = find_chip("cpu"), discover(only=("matmul", "scaled_matmul"))
    wide, narrow = Matmul(64, 256, 256), ScaledMatmul(64, 256, 256)
    kernel = catalogue.kernels["scaled_matmul/cpu_blocked"]
    config = kernel.default(narrow, chip).to_json_full()
    row = made(narrow, "cpu_blocked", chip="cpu", config=config, source_digest=kernel.source_digest, backend="cpu")
    rows = [dataclasses.replace(row, wide_key=wide.key, wide_error=0.01), made(wide, "torch_matmul", chip="cpu", level_us=900.0)]
    profile = decide(rows, None, "cpu", catalogue=catalogue, limits=chip, max_error=0.05)
    tuned = apply(json.loads(profile.to_text()))
    assert tuned.served(narrow).kernel == "scaled_matmul/cpu_blocked"
    [said] = tuned.skipped
    assert wide.label() in said and narrow.label() in said
    with pytest.raises(UsageError, match=f"ask for one like {narrow.label()}"):
        tuned.launch(wide)


def test_a_launch_that_another_thread_forgets_at_once_is_returned(pack):
    class Forgetful(dict):
        def __setitem__(self, key, value):
            pass

    tuned = apply(pack)
    tuned._launches = Forgetful()
    assert tuned.launch(Matmul(4, 96, 64, "float32")) is not None


def test_changed_code_is_refused_until_it_is_allowed(pack):
    stale = json.loads(json.dumps(pack))
    for choice in stale["choices"]:
        choice["source_digest"] = "0" * 16
    with pytest.raises(UsageError, match="has changed since it was chosen"):
        apply(stale).launch(Matmul(4, 96, 64, "float32"))
    assert apply(stale, changed_code=True).served(Matmul(4, 96, 64, "float32")).distance == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 99}, "has schema 99"),
        ({"limits": {}}, "does not say for which chip"),
        ({"choices": 3}, "not a profile"),
        ({"choices": [{"kernel": "matmul/torch"}]}, "not a profile"),
        ({"limits": limits_of(find_chip("h200"))}, "torch sees no GPU here"),
    ],
)
def test_what_is_not_for_here_is_refused(pack, change, words, tmp_path):
    if torch.cuda.is_available() and "limits" in change:
        pytest.skip("there is a GPU here")
    file = tmp_path / "pack.json"
    file.write_text(json.dumps(pack | change))
    with pytest.raises(UsageError, match=words):
        apply(file)


def test_a_configuration_that_is_none(pack):
    broken = json.loads(json.dumps(pack))
    broken["choices"][0]["config"] = 3
    with pytest.raises(UsageError, match="not a profile"):
        apply(broken)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        apply(tmp_path / "absent.json")
    (tmp_path / "text").write_text("{")
    with pytest.raises(UsageError, match="not a profile"):
        apply(tmp_path / "text")


def test_importing_klab_kernels_is_light():
    code = "import sys, klab.kernels; print(sorted({'torch', 'triton', 'cupy', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True).stdout.strip() == "[]"
