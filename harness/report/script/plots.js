// Figures: what a filter leaves of them, drawn when they come near the screen, and again only when something of theirs changed.
(() => {
  const plots = new Map();
  // Without showSendToCloud: false, Plotly offers a button that sends the figure to its makers.
  const config = { responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "", modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d", "toImage"] };
  // Scripts run before the print style applies, so its colours are here too.
  const paper = { "--ink": "#000", "--soft": "#444", "--faint": "#bbb", "--card": "#fff", "--paper": "#fff", "--accent": "#000", "--warn": "#555" };
  const NEEDS_WEBGL = /^(parcoords|parcats3d|splom|surface|mesh3d|.*gl|.*3d)$/;
  const solid = (trace) => NEEDS_WEBGL.test(trace.type || "");
  const PAPER_WIDTH = 680;
  let printing = false;

  // The theme's colours by name, asked for once: each question makes the browser compute its styles anew.
  const colours = new Map();
  const painted = []; // what else is drawn in them: callbacks
  function repaint() {
    colours.clear();
    for (const plot of plots.values()) plot.dirty = true;
    soon();
    painted.forEach((callback) => callback());
  }
  function colour(_, name) {
    if (printing && paper[name]) return paper[name];
    if (!colours.has(name)) colours.set(name, getComputedStyle(document.documentElement).getPropertyValue(name).trim());
    return colours.get(name);
  }

  function themed(value) {
    const walk = (item) => {
      if (typeof item === "string") return item.includes("var(") ? item.replace(/var\((--[a-z]+)\)/g, colour) : item;
      // Plotly sees by its identity that an array is as it was: one without colours is given as it is.
      if (Array.isArray(item)) return item.some((one) => (typeof one === "object" && one) || (typeof one === "string" && one.includes("var("))) ? item.map(walk) : item;
      if (item && typeof item === "object") return Object.fromEntries(Object.entries(item).map(([k, v]) => [k, walk(v)]));
      return item;
    };
    return walk(value);
  }

  // The figure under the filter and the controls as they are: {data, layout, caption}.
  function view(plot) {
    const { figure, table, shown } = plot;
    const steered = figure.derive && klab.plots.controls().some((name) => klab.state.get(name) !== null);
    if (!shown && !steered) return { data: figure.data, layout: figure.layout, caption: null };
    const left = shown ? figure.data.map((trace) => klab.traces.kept(trace, shown.keep)) : figure.data;
    // A derive function may write into what it gets.
    const data = figure.derive ? structuredClone(left) : left;
    const one = { identity: plot.identity, data, layout: structuredClone(figure.layout), table: table && { columns: table.columns, rows: table.rows } };
    klab.traces.shrink(one.layout, data);
    if (!figure.derive || !klab.derive[figure.derive] || (shown && !shown.left)) return { ...one, caption: null };
    const rows = shown ? shown.rows : Array.from({ length: table ? table.length : 0 }, (_, n) => n);
    const [caption, reads] = klab.state.watched(() => klab.derive[figure.derive](one, rows));
    plot.reads = reads;
    return { data: one.data, layout: one.layout, caption: caption || null };
  }

  function dressed(data, layout) {
    const narrow = window.innerWidth < 700;
    const made = themed(layout);
    made.font = { color: themed("var(--ink)"), size: narrow ? 11 : 12, family: getComputedStyle(document.body).fontFamily };
    made.hoverlabel = { bgcolor: themed("var(--card)"), bordercolor: themed("var(--soft)"), font: { color: themed("var(--ink)") }, align: "left" };
    made.modebar = { bgcolor: "rgba(0,0,0,0)", color: themed("var(--faint)"), activecolor: themed("var(--soft)") };
    for (const menu of made.updatemenus || []) Object.assign(menu, { bgcolor: themed("var(--card)"), bordercolor: themed("var(--faint)") });
    // The legend lies below: it takes height of its own, not the plot's.
    const entries = data.filter((trace) => trace.visible !== false && trace.showlegend !== false).length;
    if (made.showlegend !== false) made.height = (made.height || 460) + 18 * Math.max(0, Math.ceil(entries / (narrow ? 1 : 4)) - 3);
    // Scripts run before paper has its width, too.
    if (printing) made.width = PAPER_WIDTH;
    if (narrow) made.margin = { ...made.margin, l: Math.min(48, made.margin ? made.margin.l ?? 48 : 48), r: 8 };
    // Names of rows would leave no width for the rows; a touch still tells them.
    if (narrow && made.yaxis && made.yaxis.ticktext) made.yaxis.showticklabels = false;
    return made;
  }

  const webgl = (() => {
    let found = null;
    return () => {
      if (found === null) found = Boolean(document.createElement("canvas").getContext("webgl"));
      return found;
    };
  })();

  // The words beside a figure: what is shown of it, and to what its caption refers.
  function words(plot, caption) {
    const { shown, table, figure } = plot;
    plot.caption.textContent = caption || plot.words;
    const lacking = table ? klab.filters.lacking(new Set(table.dims)) : [...klab.filters.active().keys()];
    const said = [];
    const none = shown && (!shown.left || plot.bare);
    if (shown && !none) said.push(`${klab.count(shown.left)} of ${klab.rows(table.length)} shown${caption ? "." : "; the words above are of all of them."}`);
    if (lacking.length && figure) said.push(`Not filtered by ${lacking.join(", ")}: the data of this figure have no such column.`);
    plot.note.textContent = said.join(" ");
    plot.target.hidden = Boolean(none);
    plot.nothing.hidden = !none;
    if (plot.count) plot.count.textContent = shown ? `Table behind it (${klab.count(shown.left)} of ${klab.rows(table.length)})` : `Table behind it (${klab.rows(table.length)})`;
    plot.target.setAttribute("aria-label", `${figure.title}. ${klab.short(plot.caption.textContent, 600)}`);
  }

  function draw(plot) {
    plot.dirty = false;
    const { figure } = plot;
    const { data, layout, caption } = view(plot);
    plot.derived = caption;
    // A table may have rows that are not drawn.
    const marked = (trace) => trace.meta && trace.meta.rows && trace.visible !== false;
    plot.bare = figure.data.some(marked) && !data.some(marked);
    words(plot, caption);
    if (!window.Plotly || plot.target.hidden) return;
    if (data.some(solid) && !webgl()) return unable(plot, "This browser draws no WebGL, which this figure needs: the table behind it has its data.");
    try {
      Plotly.react(plot.target, themed(data), { ...dressed(data, layout), uirevision: plot.identity }, config);
      plot.target.dataset.drawn = "1";
      plot.target.style.minHeight = "";
    } catch (error) {
      unable(plot, `This figure cannot be drawn here (${error.message}): the table behind it has its data.`);
    }
    document.documentElement.dataset.drawn = String(document.querySelectorAll(".plot[data-drawn]").length);
  }

  function unable(plot, text) {
    plot.target.style.minHeight = "";
    plot.target.replaceChildren(klab.el("p", { className: "empty", textContent: text }));
    plot.target.dataset.drawn = "1";
    const behind = plot.box.querySelector("details.behind");
    if (behind) behind.open = true;
  }

  // Figures near the screen that are dirty: those that are seen at once, the others a few at a time so that the page answers in between.
  const near = new Set();
  let waiting = [];
  let running = false;
  const channel = new MessageChannel();
  const due = () => [...near].map((target) => plots.get(target.id)).filter((plot) => plot && plot.dirty);
  const MARGIN = 300;
  const seen = ({ target }, margin = 0) => {
    const { top, bottom } = target.getBoundingClientRect();
    return bottom > -margin && top < window.innerHeight + margin;
  };
  // What a filter or a menu brought back; the observer would tell of it a frame later.
  function back() {
    for (const plot of plots.values()) if (plot.dirty && !near.has(plot.target) && plot.target.offsetParent && seen(plot, MARGIN)) near.add(plot.target);
  }
  channel.port1.onmessage = () => {
    const until = performance.now() + 40;
    const first = due().filter((plot) => seen(plot));
    first.forEach(draw);
    release((one) => one.seen);
    let left = due();
    while (!first.length && left.length && performance.now() < until) draw(left.shift());
    left = due();
    running = left.length > 0;
    if (!running) release(() => true);
    // What is seen is painted before the rest is drawn.
    else if (first.length && !document.hidden) requestAnimationFrame(() => channel.port2.postMessage(0));
    else channel.port2.postMessage(0);
  };
  function release(which) {
    const done = waiting.filter(which);
    waiting = waiting.filter((one) => !which(one));
    done.forEach((one) => one.done());
  }
  function soon() {
    if (running || !window.Plotly) return;
    running = true;
    channel.port2.postMessage(0);
  }
  // A figure that is not laid out (another variant is shown) is not near, whatever the margin.
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) near[isIntersecting ? "add" : "delete"](target);
    soon();
  }, { rootMargin: `${MARGIN}px 0px` });

  klab.plots = {
    plots, view, themed, dressed,
    look() {
      // A browser has few WebGL contexts: a variant that is not shown holds none.
      for (const plot of plots.values()) {
        if (!plot.target.dataset.drawn || plot.target.offsetParent || !plot.figure.data.some(solid)) continue;
        Plotly.purge(plot.target);
        plot.dirty = true;
        delete plot.target.dataset.drawn;
      }
      back();
      soon();
    },
    controls: () => [...new Set(klab.state.controls().map((input) => input.dataset.state))],
    get: (identity) => plots.get(identity),
    get printing() { return printing; },
    set printing(on) { printing = on; },
    // All of a plot's elements are found once; `figure` is the payload's.
    add(identity, figure, box) {
      const target = document.getElementById(identity);
      const caption = box.querySelector("figcaption");
      const note = klab.el("p", { className: "note shown", with: { "aria-live": "polite" } });
      const nothing = klab.el("p", { className: "empty", hidden: true, textContent: "The filter leaves nothing of this figure; its words are of all of it." });
      caption.after(note);
      target.after(nothing);
      const table = figure.table ? new klab.Table(figure.table) : null;
      const plot = { identity, figure, box, target, caption, note, nothing, table, words: caption.textContent, shown: null, dirty: true, count: box.querySelector("details.behind > summary") };
      // The place it will take: what lies below stays where a reader has it.
      if (document.getElementById("klab-plotly")) target.style.minHeight = `${figure.layout.height || 460}px`;
      plots.set(identity, plot);
      observer.observe(target);
      return plot;
    },
    // After a change of the filter: what passes, and which figures that changes. What changes nothing is not drawn again.
    filter() {
      for (const plot of plots.values()) {
        const shown = klab.filters.shown(plot.table);
        const same = plot.shown && shown ? shown.left === plot.shown.left && shown.rows.every((row, n) => row === plot.shown.rows[n]) : plot.shown === shown;
        plot.shown = shown;
        if (same) {
          words(plot, plot.derived);
          continue;
        }
        klab.plots.touch(plot);
        klab.tables.behind(plot);
      }
      klab.variants();
    },
    // A figure that is hidden because nothing was left of it is not near the screen: its words are, and it must come back.
    touch(plot) {
      plot.dirty = true;
      plot.bare = false;
      words(plot, null);
    },
    // After a change of a control: what was derived from it, or may be.
    steered(changed) {
      for (const plot of plots.values()) if (plot.figure.derive && (!plot.reads || [...changed].some((name) => plot.reads.has(name)))) plot.dirty = true;
      soon();
    },
    // Another theme, width or medium: all of them.
    dirty: repaint,
    painted: (callback) => painted.push(callback),
    // What has had the width of paper has that of the page again, which Plotly does not find by itself.
    fit: () => document.querySelectorAll(".js-plotly-plot").forEach((target) => { if (target.offsetParent) Plotly.Plots.resize(target); }),
    // When the figures near the screen are drawn; seen: those that are on it.
    settled: (only = "near") => new Promise((done) => {
      if (!window.Plotly || (!due().length && !running)) return done();
      waiting.push({ done, seen: only === "seen" });
      soon();
    }),
    // Every figure that is laid out, wherever it is on the page.
    all() {
      for (const plot of plots.values()) if (plot.dirty && plot.target.offsetParent) draw(plot);
      return document.querySelectorAll(".plot[data-drawn]").length;
    },
  };
})();
