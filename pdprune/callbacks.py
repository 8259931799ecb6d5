"""What happens around a fit: its folder is opened, checkpoints are saved, progress is told."""

from __future__ import annotations

from contextlib import ExitStack
from importlib.metadata import version
from typing import Any, cast

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from pdprune.errors import NonFiniteLossError
from pdprune.files import write_atomically
from pdprune.loggers import MetricsCsv, group_names, wandb_logger
from pdprune.progress import telling
from pdprune.ranks import save_checkpoint_alone
from pdprune.run_folder import CONFIG_FILE, METRICS_FILE, RunFolder
from pdprune.signals import StopSignals, requeue_job


class OpenRunFolder(SaveConfigCallback):
    """Makes the run folder once everything has been set up and restored, so that a bad config leaves nothing behind.

    Then, not before: `config.yaml` is written, and the loggers are attached to the trainer.

    Args:
        parser, config: the command line's parser and what it parsed.
        overwrite: remove an earlier run's files first.
    """

    def __init__(self, parser: Any, config: Any, overwrite: bool = False, **kwargs: Any) -> None:
        super().__init__(parser, config, overwrite=overwrite, **kwargs)
        self._is_resumed = False
        self._last_logged_step = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing: the stock callback writes here, when the model may still turn out to be wrong."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        csv_logger = _csv_logger_of(trainer)
        if csv_logger is not None:
            checkpoint["last_logged_step"] = csv_logger.last_step

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._is_resumed = True
        self._last_logged_step = checkpoint.get("last_logged_step", -1)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = RunFolder(trainer.default_root_dir)
        resolved = resolved_config(self.parser, self.config)
        if trainer.is_global_zero:
            if self.overwrite and not self._is_resumed:
                folder.clear()
            folder.mark_unfinished()
            _write_config(folder, resolved)
        trainer.strategy.barrier("open_run_folder")

        csv_logger = MetricsCsv(folder.path / METRICS_FILE)
        csv_logger.drop_rows_after(self._last_logged_step)
        for logger in trainer.loggers:
            logger.log_hyperparams(resolved)
        loggers = [*trainer.loggers, csv_logger]
        if resolved["trainer"]["logger"] in (None, True):
            wandb = wandb_logger(folder.path, resolved, is_new_run=not self._is_resumed)
            loggers += [wandb] if wandb is not None else []
        for logger in loggers:
            if logger is not csv_logger:
                group_names(logger)
        trainer.loggers = loggers

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A circuit from elsewhere gets a run folder of its own; otherwise the run that is tested has one."""
        if getattr(self.config, "circuit", None) is None or not trainer.is_global_zero:
            return
        folder = RunFolder(trainer.default_root_dir)
        if self.overwrite:
            folder.clear()
        _write_config(folder, resolved_config(self.parser, self.config))


def resolved_config(parser: Any, config: Any) -> dict[str, Any]:
    """What it takes to run again, of what a parser parsed. How this run came to start here is left out."""
    resolved = yaml.safe_load(parser.dump(config, skip_none=False))
    left_out = ("config", "overwrite", "ckpt_path", "circuit")
    return {key: value for key, value in resolved.items() if key not in left_out}


def _write_config(folder: RunFolder, resolved: dict[str, Any]) -> None:
    content = f"# pdprune {version('pdprune')}\n" + yaml.safe_dump(resolved, sort_keys=False)
    write_atomically(folder.path / CONFIG_FILE, content.encode())


class RunCheckpoint(Checkpoint):
    """Saves `checkpoints/last.ckpt` every few steps and keeps the one before as `previous.ckpt`.

    On SIGTERM, or when SLURM warns that it will stop the job, it saves after the step that is under way, and ends the
    fit before the next, validation included if that is due; in the second case the job is then queued again.

    Args:
        every_n_steps: a checkpoint is saved each time so many optimiser steps (`trainer.global_step`) have been made,
            and at the end.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        if every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._saved_at_step = 0
        self._signals = StopSignals()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved_at_step = checkpoint["global_step"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signals.listen(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._stop_if_told()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._signals.agree(trainer)
        if self._signals.stop or trainer.global_step - self._saved_at_step >= self.every_n_steps:
            self._log_step_before_saving(trainer)
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signals.agree(trainer)  # a last validation may have come after the last step
        if trainer.global_step > self._saved_at_step:
            self._save(trainer)
        self._stop_if_told()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Queue the job again if that was asked for; a non-finite loss leaves a checkpoint to look into."""
        if not trainer.is_global_zero:
            return
        if isinstance(exception, SIGTERMException) and self._signals.requeue:
            requeue_job()
        elif isinstance(exception, NonFiniteLossError):
            save_checkpoint_alone(trainer, RunFolder(trainer.default_root_dir).non_finite)

    def _stop_if_told(self) -> None:
        if self._signals.stop:
            raise SIGTERMException

    def _save(self, trainer: Trainer) -> None:
        if cast(Any, trainer).fast_dev_run:
            return
        folder = RunFolder(trainer.default_root_dir)
        if trainer.is_global_zero:
            folder.keep_last_as_previous()
        trainer.save_checkpoint(folder.last)
        self._saved_at_step = trainer.global_step

    @staticmethod
    def _log_step_before_saving(trainer: Trainer) -> None:
        """Write this step's row of metrics.csv now: Lightning does so after the batch, when a kill may have come."""
        csv_logger = _csv_logger_of(trainer)
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        if csv_logger is None or (step + 1) % cast(Any, trainer).log_every_n_steps:
            return
        metrics = trainer._logger_connector.metrics["log"]
        if metrics:
            values = {name: float(value) for name, value in metrics.items()}
            values["epoch"] = trainer.current_epoch
            csv_logger.log_metrics(values, step)


class LogEachValueOnce(Callback):
    """Keeps a value logged at one step out of the rows of the steps that follow.

    Lightning hands loggers the last value of a metric again at every step until the epoch ends, so that rows would
    hold stale values, and others in a resumed run. Means over an epoch are left alone.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for metric in (trainer._results or {}).values():
            if not metric.meta.on_epoch:
                metric.reset()


class StepProgress(ProgressBar):
    """Steps done and the values logged with `prog_bar=True`, and how far loops over other splits have come."""

    def __init__(self) -> None:
        super().__init__()
        self._training, self._other = ExitStack(), ExitStack()
        self._is_enabled = True

    def disable(self) -> None:
        """Lightning's way of keeping all ranks but the first quiet."""
        self._is_enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps = self._training.enter_context(telling("training", quiet=not self._is_enabled))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        total = trainer.estimated_stepping_batches
        share = trainer.global_step / total if total < float("inf") else None
        self._steps(f"step {trainer.global_step}/{total}  {_shown_values(trainer)}", share)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training.close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches = self._other.enter_context(telling("validation", quiet=not self._is_enabled))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        self._tell_batch(rest[2], trainer.num_val_batches)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._other.close()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches = self._other.enter_context(telling("prediction", quiet=not self._is_enabled))

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        self._tell_batch(rest[2], trainer.num_predict_batches)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._other.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._other.close()
        self._training.close()

    def _tell_batch(self, index: int, totals: Any) -> None:
        total = sum(totals) if isinstance(totals, list) else totals
        self._batches(f"batch {index + 1} of {total}", (index + 1) / total if total else None)


def _shown_values(trainer: Trainer) -> str:
    values = trainer.progress_bar_metrics.items()
    return "  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values)


def _csv_logger_of(trainer: Trainer) -> MetricsCsv | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, MetricsCsv)), None)
