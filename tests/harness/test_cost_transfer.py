"""A prompt's cache on its way: bytes, time, what is waited for; the chips' networks and chips that are datasheets alone."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from klab.harness.catalog import find_chip, find_model, load_chips
from klab.harness.catalog.chips import find_real_chip
from klab.harness.catalog.models import PROFILES
from klab.harness.cli.main import build_app
from klab.harness.cost.ranges import Range
from klab.harness.cost.transfer import LINK_LOAD, Link, Transfer, behind_s, link_between, transfer
from klab.harness.plan import plan, scenario_for
from klab.kernels.errors import UsageError

LINK = Link(50.0, "test")
CARD = PROFILES / "examples" / "decode-card.toml"


def test_every_layer_leaves_when_it_is_computed():
    """Against a pipeline stepped piece by piece."""

    def stepped(move_s, compute_s, pieces):
        free = 0.0
        for piece in range(1, pieces + 1):
            free = max(free, piece * compute_s / pieces) + move_s / pieces
        return free - compute_s

    rng = np.random.default_rng(1)
    for _ in range(200):
        move_s, compute_s, pieces = rng.uniform(0.001, 2), rng.uniform(0.001, 2), int(rng.integers(1, 90))
        assert behind_s(move_s, compute_s, pieces) == pytest.approx(stepped(move_s, compute_s, pieces))


@pytest.mark.parametrize(
    ("name", "dtype", "tps", "per_token", "shares"),
    [
        # 2 x 80 layers x 8 heads x 128 x 2 bytes, split over the receiving GPUs.
        ("llama-3.1-70b", "bfloat16", (2, 4), 327_680, (1 / 4, 1 / 2)),
        # Fewer key/value heads than GPUs: 16 GPUs keep two copies of 8 heads.
        ("llama-3.1-70b", "bfloat16", (8, 16), 327_680, (1 / 8, 1 / 4)),
        # Latents are on every GPU whole: 61 x 576 x 2 bytes to each of 8.
        ("deepseek-v3", "bfloat16", (8, 8), 70_272, (1, 1)),
        ("llama-3.1-70b", "float8_e4m3fn", (2, 4), 163_840, (1 / 4, 1 / 2)),
    ],
)
def test_bytes_follow_the_cache(name, dtype, tps, per_token, shares):
    way = transfer(find_model(name), dtype, 8192, *tps, LINK)
    assert (way.received_bytes, way.sent_bytes) == pytest.approx([share * 8192 * per_token for share in shares])


def test_sliding_windows_send_their_window_alone():
    model = find_model("gpt-oss-120b")
    short, long = (transfer(model, "bfloat16", tokens, 1, 1, LINK).received_bytes for tokens in (128, 8192))
    # Half of the layers see 128 tokens.
    assert long / short == pytest.approx((8192 + 128) / (2 * 128))


def test_the_end_with_more_bytes_per_link_sets_the_pace():
    model = find_model("llama-3.1-70b")
    few, many = (transfer(model, "bfloat16", 8192, tp, 4, LINK) for tp in (1, 4))
    assert few.seconds.mid == pytest.approx(8192 * 327_680 / LINK.bytes_per_s.mid)
    assert many.seconds.mid == pytest.approx(few.seconds.mid / 4)
    assert few.receipts_per_s == many.receipts_per_s and few.sends_per_s.mid * 4 == pytest.approx(many.sends_per_s.mid)


@settings(max_examples=60, deadline=None)
@given(st.floats(1, 1000), st.floats(1e6, 1e11), st.integers(1, 100), st.floats(0.001, 10), st.floats(0, 0.5))
def test_waiting_is_ordered(gb_per_s, size, pieces, compute_s, doubt):
    compute = Range(compute_s * (1 - doubt), compute_s, compute_s * (1 + doubt))
    way, faster = (Transfer(Link(speed, ""), size, size, pieces) for speed in (gb_per_s, 2 * gb_per_s))
    hidden, open_ = way.exposed_s(compute, True), way.exposed_s(compute, False)
    assert all(getattr(hidden, end) <= getattr(open_, end) * (1 + 1e-9) for end in ("low", "mid", "high"))
    assert faster.exposed_s(compute, True).mid <= hidden.mid
    assert hidden.mid >= way.seconds.mid / pieces + way.link.start_s.mid - 1e-12
    assert open_.mid == pytest.approx(way.seconds.mid + way.link.start_s.mid)


@pytest.mark.parametrize("load", [0.2, 0.5, 0.75])
def test_moves_wait_for_one_another(load):
    """Against moves that arrive at random at one link."""
    way = Transfer(LINK, 3e9, 3e9, 32)
    one_s = way.seconds.mid
    arrivals = np.cumsum(np.random.default_rng(2).exponential(one_s / load, 200_000))
    # Lindley: the wait of the next is what is left of the last one's.
    waits, wait = np.empty(len(arrivals)), 0.0
    for at, gap in enumerate(np.diff(arrivals, prepend=0.0)):
        wait = max(0.0, wait + (one_s if at else 0.0) - gap)
        waits[at] = wait
    assert way.waiting_s(load / one_s) == pytest.approx(waits.mean(), rel=0.05)


def test_receipts_leave_the_link_some_rest():
    way = Transfer(LINK, 3e9, 1e9, 32)
    assert way.receipts_per_s.mid * 3e9 / LINK.bytes_per_s.mid == pytest.approx(LINK_LOAD)
    # Beyond that load the wait grows no further: requests are capped there instead.
    assert way.waiting_s(10 * way.receipts_per_s.mid) == way.waiting_s(way.receipts_per_s.mid)


def test_the_slower_network_counts():
    h200 = find_chip("h200")
    slow = dataclasses.replace(h200, name="slow", network_gb_per_s=12.5)
    assert link_between(h200, slow).gb_per_s == link_between(slow, h200).gb_per_s == 12.5
    assert "slow" in link_between(h200, slow).source
    assert link_between(h200, slow, 100.0).gb_per_s == 100.0
    with pytest.raises(UsageError, match=r"mute states no network_gb_per_s.*--link"):
        link_between(h200, dataclasses.replace(h200, name="mute", network_gb_per_s=None))


def test_nothing_to_send():
    with pytest.raises(UsageError, match="keeps no cache"):
        transfer(find_model("flux.1-dev"), "bfloat16", 4096, 1, 1, LINK)


# --- chips


def test_the_chips_of_the_catalog_have_networks_with_sources():
    for chip in load_chips():
        assert chip.network_gb_per_s == 50 and "ConnectX-7" in chip.provenance["network_gb_per_s"]
        assert chip.phases == ("prefill", "decode")


def test_a_datasheet_is_enough_for_a_chip():
    card = find_chip(str(CARD))
    assert (card.kind, card.phases, card.sm_count, card.network_gb_per_s) == ("datasheet", ("decode",), 0, 50)
    assert card.peak_flops("bfloat16") == 300e12
    model = find_model("llama-3.1-70b")
    found = plan(model, card, scenario_for(model, card, tp=4))
    assert found.problems() and all(row.bound_us > 0 for row in found.rows if row.flops)


def test_nothing_runs_on_a_datasheet():
    with pytest.raises(UsageError, match="datasheet alone"):
        find_real_chip(str(CARD))
    assert find_real_chip("h200") == find_chip("h200")
    for verb in ("run", "tune", "screen", "layer"):
        ran = CliRunner().invoke(build_app(), [verb, "-m", "qwen3-0.6b", "-c", str(CARD)])
        assert isinstance(ran.exception, UsageError) and "klab place take it" in str(ran.exception), verb


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("tdp_w = 500", "", "lacks tdp_w"),
        ("memory_gb_per_s = 6000", "", "lacks memory_gb_per_s"),
        ("network_gb_per_s = 50", "network_gb_per_s = 0", "network_gb_per_s is 0"),
        ('phases = ["decode"]', 'phases = ["train"]', "phases are those.*train"),
        ('phases = ["decode"]', "phases = []", "phases are those"),
        ('phases = ["decode"]', 'phases = "decode"', "phases are those"),
        ('kind = "datasheet"', 'kind = "cuda"', "lacks sm_count"),
    ],
)
def test_a_datasheet_with_holes_is_refused(tmp_path, old, new, says):
    text = CARD.read_text()
    assert text.count(old) == 1 or old.startswith(("tdp_w", "memory_gb", "network"))
    path = tmp_path / "holes.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError, match=says):
        find_chip(str(path))
