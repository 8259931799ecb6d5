"""The tensors of an SPD checkpoint, sorted by what they are, whatever the version of SPD that wrote them.

| | target | components of a site | causal importances |
|---|---|---|---|
| (a) | `target_model.<p>` | `_components.<site>.V`, `.U` | `_ci_fns.<site>.layers.{0,2,...}.{W,b}` |
| (b) | as (a) | as (a) | `ci_fn._ci_fns.<site>...` as (a), or `ci_fn._global_ci_fn...`, one for all |
| (c) | `patched_model.<p>` | `patched_model.<path>.components.V`, `.U` | `_gates.<site>...` as (a) |
| (d) | `model.<p>` | `components.<site>.A`, `.B` | `gates.<site>.{mlp_in,in_bias,mlp_out,out_bias}`, `{weight,bias}` |

`<site>` is the module's `<path>` with dashes for dots. V (A) is `[d_in, C]`, U (B) is `[C, d_out]`; a `bias` beside
them is a copy of the target's. In (c) the weight of a site is `patched_model.<path>.original.weight`. An identity in
front of a module is the site `<path>.pre_identity`; in (c) its components are at `patched_model.<path>` too, as
`identity_components`, and its function is `_gates.identity_<site>`. Runs in between mix these names, so each key is
read by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pdprune.decomposition.identity import PRE_IDENTITY
from pdprune.decomposition.importances import dashed
from pdprune.errors import UserError

TARGET = re.compile(r"(?:target_model|patched_model|model)\.(.+)")
PATCHED_FACTOR = re.compile(r"patched_model\.(.+)\.(identity_)?components\.(V|U|bias)")
FACTOR = re.compile(r"_?components\.([^.]+)\.(V|U|A|B|bias)")
FUNCTION = re.compile(r"(?:ci_fn\.)?_?(?:ci_fns|gates)\.([^.]+)\.(.+)")
SHARED = re.compile(r"ci_fn\._global_ci_fn\.(.+)")
ORIGINAL = re.compile(r"\.original\.(weight|bias)$")
ROTARY = ".attn.rope.inv_freq"
"""Frequencies of the rotary positions, which follow from their base."""

NEW_NAME = {"A": "V", "B": "U"}
IDENTITY_PREFIX = "identity_"


@dataclass(frozen=True)
class Sorted:
    """The tensors of a checkpoint.

    Attributes:
        target: by parameter path.
        factors: `V` and `U` by site, whose path has dashes for dots.
        functions: the parameters of each site's causal-importance function, by site as in `factors`, then by name.
        shared: the parameters of one function for all sites.
    """

    target: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    functions: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)


def sort_tensors(state: Mapping[str, Tensor], where: str) -> Sorted:
    """Read every key of a checkpoint.

    Raises:
        UserError: a key of no layout, or no components at all.
    """
    found = Sorted()
    is_patched = any(key.startswith("patched_model.") for key in state)
    for key, tensor in state.items():
        if match := PATCHED_FACTOR.fullmatch(key):
            path, identity, letter = match.groups()
            site = dashed(f"{path}.{PRE_IDENTITY}" if identity else path)
            found.factors.setdefault(site, {})[letter] = tensor
        elif match := TARGET.fullmatch(key):
            found.target[ORIGINAL.sub(r".\1", match[1])] = tensor
        elif match := FACTOR.fullmatch(key):
            found.factors.setdefault(match[1], {})[NEW_NAME.get(match[2], match[2])] = tensor
        elif match := FUNCTION.fullmatch(key):
            site, name = match.groups()
            if is_patched and site.startswith(IDENTITY_PREFIX):
                site = dashed(f"{site.removeprefix(IDENTITY_PREFIX)}.{PRE_IDENTITY}")
            found.functions.setdefault(site, {})[name] = tensor
        elif match := SHARED.fullmatch(key):
            if not key.endswith(ROTARY):
                found.shared[match[1]] = tensor
        else:
            raise UserError(f"{where}: {key!r} is a key of no layout of SPD's that is known; expected a run of SPD")
    if not found.factors:
        raise UserError(f"{where}: it holds no components; expected keys such as '_components.<site>.V'")
    return found


def function_parameters(parameters: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """A site's function in the layout of (a): `layers.{0,2,...}.{W,b}`.

    Raises:
        UserError: parameters of a function that is not known.
    """
    if all(re.fullmatch(r"layers\.\d+\.(W|b)", name) for name in parameters):
        return dict(parameters)
    for names in (FIRST_MLP, FIRST_LINEAR):
        if parameters.keys() == names.keys():
            return {names[name][0]: names[name][1](tensor) for name, tensor in parameters.items()}
    unknown = min(name for name in parameters if not name.startswith("layers."))
    raise UserError(
        f"{where}: parameter {unknown!r} is of no causal-importance function that is known; to go without them, give "
        "importances=False"
    )


Reshape = Callable[[Tensor], Tensor]
FIRST_MLP: dict[str, tuple[str, Reshape]] = {
    "mlp_in": ("layers.0.W", lambda tensor: tensor.unsqueeze(-2)),
    "in_bias": ("layers.0.b", lambda tensor: tensor),
    "mlp_out": ("layers.2.W", lambda tensor: tensor.unsqueeze(-1)),
    "out_bias": ("layers.2.b", lambda tensor: tensor.unsqueeze(-1)),
}
"""Layout (d): an MLP for each component, all of shape `[C, h]` but for the last, `[C]`."""
FIRST_LINEAR: dict[str, tuple[str, Reshape]] = {
    "weight": ("layers.0.W", lambda tensor: tensor[:, None, None]),
    "bias": ("layers.0.b", lambda tensor: tensor[:, None]),
}
"""Layout (d) without a hidden layer, all of shape `[C]`."""


def read_tensors(file: str, state: object) -> dict[str, Tensor]:
    """What `torch.load` gave, if it is a bare state dict.

    Raises:
        UserError: anything else.
    """
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{file}: it holds a {type(state).__name__}; expected a state dict, tensors by name")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{file}: {key!r} is a {type(value).__name__}; expected a bare state dict, tensors by name")
    return dict(state)
