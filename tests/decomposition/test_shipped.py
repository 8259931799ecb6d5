"""The decomposition that ships is what its card says."""

from __future__ import annotations

import json

import pytest
import torch
from jaxtyping import Int
from torch import Tensor

from pdprune import load_decomposition
from pdprune.adversary.objective import MaskedLoss
from pdprune.batches import as_batch
from pdprune.decomposition.bases import decompose
from pdprune.decomposition.importances import importance_mask
from pdprune.decomposition.strongest import strongest
from pdprune.targets.store import SHIPPED
from pdprune.tasks import TaskData

FOLDER = SHIPPED / "dense-py" / "decomposition"


def test_it_sums_to_the_target_and_few_components_matter() -> None:
    model = load_decomposition("dense-py")
    card = json.loads((FOLDER / "card.json").read_text())
    own = card["rows"][0]
    assert model.n_nodes == own["n_components"]
    for name, site in model.sites.items():
        weight = model.target.get_submodule(name).get_parameter("weight")
        assert torch.allclose((site.V @ site.U).t() + site.delta, weight, atol=1e-6)
        assert float(site.delta.norm() / weight.norm()) == pytest.approx(own["sites"][name]["left_over"], rel=1e-3)

    mask = importance_mask(model, windows())
    assert float((mask > 0).sum(-1).float().mean()) == pytest.approx(own["l0"], rel=0.2)  # other text than the card's


def test_at_its_size_it_loses_less_than_svd() -> None:
    learned = load_decomposition("dense-py")
    mask = importance_mask(learned, windows())
    counts = {
        name: round(float((mask[..., site.node_index] > 0).sum(-1).float().mean()))
        for name, site in learned.sites.items()
    }
    svd = decompose(learned.target, learned.site_names, "svd")
    lost = {}
    for model, kept in ((learned, mask), (svd, strongest(svd, windows(), counts))):
        loss = MaskedLoss(model, as_batch({"inputs": windows()}), "kl")
        lost[model] = float(loss.per_example(kept, torch.zeros(model.n_sites)).mean())
    assert lost[learned] < 0.5 * lost[svd]


def windows() -> Int[Tensor, "B T"]:
    """Held-out text."""
    batches = TaskData("text", "dense-py").held_out_batches()
    return torch.cat([batch["inputs"]["input_ids"] for batch in batches])[:64]
