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

function chosen(traces, choice) {
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

function element(name, text, ...children) {
  const made = document.createElement(name);
  made.textContent = text;
  made.append(...children);
  return made;
}

const box = document.getElementById("tip");
const hide = () => { box.hidden = true; };

// The tip beside the pointer, within the window.
function show(tip, { clientX, clientY }) {
  const reasons = tip.reasons.length ? `: ${tip.reasons.join("; ")}` : "";
  const rows = tip.rows.map((row) => element("tr", "", ...row.map((text) => element("td", text))));
  const outcome = element("p", "", element("span", tip.outcome), reasons);
  outcome.firstChild.className = tip.outcome;
  box.replaceChildren(element("strong", tip.title), element("p", tip.where), outcome, element("table", "", ...rows), element("p", tip.counts));
  box.hidden = false;
  const { width, height } = box.getBoundingClientRect();
  const beside = clientX + 16 + width < innerWidth ? clientX + 16 : clientX - 16 - width;
  box.style.left = `${Math.max(8, beside)}px`;
  box.style.top = `${Math.max(8, Math.min(clientY - height / 2, innerHeight - height - 8))}px`;
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
      if (!plot.dataset.listens) {
        plot.dataset.listens = "yes";
        plot.on("plotly_hover", ({ points, event }) => show(report.tips[points[0].customdata], event));
        plot.on("plotly_unhover", hide);
      }
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
document.addEventListener("scroll", hide, { passive: true });
dark.addEventListener("change", redraw);
redraw();
