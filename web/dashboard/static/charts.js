"use strict";
// The overview's charts, from the points of one request.

(() => {
  const section = document.getElementById("charts");
  const language = section.dataset.language;
  const AGAIN_MS = 15000;
  const CHARTS = {
    throughput: [{ name: "submitted", ink: "queued", dash: [4, 3], sum: true }, { name: "succeeded", ink: "succeeded", fill: true, sum: true }],
    pickup: [{ name: "pickup_median_s", ink: "running", fill: true, seconds: true, spans: true }, { name: "pickup_p95_s", ink: "queued", dash: [4, 3], seconds: true, spans: true }],
    failures: [{ name: "failed", ink: "failed", bars: true, sum: true }, { name: "cancelled", ink: "cancelled", dash: [4, 3], sum: true }],
    depth: [{ name: "due", ink: "queued", fill: true }, { name: "running", ink: "running" }, { name: "parked", ink: "cancelled", dash: [4, 3] }],
    oldest: [{ name: "oldest_due_s", ink: "failed", fill: true, seconds: true }],
  };
  const UNITS = language === "ru" ? { ms: "мс", s: "с", min: "мин", h: "ч", d: "д" } : { ms: "ms", s: "s", min: "min", h: "h", d: "d" };

  let shownWindow = "1h";
  let points = null;
  const drawn = new Map();

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const number = (value) => value.toLocaleString(language, { maximumFractionDigits: value < 10 ? 1 : 0 });

  function lasting(seconds) {
    if (seconds === 0) return "0";
    if (seconds < 1) return `${number(seconds * 1000)} ${UNITS.ms}`;
    if (seconds < 60) return `${number(seconds)} ${UNITS.s}`;
    if (seconds < 3600) return `${number(seconds / 60)} ${UNITS.min}`;
    if (seconds < 86400) return `${number(seconds / 3600)} ${UNITS.h}`;
    return `${number(seconds / 86400)} ${UNITS.d}`;
  }
  const written = (line, value) => (value == null ? "–" : line.seconds ? lasting(value) : number(value));

  // Beside the name of a line: its sum or last value, or what is under the pointer.
  function writeLegend(figure, lines, index) {
    for (const line of lines) {
      const column = points[line.name];
      const known = column.filter((value) => value != null);
      const value = index != null ? column[index] : line.sum ? known.reduce((a, b) => a + b, 0) : known.at(-1);
      figure.querySelector(`[data-value="${line.name}"]`).textContent = written(line, value);
    }
  }

  function draw(name, lines) {
    const figure = section.querySelector(`[data-chart="${name}"]`);
    const plot = figure.querySelector(".plot");
    drawn.get(name)?.destroy();
    plot.textContent = "";
    const data = [points.at, ...lines.map((line) => points[line.name])];
    const nothing = !data.slice(1).some((column) => column.some((value) => value));
    const seconds = lines.some((line) => line.seconds);
    const axis = { stroke: color("muted"), grid: { stroke: color("line"), width: 1 }, ticks: { show: false }, font: "11px " + color("sans"), gap: 6 };
    const clock = (at) => new Date(at * 1000).toLocaleString(language, shownWindow === "7d" ? { day: "numeric", month: "short" } : { hour: "2-digit", minute: "2-digit", hourCycle: "h23" });
    const chart = new uPlot({
      width: plot.clientWidth, height: plot.clientHeight, legend: { show: false }, padding: [10, 8, 0, 0],
      cursor: { y: false, points: { size: 6 }, drag: { x: false, y: false } },
      scales: { x: { time: true }, y: { range: (_chart, _low, high) => [0, high ? high * 1.08 : 1] } },
      axes: [
        { ...axis, size: 26, space: 70, values: (_chart, splits) => splits.map(clock) },
        { ...axis, size: 52, space: 34, values: (_chart, splits) => splits.map((value) => (seconds ? lasting(value) : Number.isInteger(value) ? number(value) : "")) },
      ],
      series: [{}, ...lines.map((line) => ({
        stroke: color(line.ink), width: line.bars ? 0 : 1.75, dash: line.dash,
        fill: line.bars ? color(line.ink) : line.fill ? color(`${line.ink}-soft`) : undefined,
        paths: line.bars ? uPlot.paths.bars({ size: [0.7, 14, 2] }) : undefined, points: { show: false }, spanGaps: line.spans ?? false,
      }))],
      hooks: { setCursor: [(self) => writeLegend(figure, lines, self.cursor.idx)] },
    }, data, plot);
    plot.chart = chart;
    drawn.set(name, chart);
    if (nothing) plot.append(Object.assign(document.createElement("div"), { className: "nothing", textContent: section.dataset.nothing }));
    writeLegend(figure, lines, null);
    plot.setAttribute("aria-label", `${figure.querySelector("h2").textContent}: ${figure.querySelector(".legend").innerText.replace(/\s+/g, " ")}`);
  }

  function drawAll() {
    if (points) for (const [name, lines] of Object.entries(CHARTS)) draw(name, lines);
  }

  async function load() {
    const wanted = shownWindow;
    const address = new URL(section.dataset.points, location.href);
    address.searchParams.set("window", wanted);
    try {
      const answer = await fetch(address, { headers: { "HX-Request": "true" } });
      if (!answer.ok || wanted !== shownWindow) return;
      points = await answer.json();
      drawAll();
      section.dataset.ready = wanted;
    } catch { /* away: the part above says so */ }
  }

  for (const button of document.querySelectorAll("[data-window]")) {
    button.addEventListener("click", () => {
      for (const each of document.querySelectorAll("[data-window]")) each.setAttribute("aria-pressed", String(each === button));
      shownWindow = button.dataset.window;
      load();
    });
  }
  let width = 0;
  new ResizeObserver(() => {
    if (section.clientWidth === width) return;
    width = section.clientWidth;
    for (const chart of drawn.values()) {
      const plot = chart.root.parentElement;
      chart.setSize({ width: plot.clientWidth, height: plot.clientHeight });
    }
  }).observe(section);
  document.addEventListener("theme", drawAll);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) load(); });
  setInterval(() => { if (!document.hidden) load(); }, AGAIN_MS);
  load();
})();
