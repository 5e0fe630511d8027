// Puts the page together: tables first, which need nothing; then what the payload has; then plotly.js, and the figures near the screen.
(() => {
  const root = document.documentElement;
  const MOST_TOLD = 8;

  // Figures of one title: a menu shows one at a time, the one that was chosen, or the first of which a filter leaves something.
  const groups = [];
  const variants = new Map(); // name in the state -> those that there are
  // A figure that only says why it is empty goes with its chip.
  function remains(figure) {
    const plot = klab.plots.get(figure.querySelector(".plot")?.id);
    if (plot) return !plot.shown || plot.shown.left > 0;
    const [chips, name] = [klab.filters.active().get("chip"), figure.dataset.variant];
    return !chips || chips.has(name) || !klab.filters.values("chip").includes(name);
  }
  function group(element) {
    const figures = [...element.querySelectorAll(":scope > figure")];
    const name = `show.${element.dataset.group}`;
    const menu = klab.el("select", { with: { "aria-label": `Which ${figures[0].querySelector("h3").textContent}` }, on: { change: () => klab.state.set(name, menu.value) } });
    const options = figures.map((figure) => klab.el("option", { value: figure.dataset.variant, textContent: klab.short(figure.dataset.variant, 90), title: figure.dataset.variant }));
    menu.append(...options);
    const printed = klab.el("span", { className: "printed" });
    element.prepend(klab.el("label", { className: "variant" }, "Shown: ", menu, printed));
    variants.set(name, options.map(({ value }) => value));
    groups.push(() => {
      const left = figures.map(remains);
      const wanted = figures.findIndex((figure) => figure.dataset.variant === klab.state.get(name));
      const seen = wanted >= 0 ? wanted : Math.max(0, left.indexOf(true));
      figures.forEach((figure, n) => { figure.hidden = n !== seen; });
      options.forEach((option, n) => { option.textContent = klab.short(option.value, 90) + (left[n] ? "" : " (the filter leaves nothing)"); });
      menu.selectedIndex = seen;
      printed.textContent = `${options[seen].value} (one of ${options.length}; the others are on the page itself)`;
    });
    klab.state.on((changed) => { if (changed.has(name)) klab.variants(); });
  }
  klab.variants = () => {
    groups.forEach((show) => show());
    klab.plots.look();
  };

  function actions(plot) {
    const { identity, figure, table, box } = plot;
    const image = klab.el("button", { type: "button", textContent: "PNG", with: { "aria-label": `PNG of ${figure.title}` }, on: { click: () => klab.png(identity).then((address) => klab.download(`${identity}.png`, address)).catch((error) => {
      image.textContent = "no PNG here";
      image.title = error.message;
    }) } });
    const save = table && klab.el("button", {
      type: "button", textContent: "CSV", with: { "aria-label": `CSV of ${figure.title}` },
      on: { click: () => {
        const address = URL.createObjectURL(new Blob([klab.tables.csv(identity)], { type: "text/csv" }));
        klab.download(`${identity}.csv`, address);
        setTimeout(() => URL.revokeObjectURL(address), 10000);
      } },
    });
    const details = box.querySelector("details.behind");
    const row = klab.el("div", { className: "actions" }, image, save);
    if (details) {
      details.before(row);
      details.addEventListener("toggle", () => klab.tables.behind(plot));
    } else box.append(row);
  }

  // The figure as it is seen, with its title and what is shown of it, on the colour of the page.
  klab.png = async (identity) => {
    const plot = klab.plots.get(identity);
    const { data, layout } = klab.plots.view(plot);
    const made = klab.plots.dressed(data, layout);
    const width = Math.max(plot.target.clientWidth, 640);
    const plain = (text) => klab.short(text, Math.floor(width / 7)).replaceAll("&", "&amp;").replaceAll("<", "&lt;");
    const title = [plot.figure.title, plot.box.dataset.variant].filter(Boolean).join(": ");
    const only = plot.shown ? `<br><sub>Only ${plain(klab.filters.words())}</sub>` : "";
    const more = only ? 50 : 30;
    made.title = { text: plain(title) + only, font: { size: 15 }, x: 0.01, xanchor: "left", y: 1, yref: "container", yanchor: "top", pad: { t: 8 } };
    made.margin = { ...made.margin, t: (made.margin?.t || 16) + more };
    made.paper_bgcolor = klab.plots.themed("var(--card)");
    const size = { width, height: made.height + more };
    return Plotly.toImage({ data: klab.plots.themed(data), layout: { ...made, ...size } }, { format: "png", scale: 2, ...size });
  };

  // Paper has no clicks: everything is open and drawn in its colours; on the screen all is as it was after that.
  function printing() {
    let opened = [];
    const repaint = (on) => {
      klab.plots.printing = on;
      klab.plots.dirty();
      klab.plots.all();
      klab.plots.plots.forEach(klab.tables.behind);
    };
    addEventListener("beforeprint", () => {
      opened = [...document.querySelectorAll("main details:not([open]), header details:not([open])")];
      opened.forEach((part) => { part.open = true; });
      repaint(true);
    });
    addEventListener("afterprint", () => {
      opened.forEach((part) => { part.open = false; });
      repaint(false);
      klab.plots.fit();
    });
  }

  function ignored() {
    const asked = (name) => `${klab.short(name)}=${klab.short(klab.state.get(name))}`;
    const missed = [...variants].filter(([name, known]) => klab.state.get(name) !== null && !known.includes(klab.state.get(name))).map(([name]) => asked(name));
    if (klab.state.get("open") !== null && !klab.tables.opens(klab.state.get("open"))) missed.push(asked("open"));
    const lost = [...klab.filters.unknown(), ...missed, ...klab.state.unknown().map((name) => klab.short(name))];
    const more = lost.length > MOST_TOLD ? ` and ${klab.count(lost.length - MOST_TOLD)} more` : "";
    if (lost.length) klab.say(`Ignored from the address, because this page does not have it: ${lost.slice(0, MOST_TOLD).join(", ")}${more}.`);
  }

  // A packed part of the page; without it the rest goes on, and the reader is told.
  async function unpacked(identity) {
    if (!document.getElementById(identity)) return null;
    try {
      return await klab.unpack(identity);
    } catch (error) {
      klab.say(`This page is damaged, so figures cannot be shown (${identity}: ${error.message}). Its tables are complete.`);
      return null;
    }
  }

  async function start() {
    const packed = document.getElementById("klab-payload");
    const able = "DecompressionStream" in window;
    klab.state.start();
    klab.tables.start();
    if (packed && !able) klab.say("This browser has no DecompressionStream (Chrome 80, Firefox 113 and Safari 16.4 have it), which unpacks the figures: only the tables are shown.");
    klab.payload = JSON.parse((able && await unpacked("klab-payload")) || '{"figures": {}}');
    for (const [identity, figure] of Object.entries(klab.payload.figures)) {
      const target = document.getElementById(identity);
      if (target) actions(klab.plots.add(identity, figure, target.closest("figure")));
    }
    document.querySelectorAll(".variants").forEach(group);
    const tables = [...klab.plots.plots.values()].map(({ table }) => table).filter(Boolean);
    klab.filters.start(tables, klab.payload.index ? new klab.Table(klab.payload.index) : null);
    klab.filters.apply();
    klab.tables.open();
    klab.state.on((changed) => { if (klab.plots.controls().some((name) => changed.has(name))) klab.plots.steered(changed); });
    ignored();
    if (klab.state.section()) klab.state.go(klab.state.section(), { push: false });
    const seen = scrollY;
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", klab.plots.dirty);
    matchMedia("(max-width: 699px)").addEventListener("change", klab.plots.dirty);
    printing();
    // A script that stands inline, as the page's policy asks; it defines Plotly.
    const plotly = able && await unpacked("klab-plotly");
    if (plotly) document.head.append(klab.el("script", { textContent: plotly }));
    await klab.plots.settled();
    // Figures above may have taken more height than was kept for them.
    if (klab.state.section() && scrollY === seen) klab.state.go(klab.state.section(), { push: false });
    root.dataset.ready = String(Math.round(performance.now()));
  }

  // Settled when the page can be used and the figures near the screen are drawn.
  klab.ready = start().catch((error) => {
    klab.say(`Figures cannot be shown: ${error.message}. The tables are complete.`);
    throw error;
  });
})();
