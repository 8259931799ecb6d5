"""The command line: `python -m pdprune.train COMMAND --config FILE [--config OVERLAY] [--key value]`. Commands:

    fit        train what the config describes; a circuit is then selected, audited, and shown in report.html
    validate   scores on the select split
    test       the audit, on the held-out split, and report.html; with --circuit FILE of a circuit found elsewhere
    predict    predictions.jsonl: the answers, prompt by prompt

A run writes into `--trainer.default_root_dir`, by default `runs/<name of the last --config>`, not counting those of a
folder `trainer/`, which say where it is made and not what. `fit --ckpt_path last` goes on from where a run was stopped,
and leaves one that is finished as it is; it is replaced only with `--overwrite`. The other commands read `last.ckpt` of
that folder unless `--ckpt_path` names another checkpoint.

What a model may define beyond a LightningModule:

    finish(datamodule, folder: Path) -> None
        called when training is over, on every rank, also in a run that is resumed after its last step: the first rank
        writes the results. It must be deterministic, so that a kill in the middle of it can be made good by doing it
        again, and no rank may wait for another, since the others leave at once.
    results(folder: Path) -> pdprune.tracking.Results
        what experiment trackers show of what `finish` wrote; asked of the first rank
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from omegaconf.errors import OmegaConfBaseException

from pdprune.callbacks import LogEachValueOnce, OpenRunFolder, RunCheckpoint, StepProgress, resolved_config
from pdprune.circuits.frontier import FrontierPruner
from pdprune.circuits.importing import read_circuit
from pdprune.circuits.pruning import CircuitPruner
from pdprune.config_errors import Given, explain
from pdprune.errors import NonFiniteLossError, UserError
from pdprune.files import write_atomically
from pdprune.loggers import MetricsCsv
from pdprune.progress import telling
from pdprune.ranks import is_first_process, require_as_many_as_launched
from pdprune.run_folder import FRONTIER_PAGE, REPORT_FILE, AtomicCheckpointIO, RunFolder, read_checkpoint
from pdprune.signals import ending_when_warned
from pdprune.tracking import Results, show_results

if TYPE_CHECKING:
    from pdprune.report.figures import Figures, FrontierFigures

TRAINER_DEFAULTS = {
    "enable_model_summary": False,
    "enable_autolog_hparams": False,  # the resolved config says more
    "inference_mode": False,  # an adversary climbs in validate and test too
    "log_every_n_steps": 1,  # metrics.csv holds every value
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,  # Lightning's shuffles even where shuffle=False
}

COMMANDS = {
    "fit": "Train, then write the results into the run folder.",
    "validate": "Score a checkpoint on the select split.",
    "test": "Audit a checkpoint on the held-out split.",
    "predict": "Write a checkpoint's answers, prompt by prompt, to predictions.jsonl.",
}


WHERE_AND_WHO_WATCHES = {
    *("accelerator", "devices", "num_nodes", "strategy", "default_root_dir", "plugins"),
    *("logger", "log_every_n_steps", "profiler", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"),
}
"""Of the trainer's settings, those that a run may be gone on with under others, and still is the same run."""


class FinishedAlready(Exception):  # noqa: N818  # it is no error
    """The run that is to be gone on with is at its end, so that there is nothing to do."""


