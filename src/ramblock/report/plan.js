// SPDX-License-Identifier: Apache-2.0
// Draws the page of a plan. Names of files and targets may come from a trace that nobody vouches for: they are put in place as text only.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
// Of Okabe and Ito's palette, which colour-blind people tell apart.
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000"];
const byId = (id) => document.getElementById(id);

function add(parent, tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  if (className) element.className = className;
  parent.append(element);
  return element;
}

byId("title").textContent = data.title;
for (const [key, value] of data.summary) {
  const pair = add(byId("summary"), "div");
  add(pair, "dt", key);
  add(pair, "dd", value);
}
for (const name of data.columns) add(document.querySelector("#rows thead tr"), "th", name).scope = "col";
for (const row of data.rows) {
  const line = add(document.querySelector("#rows tbody"), "tr");
  row.forEach((text, index) => {
    const bad = data.columns[index] === "verdict" && text === "refused";
    add(line, "td", text, bad ? "bad" : data.columns[index] === "why" ? "wide" : "");
  });
}
byId("notes-heading").textContent = data.notesTitle;
for (const note of data.notes) add(byId("notes"), "li", note);
byId("notes-section").hidden = data.notes.length === 0;

// Plotly reads a little HTML in names.
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const xs = data.lines.flatMap((line) => [line.x[0], line.x[line.x.length - 1]]).filter((x) => x !== undefined);
const ends = xs.length ? [Math.min(...xs), Math.max(...xs)] : [0, 1];
const traces = data.lines.map((line, index) => ({
  type: "scatter", mode: line.x.length > 1 ? "lines" : "markers", name: plain(line.name), x: line.x, y: line.y,
  line: { color: COLOURS[index % COLOURS.length], width: 2 },
}));
for (const limit of data.limits)
  traces.push({
    type: "scatter", mode: "lines", name: plain(limit.name), x: ends, y: [limit.value, limit.value],
    line: { color: "#5b6470", width: 1.5, dash: "dash" },
  });

function draw(logarithmic) {
  Plotly.react("plot", traces, {
    margin: { t: 20, r: 20 },
    xaxis: { title: { text: plain(data.xTitle) } },
    yaxis: { title: { text: "mappings" }, type: logarithmic ? "log" : "linear", rangemode: "tozero" },
    legend: { orientation: "h", y: -0.18 },
    hovermode: "x unified",
  }, { responsive: true, displaylogo: false });
}

byId("scale").addEventListener("click", () => {
  const logarithmic = byId("scale").getAttribute("aria-pressed") !== "true";
  byId("scale").setAttribute("aria-pressed", String(logarithmic));
  draw(logarithmic);
});
draw(true);
document.body.dataset.ready = "true";
