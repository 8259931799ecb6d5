"""A page as a session: one folder in which its commands and its Python run one after another.

What takes long is made short: few prompts, few steps, and the results of a fit are those of one real short run, made
once. What is typed stays as the page has it. What needs other machines, or hours, is read by its own parser.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import runpy
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from decomposition.spd_runs import factors_of, layout_a, mlp_parameters, module_info, write_run
from documentation.pages import ROOT, Block, Command, commands_in
from targets.tiny_models import save_byte_level, save_model

from pdprune import cluster, compare, export
from pdprune.circuits.circuit import Circuit
from pdprune.circuits.findings import Audit
from pdprune.circuits.frontier import FrontierPruner
from pdprune.circuits.frontier_curve import Frontier, level_folder
from pdprune.circuits.prune import prune
from pdprune.circuits.selection import Selection
from pdprune.sweep import Sweep
from pdprune.targets.toys import TMS, TMSConfig
from pdprune.train import main

FEW_PROMPTS = {"n_train": 64, "n_select": 8, "n_held_out": 8}
NO_SEARCH = ["--model.target_loss", "null", "--model.target_nodes", "null", "--model.coefficient", "0"]
NEEDS_OTHER_MACHINES = {"--trainer.accelerator", "--trainer.devices", "--trainer.num_nodes"}
RESULTS = ("circuit.json", "circuit.safetensors", "audit.json")


class ParsedError(Exception):
    """Raised once a program has taken its arguments, so that it goes no further."""


class Session:
    """A folder, with what pages take for granted in it, and what happens in it.

    Args:
        folder: empty; the current one.
        results: a run folder with the results that every fit of a circuit ends with.
        patch: what stands in for what takes long.
    """

    def __init__(self, folder: Path, results: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.results, self.patch = folder, results, patch
        self.names: dict[str, Any] = {}
        shutil.copytree(ROOT / "configs", folder / "configs")
        _shorten(folder / "configs/quickstart.yaml")
        _shorten(folder / "configs/frontier/quote.yaml")
        for name in ("benchmarks", "docs", "pyproject.toml", "Makefile"):
            (folder / name).symlink_to(ROOT / name)
        write_prompts(folder / "my.jsonl")
        (folder / "ablated.json").write_text('{"nodes": {"a1.h0": true, "m0": true}}')
        write_spd_run(folder / "spd-run")
        save_model(folder / "folder", "llama")
        save_byte_level(folder / "folder")
        patch.setattr(
            "pdprune.circuits.pruning.CircuitPruner.finish", lambda _, datamodule, folder: self.finish(folder)
        )
        patch.setattr(
            "pdprune.circuits.frontier.FrontierPruner.finish",
            lambda frontier, datamodule, folder: self.finish_frontier(frontier, folder),
        )
        patch.setattr("pdprune.decomposition.learning.ComponentLearner.finish", lambda *_, **__: None)
        patch.setattr("pdprune.decomposition.learning.warm_up", lambda *_: None)
        patch.setattr("pdprune.train.PdpruneCLI._write_report", lambda *_: None)  # it has tests of its own
        assert prune.__kwdefaults__ is not None
        patch.setitem(prune.__kwdefaults__, "selection", Selection(drop_scores=0, swap_scores=0))

    def finish(self, folder: Path) -> None:
        """End a run as it would end after a search and an audit."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in RESULTS:
            shutil.copy(self.results / name, folder / name)

    def finish_frontier(self, frontier: FrontierPruner, folder: Path) -> None:
        """The same for all levels of a frontier."""
        found = {}
        for level in frontier.levels:
            own = level_folder(folder, level)
            self.finish(own)
            found[level] = Circuit.load(own), Audit.load(own)
        Frontier.of(found, dict.fromkeys(found)).save(folder)

    def run(self, block: Block) -> None:
        """Do what a block says."""
        match block.kind:
            case "python":
                exec(compile(block.text, "the page", "exec"), self.names)
            case "json":
                for line in block.text.splitlines():
                    assert {"prompt", "text"} & set(json.loads(line))
            case "yaml":
                _require_part_of(
                    yaml.safe_load(block.text), yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
                )
            case "sh" | "indented":
                for command in commands_in(block):
                    self.type(command)

    def type(self, command: Command) -> None:
        """Run a command, or have its parser read it."""
        if command.is_synopsis:
            return
        arguments = command.arguments
        match command.program:
            case "make":
                targets = [word for word in arguments if "=" not in word]
                makefile = (ROOT / "Makefile").read_text()
                assert targets and all(f"\n{target}:" in makefile for target in targets)
            case "bash":
                subprocess.run(["bash", "-n", ROOT / arguments[0]], check=True)
            case "pip":
                self.check_extras(arguments)
            case "python -m pdprune.train":
                self.train(arguments)
            case "torchrun" | "srun":
                self.train([*arguments[arguments.index("pdprune.train") + 1 :], "--print_config"])
            case "python -m pdprune.compare":
                self.have_runs(arguments)
                assert compare.main(arguments) == 0
            case "python -m pdprune.report":
                self.have_runs(arguments)
                self.parse("pdprune.report.__main__", arguments)
            case "python -m pdprune.export":
                self.have_runs(arguments[:1])
                assert export.main(arguments) == 0
            case "python -m pdprune.cluster":
                assert cluster.main(arguments) == 0
            case "python docs/picture.py":
                self.have_runs(arguments)
                runpy.run_path("docs/picture.py")["draw"]([Path(run) for run in arguments], self.folder / "picture.png")
            case "python -m pdprune.sweep":
                assert Sweep.read(Path(arguments[0])).trials(None)
                self.parse("pdprune.sweep", arguments)
            case "python -m pdprune.claims":
                self.parse("pdprune.claims.__main__", arguments)
            case "python -m pdprune.decomposition.export":
                self.parse("pdprune.decomposition.export", arguments)
            case script if script.startswith("python benchmarks/"):
                self.parse(command.words[1], arguments)
            case unknown:
                raise AssertionError(f"not known how to try {unknown!r}")

    def train(self, arguments: list[str]) -> None:
        """`fit` takes two steps; what reads a run finds one, and searches for nothing."""
        if "--print_config" in arguments or _needs_other_machines(arguments):
            with pytest.raises(SystemExit) as done:
                main([*arguments, "--print_config"])
            assert done.value.code == 0
            return
        if arguments[0] == "fit":
            steps = ["--trainer.max_steps", "2", "--trainer.enable_progress_bar", "false"]
            goes_on = {"--overwrite", "--ckpt_path"} & set(arguments)
            assert main([*arguments, *steps, *([] if goes_on else ["--overwrite"])]) == 0
            return
        if "--circuit" not in arguments and not Path("runs/quickstart/checkpoints").is_dir():
            self.train(["fit", *arguments[1:]])
        short = ["--model.audit.test_ladder", "[]", "--model.audit.random_circuits", "0", "--trainer.max_steps", "2"]
        assert main([*arguments, *NO_SEARCH, *short, "--trainer.enable_progress_bar", "false"]) == 0

    def have_runs(self, folders: list[str]) -> None:
        """Audited runs that a page has not made itself."""
        for folder in folders:
            if not (Path(folder) / "audit.json").is_file():
                self.finish(Path(folder))

    def parse(self, program: str, arguments: list[str]) -> None:
        """Start a program that has a parser of its own, as far as that."""
        parse(program, arguments, self.patch)

    @staticmethod
    def check_extras(arguments: list[str]) -> None:
        """What pip is told to install is this package, with extras that it has."""
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert arguments[0] == "install"
        for word in arguments[1:]:
            name, _, asked = word.removesuffix("]").partition("[")
            assert name in (".", "pdprune") and set(filter(None, asked.split(","))) <= set(extras)