class Parser(LightningArgumentParser):
    """Lightning's parser, also used for nested classes, that takes no beginning of a key for the key."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_args(  # type: ignore[override]  # namespace and the rest are passed on, whatever they are
        self, args: Sequence[str] | None = None, *rest: Any, **options: Any
    ) -> Any:
        """As jsonargparse does, but a null for a nested key, which it hands on as `--key=None`, is a null."""
        given = None if args is None else [re.sub("=None$", "=null", argument) for argument in args]
        return super().parse_args(given, *rest, **options)


class PdpruneCLI(LightningCLI):
    """Lightning's command line with run folders that can be trusted."""

    def __init__(self, args: list[str]) -> None:
        self._args = args
        jsonargparse.set_parsing_settings(
            omegaconf_absolute_to_relative_paths=True,  # ${...} is resolved inside a subcommand too
            # The fields of dataclasses get a help text. Reading the sources for that takes a second.
            docstring_parse_attribute_docstrings=any("help" in argument for argument in args),
        )
        parser_kwargs = {"parser_mode": "omegaconf+", "exit_on_error": False}
        super().__init__(
            model_class=LightningModule,
            datamodule_class=LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=OpenRunFolder,
            trainer_defaults={**TRAINER_DEFAULTS, "callbacks": [LogEachValueOnce()]},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={
                **parser_kwargs,
                "prog": "pdprune",
                "description": "Find circuits that hold whatever happens to the rest of the network, and audit them.",
                **{name: {**parser_kwargs, "description": COMMANDS[name]} for name in self.subcommands()},
            },
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The commands, and which arguments of the Trainer's methods are not offered.

        Just the one that is asked for, since each takes a while to set up; all of them if that is none of them.
        """
        skipped = {
            name: arguments | {"ckpt_path", "weights_only", "return_predictions"}
            for name, arguments in LightningCLI.subcommands().items()
        }
        asked_for = self._args[0] if self._args else ""
        return {asked_for: skipped[asked_for]} if asked_for in skipped else skipped

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_argument("--overwrite", action="store_true", help="Replace what the run folder holds.")
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="A checkpoint, or 'last' for the newest whole one in the run folder. fit goes on from it.",
        )
        if self._args[:1] == ["test"]:
            parser.add_argument(
                "--circuit",
                type=str | None,
                default=None,
                help="Audit this circuit instead of a checkpoint's: a circuit.json, a list of nodes, an EAP-IG graph.",
            )
        parser.set_defaults({"trainer.default_root_dir": default_run_folder(self._args)})

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        super().setup_parser(*args, **kwargs)
        commands = self.parser._subcommands_action
        assert commands is not None
        for choice in commands._choices_actions:
            choice.help = COMMANDS[choice.dest]
        for command, parser in self._subcommand_parsers.items():
            _tidy_help(command, parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self._configs = read_configs(args)
        with self._told_in_one_line(args):
            self.config = parser.parse_args(args)

    def instantiate_classes(self) -> None:
        with self._told_in_one_line(self._args):
            super().instantiate_classes()

    @contextmanager
    def _told_in_one_line(self, args: list[str]) -> Iterator[None]:
        """Turn whatever is wrong with the configuration of `args`, or refused by a constructor, into a `UserError`."""
        try:
            yield
        except (argparse.ArgumentError, OmegaConfBaseException, ValueError, OSError, ModuleNotFoundError) as error:
            if (known := _user_error_behind(error)) is not None:
                raise known from error
            command = args[0] if args and args[0] in COMMANDS else None
            flags = self._subcommand_parsers[command]._option_string_actions if command else ()
            keys = [flag[2:] for flag in flags if flag.startswith("--") and flag not in ("--help", "--print_config")]
            raise UserError(explain(error, Given(command, keys, self._configs))) from error

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise UserError(f"seed_everything: {error}") from error

    def _parse_ckpt_path(self) -> None:
        """Nothing: the stock command line lets hyper-parameters in the checkpoint win over config and flags."""

    def before_instantiate_classes(self) -> None:
        """Refuse what can't end well before anything is loaded or written."""
        config = self.config[self.subcommand]
        self.folder = RunFolder(config.trainer.default_root_dir)
        self.folder.require_writable()
        self.save_config_kwargs["overwrite"] = bool(config.overwrite)
        if self.subcommand == "fit" and not config.overwrite and not config.trainer.fast_dev_run:
            if config.ckpt_path == "last" and self.folder.has_ended_fit and self._is_what_was_run():
                raise FinishedAlready(f"Results are in {self.folder.path}, where this run is finished already")
            self._refuse_to_lose_results(config.ckpt_path)
        self._circuit_file = config.get("circuit")
        if self._circuit_file is not None:
            self._refuse_to_mix(config)
        self._checkpoint = None if self._circuit_file is not None else self._find_checkpoint(config.ckpt_path)

    def _is_what_was_run(self) -> bool:
        """Whether the run in the folder is what is asked for now, wherever and with whatever loggers it was made."""
        asked = resolved_config(self._parser(self.subcommand), self.config[self.subcommand])
        return what_is_run(asked) == what_is_run(self.folder.config or {})

    def _refuse_to_lose_results(self, ckpt_path: str | None) -> None:
        path = self.folder.path
        if self.folder.is_finished:
            raise UserError(
                f"run folder {path} holds a finished run; replace it with --overwrite, or choose another folder with"
                " --trainer.default_root_dir"
            )
        if ckpt_path is None and self.folder.has_checkpoint:
            raise UserError(
                f"run folder {path} holds an unfinished run; go on with --ckpt_path last, or start over with"
                " --overwrite"
            )

    def _refuse_to_mix(self, config: Any) -> None:
        """A circuit from elsewhere is no part of a run that found its own."""
        if config.ckpt_path is not None:
            raise UserError("test: got --circuit and --ckpt_path; expected one of them")
        if self.folder.has_checkpoint and not config.overwrite:
            raise UserError(
                f"run folder {self.folder.path} holds a run with a circuit of its own; choose another folder for"
                f" {self._circuit_file} with --trainer.default_root_dir, or replace the run with --overwrite"
            )

    def _find_checkpoint(self, ckpt_path: str | None) -> Path | None:
        is_fit = self.subcommand == "fit"
        if ckpt_path is None and is_fit:
            return None
        if ckpt_path not in (None, "last"):
            read_checkpoint(Path(ckpt_path))
            return Path(ckpt_path)
        newest = self.folder.newest_readable_checkpoint()
        if newest is None and not is_fit:
            raise UserError(f"no checkpoint in {self.folder.checkpoints}; name one with --ckpt_path PATH")
        if newest is None and is_first_process():
            print(f"No checkpoint in {self.folder.checkpoints} yet: starting from the beginning.", file=sys.stderr)
        return newest

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        given = self._get(self.config_init, "trainer")
        if given["logger"] in (None, True):
            kwargs["logger"] = False  # OpenRunFolder attaches ours, once there is something to log
        callbacks = _as_list(given["callbacks"])
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if given["enable_progress_bar"] is not False and not has_bar:
            kwargs["callbacks"] = [*callbacks, StepProgress()]
        kwargs["plugins"] = [*_as_list(given["plugins"]), AtomicCheckpointIO()]
        return super().instantiate_trainer(**kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        with ending_when_warned(self.trainer):
            super()._run_subcommand(subcommand)

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        """Train, let the model write its results, and mark the run as finished."""
        is_trial = self._get(self.config, "trainer").fast_dev_run
        if not is_trial and (require_finishable := getattr(model, "require_finishable", None)) is not None:
            require_finishable()
        self._run("fit", model, kwargs)
        if is_trial:
            return
        finish = getattr(model, "finish", None)
        if finish is not None:
            finish(datamodule=self.datamodule, folder=self.folder.path)
        self._show_results(model, self._write_report(model))
        if self.trainer.is_global_zero:
            self.folder.mark_finished()
            print(f"Results are in {self.folder.path}")

    def validate(self, model: LightningModule, **kwargs: Any) -> None:
        self._run("validate", model, kwargs)

    def test(self, model: LightningModule, **kwargs: Any) -> None:
        if self._circuit_file is not None:
            self._take_circuit(model, self._circuit_file)
        self._run("test", model, kwargs)
        self._write_report(model)
        if self._circuit_file is not None and self.trainer.is_global_zero:
            print(f"Results are in {self.folder.path}")

    def _take_circuit(self, model: LightningModule, file: str) -> None:
        if not isinstance(model, CircuitPruner):
            raise UserError(f"test: --circuit {file}: the config's model is a {type(model).__name__}, not a circuit's")
        circuit, notes = read_circuit(file, model.model)
        model.take(circuit)
        if self.trainer.is_global_zero:
            print(f"{file} keeps {circuit.n_kept:,} of {circuit.n_nodes:,} nodes.", *notes)

    def predict(self, model: LightningModule, **kwargs: Any) -> None:
        """Write the dicts that `predict_step` returns, a list of them for each batch, as JSON lines."""
        batches = self._run("predict", model, kwargs)
        if not self.trainer.is_global_zero:
            return
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for batch in batches or [] for record in batch]
        path = self.folder.path / "predictions.jsonl"
        write_atomically(path, "".join(lines).encode())
        print(f"Wrote {len(lines)} predictions to {path}")

    def _write_report(self, model: LightningModule) -> Figures | FrontierFigures | None:
        """The page of a circuit's run, or a frontier's; the figures on it are returned.

        Its results are safe by now: a page that fails is told of, and costs nothing.
        """
        if not isinstance(model, CircuitPruner | FrontierPruner) or not self.trainer.is_global_zero:
            return None
        from pdprune.report import AuditedRun, write_frontier, write_report  # for circuits only

        folder = self.folder.path
        name = FRONTIER_PAGE if isinstance(model, FrontierPruner) else REPORT_FILE
        try:
            with telling("report") as tell:
                if isinstance(model, CircuitPruner):
                    model.to(self.trainer.strategy.root_device)  # after `test` Lightning has moved it away
                    return write_report(AuditedRun.of(model, self.datamodule, folder), tell=tell)
                return write_frontier(folder)
        except Exception as error:
            (folder / name).unlink(missing_ok=True)  # it would show an earlier audit
            print(f"pdprune: no {name} was written: {' '.join(str(error).split())}", file=sys.stderr)
        return None

    def _show_results(self, model: LightningModule, figures: Figures | FrontierFigures | None) -> None:
        """Hand what came out to the loggers, with the report's pictures if there is one.

        It is safe on disk by now: a tracker that fails is told of, no more.
        """
        loggers = [logger for logger in self.trainer.loggers if not isinstance(logger, MetricsCsv)]
        if not loggers or not self.trainer.is_global_zero:
            return
        results = getattr(model, "results", None)
        try:
            shown = Results({}) if results is None else results(self.folder.path)
            if figures is not None:
                from pdprune.report.pictures import pictures_of  # for circuits only

                shown = replace(shown, draw=lambda: pictures_of(figures))
            show_results(loggers, shown, self.folder.path, self.trainer.global_step)
        except Exception as error:
            print(f"pdprune: the results were not logged: {' '.join(str(error).split())}", file=sys.stderr)

    def _run(self, command: str, model: LightningModule, kwargs: dict[str, Any]) -> Any:
        kwargs["ckpt_path"] = None if self._checkpoint is None else str(self._checkpoint)
        require_as_many_as_launched(self.trainer)
        try:
            return getattr(self.trainer, command)(model, **kwargs, weights_only=True)
        except NonFiniteLossError as error:
            raise UserError(f"{error} (the state is in {self.folder.non_finite})") from error
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            details = " ".join(str(error).split("\n\t")[1].split()) if "\n\t" in str(error) else str(error)
            raise UserError(
                f"checkpoint {self._checkpoint} is of another model than the config's {type(model).__name__}: {details}"
            ) from error


def _tidy_help(command: str, parser: LightningArgumentParser) -> None:
    """Say how a command is used in one line, and put the Trainer's forty flags last."""
    parser.usage = f"pdprune {command} --config FILE [--config OVERLAY] [--key value ...]"
    titles = {"trainer": "Lightning's Trainer", "model": "What is trained", "data": "What it is trained on"}
    groups = parser.groups or {}
    for key, title in titles.items():
        groups[key].title = title
    parser._action_groups = [*(group for group in parser._action_groups if group is not groups["trainer"])]
    parser._action_groups += [groups["trainer"]]


def config_files(args: list[str]) -> list[str]:
    """The values of the `--config` flags, in order."""
    return _values_of(("--config", "-c"), args)


def _values_of(wanted: Sequence[str], args: list[str]) -> list[str]:
    """The values of some flags, in order."""
    flags = [
        argument.partition("=")[::2] if argument.startswith("--") else (argument, "") for argument in [*args, "--"]
    ]
    return [
        value or following
        for (flag, value), (following, _) in itertools.pairwise(flags)
        if flag in wanted and (value or following != "--")
    ]


def default_run_folder(args: list[str]) -> str:
    """`runs/` and the name of the last `--config` file: an overlay names the variant that it makes.

    One in a folder `trainer/` makes none: what was begun on one machine goes on on another. A circuit from elsewhere
    adds the name of its file.
    """
    configs = [file for file in config_files(args) if Path(file).absolute().parent.name != "trainer"]
    names = [*configs[-1:], *_values_of(("--circuit",), args)[-1:]]
    return f"runs/{'-'.join(Path(name).stem for name in names)}" if names else "runs/unnamed"


def what_is_run(config: dict[str, Any]) -> dict[str, Any]:
    """Of a resolved config, what decides how a run ends; where it is made, and who watches, is left out."""
    trainer = {name: value for name, value in config.get("trainer", {}).items() if name not in WHERE_AND_WHO_WATCHES}
    if trainer.get("precision") in (None, 32, "32"):
        trainer["precision"] = "32-true"
    return {"trainer": trainer} | {name: config.get(name) for name in ("seed_everything", "model", "data")}


def read_configs(args: list[str]) -> list[Any]:
    """The content of the `--config` files, unresolved.

    Raises:
        UserError: one of them doesn't exist, or is no YAML.
    """
    contents = []
    for file in config_files(args):
        try:
            contents.append(yaml.safe_load(Path(file).read_text()))
        except OSError as error:
            raise UserError(f"config file {file} cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"config file {file} is no valid YAML: {error}") from error
    return contents


def _user_error_behind(error: BaseException | None) -> UserError | None:
    """The `UserError` that a library caught and wrapped, if there is one."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Leave out what Lightning says to everyone: found accelerators, advertisements, advice on worker processes."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings(
            "ignore", message=".*in eval mode at the start of training.*"
        )  # as they are meant to be
        warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # what is logged is the same on every rank
        yield


class _Printing(logging.Handler):
    """Prints what is logged, so that it goes above a live line as everything else that is printed."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def _speak_up() -> None:
    """Print what pdprune itself logs, for instance that a target loss cannot be reached."""
    logger = logging.getLogger("pdprune")
    if not logger.handlers:
        logger.addHandler(_Printing())
    logger.setLevel(logging.INFO)


def main(args: list[str] | None = None) -> int:
    """Run the command line and return its exit status: 2 for a mistake of the user's, told in one line."""
    _speak_up()
    # Far below zero a GELU gives denormal numbers, which slow CPUs down: a toy's components took three times as long.
    torch.set_flush_denormal(True)
    try:
        with _quiet_lightning():
            PdpruneCLI(sys.argv[1:] if args is None else args)
    except SIGTERMException:
        if is_first_process():
            print("pdprune: stopped by SIGTERM; go on with --ckpt_path last", file=sys.stderr)
        return 128 + signal.SIGTERM
    except FinishedAlready as finished:
        if is_first_process():
            print(finished)
    except (UserError, MisconfigurationException) as error:
        print("pdprune: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
