"use strict";
// Curves, drawn by uPlot (vendor/).

/**
 * A chart of lines over a common x axis.
 * lines: `{name, colour, dash, points: [[x, y], ...]}`; levels: `{name, colour, dash, y}`, drawn across;
 * marks: `{colour, hollow, x, y}`; `shaded`: an x that is marked from top to bottom.
 */
pdprune.chart = (
  container,
  { lines, marks = [], levels = [], shaded = null, xTitle, yTitle, height = 330, logX = false, logY = false },
) => {
  const isSmall = height < 200; // its legend names the axis
  const xs = [...new Set(lines.flatMap((line) => line.points.map(([x]) => x)))]
    .filter((x) => !logX || x > 0)
    .sort((a, b) => a - b);
  const ys = [
    ...lines.flatMap((line) => line.points.map(([, y]) => y)),
    ...marks.map((mark) => mark.y),
    ...levels.map(({ y }) => y),
  ].filter((y) => y !== null);
  const floor = floorOf(ys);
  const placed = (y) => (y === null || y === undefined ? null : logY ? Math.max(y, floor) : y);
  const column = (points) => {
    const known = new Map(points);
    return xs.map((x) => known.get(x) ?? null);
  };
  const shown = [...lines.map((line) => column(line.points)), ...levels.map(({ y }) => xs.map(() => y))];
  const data = [xs, ...shown.map((values) => values.map(placed))];
  const told = (_, __, index, at) => (at === null || at === undefined ? "" : pdprune.number(shown[index - 1][at]));
  const tick = (y) => (y === null ? "" : Math.abs(y) >= 1e4 ? y.toExponential(0) : String(+y.toPrecision(3)));

  let plot = null;
  const widthNow = () => Math.max(220, container.clientWidth - 14);
  const draw = () => {
    plot?.destroy();
    const { colour } = pdprune;
    const axis = {
      stroke: colour("soft"),
      grid: { stroke: colour("line"), width: 1 },
      ticks: { show: false },
      font: "12px sans-serif",
      labelFont: "12px sans-serif",
    };
    plot = new uPlot(
      {
        width: widthNow(),
        height,
        scales: {
          x: { time: false, distr: logX ? 3 : 1, range: () => padded(xs[0] ?? 0, xs.at(-1) ?? 1, logX) },
          y: {
            distr: logY ? 3 : 1,
            range: () =>
              logY ? [floor, Math.max(...ys, floor * 10) * 1.4] : padded(Math.min(0, ...ys), Math.max(...ys), false),
          },
        },
        axes: [
          { ...axis, label: isSmall ? null : xTitle, labelSize: isSmall ? 0 : 20, size: 34, values: (_, splits) => splits.map(tick) },
          {
            ...axis,
            label: yTitle || null,
            labelSize: yTitle ? 20 : 0,
            size: 50,
            ...(logY ? { splits: (_, __, low, high) => roundBetween(low, high), filter: (_, splits) => splits } : {}),
            values: (_, splits) =>
              splits.map((y) => (logY && y <= floor && ys.some((each) => each < floor) ? `≤ ${tick(y)}` : tick(y))),
          },
        ],
        series: [
          { label: xTitle, value: (_, x) => (x === null || x === undefined ? "" : pdprune.count(x)) },
          ...lines.map((line) => ({
            label: line.name,
            stroke: colour(line.colour),
            width: 2,
            dash: line.dash,
            spanGaps: true,
            points: { show: line.points.length < 12, size: 5 },
            value: told,
          })),
          ...levels.map((each) => ({
            label: each.name,
            stroke: colour(each.colour),
            width: 1.5,
            dash: each.dash,
            points: { show: false },
            value: told,
          })),
        ],
        cursor: { points: { size: 7 }, drag: { x: false, y: false } },
        hooks: { drawClear: [shade], draw: [drawMarks] },
      },
      data,
      container,
    );
  };
  new ResizeObserver(() => {
    if (plot !== null && plot.width !== widthNow()) plot.setSize({ width: widthNow(), height });
  }).observe(container);
  pdprune.inEachTheme(draw);

  /** Where a logarithmic axis begins: a round number below all that is above zero, not too far down. */
  function floorOf(values) {
    const positive = values.filter((y) => y > 0);
    if (positive.length === 0) return 0.001;
    const low = Math.max(Math.min(...positive), Math.max(...positive) / 1e5);
    return roundBetween(low / 10, low).at(-1);
  }

  function padded(low, high, isLog) {
    if (isLog) return [low / 1.15, high * 1.15];
    const room = (high - low) * 0.04 || 1;
    return [low === 0 ? 0 : low - room, high + room];
  }

  /** 1, 2 and 5 times powers of ten; powers of ten alone where there are many. */
  function roundBetween(low, high) {
    const found = [];
    const decades = Math.log10(high / low);
    for (let power = Math.floor(Math.log10(low)) - 1; power <= Math.ceil(Math.log10(high)); power += 1)
      for (const digit of decades > 4 ? [1] : [1, 2, 5]) found.push(+(digit * 10 ** power).toPrecision(1));
    return found.filter((y) => y >= low * 0.999 && y <= high * 1.001);
  }

  function shade(u) {
    if (shaded === null) return;
    u.ctx.fillStyle = pdprune.colour("plain-back");
    u.ctx.fillRect(
      u.valToPos(shaded, "x", true) - 7 * devicePixelRatio,
      u.bbox.top,
      14 * devicePixelRatio,
      u.bbox.height,
    );
  }

  function drawMarks(u) {
    u.ctx.save();
    u.ctx.setLineDash([]);
    for (const mark of marks.filter(({ y }) => y !== null)) {
      u.ctx.beginPath();
      u.ctx.arc(
        u.valToPos(mark.x, "x", true),
        u.valToPos(placed(mark.y), "y", true),
        5.5 * devicePixelRatio,
        0,
        2 * Math.PI,
      );
      u.ctx.fillStyle = pdprune.colour(mark.hollow ? "card" : mark.colour);
      u.ctx.strokeStyle = pdprune.colour(mark.colour);
      u.ctx.lineWidth = 2 * devicePixelRatio;
      u.ctx.fill();
      u.ctx.stroke();
    }
    u.ctx.restore();
  }
};

