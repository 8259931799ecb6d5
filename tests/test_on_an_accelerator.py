"""On an accelerator, simulated where there is none: the numbers of the CPU, and few waits for the device.

What differs is rounding alone, since several masks run as one batch there and attention is another kernel.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import simulated_accelerator
import torch
import yaml
from safetensors.torch import load_file
from simulated_accelerator import NAME, ON_IT, install, waits
from test_cli_decomposition import CONFIG as LEARNING
from tiny_circuit import PROMPTS, QUICK, network, write_material

from pdprune import Audit, Circuit, audit, decompose, load_decomposition, prune
from pdprune.adversary.attack import Ascent, Climber
from pdprune.adversary.game import Game
from pdprune.adversary.objective import MaskedLoss
from pdprune.batches import as_batch
from pdprune.decomposition.importances import CausalImportances, ImportanceSettings, importance_mask
from pdprune.decomposition.saved import save_decomposition
from pdprune.targets import TMS, TMSConfig
from pdprune.targets.store import save_target
from pdprune.train import main

pytestmark = [
    pytest.mark.usefixtures("in_a_copy"),
    pytest.mark.skipif(
        not simulated_accelerator.can_be_simulated(), reason="this PyTorch takes no devices written in Python"
    ),
]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two targets, a task, and a config each."""
    folder = write_material(tmp_path_factory.mktemp("material"))
    save_target(TMS(TMSConfig(5, 2)), folder / "toy")
    init_args = LEARNING["model"]["init_args"] | {"target": "toy"}
    learning = LEARNING | {"model": LEARNING["model"] | {"init_args": init_args}}
    (folder / "learning.yaml").write_text(yaml.safe_dump(learning, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Executor]:
    """A process that knows the device, from its start: one that has gone backward before cannot learn of it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=install) as pool:
        yield pool


def command(folder: Path, *args: str) -> int:
    os.chdir(folder)
    return main([*args])


def on_both(elsewhere: Executor, *args: str) -> tuple[Path, Path]:
    """The run folders of a command on the CPU and on the device."""
    assert main([*args, "--trainer.default_root_dir", "on_cpu"]) == 0
    assert on_the_device(elsewhere, *args) == 0
    return Path("on_cpu"), Path("on_device")


def on_the_device(elsewhere: Executor, *args: str) -> int:
    there = [*args, "--trainer.default_root_dir", "on_device", *ON_IT]
    return elsewhere.submit(command, Path.cwd(), *there).result()


def same_numbers(one: Any, other: Any) -> bool:
    """Whether what two JSON files hold is the same but for rounding."""
    match one, other:
        case dict(), dict():
            return one.keys() == other.keys() and all(same_numbers(one[key], other[key]) for key in one)
        case list(), list():
            return len(one) == len(other) and all(same_numbers(a, b) for a, b in zip(one, other, strict=True))
        case ((float() | int()), (float() | int())):
            return one == pytest.approx(other, rel=2e-3, abs=1e-5)
        case _:
            return bool(one == other)


CIRCUITS = {
    "climbing": ["--model.learning.gate_map", "hard_concrete"],
    "at once, of singular vectors": [
        *("--model.adversary.mode", "free", "--model.decomposition.basis", "svd", "--model.reference", "mean"),
    ],
    "by example": ["--model.scope", "example", "--model.loss", "ce"],
    "lasting": ["--model.adversary.mode", "persistent", "--model.reference", "mean"],
    "by position": ["--model.scope", "position", "--model.reference", "position_mean"],
    "resampling": ["--model.reference", "resample", "--model.norm_scales", "frozen"],
    "few nodes": ["--model.adversary.max_ablated", "3", "--model.attack.optimizer", "momentum"],
    "all nodes": ["--model.scheme", "complete", "--model.reference", "mean"],
}


@pytest.mark.parametrize("args", CIRCUITS.values(), ids=list(CIRCUITS))
def test_circuits_are_those_of_the_cpu(args: list[str], elsewhere: Executor) -> None:
    here, there = on_both(elsewhere, "fit", *QUICK, *args)
    gates, gates_there = (load_file(folder / "circuit.safetensors")["gates"] for folder in (here, there))
    torch.testing.assert_close(gates_there, gates, rtol=1e-3, atol=1e-4)
    one, other = (json.loads((folder / "audit.json").read_text()) for folder in (here, there))
    for steady in ("n_kept", "model_loss", "complete_loss", "stochastic"):
        assert same_numbers(one[steady], other[steady])
    # Steps along the sign of a gradient follow its rounding where it is about zero.
    assert other["adversarial"]["loss"] == pytest.approx(one["adversarial"]["loss"], rel=0.1)
    assert (there / "report.html").is_file()


def test_what_follows_a_fit_runs_there_too(elsewhere: Executor) -> None:
    for rest in ("fit", "validate", "test", "predict"):
        assert on_the_device(elsewhere, rest, *QUICK, "--model.reference", "mean") == 0


def test_a_frontier_is_that_of_the_cpu(elsewhere: Executor) -> None:
    config = yaml.safe_load(Path("circuit.yaml").read_text())
    del config["model"]["init_args"]["target_loss"]
    config["model"]["class_path"] = "pdprune.FrontierPruner"
    config["model"]["init_args"]["levels"] = {"target_loss": [0.05, 1.0]}
    Path("circuit.yaml").write_text(yaml.safe_dump(config))
    here, there = on_both(elsewhere, "fit", *QUICK)
    one, other = (json.loads((folder / "frontier.json").read_text()) for folder in (here, there))
    assert same_numbers(one["points"], other["points"])
    assert (there / "frontier.html").is_file()


def test_components_learned_there_are_those_of_the_cpu(elsewhere: Executor) -> None:
    here, there = on_both(elsewhere, "fit", "--config", "learning.yaml")
    file = "decomposition/decomposition.safetensors"
    for name, tensor in load_file(here / file).items():
        torch.testing.assert_close(load_file(there / file)[name], tensor, rtol=1e-3, atol=1e-3)
    for rest in ("validate", "test"):
        assert on_the_device(elsewhere, rest, "--config", "learning.yaml") == 0


def quotes() -> list[Any]:
    """Prompts of one length, as a batch on the CPU."""
    texts = [str(prompt["prompt"])[:8] for prompt in PROMPTS[:8]]
    return [torch.tensor([list(text.encode()) for text in texts])]


def pruned_and_audited(device: str, basis: Any, moved: str = "the model") -> tuple[Circuit, Audit]:
    target = network().to(device if moved == "the target" else "cpu")
    model = decompose(target, ["*.mlp.down", "*.attn.out"], basis)
    if moved == "the model":
        model.to(device)
    circuit = prune(model, quotes(), target_loss=0.05, reference="mean", steps=3)
    findings = audit(model, circuit, quotes(), reference="mean", draws=2, random_circuits=0)
    assert model.delta_sites.device.type == device
    return circuit, findings


@pytest.mark.parametrize(("basis", "moved"), [("neuron", "the model"), ("svd", "the target")])
def test_from_python_the_model_says_where(basis: Any, moved: str, elsewhere: Executor) -> None:
    here, found_here = pruned_and_audited("cpu", basis)
    there, found_there = elsewhere.submit(pruned_and_audited, NAME, basis, moved).result()
    assert torch.equal(there.keep, here.keep)
    assert found_there.adversarial.loss == pytest.approx(found_here.adversarial.loss, rel=1e-3)


def importances_on(device: str, folder: Path) -> tuple[str, torch.Tensor]:
    model = load_decomposition(folder, network().to(device))
    return model.delta_sites.device.type, importance_mask(model, quotes()[0].to(device)).cpu()


def test_a_saved_decomposition_is_loaded_to_where_its_target_is(elsewhere: Executor, tmp_path: Path) -> None:
    model = decompose(network(), ["*.mlp.down"], "svd")
    model.importances = CausalImportances(model.sites, ImportanceSettings("component_mlp", (4,)))
    save_decomposition(tmp_path / "saved", model)
    (device, there), (_, here) = (
        elsewhere.submit(importances_on, NAME, tmp_path / "saved").result(),
        importances_on("cpu", tmp_path / "saved"),
    )
    assert device == NAME
    torch.testing.assert_close(there, here)


def waits_of_a_step() -> dict[str, int]:
    model = decompose(network(), ["*.mlp.down"], "svd").to(NAME)
    game = Game([MaskedLoss(model, as_batch(quotes()[0]))], [torch.zeros(model.n_nodes, device=NAME)])
    climber = Climber(game, game.corner(0.5), Ascent())
    climber.step()
    waits.clear()
    climber.step()
    return dict(waits)


def test_a_gradient_step_of_the_adversary_waits_seldom(elsewhere: Executor) -> None:
    """While it waits the device is idle."""
    found = elsewhere.submit(waits_of_a_step).result()
    assert sum(found.values()) == 3, found


def refusals() -> None:
    there, here = torch.zeros(3, device=NAME), torch.zeros(3)
    with pytest.raises(RuntimeError, match="two devices"):
        _ = there + here
    with pytest.raises(RuntimeError, match="two devices"):
        _ = here[torch.tensor([0], device=NAME)]
    with pytest.raises(RuntimeError):
        there.numpy()
    with pytest.raises(RuntimeError, match="two devices"):
        torch.stack([there[0], here[0]])
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, generator=torch.Generator(), device=NAME)
    assert there[torch.tensor([0, 1])].tolist() == [0.0, 0.0]
    assert torch.equal((there + here[0]).cpu(), here)


def test_what_a_gpu_refuses_is_refused(elsewhere: Executor) -> None:
    elsewhere.submit(refusals).result()
