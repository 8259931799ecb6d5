"""A site: one weight matrix of the target, written as a sum of rank-one components and a delta.

Shape letters: B batch, T position, I/O in/out of the site, C component. "lead" are the leading dimensions of a
site's input, `[B, T]` in a transformer. `k = m - 1` is a mask written as what it takes away: 0 leaves a component
alone, -1 ablates it. All arithmetic is on `k`, so that a component left alone contributes an exact zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from pdprune.errors import UserError


@dataclass(frozen=True)
class Kind:
    """How a class of modules stores its matrix and what it reads."""

    stores_out_in: bool
    """The parameter is `W: [O, I]`, as in `nn.Linear`; otherwise it is its transpose, `[I, O]`."""
    reads_ids: bool
    """The input is integer ids, that is one-hot rows, as in `nn.Embedding`."""


LINEAR = Kind(stores_out_in=True, reads_ids=False)
EMBEDDING = Kind(stores_out_in=False, reads_ids=True)
CONV1D = Kind(stores_out_in=False, reads_ids=False)


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module that can be a site, or None.

    A subclass with a forward of its own may do anything with its weight, so it is not taken for its parent.
    Hugging Face's `Conv1D` is known by name and attribute: importing `transformers` for it would be a heavy dependency.
    """
    if type(module).forward is nn.Linear.forward:
        return LINEAR
    if type(module).forward is nn.Embedding.forward:
        return EMBEDDING
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return CONV1D
    return None


def require_kind(name: str, module: nn.Module) -> Kind:
    """The kind of the module at path `name`.

    Raises:
        UserError: the module cannot be a site, or stores its weight in a way that cannot be masked.
    """
    kind = kind_of(module)
    if kind is None:
        raise UserError(
            f"site {name!r} is a {type(module).__name__}: a site is an nn.Linear, an nn.Embedding or a Hugging Face "
            "Conv1D (a subclass that overrides forward is neither)"
        )
    weight = module._parameters.get("weight")
    if weight is None:
        raise UserError(
            f"site {name!r} ({type(module).__name__}) computes its weight from other parameters: remove the "
            "parametrization (torch.nn.utils.parametrize.remove_parametrizations) before decomposing"
        )
    if isinstance(weight, UninitializedParameter):
        raise UserError(f"site {name!r} ({type(module).__name__}) has no weight yet: run the target once first")
    if kind is EMBEDDING and getattr(module, "max_norm", None) is not None:
        raise UserError(
            f"site {name!r} is an Embedding with max_norm, which rewrites its weight while it runs: set max_norm=None"
        )
    return kind


