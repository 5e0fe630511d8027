"""Prices are dated, sourced and in order; what is not gets one clear line."""

import dataclasses

import pytest

from klab.harness.catalog.models import PROFILES
from klab.harness.catalog.prices import (
    CONTRACTS,
    find_price,
    load_facility,
    load_ownership,
    load_prices,
    read_price,
    to_toml,
)
from klab.kernels.errors import UsageError

GOOD = """
[[price]]
chip = "H200"
contract = "reserved"
usd_per_gpu_hour = { low = 1.5, mid = 2.0, high = 3.0 }
date = "2026-05"
source = "a quote"
"""


@pytest.fixture
def file(tmp_path):
    def write(text, name="prices.toml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_what_ships_has_source_date_and_order():
    prices = load_prices()
    assert {(one.chip, one.contract) for one in prices} >= {(c, k) for c in ("h100", "h200", "b200") for k in CONTRACTS}
    for one in prices:
        assert one.source and one.date >= "2026" and one.confidence in ("published", "secondary")
        assert 0 < one.low <= one.mid <= one.high
        # On demand was only read about on the web.
        assert (one.confidence == "secondary") == (one.contract == "on_demand")
    # InferenceX's constants of 2026-04, dollars per GPU-hour.
    assert (find_price("b200", "reserved").mid, find_price("h200", "reserved").mid) == (2.90, 1.60)
    assert (find_price("h100", "owned").low, find_price("h100", "owned").high) == (1.30, 1.69)
    facility = load_facility()
    assert (facility.provisioned_kw("h200"), facility.provisioned_kw("b200"), facility.provisioned_kw("gb200")) == (1.73, 2.17, None)
    facts = [facility.pue, facility.usd_per_kwh, facility.load_share, *facility.provisioned_kw_per_gpu.values()]
    assert all(fact.source and fact.confidence for fact in [*facts, load_ownership().life_years, *load_ownership().usd_per_gpu.values()])


def test_a_price_by_number_contract_and_file(file):
    assert find_price(" H200", "On-Demand") == find_price("h200", "on_demand")
    one = read_price("2.5", "H200")
    assert (one.chip, one.low, one.mid, one.high, one.confidence) == ("h200", 2.5, 2.5, 2.5, "given")
    assert read_price("2, 2.5,4", "h200").high == 4
    path = file(GOOD)
    assert read_price(str(path), "h200").mid == 2.0 == read_price(f"{path}:reserved", "h200").mid
    both = file(GOOD + GOOD.replace("reserved", "owned"))
    with pytest.raises(UsageError, match=r"several prices for h200; say .*:reserved or .*:owned"):
        read_price(str(both), "h200")
    assert read_price(f"{both}:owned", "h200").contract == "owned"


def test_the_newest_price_holds_and_two_of_one_date_do_not(file):
    newer = GOOD.replace("2026-05", "2026-11").replace("mid = 2.0", "mid = 2.9")
    assert find_price("h200", "reserved", file(newer + GOOD)).mid == 2.9
    with pytest.raises(UsageError, match="2 reserved prices of 2026-05"):
        find_price("h200", "reserved", file(GOOD + GOOD))


def test_prices_survive_being_written(file):
    prices = load_prices()
    assert load_prices(file(to_toml(prices))) == prices


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("-1", "positive"), ("0", "positive"), ("1,2", "one figure"), ("3,2,1", "in this order"), ("1,2,3,4", "one figure"),
        ("1e999", "positive"), ("--5", "one figure"), ("spot", "unknown contract"), ("on_demnd", "did you mean on_demand"),
        ("nowhere.toml", "cannot read"), ("", "empty price"), (" ", "empty price"), ("1e308", "positive"), ("1e-320", "positive"),
        ("$2.50", "unknown contract .* or low,mid,high"), ("x" * 300, "unknown contract"), ("nan", "low,mid,high"),
    ],
)  # fmt: skip
def test_what_is_no_price(text, said):
    with pytest.raises(UsageError, match=said):
        read_price(text, "h200")


