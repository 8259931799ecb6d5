"""From an audited run to the figures of its report.

What is shown beyond the audit costs passes through the model, as many as a fixed share of the audit's own: in large
circuits some of it is shown on fewer examples, or for the nodes that matter most, and the page says so.
"""

from __future__ import annotations

import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from pdprune.batches import Batch, to_device
from pdprune.circuits.edges import Edges, edges_of
from pdprune.circuits.importing import FOUND_ELSEWHERE
from pdprune.errors import UserError
from pdprune.report.activity import Peak, peaks_of
from pdprune.report.audited_run import AuditedRun
from pdprune.report.curve import size_curve
from pdprune.report.examples import EXAMPLES_SHOWN, Texts, first_examples, texts_of
from pdprune.report.figures import Context, Figures, Graph, NodeFigures, Origin, Series, Site
from pdprune.report.verdict import checks_note, checks_of, loss_title, verdict_of
from pdprune.report.worst_case import Replay, adversary_of, n_ablated_by_site, replay, spread_examples, without_each
from pdprune.report.writing import written_to_outputs
from pdprune.run_folder import CONFIG_FILE

REMOVAL_PASSES = 36
TRACING_PASSES = 20
"""Passes over the held-out examples that removing each node, and tracing each node's edges, may cost."""
LEAST_EXAMPLES = 4
"""Below this many examples rather fewer nodes are looked at."""
NODES_SHOWN = 2000
EDGES_SHOWN = 4000
CONTEXTS = 4
OUTPUTS_SHOWN = 8
POINTS_SHOWN = 400
"""Of a training curve."""

Tell = Callable[[str], None]


def gather(run: AuditedRun, tell: Tell = lambda doing: None) -> Figures:
    """Look into a run.

    Args:
        run: with its circuit and audit.
        tell: told what is being done.
    """
    classes = _has_classes(run)
    tell("texts")
    batches = first_examples(run)
    texts = texts_of(run, batches)
    site_names = _sites_in_order(run, batches[0])
    site_of = [site_names.index(node.components[0][0]) for node in run.model.nodes]
    whole = replay(run, batches[0])
    tell("edges")
    shown, edges, notes = _traced(run, whole, classes)
    tell("removing nodes one by one")
    worst, removed, removal_note = _removed(run, whole, shown, edges)
    tell("contexts")
    nodes = _nodes(run, shown, edges, worst, removed, site_of, batches, texts, notes)
    tell("curve")
    curve = size_curve(run, whole)
    tell("the adversary's side")
    adversary = adversary_of(run, batches, whole, site_of, classes)
    return Figures(
        name=run.folder.resolve().name,
        task=run.circuit.task or "",
        target=run.circuit.target.name,
        loss=loss_title(run.audit.loss),
        verdict=verdict_of(run.audit, run.folder / CONFIG_FILE),
        checks=checks_of(run.audit),
        checks_note=checks_note(run.audit),
        curve=curve,
        sites=_sites(run, site_names, site_of, whole),
        graph=Graph(
            nodes=nodes,
            edges=_strongest(edges),
            answer=_answer_name(run, classes),
            worst=worst,
            notes=[note for note in (*notes, removal_note) if note],
        ),
        adversary=adversary,
        training=_training(run),
        origin=_origin(run),
        vocabulary=texts.vocabulary,
        texts=texts.texts,
    )


def strongest_edges(run: AuditedRun) -> tuple[list[tuple[int, int, float]], list[str]]:
    """The edges that a run's report draws, by nodes of the model and strength; and what has to be said about them."""
    whole = replay(run, first_examples(run)[0])
    shown, edges, notes = _traced(run, whole, _has_classes(run))
    return [(shown[start], shown[end], strength) for start, end, strength in _strongest(edges)], notes


def _has_classes(run: AuditedRun) -> bool:
    """Whether outputs are logits, as the audit sees it."""
    return run.audit.adversarial.flipped is not None


def _sites_in_order(run: AuditedRun, batch: Batch) -> list[str]:
    """From input to output: as the target calls them."""
    order: list[str] = []
    handles = [
        run.model.target.get_submodule(name).register_forward_hook(lambda *_, name=name: order.append(name))
        for name in run.model.site_names
    ]
    try:
        run.model(to_device(batch, run.model.delta_sites.device).inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys([*order, *run.model.site_names]))


