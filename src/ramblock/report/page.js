// SPDX-License-Identifier: Apache-2.0
// Draws the page of an audit. All data is text from a trace that nobody vouches for: it is put in place as text only.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const COLUMNS = 700;
const ROWS = 300;
const ROWS_SHOWN = 500;
// Of Okabe and Ito's palette, which colour-blind people tell apart; they differ in lightness too. Stale is never thinner than one cell.
const SHADES = [
  ["#ffffff", "nothing known"],
  ["#5d6b7a", "private"],
  ["#c9b8d8", "mapped, state not told"],
  ["#f0e442", "shared, not mapped"],
  ["#9fd3f2", "shared and mapped"],
  ["#d55e00", "private and mapped: a device reaches it"],
];
const STALE = 5;
const byId = (id) => document.getElementById(id);

function add(parent, tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  if (className) element.className = className;
  parent.append(element);
  return element;
}

// Time: seconds since the trace began; without times, the number of the event.
const toX = (time) => (data.timed ? (time - data.began) / 1e9 : time - data.began);
const lastX = Math.max(toX(data.ended), data.timed ? 1e-9 : 1);

function lengthText(nanoseconds) {
  for (const [unit, size] of [["s", 1e9], ["ms", 1e6], ["µs", 1e3]])
    if (nanoseconds >= size) return `${Number((nanoseconds / size).toPrecision(4))} ${unit}`;
  return `${nanoseconds} ns`;
}

// Memory: the parts of the guest's addresses that something is known of, one on top of the other.
let height = 0;
const segments = data.segments.map(([start, end, name, size]) => {
  const segment = { start, end, name, size, y: height };
  height += end - start;
  return segment;
});
height = Math.max(height, 1);

function segmentOf(address) {
  let low = 0, high = segments.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (segments[middle].start <= address) low = middle; else high = middle - 1;
  }
  return segments[low];
}
function toY(address) {
  const segment = segmentOf(address);
  return segment ? segment.y + Math.min(Math.max(address - segment.start, 0), segment.end - segment.start) : 0;
}
function toAddress(y) {
  for (let i = segments.length - 1; i >= 0; i--)
    if (segments[i].y <= y) return segments[i].start + Math.floor(y - segments[i].y);
  return 0;
}

// Rectangles, as columns; x and y are worked out once.
const [since, until, starts, ends, shades] = data.rectangles;
const count = since.length;
const x0 = Float64Array.from(since, toX), x1 = Float64Array.from(until, toX);
const y0 = Float64Array.from(starts, toY), y1 = Float64Array.from(ends, (end, i) => y0[i] + end - starts[i]);

// Paints the rectangles into a grid of what can be seen: exact at any zoom, and the cost does not depend on Plotly.
function raster([left, right], [bottom, top]) {
  const z = Array.from({ length: ROWS }, () => new Uint8Array(COLUMNS));
  const perX = COLUMNS / (right - left), perY = ROWS / (top - bottom);
  for (let i = 0; i < count; i++) {
    if (x1[i] < left || x0[i] > right || y1[i] <= bottom || y0[i] >= top) continue;
    const shade = shades[i];
    const firstColumn = Math.max(0, Math.min(COLUMNS - 1, Math.floor((x0[i] - left) * perX)));
    const lastColumn = Math.min(COLUMNS, Math.max(firstColumn + 1, Math.ceil((x1[i] - left) * perX)));
    const firstRow = Math.max(0, Math.min(ROWS - 1, Math.floor((y0[i] - bottom) * perY)));
    const lastRow = Math.min(ROWS, Math.max(firstRow + 1, Math.ceil((y1[i] - bottom) * perY)));
    // What lasts shorter than a column wins only over nothing, or it would hide what lasts; stale wins over everything.
    const brief = shade !== STALE && x1[i] - x0[i] < 1 / perX;
    for (let row = firstRow; row < lastRow; row++) {
      const line = z[row];
      for (let column = firstColumn; column < lastColumn; column++)
        if (brief ? line[column] === 0 : shade > line[column]) line[column] = shade;
    }
  }
  return z;
}

