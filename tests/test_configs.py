"""Every shipped config parses and runs a step, through the real command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from pdprune.targets import StdlibCorpus, Transformer, TransformerConfig, save_target
from pdprune.train import main

CONFIGS = Path(__file__).parent.parent / "configs"
OVERLAYS = {
    "quickstart-complete.yaml": "quickstart.yaml",
    "decompose/dense-py-all.yaml": "decompose/dense-py.yaml",
    "trainer/cpu.yaml": "quickstart.yaml",
}
"""Configs that are layered on top of another one."""
OTHER_MACHINES = {
    "trainer/gpu.yaml": "No supported gpu backend found",
    "trainer/ddp.yaml": None,
    "trainer/fsdp.yaml": "No supported gpu backend found",
    "trainer/slurm.yaml": "No supported gpu backend found",
}
"""Overlays that ask for more than a machine may have, and how that is told; None runs, in test_cli_ranks."""


SMALL = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
SMALL_CORPUS = ["--data.root", "library", "--data.vocabulary", "300", "--data.window", "16", "--data.batch_size", "2"]
SMALL_NETWORK = {"vocab_size": 300, "max_length": 128, "n_layers": 1, "n_heads": 8, "d_model": 16, "d_mlp": 16}
LARGE = {
    "targets/large.yaml": [
        *SMALL,
        *SMALL_CORPUS,
        *(part for name, size in SMALL_NETWORK.items() for part in (f"--model.model.{name}", str(size))),
    ],
    "decompose/large-py.yaml": [*SMALL, *SMALL_CORPUS],
    "large-quote.yaml": SMALL,
}
"""Configs for a GPU, and what makes them small: their target is one of another size, on a library of twenty modules."""


@pytest.fixture(scope="module")
def large_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the configs for a GPU look for: `library/` and `runs/large/target/`."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "library").mkdir()
    for i in range(20):
        text = f"def function{i}(argument):\n    return argument + {i}\n" * 8
        (folder / "library" / f"module{i:02}.py").write_text(text)
    corpus = StdlibCorpus(str(folder / "library"), window=16, vocabulary=300)
    corpus.setup()
    network = Transformer(TransformerConfig(**SMALL_NETWORK))
    save_target(network, folder / "runs" / "large" / "target", corpus.tokenizer_json)
    return folder


@pytest.mark.parametrize(
    "name",
    sorted(
        {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml") if path.parent.name != "sweeps"}
        - OTHER_MACHINES.keys()
    ),
)
def test_config_runs_a_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    if name in LARGE:
        shutil.copytree(request.getfixturevalue("large_target"), tmp_path, dirs_exist_ok=True)
    layers = [OVERLAYS[name], name] if name in OVERLAYS else [name]
    arguments = [argument for layer in layers for argument in ("--config", str(CONFIGS / layer))]
    # The rest of a fit, warm-up, selection and audit, has tests of its own, on smaller networks.
    finishing = ("circuits.pruning.CircuitPruner", "circuits.frontier.FrontierPruner")
    for module in (*finishing, "decomposition.learning.ComponentLearner"):
        monkeypatch.setattr(f"pdprune.{module}.finish", lambda *_, **__: None)
    monkeypatch.setattr("pdprune.decomposition.learning.warm_up", lambda *_: None)
    arguments += LARGE.get(name, [])
    assert main(["fit", *arguments, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]) == 0
    assert [path.name for path in tmp_path.glob("runs/*/checkpoints/finished")] == ["finished"]


@pytest.mark.parametrize("key", ["target_loss", "decomposition.basis"])
def test_a_flag_takes_null(capsys: pytest.CaptureFixture[str], key: str) -> None:
    with pytest.raises(SystemExit) as done:
        main(["fit", "--config", str(CONFIGS / "quickstart.yaml"), f"--model.{key}", "null", "--print_config"])
    assert done.value.code == 0
    value = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    for part in key.split("."):
        value = value[part]
    assert value is None


@pytest.mark.parametrize("name", OTHER_MACHINES)
def test_overlay_for_other_machines_parses_and_is_refused_in_a_line_where_it_cannot_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setenv("SLURM_NNODES", "2")
    arguments = ["fit", "--config", str(CONFIGS / "quickstart.yaml"), "--config", str(CONFIGS / name)]
    with pytest.raises(SystemExit) as printed:
        main([*arguments, "--print_config"])
    assert not printed.value.code
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert trainer["devices"] in (1, "auto") and trainer["default_root_dir"] == "runs/quickstart"
    assert trainer["num_nodes"] == (2 if name == "trainer/slurm.yaml" else 1)
    wrong = OTHER_MACHINES[name]
    if wrong is not None:
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert wrong in told and told.count("\n") == 1
        assert not list(tmp_path.iterdir())