def weight_of(module: nn.Module, kind: Kind) -> Float[Tensor, "O I"]:
    """The matrix `W` of a site's module, detached, at least in float32."""
    weight = at_least_float32(module.get_parameter("weight").detach())
    return weight if kind.stores_out_in else weight.t()


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor`, with half precision widened: components are summed in float32 or better, whatever the target is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class Site(nn.Module):
    """One weight matrix `W: [O, I]` of the target, as `W = (V U)ᵀ + Δ`.

    The sums are those of Bushnaq et al. 2025 (SPD, arXiv 2506.20790); `Δ` is whatever the components leave over.
    A `V` that is the identity (neurons) and a `Δ` that is zero are not stored: they cost neither memory nor products.
    """

    U: Float[Tensor, "C O"]
    node_index: Int[Tensor, " C"]
    _V: Float[Tensor, "I C"] | None
    _delta: Float[Tensor, "O I"] | None

    def __init__(
        self,
        name: str,
        kind: Kind,
        V: Float[Tensor, "I C"] | None,
        U: Float[Tensor, "C O"],
        delta: Float[Tensor, "O I"] | None,
        node_index: Int[Tensor, " C"],
    ) -> None:
        """`V=None` is the identity, `delta=None` is zero; `node_index[c]` is the node that component `c` belongs to."""
        super().__init__()
        self.name = name
        self.kind = kind
        # In memory, U lies the way the target's own parameter does, so that the neuron basis adds like to like.
        laid_out = U.t().contiguous().t() if kind.stores_out_in and V is None else U.contiguous()
        self.register_buffer("_V", V)
        self.register_buffer("U", laid_out)
        self.register_buffer("_delta", delta)
        self.register_buffer("node_index", node_index)

    @property
    def V(self) -> Float[Tensor, "I C"]:  # noqa: N802 (the papers\' name, as U)
        """Read directions; made on the spot where they are the identity."""
        if self._V is None:
            return torch.eye(self.n_components, dtype=self.U.dtype, device=self.U.device)
        return self._V

    @property
    def delta(self) -> Float[Tensor, "O I"]:
        """What the components leave over; zeros made on the spot where nothing is."""
        return self.U.new_zeros(self.d_out, self.d_in) if self._delta is None else self._delta

    @property
    def has_delta(self) -> bool:
        return self._delta is not None

    @property
    def reads_columns(self) -> bool:
        """Whether `V` is the identity: each component reads one input column."""
        return self._V is None

    @property
    def n_components(self) -> int:
        return self.U.shape[0]

    @property
    def d_in(self) -> int:
        return self.n_components if self._V is None else self._V.shape[0]

    @property
    def d_out(self) -> int:
        return self.U.shape[1]

    def narrowed(self, components: Int[Tensor, " open"]) -> Site:
        """The site with some of its components, as if the others were left alone for good; the delta stays."""
        V = None if self._V is None else self._V[:, components]
        return Site(self.name, self.kind, V, self.U[components], self._delta, self.node_index[components])

    def weight_change(self, k: Float[Tensor, " C"] | None, k_delta: Float[Tensor, ""] | None) -> Tensor | None:
        """`W(m) - W` for one mask shared by all tokens, laid out as the target's parameter; None if nothing changes."""
        change = None
        if k is not None:
            U = at_least_float32(self.U)
            V = None if self._V is None else at_least_float32(self._V)
            if self.kind.stores_out_in:
                change = U.t() * k if V is None else U.t() @ (V * k).t()
            else:
                change = U * k[:, None] if V is None else (V * k) @ U
        if k_delta is not None and self.has_delta:
            delta = at_least_float32(self.delta if self.kind.stores_out_in else self.delta.t())
            change = delta * k_delta if change is None else torch.addcmul(change, delta, k_delta)
        return change

    def through(self, matrix: Tensor, x: Tensor) -> Float[Tensor, "*lead O"]:
        """`x`, vectors `[*lead, I]` or ids `[*lead]`, through a matrix laid out as the target's parameter."""
        if not x.is_floating_point():
            return F.embedding(x, matrix)
        return x.to(matrix.dtype) @ (matrix.t() if self.kind.stores_out_in else matrix)

    def output_change(
        self,
        x: Tensor,
        reference: Tensor | None,
        k: Float[Tensor, "#*lead C"] | None,
        k_delta: Float[Tensor, "#*lead 1"] | None,
    ) -> Float[Tensor, "*lead O"] | None:
        """What masks that differ between tokens add to the output of a site that reads `x`; None if nothing.

        `(k ⊙ (x - x̄)V) U + k_Δ (x - x̄)Δᵀ`, where `x` is `[*lead, I]` or, at an embedding, ids `[*lead]`;
        `reference` is `x̄`, vectors that broadcast against `[*lead, I]` or ids that broadcast against `[*lead]`,
        and None is zero.
        """
        change = None
        if k is not None:
            U = at_least_float32(self.U)
            if self._V is not None:
                change = (self._read(at_least_float32(self._V), x, reference) * k) @ U
            elif not self.kind.reads_ids:
                change = (_difference(x, reference).to(U.dtype) * k) @ U
            else:
                # One-hot activations over a whole vocabulary are never built: only the rows that are read count.
                change = _scaled_rows(U, x, k)
                if reference is not None and reference.is_floating_point():
                    change = change - (reference.to(U.dtype) * k) @ U
                elif reference is not None:
                    change = change - _scaled_rows(U, reference, k)
        if k_delta is not None and self.has_delta:
            from_delta = self._read(at_least_float32(self.delta).t(), x, reference) * k_delta
            change = from_delta if change is None else change + from_delta
        return change

    def _read(self, matrix: Float[Tensor, "I D"], x: Tensor, reference: Tensor | None) -> Float[Tensor, "*lead D"]:
        """`(x - x̄) @ matrix`, where ids stand for one-hot rows."""
        if not self.kind.reads_ids:
            return _difference(x, reference).to(matrix.dtype) @ matrix
        rows = F.embedding(x, matrix)
        if reference is None:
            return rows
        if reference.is_floating_point():
            return rows - reference.to(matrix.dtype) @ matrix
        return rows - F.embedding(reference, matrix)


def _difference(x: Tensor, reference: Tensor | None) -> Tensor:
    return x if reference is None else x - reference


def _scaled_rows(rows: Float[Tensor, "I O"], ids: Int[Tensor, "*lead"], k: Float[Tensor, "#*lead I"]) -> Tensor:
    """Row `ids` of `rows`, each times the entry of `k` for that token and that row: `[*lead, O]`.

    `k` is indexed, not expanded: its gradient then has its own size rather than tokens times vocabulary.
    """
    n_lead = k.ndim - 1
    at = [
        torch.arange(size, device=k.device).reshape([-1] + [1] * (n_lead - 1 - axis))
        for axis, size in enumerate(k.shape[:-1])
    ]
    return k[(*at, ids)].unsqueeze(-1) * F.embedding(ids, rows)