const centres = (count, [low, high]) =>
  Array.from({ length: count }, (_, i) => low + ((i + 0.5) * (high - low)) / count);

function heatmap(xRange, yRange) {
  return { z: raster(xRange, yRange), x: centres(COLUMNS, xRange), y: centres(ROWS, yRange) };
}

// Ticks of the y axis are addresses: where parts begin, and round numbers when one is zoomed into.
function ticks([bottom, top]) {
  const values = [], texts = [];
  let step = 4096;
  while ((top - bottom) / step > 10) step *= 2;
  for (const segment of segments) {
    const low = Math.max(bottom, segment.y), high = Math.min(top, segment.y + segment.end - segment.start);
    if (low >= high) continue;
    if (low === segment.y) { values.push(low); texts.push(segment.name); }
    const from = segment.start + (low - segment.y);
    for (let address = Math.ceil(from / step) * step; address < segment.start + (high - segment.y); address += step) {
      const y = segment.y + address - segment.start;
      if (values.length && y - values[values.length - 1] < step / 2) continue;
      values.push(y);
      texts.push("0x" + address.toString(16));
    }
  }
  return { tickvals: values, ticktext: texts };
}

const failures = new Set(data.failures);
const placed = data.findings.filter((each) => each.since !== null && each.end > each.start);
const marked = placed.filter((each) => failures.has(each.kind)).slice(0, 2000);
const endOf = (finding) => (finding.until === null ? data.ended : finding.until);

function countTrace(column, name, colour, dash) {
  return {
    type: "scatter", mode: "lines", xaxis: "x", yaxis: "y2", name, line: { color: colour, shape: "hv", width: 1.6, dash },
    x: data.counts[0].slice(1).map(toX), y: data.counts[column].slice(1).map((bytes) => bytes / 2 ** 20),
    hovertemplate: `%{y:.3f} MiB ${name}<extra></extra>`,
  };
}

function rateTrace(name, colour) {
  const { width, buckets } = data.rates[name];
  // Without times there is nothing that a rate could be of.
  if (!data.timed || buckets.length === 0) return null;
  return {
    type: "bar", xaxis: "x", yaxis: "y3", name, marker: { color: colour },
    x: buckets.map(([bucket]) => toX((bucket + 0.5) * width)), width: width / 1e9,
    y: buckets.map(([, number]) => (number * 1e9) / width), hovertemplate: `%{y:.4g} ${name} a second<extra></extra>`,
  };
}

const bars = ["conversions", "page state changes", "refused accesses"];
const rates = bars.map((name, i) => rateTrace(name, ["#5d6b7a", "#5d6b7a", "#cc79a7"][i])).filter(Boolean);
const whole = { x: [-lastX * 0.005, lastX * 1.005], y: [0, height] };
const palette = SHADES.flatMap(([colour], i) => [[i / SHADES.length, colour], [(i + 1) / SHADES.length, colour]]);
const traces = [
  {
    type: "heatmap", ...heatmap(whole.x, whole.y), zmin: -0.5, zmax: SHADES.length - 0.5, colorscale: palette,
    showscale: false, hoverinfo: "none", xaxis: "x", yaxis: "y", zsmooth: false,
  },
  {
    type: "scatter", mode: "markers", xaxis: "x", yaxis: "y", hoverinfo: "none", showlegend: false,
    marker: { symbol: "x-thin", size: marked.length > 100 ? 5 : 9, line: { width: 1.5, color: "#000000" } },
    x: marked.map((each) => toX(each.since)), y: marked.map((each) => (toY(each.start) + toY(each.end - 1)) / 2),
  },
  countTrace(1, "shared", "#0072b2"),
  countTrace(2, "mapped", "#009e73", "dot"),
  countTrace(3, "private and mapped", "#d55e00", "dash"),
  ...rates,
];

