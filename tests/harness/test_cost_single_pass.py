"""Pictures, embeddings and speech: what one of them costs is its steps, shared by its batch."""

import pytest

from klab.harness.catalog import find_chip, find_model
from klab.harness.catalog.huggingface import parse_config
from klab.harness.cost.estimate import Estimator, Origin
from klab.harness.cost.single_pass import Task, pass_points, serves
from klab.harness.cost.steps import Steps
from klab.harness.cost.workload import Deployment
from klab.harness.plan import plan
from klab.kernels.errors import UsageError

H200 = find_chip("h200")
FLUX, WAN, WHISPER = find_model("flux.1-dev"), find_model("wan2.1-t2v-14b"), find_model("whisper-large-v3")
BERT = parse_config(
    {"model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
     "vocab_size": 30522, "hidden_act": "gelu", "max_position_embeddings": 512}, where="x", name="bert",
)  # fmt: skip


def points(model, task=None, **fields):
    return pass_points(Steps(Deployment(model, H200, **fields), Estimator(H200)), task or Task())


def test_a_picture_is_its_denoising_steps():
    one, two = points(FLUX, Task(denoise_steps=20))[:2]
    step = Steps(Deployment(FLUX, H200), Estimator(H200)).of("denoise", 4096, isl=4096, prefill_batch=1, osl=0, batches=())
    assert len(step.parts) == len(plan(FLUX, H200).step("denoise", 1))
    assert one.unit == "image" and one.latency_s.mid == pytest.approx(20 * step.us.mid * 1e-6)
    assert one.units_per_s.mid == pytest.approx(1 / one.latency_s.mid)
    assert two.units_per_s.mid == pytest.approx(2 / two.latency_s.mid)
    assert points(FLUX, Task(denoise_steps=40))[0].joules_per_unit.mid == pytest.approx(2 * one.joules_per_unit.mid)
    assert one.label is Origin.MODELLED and any("autoencoder" in note for note in one.notes)


def test_guidance_computes_every_step_twice():
    """Flux was distilled to do without; two pictures at once are the work of one with guidance."""
    plain, guided = points(FLUX), points(FLUX, Task(guidance=True))
    assert guided[0].latency_s == plain[1].latency_s
    assert guided[0].units_per_s.mid == pytest.approx(plain[1].units_per_s.mid / 2)
    assert points(WAN)[0].unit == "video" and "with classifier-free" in points(WAN)[0].notes[0]
    assert points(WAN, Task(guidance=False))[0].latency_s.mid < 0.51 * points(WAN)[0].latency_s.mid


def test_an_hour_of_speech_is_120_windows():
    found = points(WHISPER, Task(window_tokens=101))
    steps = Steps(Deployment(WHISPER, H200), Estimator(H200))
    first = steps.of("prefill", 4 * 8, isl=4, prefill_batch=8, osl=0, batches=())
    then = steps.of("decode", 8, isl=4, osl=101, prefill_batch=1, batches=(8,))
    eight = next(p for p in found if p.batch == 8)
    assert eight.unit == "audio hour"
    assert eight.latency_s.mid == pytest.approx((first.us.mid + 100 * then.us.mid) * 1e-6)
    assert 1 / eight.units_per_s.mid == pytest.approx(120 / 8 * eight.latency_s.mid)
    assert any(p.role.startswith("encoder_") for p in first.parts) and not any(p.role.startswith("encoder_") for p in then.parts)
    assert eight.units_per_gpu_hour.mid == pytest.approx(3600 * eight.units_per_s.mid)
    assert sum(count * step.us.mid for count, step in eight.mix) * 1e-6 == pytest.approx(1 / eight.units_per_s.mid)
    silent = points(WHISPER, Task(window_tokens=0))[0]
    assert [step.phase for _, step in silent.mix] == ["prefill"]


def test_an_encoder_serves_requests():
    short, long = points(BERT, Task(tokens=64)), points(BERT, Task(tokens=512))
    assert short[0].unit == "request" and short[-1].units_per_s.mid > long[-1].units_per_s.mid
    assert short[5].units_per_s.mid > 4 * short[0].units_per_s.mid


def test_what_stops_a_batch():
    assert points(WAN)[-1].limit == "memory"
    late = points(FLUX, Task(slo_s=15.0))
    assert [p.limit for p in late if p.meets] == ["", "slo"]
    assert {p.limit for p in late if not p.meets} == {"slo"}
    assert points(FLUX, memory_share=0.1) == [], "24 GB of weights in 14"
    assert points(FLUX, Task(utilisation=0.5))[0].joules_per_unit.mid > points(FLUX)[0].joules_per_unit.mid


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"denoise_steps": 0}, "--steps"), ({"utilisation": 0}, "--utilisation"), ({"slo_s": -1}, "--slo"), ({"tokens": -1}, "--tokens"),
     ({"window_tokens": -1}, "--window-tokens")],
)  # fmt: skip
def test_impossible_tasks(fields, says):
    with pytest.raises(UsageError, match=says):
        Task(**fields)


def test_a_language_model_is_served_elsewhere():
    assert not serves(find_model("qwen3-0.6b")) and serves(BERT)
    with pytest.raises(UsageError, match="by request"):
        points(find_model("qwen3-0.6b"))
