"""The causal-importance functions of an SPD checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pdprune.decomposition.checkpoints.layouts import Sorted, function_parameters
from pdprune.decomposition.importances import CausalImportances, ImportanceKind, ImportanceSettings, Sigmoid, dashed
from pdprune.decomposition.model import DecomposedModel
from pdprune.decomposition.saved import load_checked
from pdprune.errors import UserError

KINDS: dict[str, ImportanceKind] = {"mlp": "component_mlp", "vector_mlp": "site_mlp", "shared_mlp": "shared_mlp"}
"""By SPD's `ci_fn_type`, once `gate_type`."""
SIGMOIDS: dict[str, Sigmoid] = {
    "leaky_hard": "hard",
    "hard": "hard",
    "lower_leaky_hard": "hard",
    "upper_leaky_hard": "hard",
    "normal": "normal",
    "swish_hard": "swish_hard",
}
"""By SPD's `sigmoid_type`. Leaks above 1 are cut off: a mask ends at 1."""
SHARED_NAMES = {"_input_projector": "projector", "_output_head": "head", "_blocks": "blocks"}
GO_WITHOUT = "to go without them, give importances=False"


def read_importances(
    model: DecomposedModel, tensors: Sorted, config: Mapping[str, Any], where: str
) -> CausalImportances | None:
    """The causal-importance functions of a run, with its parameters; None if it has none.

    Args:
        model: its components.
        tensors: of its checkpoint.
        config: what its config says of the functions (`SPDRun.importance_config`).
        where: the checkpoint.

    Raises:
        UserError: a function that is not known, or a parameter that is missing, unknown or of a wrong shape.
    """
    where = f"{where}: causal importances"
    if not tensors.functions and not tensors.shared:
        return None
    sigmoid = str(config.get("sigmoid_type", "leaky_hard"))
    if sigmoid not in SIGMOIDS:
        raise UserError(f"{where}: sigmoid_type {sigmoid!r} is none of {', '.join(SIGMOIDS)}; {GO_WITHOUT}")
    if tensors.shared:
        settings, state = _transformer(tensors.shared, config, SIGMOIDS[sigmoid], where)
    else:
        settings, state = _by_site(model, tensors.functions, config, SIGMOIDS[sigmoid], where)
    importances = CausalImportances(model.sites, settings)
    load_checked(importances, {name: tensor.float() for name, tensor in state.items()}, where)
    return importances.to(model.delta_sites.device).requires_grad_(False)


def _by_site(
    model: DecomposedModel,
    functions: Mapping[str, Mapping[str, Tensor]],
    config: Mapping[str, Any],
    sigmoid: Sigmoid,
    where: str,
) -> tuple[ImportanceSettings, dict[str, Tensor]]:
    read = {site: function_parameters(parameters, where) for site, parameters in functions.items()}
    first = dashed(model.site_names[0])
    if first not in read:
        raise UserError(f"{where}: the function of site {model.site_names[0]!r} is missing; {GO_WITHOUT}")
    kind = KINDS.get(str(config.get("fn_type"))) or _kind_of(read[first].get("layers.0.W"), where)
    settings = ImportanceSettings(kind, hidden=_hidden(read[first], "layers"), sigmoid=sigmoid)
    state = {f"functions.{site}.{name}": tensor for site, own in read.items() for name, tensor in own.items()}
    return settings, state


def _kind_of(first: Tensor | None, where: str) -> ImportanceKind:
    """The kind of function whose first weight this is: for one component after another, or for all of a site."""
    if first is None or first.ndim not in (2, 3):
        raise UserError(f"{where}: layers.0.W is missing or no matrix; {GO_WITHOUT}")
    if first.ndim == 2:
        return "shared_mlp"
    return "component_mlp" if first.shape[1] == 1 else "site_mlp"


def _transformer(
    shared: Mapping[str, Tensor], config: Mapping[str, Any], sigmoid: Sigmoid, where: str
) -> tuple[ImportanceSettings, dict[str, Tensor]]:
    state = {}
    for name, tensor in shared.items():
        part, dot, rest = name.partition(".")
        if part not in SHARED_NAMES:
            raise UserError(f"{where}: parameter {name!r} is of no function for all sites that is known; {GO_WITHOUT}")
        state[f"transformer.{SHARED_NAMES[part]}{dot}{rest}"] = tensor
    n_heads = config.get("n_heads")
    if not isinstance(n_heads, int) or n_heads < 1:
        raise UserError(f"{where}: the config's n_heads is {n_heads!r}; expected the transformer's number of heads")
    projector = shared.get("_input_projector.W")
    if projector is None or projector.ndim != 2:
        raise UserError(f"{where}: _input_projector.W is missing or no matrix; expected [inputs, width]")
    settings = ImportanceSettings(
        "transformer",
        hidden=_hidden(shared, "_blocks.0.mlp"),
        d_model=projector.shape[1],
        n_blocks=len({name.split(".")[1] for name in shared if name.startswith("_blocks.")}),
        n_heads=n_heads,
        rope_base=float(config.get("rope_base", ImportanceSettings.rope_base)),
        sigmoid=sigmoid,
    )
    return settings, state


def _hidden(parameters: Mapping[str, Tensor], layers: str) -> list[int]:
    """The widths of the hidden layers: what all weights, or biases, but the last lead to."""
    widths = {
        int(name.removeprefix(f"{layers}.").partition(".")[0]): tensor.shape[-1]
        for name, tensor in parameters.items()
        if name.startswith(f"{layers}.") and tensor.ndim > 0
    }
    return [widths[index] for index in sorted(widths)[:-1]]
