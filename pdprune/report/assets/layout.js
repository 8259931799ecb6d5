"use strict";
// Where the nodes of the circuit lie: a band for each site, the first at the bottom, the strongest nodes in its middle.

const CELL = 30;
const BETWEEN_BANDS = 56;

/**
 * For a frame of this size: `positions` by the id of an element, `bands` with the size of each site's, `rows` of nodes
 * from the bottom up, each from left to right, and `scale`, at which all of it fits.
 */
pdprune.layOut = (graph, sites, frame) => {
  const effect = (place) => Math.abs(graph.nodes[place].effect ?? 0);
  const members = sites.map((_, site) =>
    graph.nodes.flatMap((node, place) => (node.site === site ? [place] : [])).sort((a, b) => effect(b) - effect(a)),
  );
  const rowsOf = (band, columns) => Math.max(1, Math.ceil(band.length / columns));
  const scaleAt = (columns) => {
    const height = members.reduce(
      (sum, band) => sum + rowsOf(band, columns) * CELL + BETWEEN_BANDS,
      BETWEEN_BANDS + 30,
    );
    return Math.min(frame.width / (columns * CELL + 40), frame.height / height);
  };
  let columns = 4;
  for (let tried = 5; tried <= 120; tried += 1) if (scaleAt(tried) > scaleAt(columns)) columns = tried;

  const positions = {};
  const bands = [];
  const rows = [];
  let y = 0;
  members.forEach((band, site) => {
    const height = rowsOf(band, columns) * CELL;
    for (let first = 0; first < band.length; first += columns) {
      const row = middleOut(band.slice(first, first + columns));
      row.forEach((place, column) => {
        positions[place] = { x: (column - (row.length - 1) / 2) * CELL, y: y - (first / columns) * CELL };
      });
      rows.push(row);
    }
    bands[site] = { width: columns * CELL + 16, height: height + 34 };
    positions[`site-${site}`] = { x: 0, y: y - (height - CELL) / 2 - 8 };
    y -= height + BETWEEN_BANDS;
  });
  positions[graph.nodes.length] = { x: 0, y: y - 6 };
  return { positions, bands, rows, scale: scaleAt(columns) };

  /** The first in the middle, the others to its right and left in turn. */
  function middleOut(ordered) {
    const right = ordered.filter((_, index) => index % 2 === 0);
    const left = ordered.filter((_, index) => index % 2 === 1);
    return [...left.reverse(), ...right];
  }
};
