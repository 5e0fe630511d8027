// Filters: one control per dimension with several values. They act on every figure with a table, every table row with data-dims, and
// every article with data-chip.
(() => {
  const values = new Map(); // dimension -> its values, in order
  const boxes = new Map(); // dimension -> {summary, details, items: Map(value -> {input, count, line})}
  let status = null;
  let bar = null;
  let index = null; // the rows that the page is about, by which values are counted
  const list = (cell) => (Array.isArray(cell) ? cell : cell === null || cell === undefined || cell === "" ? [] : [String(cell)]);

  // The values chosen by dimension; a dimension with none chosen shows all. Unknown ones in an address do not count.
  function active() {
    const found = new Map();
    for (const [dim, known] of values) {
      const chosen = klab.state.all(dim).filter((value) => known.includes(value));
      if (chosen.length) found.set(dim, new Set(chosen));
    }
    return found;
  }

  // One byte per row of a klab.Table: whether it passes every filter whose column it has. `but`: one dimension that is not asked.
  function passing(table, chosen, but = "") {
    const keep = new Uint8Array(table.length).fill(1);
    for (const dim of table.dims) {
      if (dim === but || !chosen.has(dim)) continue;
      const wanted = chosen.get(dim);
      const { of, at } = table.coded(dim);
      const fits = of.map((cell) => list(cell).some((value) => wanted.has(value)));
      for (let n = 0; n < at.length; n += 1) if (!fits[at[n]]) keep[n] = 0;
    }
    return keep;
  }

  const filters = {
    active,
    // The rows that pass as {keep, rows, left}; null where all of them do.
    shown(table) {
      const chosen = active();
      if (!table || !table.dims.some((dim) => chosen.has(dim))) return null;
      const keep = passing(table, chosen);
      const rows = [];
      for (let n = 0; n < keep.length; n += 1) if (keep[n]) rows.push(n);
      return rows.length === keep.length ? null : { keep, rows, left: rows.length };
    },
    // Whether dims ({name: [values]}) of a row pass. having: the dimensions that its table has.
    fits(dims, having, chosen = active()) {
      for (const [dim, wanted] of chosen) if (having.has(dim) && !list(dims[dim]).some((value) => wanted.has(value))) return false;
      return true;
    },
    // The active filters that ask for a column which is not there.
    lacking: (having) => [...active().keys()].filter((dim) => !having.has(dim)),
    // What is chosen, in words.
    words: () => [...active()].map(([dim, chosen]) => `${dim} ${[...chosen].map((value) => klab.short(value, 40)).join(" or ")}`).join("; "),
    clear: () => klab.state.change(Object.fromEntries([...values.keys()].map((dim) => [dim, null]))),
    values: (dim) => values.get(dim) || [],
  };
  klab.filters = filters;

  function gather(tables) {
    const found = new Map(klab.dims.map((dim) => [dim, new Set()]));
    for (const table of tables) for (const dim of table.dims) for (const cell of table.coded(dim).of) list(cell).forEach((value) => found.get(dim).add(value));
    for (const dims of klab.tables.dims()) for (const dim of klab.dims) list(dims[dim]).forEach((value) => found.get(dim).add(value));
    for (const article of document.querySelectorAll("article[data-chip]")) found.get("chip").add(article.dataset.chip);
    for (const [dim, set] of found) if (set.size > 1) values.set(dim, [...set].sort(klab.compare));
  }

  function control(dim) {
    const known = values.get(dim);
    const items = new Map();
    const lines = known.map((value) => {
      const input = klab.el("input", { type: "checkbox", on: { change: () => choose(dim) } });
      const count = klab.el("span", { className: "count" });
      const line = klab.el("label", { title: value }, input, klab.el("span", { className: "name", textContent: value }), count);
      items.set(value, { input, count, line });
      return line;
    });
    const find = known.length <= 8 ? null : klab.el("input", {
      type: "search", placeholder: `Find among ${known.length}`, with: { "aria-label": `Find a ${dim}` },
      on: { input: () => lines.forEach((line) => { line.hidden = !line.title.toLowerCase().includes(find.value.trim().toLowerCase()); }) },
    });
    const all = klab.el("button", { type: "button", textContent: "all", on: { click: () => klab.state.set(dim, null) } });
    const summary = klab.el("summary", {});
    const fields = klab.el("fieldset", {}, klab.el("legend", { textContent: dim }), find, klab.el("div", { className: "values" }, ...lines), all);
    const details = klab.el("details", { className: "filter", with: { "data-dim": dim } }, summary, fields);
    details.addEventListener("toggle", () => { if (details.open) for (const other of boxes.values()) if (other.details !== details) other.details.open = false; });
    boxes.set(dim, { summary, details, items });
    return details;
  }

  function choose(dim) {
    const chosen = [...boxes.get(dim).items].filter(([, { input }]) => input.checked).map(([value]) => value);
    klab.state.set(dim, chosen);
  }

  // The state of the controls, the counts beside their values, and the sentence that says what is filtered.
  function tell() {
    const chosen = active();
    for (const [dim, { summary, items }] of boxes) {
      const own = chosen.get(dim);
      const named = own && own.size === 1 ? klab.short([...own][0], 22) : own ? `${own.size} of ${items.size}` : "all";
      summary.replaceChildren(klab.el("b", { textContent: dim }), ` ${named}`);
      summary.parentElement.classList.toggle("on", Boolean(own));
      for (const [value, { input }] of items) input.checked = Boolean(own && own.has(value));
      if (!index) continue;
      const keep = passing(index, chosen, dim);
      const { of, at } = index.coded(dim);
      const counts = new Uint32Array(of.length);
      for (let n = 0; n < keep.length; n += 1) counts[at[n]] += keep[n];
      const sums = new Map();
      of.forEach((cell, code) => list(cell).forEach((value) => sums.set(value, (sums.get(value) || 0) + counts[code])));
      for (const [value, { count, line }] of items) {
        count.textContent = klab.count(sums.get(value) || 0);
        line.classList.toggle("none", !sums.get(value));
      }
    }
    const total = index ? index.length : 0;
    const left = index && chosen.size ? passing(index, chosen).reduce((sum, one) => sum + one, 0) : total;
    const of = index ? ` ${klab.count(left)} of ${klab.count(total)} results` : "";
    status.textContent = chosen.size ? `Shown:${of}${index ? ", " : " "}${filters.words()}.` : index ? `Shown: all ${klab.count(total)} results.` : "Shown: everything.";
    bar.classList.toggle("on", chosen.size > 0);
    bar.querySelector("summary").textContent = chosen.size ? `Filters (${chosen.size} set)` : "Filters";
  }

  // Applied without drawing: figures learn that they are dirty, rows and articles are hidden.
  filters.apply = () => {
    const chosen = active();
    const chips = chosen.get("chip");
    for (const article of document.querySelectorAll("article[data-chip]")) article.hidden = Boolean(chips && !chips.has(article.dataset.chip));
    if (bar) tell();
    klab.tables.filter();
    klab.plots.filter();
  };

  // What an address asks for and this page does not have.
  filters.unknown = () => klab.dims.flatMap((dim) => klab.state.all(dim).filter((value) => !filters.values(dim).includes(value)).map((value) => `${dim}=${klab.short(value)}`));

  // After the browser has laid out and painted what was changed; a page that is not looked at is not painted.
  const painted = () => new Promise((done) => {
    if (document.hidden) return done();
    requestAnimationFrame(() => setTimeout(done));
  });

  filters.start = (tables, counted) => {
    index = counted;
    gather(index ? [index, ...tables] : tables);
    klab.state.on((changed) => {
      if (!klab.dims.some((dim) => changed.has(dim))) return;
      const began = performance.now();
      filters.apply();
      klab.plots.settled("seen").then(painted).then(() => {
        klab.lastFilterMs = performance.now() - began;
        document.documentElement.dataset.filterMs = klab.lastFilterMs.toFixed(1);
      });
    });
    if (!values.size) return;
    status = klab.el("p", { className: "status", with: { role: "status", "aria-live": "polite" } });
    const clear = klab.el("button", { type: "button", className: "clear", textContent: "clear", on: { click: () => {
      filters.clear();
      // The button goes; the focus stays among the filters.
      controls.querySelector("summary").focus();
    } } });
    const copy = klab.el("button", { type: "button", textContent: "copy link", on: { click: () => klab.copy(klab.state.link(), copy) } });
    const wide = matchMedia("(min-width: 700px)");
    const controls = klab.el("div", { className: "dims" }, ...[...values.keys()].map(control), clear, copy);
    bar = klab.el("details", { id: "filters", open: wide.matches, with: { role: "region", "aria-label": "Filters" } }, klab.el("summary", { textContent: "Filters" }), controls, status);
    wide.addEventListener("change", () => { bar.open = wide.matches; });
    document.querySelector("main").before(bar);
    const close = () => boxes.forEach(({ details }) => { details.open = false; });
    document.addEventListener("click", ({ target }) => { if (!target.closest(".filter")) close(); });
    bar.addEventListener("focusout", ({ relatedTarget }) => { if (relatedTarget && !relatedTarget.closest(".filter[open]")) close(); });
    bar.addEventListener("keydown", (event) => {
      const open = event.key === "Escape" && event.target.closest(".filter[open]");
      if (!open) return;
      open.open = false;
      open.querySelector("summary").focus();
    });
  };
})();
