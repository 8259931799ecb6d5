"""Training toys: tied matrices stay tied, what is fixed stays fixed, and a run resumed ends like one that was not."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pdprune.errors import UserError
from pdprune.targets import (
    TMS,
    InductionConfig,
    InductionSequences,
    InductionTransformer,
    ResidualMLP,
    ResidualMLPConfig,
    SparseFeatures,
    TMSConfig,
    ToyTrainer,
    load_target,
)
from pdprune.targets.toy_data import DrawnData
from pdprune.targets.toy_training import toy_loss
from pdprune.targets.toys import Toy

# 2026-11, until Lightning follows torch 2.13: it asks for the type of tree specs in a way that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


def trainer_in(folder: Path, max_steps: int, **options: object) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(default_root_dir=folder, accelerator="cpu", max_steps=max_steps, **{**quiet, **options})


def train(network: Toy, data: DrawnData, folder: Path, max_steps: int = 150, **settings: object) -> ToyTrainer:
    model = ToyTrainer(network, lr=1e-2, **settings)
    trainer_in(folder, max_steps, enable_checkpointing=False).fit(model, data)
    return model


CASES = {
    "tms": (lambda: TMS(TMSConfig(5, 3)), SparseFeatures(5, batch_size=64)),
    "residual_mlp": (
        lambda: ResidualMLP(ResidualMLPConfig(n_features=5, d_embed=6, d_mlp=5)),
        SparseFeatures(5, 0.3, low=-1.0, batch_size=64),
    ),
    "induction": (
        lambda: InductionTransformer(InductionConfig(vocab_size=6, max_length=6, d_model=16)),
        InductionSequences(6, 6, batch_size=64),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_falls_and_the_result_can_be_loaded(name: str, tmp_path: Path) -> None:
    make, data = CASES[name]
    torch.manual_seed(1)
    network = make()
    batch = data.batch("held_out", 0)
    before = toy_loss(network, batch).item()
    model = train(network, data, tmp_path, schedule="cosine", warmup=0.1)
    after = toy_loss(network, batch).item()
    assert after < 0.8 * before
    model.finish(data, tmp_path)
    assert toy_loss(load_target(tmp_path / "target").module, batch).item() == pytest.approx(after, rel=1e-5)
    told = json.loads((tmp_path / "representation.json").read_text())
    assert told["represents_every_feature"] == (not told["missing"])


def test_tied_matrices_are_each_other_s_transpose_and_learn_from_both_places(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = TMS(TMSConfig(5, 2))
    batch = SparseFeatures(5, 0.5).batch("train", 0)
    toy_loss(network, batch).backward()
    x, W, b = batch["inputs"], network.linear1.weight.detach().clone().requires_grad_(), network.linear2.bias.detach()
    ((x @ W.t() @ W + b).relu() - x).square().mean().backward()
    torch.testing.assert_close(network.linear1.weight.grad, W.grad)
    train(network, SparseFeatures(5, batch_size=64), tmp_path, max_steps=3)
    assert torch.equal(network.linear2.weight, network.linear1.weight.t())


def test_the_embedding_stays_as_it_was(tmp_path: Path) -> None:
    network = ResidualMLP(ResidualMLPConfig(n_features=5, d_embed=6, d_mlp=4))
    before = network.W_E.clone()
    train(network, SparseFeatures(5, batch_size=16), tmp_path, max_steps=3)
    assert torch.equal(network.W_E, before) and torch.equal(network.W_U, before.t())


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    def trained(run: str, ckpt_path: Path | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        saved = ModelCheckpoint(dirpath=tmp_path / run, every_n_train_steps=10, save_top_k=-1, filename="{step}")
        model = ToyTrainer(TMS(TMSConfig(5, 2)), schedule="cosine")
        data = SparseFeatures(5, batch_size=16, steps_per_epoch=7)
        trainer_in(tmp_path, 20, callbacks=[saved]).fit(model, data, ckpt_path=ckpt_path, weights_only=True)
        return model.state_dict()

    whole = trained("first", None)
    resumed = trained("second", tmp_path / "first" / "step=10.ckpt")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"schedule": "linear"}, "schedule"), ({"warmup": 1.0}, "warmup"), ({"lr": 0.0}, "lr: got 0.0")],
)
def test_settings_that_cannot_be_are_refused(settings: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        ToyTrainer(TMS(), **settings)


def test_training_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_steps"):
        trainer_in(tmp_path, -1, max_epochs=-1, enable_checkpointing=False).fit(ToyTrainer(TMS()), SparseFeatures(5))
