"""`load_decomposition`: the way in for decompositions from disk, and how an SPD run becomes a decomposed model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pdprune.decomposition.checkpoints.functions import read_importances
from pdprune.decomposition.checkpoints.layouts import Sorted, sort_tensors
from pdprune.decomposition.checkpoints.run_folder import SPDRun, is_spd_run
from pdprune.decomposition.identity import SUFFIX, insert_identities
from pdprune.decomposition.importances import dashed
from pdprune.decomposition.model import DecomposedModel
from pdprune.decomposition.saved import JSON_FILE, read_decomposition
from pdprune.decomposition.sites import require_kind, weight_of
from pdprune.errors import UserError
from pdprune.targets import load_target
from pdprune.targets.known import KNOWN, known_network
from pdprune.targets.store import SHIPPED

IN_RUN_FOLDER = "decomposition"
"""Where our own runs put what they learned."""


def load_decomposition(
    path: str | Path,
    target: nn.Module | str | Path | None = None,
    *,
    target_config: Mapping[str, Any] | None = None,
    importances: bool = True,
) -> DecomposedModel:
    """Load a decomposition: one that pdprune saved, or the run folder of SPD (github.com/goodfire-ai/spd).

    Args:
        path: a folder that `save_decomposition` wrote, or a run folder with such a folder in it, or a shipped target
            that comes with one, by its name; an SPD run folder, of which the newest `model_<step>.pth` is read, or one
            such file.
        target: the network that was decomposed. For our own format by default what the file says. The weights of an SPD
            run are in its checkpoint, and are **loaded into the module that is given here**; instead of a module: the
            name of a class that we know (`TMS`, `ResidualMLP`, `GPT2Like`, `LlamaLike`), by default the one that the
            run's config names; or the folder of a Hugging Face model.
        target_config: of a known class of an SPD run, what shapes do not tell: `n_head`, `rotary_base`, ... (see
            `known_network`). Goes before the `model_config.yaml` in the folder.
        importances: whether causal importances are read, if there are any.

    Returns:
        the model, each component a node unless it was saved otherwise; its causal importances are in
        `model.importances`, or None.

    Raises:
        UserError: a file that is missing, damaged or of no known format; a parameter, component or function that is
            missing, unknown or of a wrong shape; a target that is not the one that was decomposed.
    """
    path = SHIPPED / path if (SHIPPED / path / IN_RUN_FOLDER).is_dir() else Path(path)
    if not path.exists():
        raise UserError(f"decomposition {path}: there is no such folder; expected a saved decomposition or an SPD run")
    for folder in (path, path / IN_RUN_FOLDER):
        if (folder / JSON_FILE).is_file():
            model = read_decomposition(folder, target)
            if not importances:
                model.importances = None
            return model
    if not is_spd_run(path):
        raise UserError(
            f"decomposition {path}: it has neither {JSON_FILE}, as pdprune saves it, nor final_config.yaml and "
            "model_<step>.pth, as SPD does; expected one of the two"
        )
    return _load_spd_run(SPDRun.find(path), target, target_config or {}, importances)


def _load_spd_run(
    run: SPDRun, target: nn.Module | str | Path | None, target_config: Mapping[str, Any], importances: bool
) -> DecomposedModel:
    """All about the target and its components is checked before anything is loaded into a user's target."""
    where = str(run.checkpoint)
    tensors = sort_tensors(run.tensors(), where)
    module = _target(run, target, tensors, target_config)
    paths = _site_paths(module, tensors.factors, where)
    _check_weights(module, tensors.target, where)
    _check_factors(module, paths, tensors.factors, where)

    insert_identities(module, list(paths.values()))
    sizes = run.sizes(module)
    _check_sizes(sizes, {path: tensors.factors[site]["U"].shape[0] for site, path in paths.items()}, where)
    module.load_state_dict(tensors.target, strict=False)
    by_path = {path: tensors.factors[site] for site, path in paths.items()}
    model = DecomposedModel.from_components(module, {path: (by_path[path]["V"], by_path[path]["U"]) for path in sizes})
    if importances:
        model.importances = read_importances(model, tensors, run.importance_config(), where)
    return model


