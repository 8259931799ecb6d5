"""Decompositions on disk, in the package's own format: a folder of two files, of which nothing is ever unpickled.

`decomposition.safetensors` holds

    V.<site>                   [I, C]   read directions; left out where they are the identity (neurons, heads)
    U.<site>                   [C, O]   write directions
    importances.<parameter>             the causal-importance functions, where there are any

and `decomposition.json` what they belong to:

    schema           "pdprune.decomposition/1"; a file of another version is refused
    target           name, sha256 of its parameters, and source: what `pdprune.targets.load_target` finds it by
    sites            name, n_components, d_in, d_out, in the model's order
    nodes            one list of [index of the site, component] a node; null where every component is one of its own
    labels           one a node; null where they follow from the nodes
    recipe           how the components follow from the weights ("svd"), or null
    importances      the settings of the causal-importance functions, or null
    about            whatever the writer wants known
    tensors_sha256   of the other file

What the components leave over of a weight, the delta, is not stored: it follows from the target. The same model gives
the same bytes. Tensors are in the type that was asked for, and float32 once read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pdprune.decomposition.building import default_label
from pdprune.decomposition.identity import insert_identities
from pdprune.decomposition.importances import CausalImportances, ImportanceSettings
from pdprune.decomposition.model import DecomposedModel, fingerprint
from pdprune.decomposition.sites import at_least_float32
from pdprune.errors import UserError
from pdprune.files import read_bytes, read_json, write_atomically
from pdprune.targets import load_target

SCHEMA = "pdprune.decomposition/1"
JSON_FILE = "decomposition.json"
TENSOR_FILE = "decomposition.safetensors"
IMPORTANCES = "importances."


def save_decomposition(
    folder: str | Path,
    model: DecomposedModel,
    importances: CausalImportances | None = None,
    about: Mapping[str, Any] | None = None,
    *,
    source: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a decomposition as `decomposition.safetensors` and then `decomposition.json`, which holds its SHA-256.

    Args:
        folder: made if it does not exist.
        model: its sites, components and nodes are written; of its target only the fingerprint.
        importances: the causal-importance functions; by default those that the model has, if any.
        about: anything that JSON can hold.
        source: what `load_target` finds the target by, a shipped name or a folder; by default `model.target_name`.
        dtype: of what is stored, by default as it is; `torch.bfloat16` takes half the space, and what is read back
            is then rounded.

    Raises:
        UserError: if the folder cannot be written.
    """
    importances = model.importances if importances is None else importances
    data = safetensors.torch.save(_tensors(model, importances, dtype))
    content = {
        "schema": SCHEMA,
        "target": {"name": model.target_name, "sha256": model.target_sha256, "source": source or model.target_name},
        "sites": [
            {"name": name, "n_components": site.n_components, "d_in": site.d_in, "d_out": site.d_out}
            for name, site in model.sites.items()
        ],
        "nodes": _nodes(model),
        "labels": _labels(model),
        "recipe": model.recipe,
        "importances": None if importances is None else asdict(importances.settings),
        "about": dict(about or {}),
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }
    text = json.dumps(content, indent=1, allow_nan=False)
    write_atomically(Path(folder) / TENSOR_FILE, data)
    write_atomically(Path(folder) / JSON_FILE, text.encode())


def read_decomposition(folder: str | Path, target: nn.Module | str | Path | None = None) -> DecomposedModel:
    """A saved decomposition with its target; its causal importances, where there are any, in `model.importances`.

    Args:
        folder: what `save_decomposition` wrote.
        target: the network, or what `load_target` finds it by; by default what the file says.

    Raises:
        UserError: a file that is missing, damaged, of another version or does not belong to the other; a target that is
            not the one that was decomposed.
    """
    file = Path(folder) / JSON_FILE
    content = read_json(file, SCHEMA)
    data = read_bytes(file.with_name(TENSOR_FILE))
    if hashlib.sha256(data).hexdigest() != content.get("tensors_sha256"):
        raise UserError(
            f"{file.with_name(TENSOR_FILE)}: it does not belong to {file.name} beside it, or is damaged; "
            "expected the two files of one save: save the decomposition again"
        )
    try:
        return _Saved(file, content, safetensors.torch.load(data)).model(target)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, safetensors.SafetensorError) as error:
        raise UserError(f"{file}: it lacks or garbles {error}; expected a decomposition that pdprune saved") from error


