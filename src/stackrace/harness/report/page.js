"use strict";
const report = JSON.parse(document.getElementById("report").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const coarse = matchMedia("(pointer: coarse)").matches;
const config = {
  displaylogo: false,
  responsive: true,
  showSendToCloud: false,
  modeBarButtonsToRemove: ["sendDataToCloud", "sendChartToCloud", "select2d", "lasso2d", "autoScale2d"],
};

// A copy in which every colour is the one of the theme in force.
function themed(value) {
  if (typeof value === "string") return dark.matches ? report.dark[value] ?? value : value;
  if (Array.isArray(value)) return value.map(themed);
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, themed(inner)]));
}

// A trace as it looks when its percentile is shown alone.
function bold(trace) {
  const marker = trace.marker && { ...trace.marker, size: 8 };
  return { ...trace, opacity: 1, ...(marker ? { marker } : { line: { ...trace.line, width: 2.2 } }) };
}

function chosen(panel, choice) {
  const traces = panel.map((trace) => ({ ...trace, hovertext: trace.hovertext?.map((place) => report.texts[place]) }));
  if (choice === "all") return traces;
  return traces
    .filter((trace) => trace.meta.variant === null || trace.meta.variant === choice)
    .map((trace) => (trace.meta.variant === choice ? bold(trace) : trace));
}

function figure(panel, axes, state) {
  const y = { ...panel.layout.yaxis, ...(axes[state.scale] ?? axes.linear) };
  const layout = { ...panel.layout, yaxis: y, dragmode: coarse ? false : "zoom" };
  return themed({ data: chosen(panel.data, state.choice), layout });
}

function draw(id) {
  const chart = document.getElementById(id);
  const data = report.figures[id];
  const picked = (kind, otherwise) => chart.querySelector(`input[name="${id}-${kind}"]:checked`)?.value ?? otherwise;
  const state = { choice: picked("choice", data.choice), scale: picked("scale", data.scale) };
  for (const group of chart.querySelectorAll(".panels")) {
    const view = picked("view", Object.keys(data.views)[0]);
    group.hidden = group.dataset.view !== view;
    if (group.hidden) continue;
    group.querySelectorAll(".plot").forEach((plot, i) => {
      const { data: traces, layout } = figure(data.views[view].panels[i], data.views[view].axes, state);
      Plotly.react(plot, traces, layout, config);
    });
  }
}

// Numbers by value, words by letter; what is missing stays last.
function sort(button) {
  const header = button.closest("th");
  const row = header.parentElement;
  const body = header.closest("table").tBodies[0];
  const column = [...row.children].indexOf(header);
  const up = header.getAttribute("aria-sort") !== "ascending";
  const key = (tr) => tr.children[column].dataset.value ?? tr.children[column].textContent.trim();
  for (const other of row.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", up ? "ascending" : "descending");
  const order = (a, b) => (key(a) === "") - (key(b) === "") || (up ? 1 : -1) * key(a).localeCompare(key(b), "en", { numeric: true });
  const numbers = (a, b) => (key(a) === "") - (key(b) === "") || (up ? 1 : -1) * (key(a) - key(b));
  body.append(...[...body.rows].sort(header.classList.contains("text") ? order : numbers));
  body.classList.add("sorted");
}

const redraw = () => Object.keys(report.figures).forEach(draw);
document.querySelectorAll(".chart").forEach((chart) => chart.addEventListener("change", () => draw(chart.id)));
document.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => sort(button)));
dark.addEventListener("change", redraw);
redraw();
