"""Targets on disk: a folder with `model.safetensors`, whose header says which network it is and of what sizes.

Beside it, one that reads byte pairs has its vocabulary, `tokenizer.json`, and a shipped target has `config.yaml` (the
run that made it) and its model card, `card.json` and `card.md`.
A folder with `config.json` is a causal language model of the Hugging Face kind (`huggingface.py`).
Nothing is ever unpickled.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pdprune.errors import UserError
from pdprune.files import read_bytes, write_atomically
from pdprune.targets import byte_pairs
from pdprune.targets.huggingface import hugging_face_reader, is_hugging_face, load_hugging_face
from pdprune.targets.reader import Reader, Tokenizer
from pdprune.targets.tokenizer import AsciiTokenizer
from pdprune.targets.toys import (
    TMS,
    InductionConfig,
    InductionTransformer,
    ResidualMLP,
    ResidualMLPConfig,
    TMSConfig,
)
from pdprune.targets.transformer import Transformer, TransformerConfig

SHIPPED = Path(__file__).parent / "shipped"
"""Folder of the targets that come with the package, one folder each."""
WEIGHTS = "model.safetensors"
VOCABULARY = "tokenizer.json"


class Target(NamedTuple):
    """A trained network with what is needed to feed it."""

    module: nn.Module
    """The network, in eval mode, asking for no gradients. One that we know has its sizes in `config`."""
    tokenizer: Tokenizer | None
    """Text to token ids and back; None for a network that reads no text."""
    name: str
    """Its folder's name."""
    max_length: int | None
    """Longest input, in tokens; None where there is no limit, and for a network that reads no sequences."""


class Architecture(NamedTuple):
    """A kind of network that can be stored."""

    module: Callable[[Any], nn.Module]
    config: Callable[..., Any]
    tokenizer: type[AsciiTokenizer] | None = None


ARCHITECTURES = {
    "pdprune_transformer": Architecture(Transformer, TransformerConfig, AsciiTokenizer),
    "pdprune_tms": Architecture(TMS, TMSConfig),
    "pdprune_residual_mlp": Architecture(ResidualMLP, ResidualMLPConfig),
    "pdprune_induction": Architecture(InductionTransformer, InductionConfig),
}
"""By the key of the safetensors header under which the network's sizes stand, as JSON."""


def shipped_targets() -> list[str]:
    """Names of the targets that come with the package."""
    return sorted(folder.name for folder in SHIPPED.iterdir() if (folder / WEIGHTS).is_file())


def load_target(name_or_folder: str | Path) -> Target:
    """A shipped target by its name, or any target by its folder: one of ours, or a Hugging Face model's.

    Raises `UserError` for an unknown name, and for weights that are missing, damaged, of the wrong shape or not finite.
    """
    folder = _folder(name_or_folder)
    if is_hugging_face(folder):
        return Target(load_hugging_face(folder), *hugging_face_reader(folder))
    path = folder / WEIGHTS
    if not path.is_file():
        names = ", ".join(shipped_targets())
        raise UserError(
            f"target {str(name_or_folder)!r}: no file {path}, expected one of {names}, or a folder with {WEIGHTS}"
        )
    architecture, config, state = _read(path)
    with torch.random.fork_rng(devices=[]):  # what a module draws when it is made is about to be replaced
        module = architecture.module(config)
    _check(path, module.state_dict(), state)
    module.load_state_dict(state)
    module.eval().requires_grad_(False)
    tokenizer = _tokenizer(folder, architecture, config)
    return Target(module, tokenizer, folder.resolve().name, getattr(config, "max_length", None))


def load_reader(name_or_folder: str | Path) -> Reader:
    """What it takes to feed a target. The weights of a Hugging Face model, which may be large, are not read for it.

    Raises `UserError` as `load_target` does.
    """
    folder = _folder(name_or_folder)
    if is_hugging_face(folder):
        return hugging_face_reader(folder)
    target = load_target(name_or_folder)
    return Reader(target.tokenizer, target.name, target.max_length)


def save_target(network: nn.Module, folder: Path, tokenizer_json: str | None = None) -> None:
    """Write a network of one of the known architectures as `folder/model.safetensors`, for `load_target`.

    Args:
        network: what was trained.
        folder: it is made if it is not there.
        tokenizer_json: the vocabulary of byte pairs that it reads, if it does.
    """
    key = next(key for key, architecture in ARCHITECTURES.items() if type(network) is architecture.module)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    header = {key: json.dumps(asdict(cast(Any, network.config)))}
    if tokenizer_json is not None:
        write_atomically(folder / VOCABULARY, tokenizer_json.encode())
    write_atomically(folder / WEIGHTS, save(state, metadata=header))


def _folder(name_or_folder: str | Path) -> Path:
    return SHIPPED / name_or_folder if str(name_or_folder) in shipped_targets() else Path(name_or_folder)


def _tokenizer(folder: Path, architecture: Architecture, config: Any) -> Tokenizer | None:
    if architecture.tokenizer is None:
        return None
    vocabulary = folder / VOCABULARY
    if vocabulary.is_file():
        return byte_pairs.tokenizer_from(read_bytes(vocabulary).decode(), str(vocabulary), config.vocab_size)
    return architecture.tokenizer()


def _read(path: Path) -> tuple[Architecture, Any, dict[str, Tensor]]:
    """What is stored: the kind of network, its sizes and its parameters."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"target {path}: not a readable safetensors file ({error}), expected a target's weights"
        ) from None
    key = next((key for key in ARCHITECTURES if key in header), None)
    if key is None:
        raise UserError(
            f"target {path}: its header names no network, expected one of {', '.join(ARCHITECTURES)}, or config.json "
            "beside it, of a Hugging Face model"
        )
    try:
        return ARCHITECTURES[key], ARCHITECTURES[key].config(**json.loads(header[key])), state
    except (ValueError, TypeError) as error:
        raise UserError(f"target {path}: no usable sizes under {key!r} in its header ({error})") from None


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
