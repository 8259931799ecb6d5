"""Causal language models of the Hugging Face kind, from a local folder and from nowhere else.

What is read is what `save_pretrained` writes: `config.json`, weights as safetensors, and the files of the tokenizer.
The network is never asked, no code of the folder's own is run, nothing is unpickled.

A model runs in float32, so that the masks of a circuit are not lost in the rounding of half precision, without
dropout and without a cache, and with the plain implementation of attention: every architecture has that one, and on a
GPU the gradients of some fused ones differ from run to run. Padding may be on either side, as the model's tokenizer has
it: positions are counted from the first token that is none.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from pdprune.errors import UserError
from pdprune.files import read_bytes
from pdprune.targets.huggingface_tokenizer import HuggingFaceTokenizer
from pdprune.targets.reader import Reader

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "tf_model.h5", "flax_model.msgpack")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model", "vocab.txt")
ADAPTER = "adapter_config.json"
LOCAL_ONLY = {"local_files_only": True, "trust_remote_code": False}
LONGEST_BELIEVED = 10**9
"""Tokenizers without a limit say 10³⁰."""


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder is one that `save_pretrained` wrote, as far as its files' names tell."""
    return (folder / CONFIG).is_file()


def load_hugging_face(folder: Path) -> nn.Module:
    """The causal language model in a folder, in eval mode, asking for no gradients; its output has `.logits`.

    Raises:
        UserError: `transformers` is not installed, weights are missing, pickled, quantized or damaged, or the folder
            holds something else than a causal language model, or one that needs code of its own.
    """
    transformers = _transformers(folder)
    _require_weights(folder)
    config = _config(folder)
    with _told_in_one_line(folder), torch.random.fork_rng(devices=[]):
        module, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="eager",
            ignore_mismatched_sizes=True,  # they are in the report, by name
            output_loading_info=True,
            **LOCAL_ONLY,
        )
    _require_complete(folder, report)
    module.config.use_cache = False
    if _takes_positions(module):
        module.register_forward_pre_hook(_count_positions, with_kwargs=True)
    return module.eval().requires_grad_(False)


def hugging_face_reader(folder: Path) -> Reader:
    """What it takes to feed the model in a folder. Its weights are not read.

    Raises:
        UserError: `transformers` is not installed, or a file is missing or damaged. A folder that lacks a tokenizer
            altogether is not refused.
    """
    transformers = _transformers(folder)
    config = _config(folder)
    name = folder.resolve().name
    sizes = config.get_text_config()  # itself, but for models that read more than text
    longest = getattr(sizes, "max_position_embeddings", None)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return Reader(None, name, longest)
    with _told_in_one_line(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **LOCAL_ONLY)
    # Without position_ids nothing tells the model where a text begins that is padded on the left.
    model_class = getattr(transformers, _causal_models()[config.model_type])
    side: Literal["left", "right"] = tokenizer.padding_side if _takes_positions(model_class) else "right"
    if longest is None and tokenizer.model_max_length < LONGEST_BELIEVED:
        longest = tokenizer.model_max_length
    return Reader(HuggingFaceTokenizer(tokenizer, sizes.vocab_size, side), name, longest)


def _transformers(folder: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"target {folder}: reading a Hugging Face model needs transformers ({error}); install it with "
            "pip install 'pdprune[hf]'"
        ) from None
    return transformers


def _require_weights(folder: Path) -> None:
    if any((folder / file).is_file() for file in WEIGHTS):
        return
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"target {folder}: its weights are pickled ({pickled[0]}), which could run any code when read; expected "
            "model.safetensors: convert them where you trust them, with save_pretrained(folder)"
        )
    raise UserError(f"target {folder}: there is a {CONFIG}, but no weights; expected {' or '.join(WEIGHTS)}")


def _config(folder: Path) -> Any:
    """What the folder says about its model, once nothing in it asks for what can't be done."""
    transformers = _transformers(folder)
    stored = _stored_config(folder)
    model_type = stored.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"target {folder}: {CONFIG} has model_type {model_type!r}, which transformers "
            f"{transformers.__version__} does not know; expected one that it does: code in the folder is never run"
        )
    causal, told = _causal_models().get(model_type), stored.get("architectures")
    saved_as = told if isinstance(told, list) else []
    if causal is None or (saved_as and causal not in saved_as):
        holds = saved_as[0] if saved_as else model_type
        here = f", here a {causal}" if causal else ""
        raise UserError(f"target {folder}: it holds a {holds}; expected a causal language model{here}")
    if stored.get("quantization_config") is not None:
        raise UserError(
            f"target {folder}: its weights are quantized, which leaves no matrix to decompose; expected the model as "
            "it was before"
        )
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"target {folder}: it holds an adapter ({ADAPTER}); expected one merged into the model's weights"
        )
    with _told_in_one_line(folder):
        return transformers.AutoConfig.from_pretrained(folder, **LOCAL_ONLY)


def _causal_models() -> dict[str, str]:
    """For each type of model the class of its causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _stored_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        stored = json.loads(read_bytes(path))
    except ValueError as error:
        raise UserError(f"target {path}: damaged, or no JSON ({error}); expected what save_pretrained wrote") from None
    if not isinstance(stored, dict):
        raise UserError(f"target {path}: a JSON {type(stored).__name__}; expected what save_pretrained wrote")
    return stored


def _require_complete(folder: Path, report: dict[str, Any]) -> None:
    """Refuse what `transformers` lets pass: weights that it drew at random, or that it left unread."""
    for fault, keys in (
        ("lacks", report["missing_keys"]),
        ("has in another shape", report["mismatched_keys"]),
        ("has too much of", report["unexpected_keys"]),
    ):
        if keys:
            names = sorted(key if isinstance(key, str) else key[0] for key in keys)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"target {folder}: for the network of its {CONFIG}, its safetensors file {fault} {names[0]}{more}; "
                "expected config and weights of one save_pretrained"
            )


def _takes_positions(model: Any) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def _count_positions(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Give a model the position of every token, for each example: `transformers` counts padding on the left as well.

    Also where there is no padding: a site that reads positions then reads as many examples as all the others.
    """
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    ids: Int[Tensor, "B T"] | None = given.get("input_ids")
    if ids is None or "position_ids" in given or given.get("past_key_values") is not None:
        return None
    mask = given.get("attention_mask")
    read = torch.ones_like(ids) if mask is None else mask.long()
    return args, {**kwargs, "position_ids": (read.cumsum(-1) - 1).clamp(min=0)}


@contextmanager
def _told_in_one_line(folder: Path) -> Iterator[None]:
    """Keep `transformers` quiet, and turn whatever it finds wrong with a folder, of many types, into a `UserError`."""
    from transformers.utils import logging

    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"target {folder}: not a causal language model that can be loaded ({reason})") from error
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()
