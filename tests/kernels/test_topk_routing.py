"""What the generic kernel tests do not ask of the router: ties, groups, and faults that must be found."""

import dataclasses

import pytest
import torch
from contest import BLACKWELL, CPU, HOPPER

from klab.harness.measure.check import check
from klab.kernels.discover import discover
from klab.kernels.topk_routing.problem import TopkRouting

KERNELS = discover().kernels
V3 = TopkRouting(40, 64, 6, "sigmoid", 8, 4, True, "float32", bias=True, scale=2.5)
QWEN = TopkRouting(60, 128, 8)


def routed(problem, *, fault=""):
    """The router in float32, one token after the other, right but for one fault."""
    p = problem

    def launch(inputs, outputs):
        logits, bias = inputs["logits"].float(), inputs.get("bias", torch.zeros(p.experts))
        for t in range(p.tokens):
            row = logits[t].clone()
            if fault == "last expert lost":
                row[-1] = -1e9
            score = torch.softmax(row, 0) if p.scoring == "softmax" else torch.sigmoid(row)
            choice = score if fault == "bias forgotten" else score + bias
            members = choice.view(p.groups, -1)
            if p.groups > 1 and fault != "groups ignored":
                best = members.topk(2, dim=1).values.sum(dim=1) if p.bias and fault != "group by its best" else members.amax(dim=1)
                lost = best.argsort(descending=True)[p.topk_groups - (fault == "a group too few") :]
                members[lost] = float("-inf")
            ids = choice.argsort(descending=True)[: p.top_k]
            weights = (choice if fault == "bias in the weights" else score)[ids]
            if p.renormalize:
                weights = weights / weights.sum()
            outputs["ids"][t], outputs["weights"][t] = ids, weights * (1.0 if fault == "scale forgotten" else p.scale)
        if fault == "next best":
            outputs["ids"][3, -1] = (outputs["ids"][3, -1] + 1) % p.experts
        if fault == "an expert twice":
            outputs["ids"][3, -1] = outputs["ids"][3, 0]

    return launch


ANY = ["last expert lost", "next best", "an expert twice"]
FAULTS = [
    (V3, [*ANY, "bias forgotten", "bias in the weights", "groups ignored", "group by its best", "a group too few", "scale forgotten"]),
    (QWEN, ANY),
    (TopkRouting(40, 64, 6, groups=8, topk_groups=3, renormalize=False, scale=16.0), [*ANY, "groups ignored", "a group too few"]),
]


@pytest.mark.parametrize(("problem", "faults"), FAULTS, ids=lambda v: v.label() if isinstance(v, TopkRouting) else "")
def test_a_right_router_passes_and_a_wrong_one_does_not(problem, faults):
    for seed in (1, 2):
        assert check(problem, routed(problem), seed=seed).passed
        for fault in faults:
            assert not check(problem, routed(problem, fault=fault), seed=seed).passed, fault


def test_of_equal_experts_either_may_be_taken():
    problem = TopkRouting(1, 6, 2, dtype="float32")
    inputs = {"logits": torch.tensor([[0.0, 2.0, 1.0, 1.0, -1.0, 1.0]])}
    reference = problem.reference(inputs)
    for ids in ([1, 2], [1, 3], [1, 5]):
        assert problem.mismatch("ids", torch.tensor([ids], dtype=torch.int32), reference) == ""
    for ids, why in (([2, 1], "worse"), ([1, 0], "worse"), ([1, 4], "worse"), ([1, 1], "twice"), ([1, 6], "no such"), ([1, -1], "no such")):
        assert why in problem.mismatch("ids", torch.tensor([ids], dtype=torch.int32), reference)


def test_of_equal_groups_either_may_be_taken_but_no_mixture():
    problem = TopkRouting(1, 6, 2, groups=3, topk_groups=1, dtype="float32")
    reference = problem.reference({"logits": torch.tensor([[2.0, 1.0, 2.0, 0.5, 0.0, 0.0]])})
    for ids in ([0, 1], [2, 3]):
        assert problem.mismatch("ids", torch.tensor([ids], dtype=torch.int32), reference) == ""
    for ids in ([0, 3], [0, 2], [4, 5]):
        assert "worse" in problem.mismatch("ids", torch.tensor([ids], dtype=torch.int32), reference)


def test_inputs_leave_no_choice_that_changes_the_weights():
    problem = dataclasses.replace(V3, tokens=3000, dtype="bfloat16")
    inputs = problem.inputs(seed=3)
    _, choice, group = problem._scores(inputs["logits"], inputs["bias"])
    best = group.topk(5, dim=1).values
    assert float((best[:, 3] - best[:, 4]).min()) > 4e-6
    assert float(choice.sort(dim=1).values.diff(dim=1).min()) > 4e-6
    assert torch.equal(inputs["logits"], problem.inputs(seed=3, row_padding=0)["logits"])


@pytest.mark.parametrize("name", ["triton_topk", "cuda_topk"])
def test_space_is_valid_and_led_by_the_default(name):
    if f"topk_routing/{name}" not in KERNELS:
        pytest.skip("its toolkit is not installed")
    kernel = KERNELS[f"topk_routing/{name}"]
    for problem in [*TopkRouting.at_scale(), V3, TopkRouting(1, 512, 10)]:
        for chip in (HOPPER, BLACKWELL):
            found = list(kernel.space(problem, chip))
            assert kernel.unfit(problem, chip) is None
            assert found[0] == kernel.default(problem, chip) and len(set(found)) == len(found) >= 3
        assert kernel.unfit(problem, CPU) is not None


def test_cuda_refuses_what_a_warp_cannot_hold():
    if "topk_routing/cuda_topk" not in KERNELS:
        pytest.skip("cupy is not installed")
    kernel = KERNELS["topk_routing/cuda_topk"]
    assert "at most 32" in kernel.unfit(TopkRouting(1, 64, 33), HOPPER)
    assert "1024" in kernel.unfit(TopkRouting(1, 2048, 4), HOPPER)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"groups": 5}, "groups"), ({"topk_groups": 9}, "groups"), ({"top_k": 33}, "top_k"), ({"scoring": "relu"}, "scoring")],
)
def test_refuses_impossible_problems(change, reason):
    with pytest.raises(Exception, match=reason):
        dataclasses.replace(V3, **change)
