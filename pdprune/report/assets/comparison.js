"use strict";
// The page of several runs: fills the sections of comparison.html.

(() => {
  const { element, fill, figures, number, count, percent } = pdprune;
  const { runs, overlaps, sites } = figures;
  const tones = ["adversarial", "complete", "stochastic", "random", "accent", "model", "ink"];
  const tone = (index) => tones[index % tones.length];
  const titles = {
    complete: "the rest ablated",
    stochastic: "the rest at random",
    adversarial: "the rest by the adversary",
  };

  fill(
    "kicker",
    [figures.task && `task ${figures.task}`, `target ${figures.target}`, figures.loss].filter(Boolean).join(" · "),
  );
  fill("headline", figures.headline);
  fill(
    "verdicts",
    runs.map((run, index) =>
      element(
        "article",
        { style: `--tone: var(--${tone(index)})` },
        element("h2", {}, run.name),
        element("p", {}, run.verdict.sentence),
        element("p", { class: "soft" }, pdprune.prose(run.verdict.convergence)),
        run.link === null ? null : element("a", { href: run.link }, "its report"),
      ),
    ),
  );

  /** A line across, where it is the same for all runs. */
  const level = (name, colour, dash, key) => {
    const y = runs[0].curve[key];
    return y !== null && runs.every((run) => run.curve[key] === y) ? [{ name, colour, dash, y }] : [];
  };
  const dashes = { complete: [2, 4], stochastic: [9, 4], adversarial: undefined };
  const draw = (schemes) => {
    const chart = element("div");
    fill("curves", chart);
    pdprune.chart(chart, {
      lines: runs.flatMap((run, index) =>
        schemes.map((scheme) => ({
          name: schemes.length === 1 ? run.name : `${run.name}: ${titles[scheme]}`,
          colour: tone(index),
          dash: dashes[scheme],
          points: run.curve.points.map((point) => [point.size, point[scheme]]),
        })),
      ),
      marks: runs.flatMap((run, index) =>
        schemes.map((scheme) => ({
          colour: tone(index),
          hollow: scheme !== "adversarial",
          x: run.curve.chosen.size,
          y: run.curve.chosen[scheme],
        })),
      ),
      levels: [...level("the model", "model", [1, 3], "model_loss"), ...level("target", "ink", [6, 4], "target_loss")],
      xTitle: `${runs[0].curve.unit} kept`,
      yTitle: figures.loss,
      logX: pdprune.isWide(runs.map((run) => run.curve)),
      logY: true,
      height: 380,
    });
  };
  const choice = element(
    "select",
    { id: "schemes", onchange: (event) => draw(event.target.value.split(" ")) },
    element("option", { value: "adversarial" }, titles.adversarial),
    element("option", { value: "complete adversarial" }, "ablated and by the adversary"),
    element("option", { value: "complete" }, titles.complete),
    element("option", { value: "stochastic" }, titles.stochastic),
    element("option", { value: "complete stochastic adversarial" }, "all three"),
  );
  fill("curve-controls", element("label", {}, "Show", choice));
  fill("curves-note", runs[0].curve.note);
  draw(["adversarial"]);

  const first = runs[0];
  const rows = [
    { name: `nodes kept of ${count(first.n_nodes)}`, cell: (run) => count(run.n_kept) },
    { name: "how it was pruned", cell: (run) => run.scheme },
    ...first.checks.map((check) => ({
      name: `${figures.loss}, ${check.name}`,
      cell: (run) => {
        const own = run.checks.find((other) => other.name === check.name);
        const right = own?.accuracy ?? null;
        return [
          element("span", {}, number(own?.loss)),
          right === null ? null : element("span", { class: "soft" }, ` ${percent(right)} right`),
        ];
      },
    })),
    { name: "target", cell: (run) => number(run.curve.target_loss) },
    {
      name: "faithful under this attack",
      cell: (run) => ({ faithful: "yes", unfaithful: "no", no_target: "–" })[run.verdict.standing],
    },
    {
      name: "the attack had converged",
      cell: (run) => ({ true: "yes", false: "no", null: "not tried" })[String(run.verdict.converged)],
    },
  ];
  fill(
    "table",
    pdprune.table(
      [
        { title: "", cell: (row) => row.name },
        ...runs.map((run) => ({ title: run.name, number: true, cell: (row) => element("div", {}, row.cell(run)) })),
      ],
      rows,
      { stacked: false },
    ),
  );

  const between = (a, b) =>
    overlaps.find((overlap) => overlap.first === Math.min(a, b) && overlap.second === Math.max(a, b));
  const cell = (a, b) => {
    if (a === b) return element("span", { class: "soft" }, `${count(runs[a].n_kept)} nodes`);
    const overlap = between(a, b);
    return overlap.jaccard === null ? "other nodes" : `${overlap.jaccard.toFixed(3)} (${count(overlap.both)} in both)`;
  };
  fill(
    "overlap",
    element("p", { class: "note" }, "Jaccard: nodes in both circuits over nodes in either."),
    pdprune.table(
      [
        { title: "", cell: (a) => runs[a].name },
        ...runs.map((run, b) => ({ title: run.name, number: true, cell: (a) => cell(a, b) })),
      ],
      runs.map((_, index) => index),
      { stacked: false },
    ),
  );
  fill(
    "by-site",
    pdprune.table(
      [
        { title: "site", cell: (site) => element("code", {}, site.name) },
        ...runs.map((run, index) => ({
          title: run.name,
          number: true,
          cell: (site) => (site.kept[index] === null ? "–" : count(site.kept[index])),
        })),
      ],
      sites,
      { stacked: false },
    ),
  );
  document.documentElement.dataset.ready = "true";
})();
