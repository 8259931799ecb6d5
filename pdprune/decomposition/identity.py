"""An identity matrix in front of a module, so that what the module reads can be decomposed (SPD's `pre_identity`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pdprune.decomposition.sites import LINEAR, kind_of, require_kind, weight_of
from pdprune.errors import UserError

PRE_IDENTITY = "pre_identity"
SUFFIX = f".{PRE_IDENTITY}"


def insert_identities(target: nn.Module, names: list[str]) -> None:
    """Give every module `<path>` with `<path>.pre_identity` among the names an identity to read its input through.

    It is an `nn.Linear` without bias whose weight is the identity: a site like any other. The target computes what it
    did before. A module that has one keeps it. Names of other sites are passed over.

    Raises:
        UserError: a path that the target does not have, or a module that does not read vectors.
    """
    paths = dict(target.named_modules())
    for path in (name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)):
        if path not in paths:
            raise UserError(f"site {path + SUFFIX!r}: the target has no module {path!r} to put an identity in front of")
        module = paths[path]
        if isinstance(getattr(module, PRE_IDENTITY, None), nn.Module):
            continue
        kind = require_kind(path, module)
        if kind.reads_ids:
            raise UserError(f"site {path + SUFFIX!r}: {path!r} is an Embedding, and no identity reads ids")
        weight = module.get_parameter("weight")
        d_in = weight_of(module, kind).shape[1]
        identity = nn.Linear(d_in, d_in, bias=False, device="meta")
        identity.weight = nn.Parameter(torch.eye(d_in, dtype=weight.dtype, device=weight.device), requires_grad=False)
        assert kind_of(identity) is LINEAR
        module.add_module(PRE_IDENTITY, identity)
        module.register_forward_pre_hook(_through_identity)


def _through_identity(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    identity = getattr(module, PRE_IDENTITY)
    return (identity(args[0]), *args[1:])