def _affordable(run: AuditedRun, passes: int, n_nodes: int) -> tuple[int, int]:
    """How many examples, and for how many nodes, so that one pass a node stays within the budget."""
    budget = passes * max(run.n_examples, EXAMPLES_SHOWN)
    n_examples = max(LEAST_EXAMPLES, budget // max(1, n_nodes))
    n_examples = min(n_examples, run.batches[0].size)
    return n_examples, min(n_nodes, budget // n_examples)


def _traced(run: AuditedRun, whole: Replay, classes: bool) -> tuple[list[int], Edges | None, list[str]]:
    """The nodes that are shown, and what they do to one another; notes say what was left out.

    In a circuit too large to be traced as a whole, the nodes of the widest open gates are.
    """
    kept = run.circuit.kept
    gates = run.circuit.gates.reshape(-1, run.circuit.n_nodes).amax(0)
    n_examples, n_nodes = _affordable(run, TRACING_PASSES, min(len(kept), NODES_SHOWN))
    shown = sorted(sorted(kept, key=lambda node: (-float(gates[node]), node))[:n_nodes])
    notes = []
    if run.circuit.keep.ndim > 1:
        notes.append(
            "This circuit keeps nodes position by position. A node is shown once, wherever it is kept at all, and "
            "edges and contexts are those of all positions."
        )
    if len(shown) < len(kept):
        notes.append(f"Shown are the {len(shown):,} of {len(kept):,} kept nodes whose gates are widest open.")
    if not shown:
        return [], None, [*notes, "The circuit keeps no node."]
    batch = spread_examples(whole, n_examples)
    try:
        edges = edges_of(run.model, shown, batch, classes=classes, reference=run.masked_loss(batch).reference)
    except UserError as error:
        return shown, None, [*notes, f"No edges are shown: {error}."]
    notes.append(
        f"Effects and edges: gradient × activation on {batch.size:,} held-out examples, spread evenly from the least "
        "to the most hurt by the adversary, around the model with nothing ablated; gradients stop at the other nodes "
        "that are shown. An edge is summed over positions: attention carries it across them, an MLP stays within one."
    )
    return shown, edges, notes


def _removed(
    run: AuditedRun, whole: Replay, shown: Sequence[int], edges: Edges | None
) -> tuple[float | None, dict[int, float], str]:
    """The worst case without each node, on as many examples as the budget allows."""
    if not shown:
        return None, {}, ""
    n_examples, n_nodes = _affordable(run, REMOVAL_PASSES, len(shown))
    effect = torch.zeros(len(shown)) if edges is None else edges.effect.abs()
    order = [shown[int(place)] for place in effect.argsort(descending=True, stable=True)[:n_nodes]]
    batch = spread_examples(whole, n_examples)
    worst, removed = without_each(replay(run, batch), order)
    few = "" if n_nodes == len(shown) else f", for the {n_nodes:,} nodes of the greatest effect"
    note = (
        f"Removals: the audit's worst source on {batch.size:,} held-out examples, spread likewise, with the node "
        f"ablated besides{few}, or left alone where that hurts more; a new attack could find worse."
    )
    return worst, removed, note


def _nodes(
    run: AuditedRun,
    shown: Sequence[int],
    edges: Edges | None,
    worst: float | None,
    removed: dict[int, float],
    site_of: Sequence[int],
    batches: Sequence[Batch],
    texts: Texts,
    notes: list[str],
) -> list[NodeFigures]:
    if not shown:
        return []
    try:
        peaks = peaks_of(run.model, shown, batches, run.means, CONTEXTS)
    except UserError as error:
        peaks = [[] for _ in shown]
        notes.append(f"No contexts are shown: {error}.")
    written = _written(run, shown, peaks, batches)
    if any(peaks) and not any(written.values()):
        notes.append("No raised or lowered outputs are shown: no node writes to the outputs but through later layers.")
    if any(written.values()):
        notes.append(
            "Raised and lowered: what a node adds to each output in the first of its contexts, to first order, with "
            "no help from later layers; in logits, less their mean, where outputs are logits."
        )
    gates = run.circuit.gates.reshape(-1, run.circuit.n_nodes).amax(0)
    keep = run.circuit.keep
    found = []
    for place, node in enumerate(shown):
        outputs = written.get(node, Written())
        found.append(
            NodeFigures(
                node=node,
                label=run.model.nodes[node].label,
                site=site_of[node],
                n_components=len(run.model.nodes[node].components),
                gate=float(gates[node]),
                positions=keep[:, node].nonzero().squeeze(-1).tolist() if keep.ndim == 2 else None,
                effect=None if edges is None else float(edges.effect[place]),
                direct=None if edges is None else float(edges.direct[place]),
                removed=None if worst is None or node not in removed else max(worst, removed[node]),
                contexts=[
                    Context(peak.example, peak.start - texts.first[peak.example], peak.values) for peak in peaks[place]
                ],
                raised=outputs.raised,
                lowered=outputs.lowered,
                choices=outputs.choices,
            )
        )
    return found


@dataclass(frozen=True)
class Written:
    """What a node adds to outputs: those that it raises and lowers most, and those that a task is decided among."""

    raised: list[tuple[str, float]] = field(default_factory=list)
    lowered: list[tuple[str, float]] = field(default_factory=list)
    choices: list[tuple[str, float]] = field(default_factory=list)


def _written(
    run: AuditedRun, shown: Sequence[int], peaks: Sequence[Sequence[Peak]], batches: Sequence[Batch]
) -> dict[int, Written]:
    """What each node adds to outputs in the first of its contexts; nothing for one that reaches them otherwise."""
    found: dict[int, Written] = {}
    first = 0
    for batch in batches:
        here = [
            (node, of_node[0])
            for node, of_node in zip(shown, peaks, strict=True)
            if of_node and first <= of_node[0].example < first + batch.size
        ]
        first_of_batch, first = first, first + batch.size
        if not here:
            continue
        rows = torch.tensor([peak.example - first_of_batch for _, peak in here])
        chosen = batch.select(rows)
        written = written_to_outputs(
            run.model,
            [node for node, _ in here],
            chosen,
            [peak.position for _, peak in here],
            run.means,
        )
        if written is None:
            return {}
        if _has_classes(run):
            written = written - written.mean(-1, keepdim=True)  # a shift of all logits changes no answer
        choices: list[list[int]] = [[]] * len(here) if chosen.choices is None else chosen.choices.tolist()
        for (node, _), row, among in zip(here, written, choices, strict=True):
            if bool(row.any()):
                own = [(_output_name(run, index), float(row[index])) for index in among if index >= 0]
                found[node] = Written(_outputs(run, row), _outputs(run, -row, -1), own)
    return found


def _outputs(run: AuditedRun, row: torch.Tensor, sign: int = 1) -> list[tuple[str, float]]:
    """The largest entries above zero, with what they are of.

    Of several that are the same one stands for all: tokens that training never saw share their unembedding.
    """
    alike: dict[str, list[int]] = {}
    for index in row.argsort(descending=True, stable=True).tolist():
        value = float(row[index])
        if value <= 0 or (f"{value:.4g}" not in alike and len(alike) == OUTPUTS_SHOWN):
            break
        alike.setdefault(f"{value:.4g}", []).append(index)
    return [
        (
            _output_name(run, indices[0]) + (f" and {len(indices) - 1:,} alike" if len(indices) > 1 else ""),
            sign * float(row[indices[0]]),
        )
        for indices in alike.values()
    ]


def _output_name(run: AuditedRun, index: int) -> str:
    return f"y{index}" if run.tokenizer is None or not _has_classes(run) else run.tokenizer.decode([index])


def _strongest(edges: Edges | None) -> list[tuple[int, int, float]]:
    if edges is None:
        return []
    flat = edges.strength.abs().flatten()
    order = flat.argsort(descending=True, stable=True)[:EDGES_SHOWN]
    n = len(edges.nodes)
    return [
        (place // n, place % n, float(edges.strength[place // n, place % n]))
        for place in order.tolist()
        if flat[place] > 0
    ]


def _sites(run: AuditedRun, names: Sequence[str], site_of: Sequence[int], replayed: Replay) -> list[Site]:
    kept = set(run.circuit.kept)
    ablated = n_ablated_by_site(run, replayed, site_of, len(names))
    return [
        Site(
            name,
            n_nodes=sum(site == index for site in site_of),
            n_kept=sum(site == index and node in kept for node, site in enumerate(site_of)),
            n_ablated=ablated[index],
        )
        for index, name in enumerate(names)
    ]


def _answer_name(run: AuditedRun, classes: bool) -> str:
    if not classes:
        return "the output's length along its own direction"
    among = "the answers to choose from" if run.batches[0].choices is not None else "all outputs"
    return f"the log-odds of the model's own answer among {among}"


def _training(run: AuditedRun) -> list[Series]:
    columns = run.metrics()
    steps = columns.pop("step", [])
    columns.pop("epoch", None)
    series = []
    for name, values in columns.items():
        known = [(int(step), value) for step, value in zip(steps, values, strict=True) if None not in (step, value)]  # type: ignore[arg-type]
        thinned = known[:: -(-len(known) // POINTS_SHOWN)] if known else []
        if thinned:
            series.append(Series(name, [step for step, _ in thinned], [float(value) for _, value in thinned]))  # type: ignore[arg-type]
    return series


def _origin(run: AuditedRun) -> Origin:
    circuit, audit = run.circuit, run.audit
    facts = [
        ("task", circuit.task or "–"),
        ("target", f"{circuit.target.name}, SHA-256 {circuit.target.sha256}"),
        ("decomposition", f"{circuit.decomposition.name}, SHA-256 {circuit.decomposition.sha256}"),
        ("scheme", circuit.scheme),
        ("reference", circuit.reference),
        ("scope", circuit.scope),
        ("loss", circuit.loss),
        ("seed", str(circuit.seed)),
        ("held-out examples", f"{audit.n_examples:,} in batches of at most {audit.batch_size:,}"),
        *((f"{package} version", version) for package, version in circuit.versions.items()),
        ("Python version", platform.python_version()),
    ]
    path = shlex.quote(str(run.folder / CONFIG_FILE))
    again = shlex.quote(f"{run.folder}-again")
    # What was found elsewhere can only be audited again.
    found_elsewhere = circuit.scheme == FOUND_ELSEWHERE
    how = f"test --circuit {shlex.quote(str(run.folder))}" if found_elsewhere else "fit"
    command = f"python -m pdprune.train {how} --config {path} --trainer.default_root_dir {again}"
    return Origin(command, run.config_text(), facts)
