from __future__ import annotations

import torch
from decomposition.small_nets import VOCAB, small_lm
from hypothesis import given
from hypothesis import strategies as st

from pdprune.decomposition.bases import decompose
from pdprune.decomposition.strongest import strongest


@given(seed=st.integers(0, 1000), count=st.integers(0, 40))
def test_those_that_write_most_are_kept(seed: int, count: int) -> None:
    model = decompose(small_lm(seed).float(), ["*down", "*up"], "svd")
    tokens = torch.randint(0, VOCAB, (2, 3), generator=torch.Generator().manual_seed(seed))
    kept = strongest(model, tokens, dict.fromkeys(model.site_names, count))
    for name, site in model.sites.items():
        x = model.site_inputs(tokens)[name]
        n_kept = min(count, site.n_components)
        for example in range(2):
            for position in range(3):
                writes = torch.stack([(x[example, position] @ v) * u for v, u in zip(site.V.t(), site.U, strict=True)])
                order = writes.norm(dim=-1).argsort(descending=True)
                own = kept[example, position, site.node_index]
                assert own.sum() == n_kept
                assert own[order[:n_kept]].all()