/** Whether sizes are so far apart that a logarithmic axis shows them better. */
pdprune.isWide = (curves) => {
  const sizes = curves.flatMap((curve) => curve.points.map((point) => point.size)).filter((size) => size > 0);
  return sizes.length > 0 && Math.max(...sizes) / Math.min(...sizes) > 30;
};

/** Loss by size under the three schemes; discs are the audit's figures at the chosen size, rings those of random circuits. */
pdprune.curveChart = (container, curve, lossTitle) => {
  const line = (name, key, dash) => ({
    name,
    colour: key,
    dash,
    points: curve.points.map((point) => [point.size, point[key]]),
  });
  const marks = (point, hollow) =>
    ["complete", "stochastic", "adversarial"].map((key) => ({ colour: key, hollow, x: point.size, y: point[key] }));
  pdprune.chart(container, {
    lines: [
      line("the rest ablated", "complete", [2, 4]),
      line("at random", "stochastic", [9, 4]),
      line("by the adversary", "adversarial"),
      line("random circuits, by the adversary", "random", [12, 3, 2, 3]),
    ],
    levels: [
      { name: "the model", colour: "model", y: curve.model_loss, dash: [1, 3] },
      ...(curve.target_loss === null ? [] : [{ name: "target", colour: "ink", y: curve.target_loss, dash: [6, 4] }]),
    ],
    marks: [...(curve.random === null ? [] : marks(curve.random, true)), ...marks(curve.chosen, false)],
    shaded: curve.chosen.size,
    xTitle: `${curve.unit} kept of ${pdprune.count(curve.total)}`,
    yTitle: lossTitle,
    logX: pdprune.isWide([curve]),
    logY: true,
  });
};