def parse(program: str, arguments: list[str], patch_with: pytest.MonkeyPatch) -> None:
    """Have a program's own parser read its arguments; `program` is a script's path, or a module."""
    real = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, *_: Any) -> None:
        real(parser, arguments)
        raise ParsedError

    with patch_with.context() as patch, pytest.raises(ParsedError):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        if program.endswith(".py"):
            patch.syspath_prepend(str(ROOT / Path(program).parent))  # as Python does for a script
            runpy.run_path(program, run_name="__main__")
        else:
            importlib.import_module(program).main()


def _needs_other_machines(arguments: list[str]) -> bool:
    """Whether a flag or a config asks for a GPU, or for several devices."""
    files = [Path(file) for flag, file in itertools.pairwise(arguments) if flag == "--config"]
    asked = [yaml.safe_load(file.read_text()).get("trainer", {}) for file in files if file.is_file()]
    return bool(NEEDS_OTHER_MACHINES & set(arguments)) or any(
        trainer.get("accelerator") == "gpu" or trainer.get("devices") == "auto" for trainer in asked
    )


def make_results(folder: Path) -> None:
    """One real run of the quickstart: few prompts, two steps, and whatever gates are open then; audited."""
    config = folder / "quickstart.yaml"
    shutil.copy(ROOT / "configs/quickstart.yaml", config)
    _shorten(config)
    short = ["--trainer.max_steps", "2", "--model.audit.random_circuits", "0", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", "--config", str(config), *NO_SEARCH, *short, "--trainer.default_root_dir", str(folder)]) == 0


def write_prompts(path: Path) -> None:
    """Prompts that any tokenizer reads."""
    lines = ({"prompt": f"text {number}", "answer": "x", "wrong": ["y", "z"]} for number in range(60))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_spd_run(folder: Path) -> None:
    """The run folder of a toy."""
    target, sizes = TMS(TMSConfig(5, 2, tied_weights=False)), {"linear1": 7, "linear2": 4}
    functions = {path: mlp_parameters([1, 6, 1], count, seed) for seed, (path, count) in enumerate(sizes.items())}
    model_class = "spd.experiments.tms.models.TMSModel"
    config = {"module_info": module_info(sizes), "ci_fn_type": "mlp", "pretrained_model_class": model_class}
    write_run(folder, layout_a(target, factors_of(target, sizes), functions), config)


def _shorten(config: Path) -> None:
    """Few prompts in a config; what flags say goes before it."""
    content = yaml.safe_load(config.read_text())
    content["data"]["init_args"] |= FEW_PROMPTS
    config.write_text(yaml.safe_dump(content))


def _require_part_of(part: Any, whole: Any) -> None:
    if isinstance(part, dict):
        for key, value in part.items():
            _require_part_of(value, whole[key])
    else:
        assert part == whole


@contextlib.contextmanager
def session(folder: Path, results: Path) -> Iterator[Session]:
    """A session in a folder, which is the current one as long as it lasts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield Session(folder, results, patch)