def test_what_there_is_instead():
    with pytest.raises(UsageError, match="for gb200 there is reserved, owned"):
        find_price("gb200", "on_demand")
    with pytest.raises(UsageError, match="prices for b200, gb200, h100, h200"):
        find_price("cpu", "owned")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("mid = 2.0", "mid = 9.0", "not in order"), ("low = 1.5", "low = -1.5", "low is -1.5"), ("low = 1.5", "low = 0", "positive"),
        ("low = 1.5,", "", "low, mid and high"), ('"2026-05"', '"May"', "YYYY-MM"), ('"2026-05"', '"2026-13"', "YYYY-MM"),
        ('source = "a quote"', "", "lacks source"), ('"reserved"', '"leased"', "contract is on_demand, reserved, owned"),
        ("[[price]]", "[[prices]]", "unknown field prices"), ("chip =", "gpu =", "unknown field gpu"), ('"H200"', '""', "lacks chip"),
        ("1.5", "true", "low is True"), ("1.5", "nan", "low is nan"), ("= {", "= [", "not TOML"),
        ("3.0", "1" + "0" * 400, "at most"), ("3.0", "1e7", "between"), ('"2026-05"', '"2026-02-31"', "YYYY-MM"),
        ('"a quote"', '" "', "lacks source"), ('"a quote"', "[1]", "must be a text"), ('"H200"', "3", "must be a text"),
        ('"a quote"', '"a quote"\nguesses = ["middle"]', "which of low, mid, high"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_with_its_fault(file, old, new, said):
    assert old in GOOD
    with pytest.raises(UsageError, match=said) as error:
        load_prices(file(GOOD.replace(old, new)))
    assert "prices.toml" in str(error.value)


def test_folders(tmp_path, file):
    with pytest.raises(UsageError, match="holds no prices"):
        load_prices(tmp_path)
    file(GOOD)
    assert len(load_prices(tmp_path)) == 1
    # Other facts of the folder count where it has them, the shipped ones where it has not.
    assert load_facility(tmp_path).usd_per_kwh == load_facility().usd_per_kwh
    ours = tmp_path / "ours"
    ours.mkdir()
    figure = 'low = 1.0\nmid = 1.1\nhigh = 1.2\nsource = "us"\n'
    share = figure.replace("1.0", "0.05").replace("1.", "0.")
    text = f"[pue]\n{figure}[usd_per_kwh]\n{share}[colocation_usd_per_kw_month]\n{figure}[load_share]\n{share}"
    (ours / "facility.toml").write_text(text + f"[provisioned_kw_per_gpu.H200]\n{figure}")
    assert load_facility(ours).provisioned_kw("h200") == 1.1
    load = f"[load_share]\n{share}"
    for at, (old, new, said) in enumerate((
        ("[pue]", "[PUE]", "unknown field PUE"), ("low = 1.0", "low = 0.5", "at least 1"), (load, load.replace("0.2", "1.2"), "at most 1"),
    )):  # fmt: skip
        other = tmp_path / str(at)
        other.mkdir()
        (other / "facility.toml").write_text((text + f"[provisioned_kw_per_gpu.h200]\n{figure}").replace(old, new, 1))
        with pytest.raises(UsageError, match=said):
            load_facility(other)


def test_guesses_are_in_the_label(file):
    one = load_prices(file(GOOD + 'confidence = "published"\nguesses = ["high", "low"]\n'))[0]
    assert one.label == "h200 reserved 1.50..2.00..3.00 $/GPU-h (2026-05, published, low and high guessed)"
    assert load_prices(file(to_toml([one]))) == (one,)
    for found in load_prices():  # what a note calls a guess is one
        assert found.guesses and "guess" not in found.note
    assert load_ownership().life_years.trust == "secondary, low and high guessed" and load_ownership().opex_share.trust == "guess"


def test_a_file_with_a_byte_order_mark(file):
    assert load_prices(file("\ufeff" + GOOD)) == load_prices(file(GOOD))


def test_a_contract_before_a_folder_of_its_name(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owned").mkdir()
    assert read_price("owned", "h200") == find_price("h200", "owned")
    assert read_price("reserved", "h200", file(GOOD)).mid == 2.0


def test_two_prices_of_one_date_are_no_price_of_a_file_either(file):
    with pytest.raises(UsageError, match="2 reserved prices of 2026-05"):
        read_price(str(file(GOOD + GOOD)), "h200")


def test_years_that_nobody_has(tmp_path):
    shipped = (PROFILES / "prices" / "ownership.toml").read_text()
    for at, (old, new, said) in enumerate((
        ("low = 3\nmid = 4\nhigh = 6", "low = 1e-9\nmid = 4\nhigh = 6", "life_years is a number of years"),
        ("low = 3\nmid = 3\nhigh = 5", "low = 3\nmid = 3\nhigh = 500", "term_years is a number of years"),
    )):  # fmt: skip
        assert old in shipped
        path = tmp_path / f"{at}.toml"
        path.write_text(shipped.replace(old, new))
        with pytest.raises(UsageError, match=said):
            load_ownership(path)


def test_any_text_survives_being_written(file):
    one = dataclasses.replace(load_prices()[0], source='says "\U0001f600" \\ \t é', note="[a] # b")
    assert load_prices(file(to_toml([one]))) == (one,)
