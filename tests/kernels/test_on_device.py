"""On a GPU: every kernel against the reference in bf16 and fp16, run eagerly and replayed from a CUDA graph.

    pytest -m gpu

Without a CUDA device these tests are skipped and say so.
"""

import pytest
from contest import cases

from klab.harness.measure.check import check, compare, poison
from klab.harness.measure.faults import is_fatal
from klab.kernels.discover import discover

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: numerics on a device are not verified by this run"),
]

# Characters of an error: what a compiler says of a source line comes late.
LONGEST = 1500
CUDA_KERNELS = [k for k in discover().kernels.values() if "cuda" in k.kinds]


@pytest.fixture(scope="module")
def chip():
    from klab.harness.catalog.chips import find_chip

    return find_chip("auto")


@pytest.mark.parametrize("kernel", CUDA_KERNELS, ids=lambda k: k.id)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_agrees_with_reference(kernel, dtype, chip):
    ran, wrong = 0, []
    for i, (problem, config) in enumerate(cases(kernel, chip, dtypes=(dtype,), configs=2)):
        for row_padding in (0, 8):
            ran, fatal = ran + 1, False
            try:
                launch = kernel.build(problem, config, chip)
                reason = check(problem, launch, seed=i, device="cuda", row_padding=row_padding, reference_device="cpu").reason
            except Exception as error:  # noqa: BLE001 - the other cases tell whether it is all of them, where the device still answers
                reason, fatal = f"{type(error).__name__}: {str(error)[:LONGEST]}", is_fatal(error)
            if reason:
                wrong.append(f"{problem.label()} [{config.label()}] row_padding={row_padding}: {reason}")
            if fatal:
                pytest.fail("\n".join(wrong))
    assert not wrong, "\n".join(wrong)
    if not ran:
        pytest.skip(f"fits no {dtype} example on {chip.name}")


@pytest.mark.parametrize("kernel", CUDA_KERNELS, ids=lambda k: k.id)
def test_a_graph_replay_writes_fresh_outputs(kernel, chip):
    for problem, config in cases(kernel, chip, dtypes=("bfloat16",), configs=0):
        launch = kernel.build(problem, config, chip)
        inputs, outputs = problem.inputs(seed=5, device="cuda"), problem.outputs(device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            launch(inputs, outputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch(inputs, outputs)
        # New values in the same memory and poisoned outputs: a launch that was not captured leaves NaN or the old answer.
        for name, tensor in problem.inputs(seed=6, device="cuda").items():
            inputs[name].copy_(tensor)
        poison(outputs)
        graph.replay()
        torch.cuda.synchronize()
        found = compare(problem, outputs, problem.reference({n: t.cpu() for n, t in inputs.items()}))
        assert found.passed, f"{problem.label()}: {found.reason}"
