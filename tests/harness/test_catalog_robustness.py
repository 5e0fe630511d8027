"""Whatever a configuration says, the answer is a Model or one clear UsageError."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from klab.harness.catalog.huggingface import parse_config
from klab.harness.catalog.models import find_model, load_models
from klab.harness.plan import plan, scenario_for
from klab.kernels.contract import Chip
from klab.kernels.errors import UsageError

CHIP = Chip(
    "chip", "a chip", "cuda", 100, 2000, 2000, {"bfloat16": 1000.0, "float16": 1000.0, "float32": 60.0}, 10**11, 4000.0, 1 << 25, (9, 0)
)
NAMES = sorted({name for model in load_models() for name in (*model.config, *model.config.get("text_config", {}))})
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 12), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5),
    st.lists(st.integers(0, 3), max_size=4), st.lists(st.text(max_size=3), max_size=4),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    base=st.sampled_from(load_models()),
    changes=st.dictionaries(st.sampled_from(NAMES), JUNK, max_size=4),
    drop=st.sets(st.sampled_from(NAMES), max_size=4),
)
def test_a_damaged_configuration_gives_a_model_or_a_usage_error(base, changes, drop):
    config = json.loads(json.dumps(base.config))
    target = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    for name in drop:
        target.pop(name, None)
    target |= changes
    try:
        model = parse_config(config, where="x.json", name="x")
        made = plan(model, CHIP, scenario_for(model, CHIP, isl=64, osl=8, batches=(2,)))
    except UsageError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert all(row.bound_us >= 0 and row.count > 0 for row in made.rows)


@settings(max_examples=100, deadline=None)
@given(
    name=st.from_regex(r"[a-z][a-z0-9_]{2,12}", fullmatch=True), value=st.one_of(st.integers(1, 9), st.text("abc", min_size=1, max_size=4))
)
def test_no_field_is_ignored_silently(name, value):
    config = dict(find_model("llama-3.1-8b").config)
    if name in config:
        return
    fields = parse_config(config | {name: value}, where="x.json", name="x")
    plain = parse_config(config, where="x.json", name="x")
    from klab.harness.catalog.fields import IRRELEVANT

    reported = any(note.field == name for note in fields.notes)
    changed = (fields.stack, fields.vocab, fields.dtype, fields.quantization, fields.max_tokens, fields.kind) != (
        plain.stack, plain.vocab, plain.dtype, plain.quantization, plain.max_tokens, plain.kind,
    )  # fmt: skip
    assert reported or changed or IRRELEVANT.fullmatch(name) or name == "alibi"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"hidden_size": 4096,\n "a": }', "line 2"),
        ("", "line 1"),
        ("[1, 2]", "no JSON object"),
        ('"llama"', "no JSON object"),
        ("{}", "hidden_size"),
        ('{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}', "vocab_size"),
        ('{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}', "intermediate_size"),
        ('{"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 100}', "num_attention_heads"),
        ('{"hidden_size": 64, "num_hidden_layers": "two"}', "num_hidden_layers is 'two'"),
        ('{"hidden_size": 64, "num_hidden_layers": 2.5}', "num_hidden_layers is 2.5"),
        ('{"hidden_size": -1}', "hidden_size is -1"),
        ('{"hidden_size": true}', "hidden_size is True"),
        ('{"hidden_size": 64, "num_hidden_layers": 1000000000}', "at most 10000"),
        ('{"hidden_size": 65, "num_hidden_layers": 2, "num_attention_heads": 4}', "head_dim"),
        ('{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 3}', "num_key_value_heads"),
        ('{"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "layer_types": ["full_attention"]}', "layer_types"),
        ('{"_class_name": "SomeOtherTransformer"}', "SomeOtherTransformer"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path, text, says):
    path = tmp_path / "config.json"
    path.write_text(text)
    for given_path in (path, tmp_path):
        with pytest.raises(UsageError) as caught:
            find_model(str(given_path))
        assert says in str(caught.value)
        assert "config.json" in str(caught.value)
        assert caught.value.exit_code == 2


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        find_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("llama-3.1-8c", "llama-3.1-8b"),
        ("Qwen3-0.6", "qwen3-0.6b"),
        ("utter nonsense", "known: "),
        ("", "known: "),
        ("./absent.json", "does not exist"),
        ("/absent/folder", "does not exist"),
    ],
)
def test_an_unknown_model_gets_help(name, says):
    with pytest.raises(UsageError, match=says):
        find_model(name)


def test_an_empty_folder(tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json"):
        find_model(str(tmp_path))
