"use strict";
// The page of one run: fills the sections of report.html.

(() => {
  const { element, fill, figures, number, count, percent, visible, signed } = pdprune;
  const { verdict, checks, curve, sites, graph, adversary, texts, origin } = figures;

  const header = () => {
    const badges = {
      faithful: "faithful under this attack",
      unfaithful: "not faithful",
      no_target: "no target was set",
    };
    const badge = document.getElementById("badge");
    badge.textContent = badges[verdict.standing];
    badge.classList.add(verdict.standing);
    fill(
      "kicker",
      [figures.task && `task ${figures.task}`, `target ${figures.target}`, `run ${figures.name}`]
        .filter(Boolean)
        .join(" · "),
    );
    fill("verdict", verdict.sentence);
    const tile = (kind, shown, told) =>
      element("div", { class: `tile ${kind}` }, element("b", {}, shown), element("span", {}, told));
    fill(
      "tiles",
      tile("kept", count(curve.chosen.size), `of ${count(curve.total)} ${curve.unit} kept`),
      tile("model", number(curve.model_loss), `${figures.loss}, the model itself`),
      tile("complete", number(curve.chosen.complete), "the rest ablated"),
      tile("stochastic", number(curve.chosen.stochastic), "the rest at random"),
      tile(
        "adversarial",
        number(curve.chosen.adversarial),
        curve.target_loss === null
          ? "the rest by the adversary"
          : `the rest by the adversary; target ${number(curve.target_loss)}`,
      ),
    );
    const tone = { true: "good", false: "warn", null: "" }[String(verdict.converged)];
    fill(
      "belief",
      element("div", {}, element("p", {}, element("b", {}, "What is asked. "), verdict.question)),
      element("div", {}, element("p", {}, element("b", {}, "How hard it tried. "), pdprune.prose(verdict.budget))),
      element(
        "div",
        { class: tone },
        element("p", {}, element("b", {}, "Was that enough? "), pdprune.prose(verdict.convergence)),
      ),
    );
  };

  const curveSection = () => {
    pdprune.curveChart(document.getElementById("curve"), curve, figures.loss);
    fill(
      "curve-note",
      element("span", { class: "mark" }, "●"),
      " the chosen circuit, by the audit. ",
      curve.random === null ? null : [element("span", { class: "mark" }, "○"), " random circuits of its size, by the audit. "],
      curve.note,
    );
    const has = (key) => checks.some((check) => check[key] !== null);
    const isTask = checks.every((check) => check.task_loss === null || check.task_loss === check.loss);
    fill(
      "checks",
      pdprune.table(
        [
          { title: "", cell: (check) => check.name },
          { title: figures.loss, number: true, cell: (check) => number(check.loss) },
          ...(has("task_loss") && !isTask
            ? [{ title: "task cross-entropy", number: true, cell: (check) => number(check.task_loss) }]
            : []),
          ...(has("accuracy") ? [{ title: "right", number: true, cell: (check) => percent(check.accuracy) }] : []),
          ...(has("kl") ? [{ title: "KL to the model", number: true, cell: (check) => number(check.kl) }] : []),
        ],
        checks,
        { stacked: false, rowClass: (check) => (check.name === "the rest by the adversary" ? "strong" : null) },
      ),
      element("p", { class: "note" }, figures.checks_note),
    );
  };

  const circuitSection = () => {
    pdprune.circuitGraph();
    pdprune.nodeTable();
    const notes = graph.nodes.length ? [`Effects are on ${graph.answer}.`, ...graph.notes] : graph.notes;
    fill(
      "graph-notes",
      notes.map((note) => element("p", { class: "note" }, note)),
    );
  };

  const adversarySection = () => {
    const ablated = sites.reduce((sum, site) => sum + site.n_ablated, 0),
      free = sites.reduce((sum, site) => sum + site.n_nodes - site.n_kept, 0);
    fill(
      "adversary-lead",
      `Its worst source ablates ${count(ablated)} of the ${count(free)} nodes that are not kept, and leaves the others alone (source 0: ablated; 1: left alone). ${adversary.notes.join(" ")}`,
    );
    const key = (kind, told) =>
      element("span", {}, element("span", { class: "key", style: `background: var(--${kind})` }), told, "   ");
    fill(
      "site-bars",
      element(
        "p",
        { class: "note" },
        key("accent", "kept"),
        key("adversarial", "ablated"),
        key("plain-back", "left alone"),
      ),
      sites.map((site) => {
        const left = site.n_nodes - site.n_kept - site.n_ablated;
        const part = (kind, n, told) =>
          n === 0
            ? null
            : element("span", { class: kind, style: `flex: ${n} 0 0`, title: `${count(n)} ${told}` }, count(n));
        return element(
          "div",
          { class: "bar-row" },
          element("code", {}, site.name),
          element(
            "div",
            {
              class: "bar",
              role: "img",
              "aria-label": `${site.n_kept} kept, ${site.n_ablated} ablated, ${left} left alone`,
            },
            part("kept", site.n_kept, "kept"),
            part("ablated", site.n_ablated, "ablated"),
            part("left", left, "left alone"),
          ),
        );
      }),
    );
    const list = (title, nodes, told) =>
      element(
        "div",
        {},
        element("h3", {}, title),
        nodes.length === 0
          ? element("p", { class: "soft" }, "none")
          : element(
              "div",
              {
                class: "fold-list scroll",
                style: "max-height: 280px; overflow-y: auto",
                tabindex: 0,
                role: "region",
                "aria-label": title,
              },
              pdprune.table(
                [
                  { title: "node", cell: (node) => element("code", {}, node.label) },
                  { title: "source", number: true, cell: (node) => number(node.source) },
                  { title: told, number: true, cell: (node) => signed(node.gain) },
                ],
                nodes,
                { stacked: false },
              ),
            ),
      );
    fill(
      "opposed",
      list("What it ablates, the most useful to it first", adversary.ablated, "gained by ablating"),
      list("What it leaves alone, the most useful to it first", adversary.left_alone, "gained by leaving"),
    );
    const answer = (said) =>
      element(
        "span",
        {},
        element("code", {}, visible(said.text, true)),
        said.probability === null ? "" : ` ${percent(said.probability)}`,
      );
    fill(
      "sufferers",
      pdprune.table(
        [
          {
            title: "example",
            cell: (row) => element("div", { class: "context" }, pdprune.shadedTokens(texts[row.text])),
          },
          {
            title: "right",
            cell: (row) =>
              texts[row.text].answer === null ? "–" : element("code", {}, visible(texts[row.text].answer, true)),
          },
          { title: "the model", cell: (row) => answer(row.model) },
          { title: "the circuit", cell: (row) => answer(row.circuit) },
          { title: "the circuit, attacked", cell: (row) => answer(row.attacked) },
          { title: `${figures.loss}: ablated`, number: true, cell: (row) => number(row.circuit_loss) },
          { title: "attacked", number: true, cell: (row) => element("b", {}, number(row.attacked_loss)) },
        ],
        adversary.sufferers,
      ),
    );
  };

  // What CircuitPruner logs; a series of another name goes without.
  const glosses = {
    loss: "under the scheme it is pruned with",
    complete: "loss with the rest ablated",
    stochastic: "loss with the rest at random",
    kept: "nodes whose gate is open",
    gate_sum: "all gates together",
    price: "of sparsity, against the loss",
  };
  const trainingSection = () => {
    const panels = figures.training.map((series) => {
      const chart = element("div");
      return [
        element("div", { class: "chart" }, element("h3", {}, series.name, element("small", {}, ` ${glosses[series.name] ?? ""}`)), chart),
        () =>
          pdprune.chart(chart, {
            lines: [
              {
                name: series.name,
                colour: "accent",
                points: series.steps.map((step, index) => [step, series.values[index]]),
              },
            ],
            xTitle: "step",
            yTitle: "",
            height: 170,
          }),
      ];
    });
    fill(
      "training",
      ...(panels.length
        ? panels.map(([panel]) => panel)
        : [element("p", { class: "soft" }, "The run folder has no metrics.csv.")]),
    );
    for (const [, draw] of panels) draw();
  };

  const originSection = () =>
    fill(
      "origin",
      element("pre", { tabindex: 0 }, origin.command),
      element(
        "dl",
        { class: "facts" },
        origin.facts.map(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]),
      ),
      element(
        "details",
        { class: "fold" },
        element("summary", {}, "The whole configuration"),
        element("pre", { tabindex: 0 }, origin.config || "not recorded"),
      ),
    );

  header();
  curveSection();
  circuitSection();
  adversarySection();
  trainingSection();
  originSection();
  document.documentElement.dataset.ready = "true";
})();
