"""The config of a circuit's run, read back: which decomposition it describes, and which data."""

from __future__ import annotations

import pydoc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pdprune.decomposition.settings import Decomposition
from pdprune.errors import UserError
from pdprune.files import read_bytes


@dataclass(frozen=True)
class CircuitConfig:
    """What a config says.

    Attributes:
        path: its file.
        decomposition: of `model.init_args`.
        model: the other arguments of the model, as far as they are given.
        data_class, data: what makes the data, and its arguments.
    """

    path: Path
    decomposition: Decomposition
    model: Mapping[str, Any]
    data_class: Any
    data: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> CircuitConfig:
        """Read what `fit --config` takes, or the `config.yaml` of a run.

        Raises:
            UserError: a config that can't be read or describes no circuit.
        """
        try:
            given = OmegaConf.create({"seed_everything": 0} | yaml.safe_load(read_bytes(path)))
            content: Any = OmegaConf.to_container(given, resolve=True)
            model, data = dict(content["model"]["init_args"]), content["data"]
            data_class = pydoc.locate(data["class_path"])
            if not callable(data_class):
                raise UserError(f"{path}: data.class_path: no class {data['class_path']!r}")
            return cls(path, Decomposition(**model.pop("decomposition")), model, data_class, data["init_args"])
        except (yaml.YAMLError, OmegaConfBaseException, KeyError, TypeError, AttributeError) as error:
            raise _no_circuit(path, error) from error

    def make_data(self) -> Any:
        """The data module.

        Raises:
            UserError: its arguments do not fit, or data that can't be read.
        """
        try:
            return self.data_class(**self.data)
        except TypeError as error:
            raise _no_circuit(self.path, error) from error


def _no_circuit(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: it lacks or garbles {error}; expected the config of a circuit, with "
        "model.init_args.decomposition and data"
    )
