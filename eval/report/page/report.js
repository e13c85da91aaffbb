"use strict";

// Data that Python wrote: runs with their tags, and figures by number (eval/report/parts.py).
const data = JSON.parse(document.getElementById("data").textContent);
const runs = new Map(data.runs.map((run) => [run.key, run]));
const dark = matchMedia("(prefers-color-scheme: dark)");
const hidden = new Set(); // keys of runs that the filter hides
const drawn = new Set(); // cards whose figure was drawn

// Figures

// Plotly reads tags and entities in texts: a name stays a text.
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
// The middle of a long name gives way: names of one run often differ at the end.
const shortened = (text) => plain(text.length > 44 ? `${text.slice(0, 24)}…${text.slice(-19)}` : text);
const broken = (task) => plain(task).replace(/\/|,(?= )/g, "$&<br>").replace(/ \(/g, "<br>(");
const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const channels = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
const onDark = () => dark.matches && document.documentElement.dataset.print === undefined;

// A colour of the data as the page shows it: black is the colour of text, and on dark all others are lighter.
function ink(colour) {
  if (colour === "#000000") {
    return colourOf("text");
  }
  const hex = (value) => Math.round(onDark() ? value + 0.25 * (255 - value) : value).toString(16).padStart(2, "0");
  return `#${channels(colour).map(hex).join("")}`;
}

const faint = (colour) => `rgba(${channels(ink(colour)).join(", ")}, 0.17)`;

const figureOf = (card) => data.figures[Number(card.dataset.figure)];

function shownSeries(card) {
  const select = card.querySelector("select");
  return figureOf(card).series.filter(
    (series) => !hidden.has(series.run) && (!select || !series.choice || series.choice === select.value),
  );
}

// An interval over two units is so wide that it would flatten every curve: only the data table has it.
const isKnown = (series, i) => series.low[i] !== null && series.high[i] !== null;
const isFirm = (series, i) => isKnown(series, i) && series.n[i] > 2;

function intervals(series, values, isShown = isFirm) {
  if (!series.low.length) {
    return undefined;
  }
  const apart = (bounds) => values.map((value, i) => (isShown(series, i) ? Math.abs(bounds[i] - value) : 0));
  return {
    type: "data", symmetric: false, array: apart(series.high), arrayminus: apart(series.low), thickness: 1.3, width: 4,
    color: colourOf("text"),
  };
}

function band(series) {
  const known = series.x.map((_, i) => i).filter((i) => isFirm(series, i));
  const back = [...known].reverse();
  return {
    x: [...known, ...back].map((i) => series.x[i]),
    y: [...known.map((i) => series.high[i]), ...back.map((i) => series.low[i])],
    fill: "toself", fillcolor: faint(series.colour), line: { width: 0 }, mode: "lines", hoverinfo: "skip",
    showlegend: false, legendgroup: series.name,
  };
}

function traces(figure, series) {
  const colour = ink(series.colour);
  const common = { x: series.x, y: series.y, name: shortened(series.name), legendgroup: series.name };
  if (figure.kind === "bars") {
    return [{ ...common, type: "bar", marker: { color: colour }, error_y: intervals(series, series.y, isKnown) }];
  }
  if (figure.kind === "points") {
    const bars = intervals(series, series.x);
    return [{
      ...common, y: series.y.map(shortened), mode: "markers", orientation: "h", marker: { color: colour, size: 9 },
      error_x: bars && { ...bars, color: colour },
    }];
  }
  const few = figure.log || series.x.length < 3; // intervals are bars, not a band
  const line = {
    ...common, mode: few ? "lines+markers" : "lines", marker: { size: 5 },
    line: { color: colour, width: 1.8, dash: series.dash || "solid" },
  };
  if (!series.low.length) {
    return [line];
  }
  return few ? [{ ...line, error_y: { ...intervals(series, series.y), color: colour } }] : [band(series), line];
}

// A mark beyond the curves would only make them narrow.
function marks(figure, shown) {
  const across = figure.kind === "bars";
  const last = across ? Infinity : Math.max(...shown.flatMap((series) => series.x));
  const places = figure.marks.filter(([at]) => at < last);
  const shapes = places.map(([at]) => ({
    type: "line",
    line: { color: colourOf("text"), width: 1, dash: "dot" },
    ...(across ? { y0: at, y1: at, xref: "paper", x0: 0, x1: 1 } : { x0: at, x1: at, yref: "paper", y0: 0, y1: 1 }),
  }));
  const annotations = places.map(([at, words], i) => ({
    text: plain(words),
    showarrow: false,
    font: { size: 11, color: colourOf("quiet") },
    bgcolor: colourOf("card"),
    opacity: 0.85,
    ...(across
      ? { xref: "paper", x: 1, xanchor: "left", y: at, yanchor: "middle" }
      : {
        x: figure.log ? Math.log10(at) : at, xanchor: at > last / 2 ? "right" : "left",
        yref: "paper", y: 1 - 0.08 * i, yanchor: "top",
      }),
  }));
  return { shapes, annotations };
}

function layout(figure, shown, width) {
  const text = colourOf("text");
  const axis = { gridcolor: colourOf("grid"), linecolor: colourOf("line"), zeroline: false, automargin: true };
  const zero = { zeroline: figure.zero, zerolinecolor: text, zerolinewidth: 1 };
  const points = figure.kind === "points", bars = figure.kind === "bars";
  const groups = bars ? [...new Set(shown.flatMap((series) => series.x))] : [];
  const rows = Math.ceil(shown.reduce((sum, series) => sum + 60 + 7 * Math.min(44, series.name.length), 0) / width);
  const categories = points ? new Set(shown.flatMap((series) => series.y)).size : 0;
  return {
    height: (points ? 110 + 62 * categories : bars ? 360 : 320) + 22 * rows,
    margin: { l: 8, r: bars ? 52 : 12, t: 12 + 22 * rows, b: 8 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: text },
    hoverlabel: { bgcolor: colourOf("card"), bordercolor: colourOf("edge"), font: { color: text }, namelength: -1 },
    hovermode: points ? "closest" : "x unified",
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    showlegend: true,
    legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
    scattermode: points ? "group" : "overlay",
    barmode: "group",
    xaxis: {
      ...axis, ...(points ? zero : {}), type: figure.log ? "log" : undefined,
      rangemode: figure.kind === "lines" && !figure.log ? "tozero" : "normal",
      title: { text: plain(figure.x), standoff: 8 }, 
      ...(figure.log ? { tickvals: [...new Set(shown.flatMap((series) => series.x))] } : {}),
      ...(bars ? { tickvals: groups, ticktext: groups.map(broken) } : {}),
    },
    yaxis: {
      ...axis, ...(points ? { autorange: "reversed", type: "category" } : zero),
      title: { text: plain(figure.y), standoff: 8 }, rangemode: figure.from_zero ? "tozero" : "normal",
    },
    ...marks(figure, shown),
  };
}

function draw(card) {
  const figure = figureOf(card), plot = card.querySelector(".plot"), shown = shownSeries(card);
  drawn.add(card);
  Plotly.react(
    plot,
    shown.flatMap((series) => traces(figure, series)),
    layout(figure, shown, plot.clientWidth || 600),
    { responsive: true, displayModeBar: false },
  );
  const details = card.querySelector("details");
  if (details.open) {
    fill(details);
  }
}

// Tables of figures, and CSV

// A row for each point; what lies along x comes first.
function points(figure, series) {
  const sideways = figure.kind === "points";
  const chosen = series.some((one) => one.choice);
  const [place, value] = sideways ? ["condition", figure.x] : [figure.x || "task", figure.y];
  const heads = [...(chosen ? [figure.choice] : []), "series", place, value, "95 % low", "95 % high", "units"];
  const rows = series.flatMap((one) =>
    one.x.map((x, i) => [
      ...(chosen ? [one.choice] : []), one.name, ...(sideways ? [one.y[i], x] : [x, one.y[i]]),
      one.low[i] ?? "", one.high[i] ?? "", one.n[i] ?? "",
    ]),
  );
  const used = heads.map((_, i) => i < heads.length - 3 || rows.some((row) => row[i] !== ""));
  return [heads, ...rows].map((row) => row.filter((_, i) => used[i]));
}

function fill(details) {
  const card = details.closest(".card"), figure = figureOf(card);
  const [heads, ...rows] = points(figure, shownSeries(card));
  const table = document.createElement("table");
  const add = (parent, tag, text) => Object.assign(parent.appendChild(document.createElement(tag)), text && { textContent: text });
  add(table, "caption", figure.title).className = "hidden";
  const head = add(add(table, "thead"), "tr"), body = add(table, "tbody");
  heads.forEach((text) => { add(head, "th", text).scope = "col"; });
  for (const row of rows) {
    const line = add(body, "tr");
    row.forEach((value) => { add(line, "td", String(value)).className = typeof value === "number" ? "number" : ""; });
  }
  const scroll = document.createElement("div");
  Object.assign(scroll, { className: "scroll", tabIndex: 0 });
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", `Data: ${figure.title}`);
  scroll.append(table);
  details.querySelector(".scroll")?.remove();
  details.append(scroll);
}

// A table as it is shown: rows that the filter hides are left out, intervals have columns of their own.
function shownRows(table) {
  const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden);
  const lines = [[], ...rows.map(() => [])];
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    const cells = rows.map((row) => row.cells[i]), add = (name, of) => {
      [name, ...cells.map(of)].forEach((value, at) => lines[at].push(value));
    };
    const nothing = (cell) => cell.classList.contains("none");
    add(head.textContent, (cell) => (nothing(cell) ? "" : cell.dataset.value ? Number(cell.dataset.value) : words(cell)));
    if (cells.some((cell) => cell.dataset.low)) {
      for (const bound of ["low", "high"]) {
        add(`${head.textContent} 95 % ${bound}`, (cell) => (cell.dataset[bound] ? Number(cell.dataset[bound]) : ""));
      }
    }
  });
  return lines;
}

