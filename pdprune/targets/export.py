"""Ships a trained target: `python -m pdprune.targets.export RUN NAME [--note TEXT] [--out FOLDER]`.

RUN is the run folder of `python -m pdprune.train fit --config configs/targets/<name>.yaml`. What comes out is a folder
with the weights, the config and the model card: by default inside the package, where `load_target(NAME)` finds it.
"""

import argparse
import json
import sys
from pathlib import Path

from pdprune.errors import UserError
from pdprune.files import read_bytes, write_atomically
from pdprune.targets import language_card, toy_card
from pdprune.targets.store import SHIPPED, VOCABULARY, WEIGHTS, load_target
from pdprune.targets.toys import Toy

CONFIG = "config.yaml"


def export(run: Path, name: str, out: Path = SHIPPED, note: str = "") -> Path:
    """Write the folder `out/name` from the run folder of a finished training; returns it.

    `note` is what the card shall say about the training beyond its config.

    Raises `UserError` if the run folder lacks the trained target or its config.
    """
    folder = out / name
    write_atomically(folder / WEIGHTS, read_bytes(run / "target" / WEIGHTS))
    if (run / "target" / VOCABULARY).is_file():
        write_atomically(folder / VOCABULARY, read_bytes(run / "target" / VOCABULARY))
    write_atomically(folder / CONFIG, without_place(read_bytes(run / CONFIG)))
    kind = toy_card if isinstance(load_target(folder).module, Toy) else language_card
    card = {**kind.model_card(folder), "note": note}
    write_atomically(folder / "card.json", (json.dumps(card, indent=2) + "\n").encode())
    write_atomically(folder / "card.md", kind.card_text(card).encode())
    return folder


def without_place(config: bytes) -> bytes:
    """A run's config without the folder it ran in, which is nobody else's business."""
    lines = config.decode().splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("  default_root_dir:")).encode()


def main() -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pdprune.targets.export", description="Ship a trained target.")
    parser.add_argument("run", type=Path, help="run folder of the training")
    parser.add_argument("name", help="name to load it by")
    parser.add_argument("--note", default="", help="what the card shall say about the training beyond its config")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of targets to write to")
    arguments = parser.parse_args()
    try:
        print(export(arguments.run, arguments.name, arguments.out, arguments.note))
    except UserError as error:
        print(f"pdprune: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
