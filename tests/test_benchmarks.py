"""What the benchmarks say about themselves: formulas that are in the documentation match what is counted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from documentation.session import parse

import pdprune
from pdprune.seeding import generator
from pdprune.targets import load_target
from pdprune.train import main

ROOT = Path(__file__).parent.parent


def test_formulas_of_memory_and_work_match_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sys.modules.pop("scale", None)
    import scale

    found = scale.check()
    assert len(found) == 10
    for name, (formula, counted) in found.items():
        exact = not name.startswith("activations")
        assert formula == (counted if exact else pytest.approx(counted, rel=0.05)), name
    assert scale.tables() in (ROOT / "docs/scale.md").read_text()


@pytest.mark.parametrize(("target", "device"), [("dense", "cpu"), ("dense-py", "cuda")])
def test_what_cannot_be_measured_is_said_in_one_line(
    target: str, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    from step_cost import measured_on

    with pytest.raises(SystemExit) as ended:
        measured_on(target, device)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and (device if device == "cuda" else repr(target)) in line and "expected" in line


def test_levels_that_run_as_one_batch_share_their_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bounds the cost of a frontier of a small network on a GPU; one after another they would call 16 times."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import frontier
    from step_cost import random_text

    target = load_target("dense-py").module
    model = pdprune.decompose(target, ["*.mlp.down", "*.attn.out"], "neuron")
    batch = random_text(target, 256, "cpu")
    one, sixteen = (frontier.operators_of(frontier.step_of(model, batch, levels), model) for levels in (1, 16))
    assert one > 100 and sixteen < 2 * one


@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.bfloat16), (11, torch.float16)])
def test_products_are_rounded_as_half_precision_would(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both operands, the result, and the gradients of all three; in the steps of a training only."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from rounded_products import RoundsProducts, rounded

    x, w, g = (torch.randn(8, 8, generator=generator(0, name)) for name in "xwg")
    x_half, w_half, g_half = (tensor.to(dtype).float() for tensor in (x, w, g))
    assert torch.equal(rounded(x, bits), x_half) and not torch.equal(x, x_half)

    callback = RoundsProducts(bits)
    leaf = x.clone().requires_grad_()
    callback.on_train_batch_start()
    y = F.linear(leaf, w)
    callback.on_train_batch_end()
    (gradient,) = torch.autograd.grad(y, leaf, g)
    assert torch.equal(y, (x_half @ w_half.t()).to(dtype).float())
    assert torch.equal(gradient, (g_half @ w_half).to(dtype).float())
    assert torch.equal(F.linear(x, w), x @ w.t())


@pytest.mark.parametrize(("part", "count"), [([], 11), (["large"], 3)])
def test_what_runs_on_a_gpu_is_read_by_its_parsers(
    part: list[str], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "gpu")}
    for _ in range(2):  # the second time there is nothing left to measure
        subprocess.run(["bash", "benchmarks/on_a_gpu.sh", *part], check=True, env=environment, capture_output=True)
    calls = [call.split() for call in (tmp_path / "calls").read_text().splitlines()]
    assert len(calls) == (2 * count if part else count)
    for program, *arguments in calls[:count]:
        if program == "-m":
            with pytest.raises(SystemExit) as done:
                main([*arguments[1:], "--print_config"])
            assert done.value.code == 0
        else:
            parse(program, arguments, monkeypatch)
        if "--" in arguments:  # what follows goes to every fit
            flags = arguments[arguments.index("--") + 1 :]
            with pytest.raises(SystemExit) as done:
                main(["fit", "--config", "configs/quickstart.yaml", *flags, "--print_config"])
            assert done.value.code == 0
