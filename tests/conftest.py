"""What every test shares: caches and locks of its own process, and which tests stay together when several processes run them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Generator

import hypothesis
import pytest

# A busy machine is no defect, so no example has a deadline. The gate sees the same examples each time; who tests at home, new ones.
hypothesis.settings.register_profile("klab", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("klab")

# A shell without job control starts what runs in the background with SIGINT ignored, and children inherit that: the tests that interrupt
# a klab of their own would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What takes minutes and looks deeper into kernels that the generic tests (interpreter, emulator, compiler, CPU) run on every example, and
# what is large where another test has it small: `make test-all` runs it, `make test` does not.
THOROUGH = {
    "test_cuda_attention", "test_cuda_flash_hopper", "test_cuda_wgmma", "test_decode_attention", "test_fused_moe", "test_latent_attention",
    "test_prefill_attention", "test_report_odd_large", "test_scaled_matmul", "test_weight_only_matmul",
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A user's cache neither helps nor suffers, and processes that test side by side do not wait for one another's locks; child processes
    inherit the variables.
    """
    os.environ["KLAB_CACHE"] = str(tmp_path_factory.mktemp("klab-cache"))
    os.environ["KLAB_LOCK_DIR"] = str(tmp_path_factory.mktemp("klab-locks"))


@pytest.fixture
def klab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int | str, str, str]]:
    """Run a command line; returns (exit code, stdout, stderr)."""
    from klab.harness.cli.main import main

    def run(*args: object) -> tuple[int | str, str, str]:
        monkeypatch.setattr(sys, "argv", ["klab", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a module's fixture run in one process (pytest -n 2 --dist loadgroup), so that it is made once."""
    for item in items:
        if item.path.stem in THOROUGH:
            item.add_marker(pytest.mark.thorough)
        info = getattr(item, "_fixtureinfo", None)
        shared = info is not None and any(
            definition.scope in ("module", "class") for definitions in info.name2fixturedefs.values() for definition in definitions
        )
        if shared:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


# What pytest found when it began: a module that leaves another handler behind makes a later one fail, which depends on their order.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HANDLERS = {which: signal.getsignal(which) for which in ENDING}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None]:
    """A module's last test fails for the signal handlers that the module leaves behind; they are put back for the next one."""
    yield
    if nextitem is not None and nextitem.path == item.path:
        return
    left = [which for which in ENDING if signal.getsignal(which) is not HANDLERS[which]]
    for which in left:
        signal.signal(which, HANDLERS[which])
    assert not left, f"{item.path.name} leaves handlers of its own: {', '.join(which.name for which in left)}"