const layout = {
  margin: { l: 110, r: 20, t: 30, b: 45 }, showlegend: true, legend: { orientation: "h", x: 0, y: -0.1 }, barmode: "group",
  dragmode: "zoom", hovermode: "closest", font: { color: "#1b1f24" }, shapes: [],
  xaxis: { range: whole.x, title: { text: data.timed ? "seconds since the trace began" : "events" }, anchor: rates.length ? "y3" : "y2", zeroline: false },
  yaxis: { range: whole.y, domain: [0.42, 1], ...ticks(whole.y), title: { text: "guest address", standoff: 5 }, zeroline: false, showgrid: false },
  yaxis2: { domain: [rates.length ? 0.18 : 0, 0.38], title: { text: "MiB" }, rangemode: "tozero", fixedrange: true },
  ...(rates.length && { yaxis3: { domain: [0, 0.13], title: { text: "a second" }, rangemode: "tozero", fixedrange: true } }),
};

const plot = byId("plot");

// Zooming changes what is seen: paint it again at the new resolution. A click on a finding does the same from the table.
function show(xRange, yRange, finding) {
  const outline = finding && {
    type: "rect", xref: "x", yref: "y", x0: toX(finding.since), x1: toX(endOf(finding)), y0: toY(finding.start),
    y1: toY(finding.start) + finding.end - finding.start, line: { color: "#000000", width: 2 },
  };
  repainting = true;
  return Plotly.update(
    plot,
    ...(({ z, x, y }) => [{ z: [z], x: [x], y: [y] }])(heatmap(xRange, yRange)),
    { "xaxis.range": xRange, "yaxis.range": yRange, "yaxis.tickvals": ticks(yRange).tickvals, "yaxis.ticktext": ticks(yRange).ticktext,
      ...(finding === undefined ? {} : { shapes: outline ? [outline] : [] }) },
    [0],
  ).then(() => { repainting = false; });
}
let repainting = false;

function zoomTo(finding) {
  let x = whole.x;
  if (finding.since !== null) {
    const from = toX(finding.since), to = toX(endOf(finding));
    const margin = Math.max((to - from) * 0.5, lastX * 1e-4);
    x = [Math.max(whole.x[0], from - margin), Math.min(whole.x[1], to + margin)];
  }
  const from = toY(finding.start), size = Math.max(finding.end - finding.start, 4096);
  const y = [Math.max(0, from - size * 2), Math.min(height, from + size * 3)];
  return show(x, y, finding.since === null ? null : finding);
}

function describe(x, y) {
  let best = -1;
  for (let i = 0; i < count; i++)
    if (x0[i] <= x && x <= x1[i] && y0[i] <= y && y < y1[i] && (best < 0 || shades[i] > shades[best])) best = i;
  const address = toAddress(y);
  if (best < 0) return `0x${address.toString(16)}: nothing known`;
  const time = data.timed ? `from ${x0[best].toFixed(6)} s for ${lengthText(until[best] - since[best])}` : "";
  return `0x${address.toString(16)}: ${SHADES[shades[best]][1]} ${time}, [0x${starts[best].toString(16)}, 0x${ends[best].toString(16)})`;
}

// The table.

const body = byId("findings").tBodies[0];
const kinds = [...new Set(data.findings.map((each) => each.kind))];
let kindShown = null;
let shown = 0;

