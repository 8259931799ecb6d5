"""How the shipped targets were trained: AdamW on the next token, optionally with few non-zero weights.

Weight sparsity follows Gao et al. 2025 (arXiv 2511.13653): after every optimiser step each matrix keeps its entries of
largest magnitude and the rest are set to zero; the fraction kept falls during training. Differences: it falls
geometrically, not linearly; biases and norm gains stay dense; there is no minimum per row.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from pdprune.errors import UserError, require_above, require_at_least, require_share
from pdprune.ranks import Ranks, require_whole_model
from pdprune.targets.store import save_target
from pdprune.targets.transformer import Transformer, TransformerConfig


@dataclass(frozen=True)
class WeightSparsity:
    """Keep the largest weights of each matrix: all of them at first, `final_fraction` of them in the end."""

    final_fraction: float = 1 / 16
    """Fraction of the entries of each matrix that may be non-zero at the end."""
    decay_start: float = 0.05
    """Share of the training steps after which the fraction starts to fall."""
    decay_end: float = 0.5
    """Share of the training steps after which it has reached `final_fraction`."""

    def __post_init__(self) -> None:
        if not 0 < self.final_fraction <= 1:
            raise UserError(f"sparsity: final_fraction is {self.final_fraction}, expected above 0 and at most 1")
        if not 0 <= self.decay_start < self.decay_end <= 1:
            raise UserError(
                f"sparsity: decay_start {self.decay_start} and decay_end {self.decay_end}, "
                "expected 0 <= decay_start < decay_end <= 1"
            )

    def fraction_at(self, progress: float) -> float:
        """The fraction kept when this share of the training steps is done."""
        decayed = (progress - self.decay_start) / (self.decay_end - self.decay_start)
        return self.final_fraction ** min(1.0, max(0.0, decayed))


class TargetTrainer(LightningModule):
    """Trains a `Transformer` to predict the next token, which for the targets that ship is a byte.

    The learning rate rises linearly over `warmup` of the steps, then falls along a cosine to `final_lr` of its peak.
    Logs `train_loss` and `val_loss` in nats per token, and `kept` (fraction of the matrices' entries that may be
    non-zero) if sparse.

    Args:
        model: sizes of the network.
        sparsity: keep only the largest weights of each matrix; none for a dense network.
        lr: peak learning rate.
        weight_decay: AdamW's, on matrices only.
        warmup: share of the steps.
        final_lr: share of `lr` at the last step.
    """

    def __init__(
        self,
        model: TransformerConfig = TransformerConfig(),
        sparsity: WeightSparsity | None = None,
        lr: float = 3e-3,
        weight_decay: float = 0.1,
        warmup: float = 0.02,
        final_lr: float = 0.02,
    ) -> None:
        super().__init__()
        require_above(0, "target training: ", lr=lr)
        require_at_least(0, "target training: ", weight_decay=weight_decay)
        require_share("target training: ", final_lr=final_lr)
        if not 0 <= warmup < 1:
            raise UserError(f"target training: warmup: got {warmup}; expected a share of the steps, 0 <= warmup < 1")
        self.hparams.update(
            model=asdict(model),
            sparsity=asdict(sparsity) if sparsity else None,
            lr=lr,
            weight_decay=weight_decay,
            warmup=warmup,
            final_lr=final_lr,
        )
        self.network = Transformer(model)
        self.sparsity = sparsity
        self.lr = lr
        self.weight_decay = weight_decay
        self.warmup = warmup
        self.final_lr = final_lr

    def setup(self, stage: str) -> None:
        """Lightning's hook: what is trained is written whole."""
        require_whole_model(self.trainer)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Float[Tensor, ""]:
        """The mean loss of the whole batch, on all ranks, in nats per token."""
        loss = Ranks.of(self._trainer).mean(next_token_loss(self.network, batch), batch["labels"].numel())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Logs the held-out loss, in nats per token."""
        loss = next_token_loss(self.network, batch)
        self.log("val_loss", loss, prog_bar=True, batch_size=len(batch["labels"]))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimiser's step, after which only the largest weights survive.

        Not in `on_train_batch_end`: callbacks come before it there, so checkpoints would hold the others too.
        """
        super().optimizer_step(*args, **kwargs)
        if self.sparsity is not None:
            keep_largest(self.network, self.sparsity.fraction_at((self.global_step + 1) / self._total_steps()))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Logs the fraction kept."""
        if self.sparsity is not None:
            self.log("kept", self.sparsity.fraction_at(self.global_step / self._total_steps()), prog_bar=True)

    def finish(self, datamodule: LightningDataModule, folder: Path) -> None:
        """Writes the trained network to `target/` in the run folder, ready for `load_target`.

        The command line calls this at the end of a fit.
        """
        if self.trainer.is_global_zero:
            save_target(self.network, folder / "target", getattr(datamodule, "tokenizer_json", None))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, with warm-up and cosine stepped with the optimiser."""
        matrices = {id(parameter) for parameter in matrices_of(self.network).values()}
        decayed = [p for p in self.network.parameters() if id(p) in matrices]
        others = [p for p in self.network.parameters() if id(p) not in matrices]
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=self.lr,
            betas=(0.9, 0.95),
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        progress = (step + 1) / self._total_steps()
        if progress < self.warmup:
            return progress / self.warmup
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - self.warmup) / (1 - self.warmup))))
        return self.final_lr + (1 - self.final_lr) * cosine

    def _total_steps(self) -> int:
        total = self.trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise UserError("target training: the number of steps is open, expected trainer.max_steps or max_epochs")
        return int(total)


def next_token_loss(network: nn.Module, batch: dict[str, Any]) -> Float[Tensor, ""]:
    """Cross-entropy of the next token, averaged over all positions, in nats."""
    logits_BTV = network(**batch["inputs"])
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), batch["labels"].flatten())


def matrices_of(network: nn.Module) -> dict[str, Tensor]:
    """The weight matrices, by the path of the module that holds each."""
    return {
        name: module.weight for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Embedding)
    }


@torch.no_grad()
def keep_largest(network: nn.Module, fraction: float) -> None:
    """Set to zero, in every matrix, all but the `fraction` of entries of largest magnitude (at least one)."""
    for weight in matrices_of(network).values():
        n_dropped = weight.numel() - max(1, int(fraction * weight.numel()))
        if n_dropped:
            threshold = weight.abs().flatten().kthvalue(n_dropped).values
            weight.mul_(weight.abs() > threshold)