def _target(
    run: SPDRun, target: nn.Module | str | Path | None, tensors: Sorted, target_config: Mapping[str, Any]
) -> nn.Module:
    if isinstance(target, nn.Module):
        return target
    if target is None and run.target_class in KNOWN:
        target = run.target_class
    if target is None and run.target_place is not None and Path(run.target_place).is_dir():
        target = run.target_place
    if target is None:
        what = run.target_class or "network that its config does not name"
        raise UserError(
            f"{run.checkpoint}: its target is a {what}, none that we know; expected target=..., the module itself or "
            "the local folder of a Hugging Face model"
        )
    if str(target) in KNOWN:
        return known_network(str(target), tensors.target, {**run.target_config, **target_config})
    return load_target(target).module


def _site_paths(target: nn.Module, sites: Iterable[str], where: str) -> dict[str, str]:
    """The module path of every site of the checkpoint, where dots are dashes."""
    by_key = {dashed(path): path for path, _ in target.named_modules() if path}
    paths = {}
    for site in sites:
        base = site.removesuffix(dashed(SUFFIX))
        path = by_key.get(site) or (f"{by_key[base]}{SUFFIX}" if base != site and base in by_key else None)
        if path is None:
            raise UserError(f"{where}: it has components of {site!r}; expected a module of that path in the target")
        paths[site] = path
    return paths


def _check_weights(target: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Whether every parameter of the target is there, in its shape, and nothing else is."""
    expected = {name: value for name, value in target.state_dict().items() if f"{SUFFIX}." not in f".{name}"}
    stored_at = {_place(value) for name, value in expected.items() if name in weights}
    for name, value in expected.items():
        what = f"{where}: parameter {name!r} of the target"
        if name not in weights:
            if _place(value) in stored_at:
                continue  # tied to one that is there
            raise UserError(f"{what} is missing; expected shape {list(value.shape)}")
        if weights[name].shape != value.shape:
            raise UserError(f"{what} has shape {list(weights[name].shape)}; expected {list(value.shape)}")
        if not bool(torch.isfinite(weights[name]).all()):
            raise UserError(f"{what} holds NaN or infinite values; expected finite ones")
    for name in weights:
        if name not in expected and not RECOMPUTED.search(name):
            raise UserError(f"{where}: it has a parameter {name!r}, and the target has none; expected the same network")


RECOMPUTED = re.compile(r"(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$|rotary_(sin|cos)$")
"""Causal masks and rotary tables that older versions of a network stored and newer ones make anew."""


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor lies in memory: tied parameters lie at the same place."""
    return tensor.data_ptr(), tensor.numel()


def _check_factors(
    target: nn.Module, paths: Mapping[str, str], factors: Mapping[str, Mapping[str, Tensor]], where: str
) -> None:
    """Whether the components of every site multiply to a matrix of the shape of its weight."""
    for site, path in paths.items():
        module = target.get_submodule(path.removesuffix(SUFFIX))
        d_out, d_in = weight_of(module, require_kind(path, module)).shape
        if path.endswith(SUFFIX):
            d_out = d_in
        expected = f"expected V [{d_in}, C] and U [C, {d_out}] for a weight that maps {d_in} to {d_out}"
        for letter in ("V", "U"):
            factor = factors[site].get(letter)
            if factor is None:
                raise UserError(f"{where}: {letter} of site {path!r} is missing; {expected}")
            if not bool(torch.isfinite(factor).all()):
                raise UserError(f"{where}: {letter} of site {path!r} holds NaN or infinite values; {expected}")
        V, U = factors[site]["V"], factors[site]["U"]
        if U.ndim != 2 or V.shape != (d_in, U.shape[0]) or U.shape[1] != d_out:
            raise UserError(f"{where}: site {path!r} has V {list(V.shape)} and U {list(U.shape)}; {expected}")


def _check_sizes(configured: Mapping[str, int], found: Mapping[str, int], where: str) -> None:
    """Whether the checkpoint has the sites that its config names, of as many components."""
    for path in [*configured, *found]:
        has, wanted = found.get(path), configured.get(path)
        if wanted is None:
            raise UserError(f"{where}: it has components of site {path!r}; expected a pattern for it in its config")
        if has != wanted:
            raise UserError(
                f"{where}: site {path!r} has {has or 'no'} components; expected {wanted}, as its config says"
            )