const words = (cell) => {
  const tags = [...cell.querySelectorAll(".tag")].map((tag) => tag.textContent);
  return tags.length ? tags.join(", ") : cell.textContent;
};

// RFC 4180. A spreadsheet would run a text that begins like a formula, so a quote comes before it.
function csvCell(value) {
  const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
}

function save(title, rows) {
  const text = rows.map((row) => row.map(csvCell).join(",")).join("\r\n");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([`${text}\r\n`], { type: "text/csv;charset=utf-8" }));
  link.download = `${title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") || "table"}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// Sorting

function sort(table, head) {
  const at = head.cellIndex, rising = head.getAttribute("aria-sort") !== "ascending";
  for (const other of table.tHead.rows[0].cells) {
    other.removeAttribute("aria-sort");
  }
  head.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const of = (row) => {
    const cell = row.cells[at];
    if (cell.classList.contains("none")) {
      return null;
    }
    return cell.dataset.value ? Number(cell.dataset.value) : cell.textContent;
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  const rows = [...table.tBodies[0].rows].map((row) => [of(row), row]);
  rows.sort(([a], [b]) => {
    if (a === null || b === null) {
      return (a === null) - (b === null); // what was not measured stays last
    }
    return rising ? compare(a, b) : compare(b, a);
  });
  table.tBodies[0].append(...rows.map(([, row]) => row));
}

// The filter of the runs

function filter() {
  const wanted = document.getElementById("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const pressed = [...document.querySelectorAll('.chip[aria-pressed="true"]')].map((chip) => chip.textContent);
  const rows = [...document.getElementById("runs-table").tBodies[0].rows];
  hidden.clear();
  for (const row of rows) {
    const text = row.textContent.toLowerCase(), tags = runs.get(row.dataset.run).tags;
    row.hidden = !wanted.every((word) => text.includes(word)) || !pressed.every((tag) => tags.includes(tag));
    if (row.hidden) {
      hidden.add(row.dataset.run);
    }
  }
  const shown = rows.length - hidden.size;
  document.getElementById("count").textContent =
    `${shown} of ${rows.length} run${rows.length === 1 ? "" : "s"}${hidden.size ? "; the figures follow the filter" : ""}`;
  for (const card of document.querySelectorAll("[data-runs]")) {
    card.hidden = card.dataset.runs.split(" ").every((key) => hidden.has(key));
  }
  drawn.forEach((card) => { if (!card.hidden) { draw(card); } });
}

// Start

for (const table of document.querySelectorAll(".tabled table")) {
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sort(table, head));
    head.replaceChildren(button);
  }
}
for (const cell of document.querySelectorAll("tbody th, td")) {
  cell.classList.toggle("long", cell.textContent.length > 40);
}
for (const button of document.querySelectorAll(".csv")) {
  const card = button.closest(".card"), title = card.querySelector("h3").textContent;
  button.addEventListener("click", () => {
    if (card.dataset.figure === undefined) {
      save(title, shownRows(card.querySelector("table")));
    } else {
      save(title, points(figureOf(card), figureOf(card).series.filter((series) => !hidden.has(series.run))));
    }
  });
}
document.getElementById("filter").addEventListener("input", filter);
for (const chip of document.querySelectorAll(".chip")) {
  chip.addEventListener("click", () => {
    chip.setAttribute("aria-pressed", String(chip.getAttribute("aria-pressed") !== "true"));
    filter();
  });
}
const cards = [...document.querySelectorAll("[data-figure]")];
const near = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting && !drawn.has(entry.target)) {
        draw(entry.target);
      }
    }
  },
  { rootMargin: "600px" },
);
for (const card of cards) {
  near.observe(card);
  card.querySelector("select")?.addEventListener("change", () => draw(card));
  card.querySelector("details").addEventListener("toggle", (event) => { if (event.target.open) { fill(event.target); } });
}
const redraw = () => drawn.forEach(draw);
dark.addEventListener("change", redraw);
addEventListener("beforeprint", () => {
  document.documentElement.dataset.print = "";
  cards.filter((card) => !card.hidden).forEach(draw);
});
addEventListener("afterprint", () => {
  delete document.documentElement.dataset.print;
  redraw();
});
filter();
