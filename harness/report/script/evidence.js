// What stands behind a winner: its rounds beside its rivals', the device while it ran, and how to do it again. Also the copy buttons.
(() => {
  const SYMBOLS = ["circle", "square", "diamond", "cross"];
  const COLOURS = ["#3b7dd8", "#e07b39", "#2a9d74", "#8a6fd1"];
  const panels = new Set(); // open ones, which follow the theme

  const record = (identity) => (klab.payload.evidence ? klab.payload.evidence.records[identity] : null);
  const list = (value, count) => (Array.isArray(value) ? value : Array(count).fill(value));
  // Names of others are texts, also to Plotly, which reads a little HTML.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const hex = (colour, alpha) => `rgba(${[1, 3, 5].map((n) => parseInt(colour.slice(n, n + 2), 16)).join(",")},${alpha})`;

  // The clipboard where there is one; else the old way; else the text, selected, for the reader to copy.
  async function copy(text, button) {
    const said = button.textContent;
    const done = (word) => {
      button.textContent = word;
      setTimeout(() => { button.textContent = said; }, 1500);
    };
    try {
      await navigator.clipboard.writeText(text);
      return done("copied");
    } catch {
      const area = klab.el("textarea", { value: text, readOnly: true, className: "copied", rows: 3, with: { "aria-label": "Text to copy" } });
      button.after(area);
      area.select();
      if (document.execCommand("copy")) {
        area.remove();
        button.focus();
        return done("copied");
      }
      area.addEventListener("blur", () => area.remove());
      return done("press Ctrl-C");
    }
  }
  klab.copy = copy;

  const copier = (word, label, text) => klab.el("button", { type: "button", className: "copy", textContent: word, with: { "aria-label": label }, on: { click: (event) => copy(text(), event.currentTarget) } });

  for (const config of document.querySelectorAll("[data-copy]")) {
    const text = () => {
      const one = record(config.dataset.copy);
      return one ? JSON.stringify({ kernel: one.kernel, config: one.config }) : config.textContent;
    };
    config.after(copier("copy config", "Copy kernel and configuration as JSON", text));
  }

  // One unit for all series of a panel: [factor, name], of microseconds.
  function unit(series) {
    const most = Math.max(...series.map(({ median }) => median || 0));
    return most >= 1e6 ? [1e-6, "s"] : most >= 1e3 ? [1e-3, "ms"] : most >= 1 ? [1, "µs"] : [1e3, "ns"];
  }
  const digits = (value) => String(Number(value.toPrecision(5)));

  // The rounds in the order they were taken: a mark each, hollow where it does not count; the median with its interval as a band.
  function rounds(series) {
    const [factor, name] = unit(series);
    const traces = [];
    const shapes = [];
    series.forEach((one, n) => {
      const colour = COLOURS[n % COLOURS.length];
      const marked = one.marked || [];
      const symbol = SYMBOLS[n % SYMBOLS.length];
      const clock = list(one.clock ?? null, one.us.length);
      const heat = list(one.heat ?? null, one.us.length);
      const read = one.us.map((_, i) => [clock[i] === null ? "" : `<br>${clock[i]} MHz`, heat[i] === null ? "" : `, ${heat[i]} °C`, marked[i] ? "<br>throttled: does not count" : ""].join(""));
      const x = one.us.map((_, i) => 1 + i * one.every);
      traces.push({
        type: "scatter", mode: "markers", x, y: one.us.map((us) => us * factor), customdata: read, name: plain(`${one.role}: ${klab.short(one.title, 60)}`),
        marker: { color: colour, size: 7, symbol: one.us.map((_, i) => symbol + (marked[i] ? "-open" : "")) },
        hovertemplate: `round %{x}: %{y:.5g} ${name}%{customdata}<extra>${plain(one.role)}</extra>`,
      });
      const ends = [x[0], x[x.length - 1]];
      shapes.push({ type: "line", x0: ends[0], x1: ends[1], y0: one.median * factor, y1: one.median * factor, line: { color: colour, width: 1.5 } });
      if (one.low !== null && one.high !== null) shapes.push({ type: "rect", x0: ends[0], x1: ends[1], y0: one.low * factor, y1: one.high * factor, fillcolor: hex(colour, 0.18), line: { width: 0 } });
    });
    const layout = { height: 280, margin: { l: 64, r: 16, t: 8, b: 40 }, shapes, xaxis: axis("round, in the order taken"), yaxis: axis(`time per launch (${name})`), ...common(series.length > 1) };
    return ["Rounds", traces, layout];
  }

  // Clock and heat of the winner, where one of them changed: what stayed the same is among the facts.
  function device({ us, every, clock, heat }) {
    const x = us.map((_, i) => 1 + i * every);
    const traces = [];
    if (Array.isArray(clock)) traces.push({ type: "scatter", mode: "lines+markers", x, y: clock, name: "SM clock", line: { color: COLOURS[0] }, marker: { size: 4 }, hovertemplate: "round %{x}: %{y} MHz<extra></extra>" });
    if (Array.isArray(heat)) traces.push({ type: "scatter", mode: "lines+markers", x, y: heat, name: "temperature", yaxis: "y2", line: { color: COLOURS[1], dash: "dot" }, marker: { size: 4, symbol: "square" }, hovertemplate: "round %{x}: %{y} °C<extra></extra>" });
    const layout = { height: 190, margin: { l: 64, r: 56, t: 8, b: 40 }, xaxis: axis("round"), yaxis: axis("SM clock (MHz)"), yaxis2: { ...axis("°C"), overlaying: "y", side: "right", showgrid: false }, ...common(true) };
    return ["Clock and temperature of the winner", traces, layout];
  }

  function power({ s, w }) {
    const from = s[0];
    const traces = [{ type: "scatter", mode: "lines", x: s.map((at) => at - from), y: w, line: { color: COLOURS[2], shape: "hv" }, hovertemplate: "%{x:.3g} s: %{y} W<extra></extra>" }];
    const layout = { height: 190, margin: { l: 64, r: 16, t: 8, b: 40 }, xaxis: axis("seconds"), yaxis: { ...axis("board power (W)"), rangemode: "tozero" }, ...common(false) };
    return ["Power of the winner", traces, layout];
  }

  const axis = (title) => ({ title: { text: title }, automargin: true, gridcolor: "var(--faint)", zeroline: false, linecolor: "var(--faint)" });
  const common = (legend) => ({ showlegend: legend, legend: { orientation: "h", y: 1.02, x: 0, yanchor: "bottom" }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest" });

  function draw(panel) {
    for (const { target, traces, layout } of panel.figures) {
      const made = klab.plots.dressed(traces, layout);
      made.height = layout.height; // the legend lies above, and takes no more
      Plotly.react(target, klab.plots.themed(traces), made, { responsive: true, displaylogo: false, displayModeBar: false });
    }
  }

  function redraw() {
    for (const panel of panels) {
      if (panel.box.isConnected) draw(panel);
      else panels.delete(panel);
    }
  }
  klab.plots.painted(redraw);

  function told(one, [factor, name]) {
    const every = one.every > 1 ? `, one in ${one.every} is shown` : "";
    const inside = one.low === null || one.high === null ? "" : ` [${digits(one.low * factor)} to ${digits(one.high * factor)}]`;
    return klab.el("li", {}, klab.el("b", { textContent: one.role }), ` ${one.title}: median ${digits(one.median * factor)} ${name}${inside}, ${one.rounds} rounds${every}, run ${one.run}${one.how ? `; compared by: ${one.how}` : ""}`);
  }

  function facts(pairs) {
    return klab.el("dl", {}, ...pairs.map(([name, value]) => {
      const shown = name === "Measure again" || name === "Tune again" ? [klab.el("code", { textContent: value }), " ", copier("copy", "Copy the command", () => value)] : [value];
      return klab.el("div", {}, klab.el("dt", { textContent: name }), klab.el("dd", {}, ...shown));
    }));
  }

  // Fills the cell below a row of the table of winners.
  klab.evidence = (identity, cell) => {
    const one = record(identity);
    const box = klab.el("div", { className: "panel" });
    cell.replaceChildren(box);
    if (!one) {
      box.append(klab.el("p", { className: "empty", textContent: klab.payload.evidence ? "There is no evidence of this row in this page." : "The evidence is packed with the figures, which this browser cannot unpack." }));
      return;
    }
    const panel = { box, figures: [] };
    const parts = [klab.el("h4", { textContent: `${one.problem} on ${one.chip}: ${one.kernel}` })];
    const series = one.series || [];
    const drawn = series.length ? [rounds(series)] : [];
    if (series.length && (Array.isArray(series[0].clock) || Array.isArray(series[0].heat))) drawn.push(device(series[0]));
    if (one.power) drawn.push(power(one.power));
    if (series.length) parts.push(klab.el("ul", { className: "told" }, ...series.map((each) => told(each, unit(series)))));
    else parts.push(klab.el("p", { className: "note", textContent: one.left_out || "The rounds of this choice are not among the results shown." }));
    const charts = klab.el("div");
    parts.push(charts);
    parts.push(facts(one.facts.map((place) => klab.payload.evidence.facts[place])));
    const environment = klab.payload.evidence.environments[one.environment];
    if (environment) parts.push(klab.el("details", {}, klab.el("summary", { textContent: "Environment" }), facts(Object.entries(environment))));
    box.append(...parts);
    const chart = () => {
      if (!window.Plotly || !box.isConnected || !drawn.length) return;
      for (const [title, traces, layout] of drawn) {
        const target = klab.el("div", { className: "strip-plot", with: { role: "img", "aria-label": `${title}: ${one.problem}` } });
        panel.figures.push({ target, traces, layout });
        charts.append(klab.el("h5", { textContent: title }), target);
      }
      if (series.length > 1) charts.append(klab.el("p", { className: "note", textContent: "Lines are medians, bands their 95% intervals, hollow marks rounds that do not count. Rows compared by the same rounds took turns, so that drift is common to them." }));
      draw(panel);
      panels.add(panel);
    };
    // A link may open the panel before the figures' library is unpacked.
    if (window.Plotly) chart();
    else klab.ready.then(chart);
  };
})();
