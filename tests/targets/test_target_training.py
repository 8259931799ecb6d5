"""Training: the loss falls, sparse training keeps its promise, an interrupted run ends like an uninterrupted one."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from pdprune.errors import UserError
from pdprune.targets import StdlibCorpus, TargetTrainer, TransformerConfig, WeightSparsity, load_target
from pdprune.targets.training import keep_largest, matrices_of, next_token_loss

# 2026-11, until Lightning follows torch 2.13: it asks for the type of tree specs in a way that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

SIZES = TransformerConfig(max_length=16, n_layers=1, n_heads=2, d_model=16, d_mlp=32)
SPARSE = WeightSparsity(final_fraction=0.1, decay_start=0.1, decay_end=0.6)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    for i in range(12):
        (folder / f"module{i}.py").write_text("def f(x):\n    return x\n\n" * 20)
    return folder


def trainer_in(folder: Path, max_steps: int, **options: object) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(default_root_dir=folder, accelerator="cpu", max_steps=max_steps, **{**quiet, **options})


def corpus_of(library: Path) -> StdlibCorpus:
    return StdlibCorpus(str(library), window=16, batch_size=8, val_batches=1, steps_per_epoch=7)


def train(library: Path, folder: Path, sparsity: WeightSparsity | None, max_steps: int = 40) -> TargetTrainer:
    torch.manual_seed(1)
    model = TargetTrainer(SIZES, sparsity, lr=1e-2)
    trainer_in(folder, max_steps, enable_checkpointing=False).fit(model, corpus_of(library))
    return model


def test_the_loss_falls_and_the_result_can_be_loaded(library: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    untrained = TargetTrainer(SIZES)
    model = train(library, tmp_path, None)
    batch = corpus_of(library).batch("val", 0)
    assert next_token_loss(model.network, batch) < 0.5 * next_token_loss(untrained.network, batch)
    model.finish(corpus_of(library), tmp_path)
    target = load_target(tmp_path / "target")
    torch.testing.assert_close(target.module(**batch["inputs"]), model.network(**batch["inputs"]))


def test_after_sparse_training_no_matrix_has_more_weights_than_promised(library: Path, tmp_path: Path) -> None:
    model = train(library, tmp_path, SPARSE)
    for name, weight in matrices_of(model.network).items():
        assert 0 < weight.count_nonzero() <= SPARSE.final_fraction * weight.numel(), name


def test_the_largest_weights_are_the_ones_kept() -> None:
    module = torch.nn.Linear(4, 2)
    module.weight.data = torch.tensor([[0.1, -5.0, 0.2, 3.0], [-0.3, 0.0, 4.0, -0.4]])
    keep_largest(module, 3 / 8)
    assert module.weight.tolist() == [[0, -5, 0, 3], [0, 0, 4, 0]]


def test_the_fraction_kept_falls_from_all_to_final() -> None:
    progress = [i / 20 for i in range(21)]
    fractions = [SPARSE.fraction_at(p) for p in progress]
    assert fractions == sorted(fractions, reverse=True)
    assert fractions[2] == 1 and fractions[12] == pytest.approx(0.1) and fractions[-1] == pytest.approx(0.1)


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_an_interrupted_run_ends_like_an_uninterrupted_one(library: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    first, second = (
        ModelCheckpoint(dirpath=tmp_path / run, every_n_train_steps=10, save_top_k=-1, filename="{step}")
        for run in ("first", "second")
    )
    whole = TargetTrainer(SIZES, SPARSE)
    trainer_in(tmp_path, 20, callbacks=[first]).fit(whole, corpus_of(library))
    resumed = TargetTrainer(SIZES, SPARSE)
    trainer_in(tmp_path, 20, callbacks=[second]).fit(
        resumed, corpus_of(library), ckpt_path=tmp_path / "first" / "step=10.ckpt"
    )
    for (name, expected), got in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(expected, got), name


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"final_fraction": 0.0}, "final_fraction"),
        ({"final_fraction": 1.5}, "final_fraction"),
        ({"decay_start": 0.6, "decay_end": 0.5}, "decay_start"),
    ],
)
def test_impossible_sparsity_is_refused(arguments: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        WeightSparsity(**arguments)


def test_training_without_an_end_is_refused(library: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_steps"):
        trainer_in(tmp_path, -1, max_epochs=-1, enable_checkpointing=False).fit(
            TargetTrainer(SIZES), corpus_of(library)
        )


@pytest.mark.parametrize("settings", [{"lr": 0.0}, {"weight_decay": -1.0}, {"warmup": 1.0}, {"final_lr": 2.0}])
def test_settings_that_cannot_be_are_refused(settings: dict[str, float]) -> None:
    (name,) = settings
    with pytest.raises(UserError, match=f"target training: {name}: got"):
        TargetTrainer(**settings)
