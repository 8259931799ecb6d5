"""Targets on disk: a folder with `model.safetensors`, whose header also holds the sizes of the network.

Beside it, a shipped target has `config.yaml` (the run that made it) and its model card, `card.json` and `card.md`.
Nothing is ever unpickled.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pdprune.errors import UserError
from pdprune.files import write_atomically
from pdprune.targets.tokenizer import AsciiTokenizer
from pdprune.targets.transformer import Transformer, TransformerConfig

SHIPPED = Path(__file__).parent / "shipped"
"""Folder of the targets that come with the package, one folder each."""
WEIGHTS = "model.safetensors"
HEADER_KEY = "pdprune_transformer"
"""Key of the safetensors header under which the network's sizes stand, as JSON."""


class Target(NamedTuple):
    """A trained network with what is needed to feed it."""

    module: Transformer
    """The network, in eval mode, asking for no gradients."""
    tokenizer: AsciiTokenizer
    """Text to token ids and back."""
    name: str
    """Its folder's name."""
    max_length: int
    """Longest input, in tokens."""


def shipped_targets() -> list[str]:
    """Names of the targets that come with the package."""
    return sorted(folder.name for folder in SHIPPED.iterdir() if (folder / WEIGHTS).is_file())


def load_target(name_or_folder: str | Path) -> Target:
    """A shipped target by its name, or any target by its folder.

    Raises `UserError` for an unknown name, and for weights that are missing, damaged, of the wrong shape or not finite.
    """
    folder = SHIPPED / name_or_folder if str(name_or_folder) in shipped_targets() else Path(name_or_folder)
    path = folder / WEIGHTS
    if not path.is_file():
        names = ", ".join(shipped_targets())
        raise UserError(
            f"target {str(name_or_folder)!r}: no file {path}, expected one of {names}, or a folder with {WEIGHTS}"
        )
    config, state = _read(path)
    module = Transformer(config)
    _check(path, module.state_dict(), state)
    module.load_state_dict(state)
    module.eval().requires_grad_(False)
    return Target(module, AsciiTokenizer(), folder.resolve().name, config.max_length)


def save_target(network: Transformer, folder: Path) -> None:
    """Write the network as `folder/model.safetensors`, for `load_target`."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    header = {HEADER_KEY: json.dumps(asdict(network.config))}
    write_atomically(folder / WEIGHTS, save(state, metadata=header))


def _read(path: Path) -> tuple[TransformerConfig, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER_KEY)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"target {path}: not a readable safetensors file ({error}), expected a target's weights"
        ) from None
    try:
        return TransformerConfig(**json.loads(header or "")), state
    except (ValueError, TypeError) as error:
        raise UserError(f"target {path}: no usable sizes under {HEADER_KEY!r} in its header ({error})") from None


def _check(path: Path, expected: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    for name in expected.keys() ^ state.keys():
        where = "missing" if name in expected else "not a parameter of the network"
        raise UserError(f"target {path}: {name} is {where}, expected the parameters that its header's sizes make")
    for name, tensor in expected.items():
        got = state[name]
        if got.shape != tensor.shape:
            raise UserError(f"target {path}: {name} has shape {list(got.shape)}, expected {list(tensor.shape)}")
        if not torch.isfinite(got).all():
            raise UserError(f"target {path}: {name} has NaN or infinite values, expected finite weights")
