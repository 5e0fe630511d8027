"""A forecast is read to the letter, or the line and the column at fault are named."""

from pathlib import Path

import pytest

from klab.harness.catalog.models import PROFILES
from klab.harness.cost.demand import SECONDS_PER_MONTH, read_demand, seconds_of
from klab.kernels.errors import UsageError

HEAD = "model,tokens_per_day,isl,osl,growth_per_month,peak_over_average,slo_ttft,slo_tpot"


@pytest.fixture
def read(tmp_path):
    def write(text, encoding="utf-8"):
        path = tmp_path / "demand.csv"
        path.write_bytes(text.encode(encoding))
        return read_demand(path)

    return write


def test_every_column_means_what_it_says(read):
    head = f"{HEAD},prefix_hit,quantization,kv_dtype,tp,sell_input,sell_output"
    (one,) = read(f"# a comment\n\n{head}\nqwen3-8b,8.64e9,900,100,0.1,3,2s,25ms,0.5,fp8_block,fp8,2,0.2,1\n")
    assert one.average(0) == pytest.approx(8.64e9 / 86_400 / 1000) == 100.0
    assert (one.average(2), one.peak(2)) == pytest.approx((121, 363))
    assert one.tokens_per_month(0) == pytest.approx(8.64e9 * 365 / 12) and SECONDS_PER_MONTH == 86_400 * 365 / 12
    w = one.workload
    assert (w.isl, w.osl, w.slo_ttft_s, w.slo_tpot_s, w.prefix_hit, w.cached_tokens) == (900, 100, 2.0, 0.025, 0.5, 450)
    assert (one.name, one.quantization, one.kv_dtype, one.tp) == ("qwen3-8b", "fp8_block", "float8_e4m3fn", 2)
    # Cached prompt tokens are sold as prompt tokens.
    assert one.usd_per_month(0) == pytest.approx(100 * SECONDS_PER_MONTH * (900 * 0.2 + 100 * 1) / 1e6)


def test_defaults_and_other_spellings(read):
    plain, batch = read("\ufeffModel; requests_per_s; isl ;osl;offline;peak_over_average\nqwen3-8b;2.5;10;0;;\nqwen3-8b;2;10;5;yes;4\n")
    assert (plain.average(7), plain.peak(7), plain.usd_per_month(0)) == (2.5, 2.5, None)
    assert batch.workload.offline and batch.peak(0) == 2  # it waits for the troughs
    assert (plain.name, batch.name) == ("qwen3-8b #1", "qwen3-8b #2")
    assert [seconds_of(text) for text in ("25ms", "2s", "1.5", ".5 s")] == [0.025, 2.0, 1.5, 0.5]


def test_the_example_that_ships_is_one():
    needs = read_demand(Path(PROFILES) / "prices" / "demand-example.csv")
    assert [need.name for need in needs] == ["chat", "agents", "nightly batch"] and needs[2].workload.offline


ROW = "qwen3-8b,1e9,1000,100,0.1,2,2s,25ms"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        (HEAD, "no rows"),
        (f"{HEAD},colour\n{ROW},red", "unknown column 'colour'"),
        (f"{HEAD},isl\n{ROW},1", "isl is there twice"),
        ("model,isl,osl\nqwen3-8b,1,1", "lacks the column tokens_per_day"),
        ("model,requests_per_s,isl\nx,1,1", "lacks the column osl"),
        (f"{HEAD}\n{ROW},9", "line 2 has 9 values for 8 columns"),
        (f"{HEAD}\n\n{ROW}\n{ROW.replace('1e9', '')}", "line 4: give tokens_per_day or"),
        (f"{HEAD},requests_per_s\n{ROW},3", "only one of"),
        (f"{HEAD}\n{ROW.replace('1e9', '0')}", "a demand is above 0"),
        (f"{HEAD}\n{ROW.replace('1e9', '-5')}", "above 0"),
        (f"{HEAD}\n{ROW.replace('1e9', 'many')}", "tokens_per_day is 'many': not a number"),
        (f"{HEAD}\n{ROW.replace('1e9', 'nan')}", "not a number"),
        (f"{HEAD}\n{ROW.replace('1000,100', '0,100')}", "--isl"),
        (f"{HEAD}\n{ROW.replace('1000,100', '1.5,100')}", "not a whole number"),
        (f"{HEAD}\n{ROW.replace('0.1', '10%')}", "without thousands"),
        (f"{HEAD}\n{ROW.replace('0.1', '-1')}", "above -1"),
        (f"{HEAD}\n{ROW.replace('0.1,2', '0.1,0.5')}", "1 to 1000 times"),
        (f"{HEAD}\n{ROW.replace('25ms', '25 minutes')}", "2s or 25ms"),
        (f"{HEAD}\n{ROW.replace('25ms', '0')}", "slo-tpot"),
        (f"{HEAD},offline\n{ROW},maybe", "yes or no"),
        (f"{HEAD},tp\n{ROW},0", "at least 1 GPU"),
        (f"{HEAD},sell_input\n{ROW},-1", "sell_input"),
        (f'{HEAD}\n"qwen', "no CSV"),
        (f'{HEAD}\n"qwen\n3",1,1,1,,,,', "runs over"),
        (f"{HEAD}\n,1,1,1,,,,", "lacks model"),
        (f"{HEAD},prefix_hit\n{ROW},1.5", "line 2: --prefix-hit"),
        (f"{HEAD},quantization\n{ROW},fp3", "line 2: quantization is one of"),
        (f"{HEAD},kv_dtype\n{ROW},int2", "line 2: .*int2"),
        (f"{HEAD}\n{ROW.replace('1e9', '1e-300')}", "a demand is above 0"),
        (f"{HEAD},offline\n{ROW},yes", "offline and slo_ttft and slo_tpot contradict"),
        (f"{HEAD},\n{ROW},9", "unknown column ''"),
    ],
)
def test_what_is_no_forecast(read, text, said):
    with pytest.raises(UsageError, match=said) as error:
        read(text)
    assert "demand.csv" in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_none(read, tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        read_demand(tmp_path / "nothing.csv")
    with pytest.raises(UsageError, match="UTF-8"):
        read("model,é\n", encoding="latin-1")


def test_what_spreadsheets_write(read):
    wanted = read(f"{HEAD}\n{ROW}\n")
    for text in (f"{HEAD},,\n{ROW},,\n,,\n".replace("\n,,\n", "\n"), f"{HEAD}\n{ROW},\n", f"\ufeff{HEAD}\r\n{ROW}\r\n"):
        assert read(text) == wanted
    assert read(f"{HEAD}\n{ROW}\n".replace(",", "\t")) == wanted == read(f"{HEAD}\n{ROW}\n".replace(",", ";"))