function fill(from) {
  const listed = data.findings.filter((each) => kindShown === null || each.kind === kindShown);
  if (from === 0) body.replaceChildren();
  for (const finding of listed.slice(from, from + ROWS_SHOWN)) {
    const row = add(body, "tr");
    row.tabIndex = 0;
    add(row, "td", finding.kind, failures.has(finding.kind) ? "bad" : "");
    add(row, "td", finding.target);
    add(row, "td", finding.range);
    add(row, "td", finding.size);
    add(row, "td", finding.since === null ? "" : `${toX(finding.since).toFixed(6)} s`);
    add(row, "td", finding.open ? "open at the end" : finding.since === null || finding.until === null ? "" : lengthText(finding.until - finding.since));
    add(row, "td", finding.opened);
    add(row, "td", finding.closed);
    const grace = finding.grace ? "with a longer --grace it may be none" : "";
    add(row, "td", [finding.note, grace, finding.mapped ? `mapped by ${finding.mapped}` : ""].filter(Boolean).join("; "), "wide");
    const select = () => {
      for (const other of body.querySelectorAll('[aria-selected="true"]')) other.removeAttribute("aria-selected");
      row.setAttribute("aria-selected", "true");
      plot.scrollIntoView({ block: "nearest" });
      zoomTo(finding);
    };
    row.addEventListener("click", select);
    row.addEventListener("keydown", (event) => { if (event.key === "Enter") select(); });
  }
  shown = Math.min(listed.length, from + ROWS_SHOWN);
  byId("more").hidden = shown === listed.length;
  byId("more").textContent = `Show more (${(listed.length - shown).toLocaleString("en")} left)`;
  byId("meaning").textContent = kindShown === null ? "" : data.meanings[kindShown];
}

function chooseKind(kind) {
  kindShown = kind;
  for (const button of byId("kinds").children) button.setAttribute("aria-pressed", String(button.kind === kind));
  fill(0);
}

// Faults and notes: a storm of them is one row.
function fillGroups(name, cells) {
  byId(`${name}-section`).hidden = data[name].length === 0;
  for (const group of data[name]) {
    const row = add(byId(name).tBodies[0], "tr");
    for (const text of cells(group)) add(row, "td", text);
  }
}
const from = (group) => (group.since === null ? "" : `${toX(group.since).toFixed(6)} s`);
const lines = (group) => (group.last === group.opened ? group.opened : `${group.opened}, ${group.last}`);
fillGroups("faults", (group) => [group.count, group.device ?? group.target, group.range, from(group), lines(group), group.note]);
fillGroups("notes", (group) => [group.count, group.kind, group.target, group.range, from(group), lines(group), group.note]);

// Put it together.

byId("title").textContent = data.title;
for (const [key, value] of data.summary) {
  const pair = add(byId("summary"), "div");
  add(pair, "dt", key);
  add(pair, "dd", value, failures.has(key) || key === "not read to its end" || (key === "verdict" && value !== "no failures") ? "bad" : "");
}
for (const [colour, name] of SHADES.slice(1)) {
  const entry = add(byId("legend"), "li");
  add(entry, "span").style.background = colour;
  entry.append(name);
}
const mark = add(byId("legend"), "li");
mark.append("× a finding");
for (const text of data.limits) add(byId("limits"), "li", text);
if (data.limits.length === 0) add(byId("limits"), "li", "Nothing that this audit looks for.");
if (data.findings.length === 0) byId("meaning").textContent = data.sentence;
if (kinds.length > 1)
  for (const kind of [null, ...kinds]) {
    const number = kind === null ? data.findings.length : data.findings.filter((each) => each.kind === kind).length;
    const button = add(byId("kinds"), "button", `${kind ?? "all"} (${number.toLocaleString("en")})`);
    button.type = "button";
    button.kind = kind;
    button.addEventListener("click", () => chooseKind(kind));
  }
if (data.findings.length) chooseKind(null);
byId("more").addEventListener("click", () => fill(shown));

Plotly.newPlot(plot, traces, layout, { responsive: true, displaylogo: false, doubleClick: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "sendDataToCloud"] }).then(() => {
  plot.on("plotly_relayout", (change) => {
    if (repainting) return;
    if (Object.keys(change).some((key) => key.startsWith("xaxis") || key.startsWith("yaxis")))
      show(plot.layout.xaxis.autorange ? whole.x : [...plot.layout.xaxis.range], plot.layout.yaxis.autorange ? whole.y : [...plot.layout.yaxis.range]);
  });
  plot.on("plotly_doubleclick", () => show(whole.x, whole.y, null));
  plot.on("plotly_hover", ({ points: [point] }) => {
    if (point.curveNumber <= 1) byId("pointed").textContent = describe(point.x, point.y);
  });
  document.body.dataset.ready = "yes";
});
