"""What an SPD run folder holds besides tensors: which file is the newest, and what `final_config.yaml` says of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from pdprune.decomposition.checkpoints.layouts import read_tensors
from pdprune.decomposition.identity import SUFFIX
from pdprune.decomposition.sites import kind_of
from pdprune.errors import UserError
from pdprune.files import read_bytes

CONFIG = "final_config.yaml"
CHECKPOINT = re.compile(r"model_(\d+)\.pth")
SIZES = {
    "model_config.yaml": (),
    "tms_train_config.yaml": ("tms_model_config",),
    "resid_mlp_train_config.yaml": ("resid_mlp_model_config", "resid_mlp_config"),
}
"""Files that say more of the target than shapes do, and the key under which they do."""


@dataclass(frozen=True)
class SPDRun:
    """An SPD run.

    Attributes:
        checkpoint: the file with the tensors, the newest unless one was named.
        config: `final_config.yaml`.
        target_config: what files beside it say of the target.
    """

    checkpoint: Path
    config: Mapping[str, Any]
    target_config: Mapping[str, Any]

    @classmethod
    def find(cls, path: Path) -> SPDRun:
        """The run in a folder, or that of one `model_<step>.pth`.

        Raises:
            UserError: a file that is missing or damaged.
        """
        folder = path.parent if path.is_file() else path
        checkpoint = path if path.is_file() else _newest(folder)
        sizes: dict[str, Any] = {}
        for name, keys in SIZES.items():
            if (folder / name).is_file():
                content = _read_yaml(folder / name)
                sizes |= next((content[key] for key in keys if isinstance(content.get(key), Mapping)), content)
        return cls(checkpoint, _read_yaml(folder / CONFIG), sizes)

    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint, a bare state dict. Nothing but tensors is ever unpickled.

        Raises:
            UserError: a damaged file, or one with anything else in it.
        """
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # what a damaged file makes of the reader is anyone's guess
            reason = str(error).strip().partition("\n")[0][:120] or type(error).__name__
            raise UserError(
                f"{self.checkpoint}: not a readable checkpoint ({reason}); expected a state dict saved by torch.save"
            ) from error
        return read_tensors(str(self.checkpoint), state)

    @property
    def target_class(self) -> str:
        """The last part of `pretrained_model_class`: `"LlamaSimpleMLP"`; empty if it is not told."""
        return str(self.config.get("pretrained_model_class") or "").rpartition(".")[2]

    @property
    def target_place(self) -> str | None:
        """`pretrained_model_path` or `pretrained_model_name`: where SPD had the target from."""
        keys = ("pretrained_model_path", "pretrained_model_name", "pretrained_model_name_hf")
        return next((str(self.config[key]) for key in keys if self.config.get(key)), None)

    def sizes(self, target: nn.Module) -> dict[str, int]:
        """The number of components by site, as the config's patterns say, in the target's order.

        Args:
            target: with the identities that the config inserts.

        Raises:
            UserError: a pattern that matches nothing, or a config without patterns.
        """
        n_components: dict[str, int] = {}
        for pattern, count, is_identity in self._patterns():
            hits = [
                path for path in _sites(target) if fnmatchcase(path, pattern) and path.endswith(SUFFIX) is is_identity
            ]
            if not hits:
                raise UserError(
                    f"{self._config_file}: pattern {pattern!r} matches no module of the target; expected the target "
                    f"that was decomposed, whose sites are {', '.join(_sites(target)) or 'none'}"
                )
            n_components |= dict.fromkeys(hits, count)
        return {path: n_components[path] for path in _sites(target) if path in n_components}

    def importance_config(self) -> dict[str, Any]:
        """What the config says of the causal-importance functions, wherever this version of SPD wrote it.

        The keys are `sigmoid_type`, `fn_type`, `n_heads` and `rope_base`, those of them that are there.
        """
        nested = self.config.get("ci_config")
        told = dict(_scalars(nested)) if isinstance(nested, Mapping) else {}
        for key in ("ci_fn_type", "gate_type"):
            if self.config.get(key):
                told.setdefault("fn_type", self.config[key])
        told["sigmoid_type"] = self.config.get("sigmoid_type")
        wanted = ("sigmoid_type", "fn_type", "n_heads", "rope_base")
        return {key: told[key] for key in wanted if told.get(key) is not None}

    @property
    def _config_file(self) -> Path:
        return self.checkpoint.with_name(CONFIG)

    def _patterns(self) -> Iterator[tuple[str, int, bool]]:
        """Pattern, number of components, and whether it names inserted identities."""
        count = self.config.get("C", self.config.get("m"))
        try:
            for pattern in self.config.get("target_module_patterns") or []:
                yield str(pattern), int(count), False
            for pattern in self.config.get("identity_module_patterns") or []:
                yield f"{pattern}{SUFFIX}", int(count), True
            for info in self.config.get("module_info") or []:
                yield str(info["module_pattern"]), int(info["C"]), False
            for info in self.config.get("identity_module_info") or []:
                yield f"{info['module_pattern']}{SUFFIX}", int(info["C"]), True
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{self._config_file}: its sites cannot be read ({error}); expected module_info, a list of "
                "{module_pattern, C}, or C and target_module_patterns"
            ) from error


def is_spd_run(path: Path) -> bool:
    """Whether a folder, or one file of it, looks like an SPD run."""
    if path.is_file():
        return path.suffix == ".pth"
    return (path / CONFIG).is_file() or any(CHECKPOINT.fullmatch(file.name) for file in path.glob("model_*.pth"))


def _newest(folder: Path) -> Path:
    steps = {int(match[1]): file for file in folder.glob("*.pth") if (match := CHECKPOINT.fullmatch(file.name))}
    if not steps:
        raise UserError(f"{folder}: it has no model_<step>.pth; expected an SPD run with a checkpoint")
    return steps[max(steps)]


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_bytes(file))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: is damaged or no YAML ({reason}); expected a config that SPD wrote") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: it holds a {type(content).__name__}; expected keys and values")
    return content


def _sites(target: nn.Module) -> list[str]:
    return [path for path, module in target.named_modules() if kind_of(module) is not None]


def _scalars(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _scalars(value)
        elif not isinstance(value, list):
            yield key, value