class _Saved:
    """The two files, read; that they say what they should is not known yet."""

    def __init__(self, file: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.file = file
        self.content = content
        self.tensors = {name: at_least_float32(tensor) for name, tensor in tensors.items()}

    def model(self, target: nn.Module | str | Path | None) -> DecomposedModel:
        names = [site["name"] for site in self.content["sites"]]
        module, target_name = self._target(target)
        insert_identities(module, names)
        self._require_target(module)
        factors = {name: (self.tensors.get(f"V.{name}"), self.tensors[f"U.{name}"]) for name in names}
        nodes = self.content["nodes"]
        groups = None if nodes is None else [[(names[site], c) for site, c in node] for node in nodes]
        model = DecomposedModel.from_components(module, factors, groups, self.content["labels"])
        model.target_name = target_name
        model.recipe = self.content["recipe"]
        model.importances = self._importances(model)
        return model

    def _target(self, target: nn.Module | str | Path | None) -> tuple[nn.Module, str]:
        if isinstance(target, nn.Module):
            return target, self.content["target"]["name"]
        try:
            loaded = load_target(target or self.content["target"]["source"])
        except UserError as error:
            if target is not None:
                raise
            raise UserError(f"{self.file}: its target is not where it was ({error}); give target=...") from error
        return loaded.module, loaded.name

    def _require_target(self, target: nn.Module) -> None:
        made_for, found = self.content["target"], fingerprint(target)
        if found != made_for["sha256"]:
            raise UserError(
                f"{self.file}: it decomposes the target {made_for['name']!r} ({made_for['sha256'][:12]}), and this "
                f"target is another one ({found[:12]}); expected the network that was decomposed"
            )

    def _importances(self, model: DecomposedModel) -> CausalImportances | None:
        if self.content["importances"] is None:
            return None
        importances = CausalImportances(model.sites, ImportanceSettings(**self.content["importances"]))
        load_checked(
            importances,
            {
                name.removeprefix(IMPORTANCES): tensor
                for name, tensor in self.tensors.items()
                if name.startswith(IMPORTANCES)
            },
            f"{self.file}: importances",
        )
        return importances.to(model.delta_sites.device).requires_grad_(False)


def load_checked(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load the parameters of a module, all of them, if they fit; the first that does not is named.

    Raises:
        UserError: a parameter that is missing, unknown, of another shape or not finite.
    """
    expected = module.state_dict()
    for name in [*expected, *state]:
        if name not in state:
            raise UserError(f"{where}: {name} is missing; expected it, of shape {list(expected[name].shape)}")
        if name not in expected:
            raise UserError(f"{where}: {name} is not known; expected the parameters that the sizes make")
        if state[name].shape != expected[name].shape:
            raise UserError(
                f"{where}: {name} has shape {list(state[name].shape)}; expected {list(expected[name].shape)}"
            )
        if not bool(torch.isfinite(state[name]).all()):
            raise UserError(f"{where}: {name} holds NaN or infinite values; expected finite ones")
    module.load_state_dict(dict(state))


def _tensors(
    model: DecomposedModel, importances: CausalImportances | None, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for name, site in model.sites.items():
        named[f"U.{name}"] = site.U
        if not site.reads_columns:
            named[f"V.{name}"] = site.V
    if importances is not None:
        named |= {f"{IMPORTANCES}{name}": value for name, value in importances.state_dict().items()}
    return {name: value.detach().cpu().to(dtype or value.dtype).contiguous() for name, value in named.items()}


def _nodes(model: DecomposedModel) -> list[list[list[int]]] | None:
    index = {name: at for at, name in enumerate(model.site_names)}
    nodes = [[[index[name], c] for name, c in node.components] for node in model.nodes]
    each_alone = [[[at, c]] for at, site in enumerate(model.sites.values()) for c in range(site.n_components)]
    return None if nodes == each_alone else nodes


def _labels(model: DecomposedModel) -> list[str] | None:
    labels = [node.label for node in model.nodes]
    return None if labels == [default_label(node.components) for node in model.nodes] else labels
