"use strict";
// The page of a frontier: fills the sections of frontier.html.

(() => {
  const { fill, figures, number, count } = pdprune;
  const { points } = figures;
  const schemes = [
    ["complete", "the rest ablated", [2, 4]],
    ["stochastic", "at random", [9, 4]],
    ["adversarial", "by the adversary", undefined],
  ];

  fill(
    "kicker",
    [figures.task && `task ${figures.task}`, `target ${figures.target}`, figures.loss].filter(Boolean).join(" · "),
  );
  fill("headline", figures.headline);
  pdprune.chart(document.getElementById("curve"), {
    lines: schemes.map(([key, name, dash]) => ({
      name,
      colour: key,
      dash,
      points: points.map((point) => [point.n_kept, point[`${key}_loss`]]),
    })),
    marks: schemes.flatMap(([key]) =>
      points.map((point) => ({ colour: key, hollow: false, x: point.n_kept, y: point[`${key}_loss`] })),
    ),
    levels: [{ name: "the model", colour: "model", dash: [1, 3], y: figures.model_loss }],
    xTitle: `nodes kept of ${count(figures.n_nodes)}`,
    yTitle: figures.loss,
    logX: points.every((point) => point.n_kept > 0) && points.at(-1).n_kept / points[0].n_kept > 30,
    logY: true,
    height: 380,
  });
  fill("curve-note", figures.note);

  const answer = (value) => ({ true: "yes", false: "no", null: "–" })[String(value)];
  fill(
    "table",
    pdprune.table(
      [
        { title: "level", cell: (point) => point.level },
        { title: "nodes kept", number: true, cell: (point) => count(point.n_kept) },
        ...schemes.map(([key, name]) => ({ title: name, number: true, cell: (point) => number(point[`${key}_loss`]) })),
        { title: "faithful under this attack", cell: (point) => answer(point.faithful) },
      ],
      points,
    ),
  );
  document.documentElement.dataset.ready = "true";
})();
