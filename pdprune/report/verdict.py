"""What an audit found, in sentences that hold no more than it does."""

from __future__ import annotations

import shlex
from pathlib import Path

from pdprune.circuits.findings import Audit
from pdprune.circuits.importing import FOUND_ELSEWHERE
from pdprune.report.figures import Check, Standing, Verdict

LOSS_NAMES = {"kl": "KL to the model", "ce": "cross-entropy", "mse": "mean squared distance from the model"}
UNITS = {"kl": " nats", "ce": " nats"}
SCHEMES = {
    "complete": "with complete ablation",
    "stochastic": "with random ablation",
    "adversarial": "adversarially",
    FOUND_ELSEWHERE: "found elsewhere",
}
SCOPES = {
    "batch": "one choice of what to ablate for a whole batch of {size:,} examples",
    "universal": "one choice of what to ablate for all examples",
    "position": "a choice of what to ablate for each position, the same for a whole batch of {size:,} examples",
    "example": "a choice of what to ablate for each example by itself",
    "example_position": "a choice of what to ablate for each token by itself",
}


def loss_title(loss: str) -> str:
    """A loss as axes and sentences name it."""
    return LOSS_NAMES.get(loss, loss)


REFERENCES = {
    "zero": "by zero",
    "mean": "by their mean over the training examples",
    "position_mean": "by their mean at that position over the training examples",
    "resample": "by what they are on another example",
}


def verdict_of(audit: Audit, config: Path) -> Verdict:
    """The audit in words: what came out, what was asked, how hard the adversary tried, whether it was done.

    Args:
        audit: what was found.
        config: the run's, for the command that tries harder.
    """
    found = audit.adversarial
    kept = f"{audit.n_kept:,} of {audit.n_nodes:,} nodes"
    worst = number(found.loss)
    loss, unit = loss_title(audit.loss), UNITS.get(audit.loss, "")
    held = "held-out examples" if audit.held_out else "examples"
    on = f"{audit.n_examples:,} {held}"
    compared = f"ablating all the rest gives {number(audit.complete_loss)}, the model itself {number(audit.model_loss)}"
    standing: Standing = "no_target"
    if audit.faithful is None:
        came_out = f"{kept} leave the {loss} at {worst}{unit} in the worst case found on {on}"
    elif audit.faithful:
        standing = "faithful"
        came_out = (
            f"Faithful under this attack: {kept} keep the {loss} at {worst}{unit} in the worst case found on {on}, "
            f"within the target of {number(audit.target_loss)}"
        )
    else:
        standing = "unfaithful"
        came_out = (
            f"Not faithful: with {kept} kept, an adversary raises the {loss} to {worst}{unit} on {on}, above the "
            f"target of {number(audit.target_loss)}"
        )
    question = (
        "If these nodes explain the behaviour, it cannot matter what becomes of the others: whichever of them are "
        f"ablated (replaced {REFERENCES.get(audit.reference, audit.reference)}), the loss should stay low. So an "
        "adversary looks for the choice that hurts most."
    )
    return Verdict(
        standing, f"{came_out}; {compared}.", question, _budget(audit), _convergence(audit, config), found.converged
    )


def checks_of(audit: Audit) -> list[Check]:
    """The audit as a table."""

    def check(name: str, loss: float, scheme: str) -> Check:
        score = None if audit.task is None else getattr(audit.task, scheme)
        kl = None if audit.kl is None else getattr(audit.kl, scheme, 0.0)  # the model's own is 0
        return Check(name, loss, score and score.ce, score and score.accuracy, kl)

    draws, random = audit.stochastic, audit.random_circuits
    checks = [
        check("the model itself", audit.model_loss, "model"),
        check("the rest ablated", audit.complete_loss, "complete"),
        check(f"the rest at random, mean of {draws.draws}", draws.mean, "stochastic"),
        Check("the rest at random, worst draw", draws.max),
        check("the rest by the adversary", audit.adversarial.loss, "adversarial"),
        Check("the circuit ablated, the rest kept", audit.complement_loss),
    ]
    if random is not None:
        drawn = f"a random circuit of that size (mean of {random.n})"
        checks.append(Check(f"{drawn}, the rest ablated", random.complete_loss))
        checks.append(Check(f"{drawn}, the rest by a brief attack", random.adversarial_loss))
    return checks


def checks_note(audit: Audit) -> str:
    """What is easily misread in the table."""
    if not audit.beats_model:
        return ""
    far = "" if audit.kl is None else f", and far from it: KL {number(audit.kl.complete)}"
    return (
        f"With all the rest ablated the circuit does the task better than the model{far}. Nodes whose ablation only "
        "helps can be left out: the circuit shows what suffices for the answer, not all that the model does."
    )


def number(value: float | None) -> str:
    """Three decimals, or more where the value is small."""
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"


def _budget(audit: Audit) -> str:
    found, scope = audit.adversarial, SCOPES[audit.scope].format(size=audit.batch_size)
    if found.steps == 0:
        climbs = "tried every subset of the nodes that are not kept"
    else:
        climbs = (
            f"climbed from {found.restarts} starts for up to {found.steps} steps of {found.step_size:g}, beside "
            f"ablating all, none, {audit.stochastic.draws} random draws, and flipping nodes one by one and together"
        )
    ladder = ", ".join(f"{rung.steps} steps {number(rung.loss)}" for rung in found.ladder)
    flipped = "" if found.flipped is None else f" It changes the answer of {found.flipped:.1%} of the examples."
    return f"The adversary made {scope}; it {climbs}." + (f" By budget: {ladder}." if ladder else "") + flipped


def _convergence(audit: Audit, config: Path) -> str:
    match audit.adversarial.converged:
        case True:
            return (
                "The attack had converged: longer climbs and an attack of another kind found hardly more. That is "
                "still a lower bound on the worst case, not a proof."
            )
        case False:
            return (
                "The attack had not converged: a longer or a different one climbed further, so the worst case is "
                "likely higher still."
            )
        case _:
            return (
                "Whether the attack had converged was not tried: "
                f"`python -m pdprune.train test --config {shlex.quote(str(config))}` attacks longer and in "
                "another way. Until then this is what one attack found, a lower bound on the worst case."
            )
