"""The attacks that an audit has made so far, so that one that is stopped goes on where it was.

They are most of an audit, and follow from one another: made again from what the first ones found, the next is the same.
So each is kept in the run's checkpoint once it is done. What is quickly read is read again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from pdprune.adversary.attack import Worst
from pdprune.adversary.game import Game
from pdprune.circuits.journal import SavesNowAndThen

MOST_ENTRIES = 2**24
"""Of all sources that are kept: where they differ between tokens they are large, and are found again instead."""


@dataclass
class AttackJournal:
    """The outcomes of an audit's attacks.

    Attributes:
        about: a fingerprint of all that they follow from, but for the model.
        found: by number, in the order in which they are asked for: the worst source and the losses under it.
    """

    about: str = ""
    found: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def begin(self, about: str) -> None:
        """Forget what was found if it was about something else."""
        if self.about != about:
            self.about, self.found = about, {}

    def has_room_for(self, source: Tensor) -> bool:
        """Whether all sources together stay small enough to be saved again and again."""
        return sum(entries.numel() for entries, _ in self.found.values()) + source.numel() <= MOST_ENTRIES


class Attacks:
    """Makes the attacks of one audit, or knows their outcome from a journal.

    Args:
        journal: may hold what an earlier, stopped audit found; None where nothing is kept.
        save: puts the journal where it outlives the process; called now and then.
    """

    def __init__(self, journal: AttackJournal | None = None, save: Callable[[], None] = lambda: None) -> None:
        self._journal = journal
        self._save = SavesNowAndThen(save)
        self._asked = 0

    def begin(self, about: Callable[[], str]) -> None:
        """Say what the attacks will be about."""
        if self._journal is not None:
            self._journal.begin(about())

    def made(self, game: Game, attack: Callable[[], Worst]) -> Worst:
        """What an attack on a game finds."""
        number, journal = self._asked, self._journal
        self._asked += 1
        if journal is not None and number in journal.found:
            entries, losses = (kept.to(game.free.device) for kept in journal.found[number])
            return Worst(game, entries, losses)
        worst = attack()
        if journal is not None and journal.has_room_for(worst.entries):
            journal.found[number] = worst.entries.detach().cpu(), worst.losses.detach().cpu()
            self._save()
        return worst
